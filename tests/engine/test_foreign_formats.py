"""Exports for transformers, onnxruntime and detectron2 compute our features; a package that is absent skips its test."""

import dataclasses
import json
import pickle
import warnings
from unittest import mock

import pytest
import timm
import torch

from crossbatch import InputError
from crossbatch.engine.pretrained import foreign
from crossbatch.engine.pretrained.export import export
from crossbatch.engine.pretrained.load import Pretrained, load_pretrained
from crossbatch.models import build_backbone

NETWORKS = {
    "resnet18": {},
    "resnet50": {},
    "vit_small": {"depth": 2, "embed_dim": 48, "num_heads": 4},
}


@pytest.fixture(scope="module")
def networks(tmp_path_factory) -> dict[str, Pretrained]:
    folder = tmp_path_factory.mktemp("networks")
    for arch, arguments in NETWORKS.items():
        torch.manual_seed(0)
        backbone = build_backbone(arch, 64, backbone_args=arguments)
        for module in backbone.modules():
            if isinstance(getattr(module, "running_var", None), torch.Tensor):
                torch.nn.init.uniform_(module.get_parameter("weight"), 0.5, 1.0)
                module.get_buffer("running_mean").normal_(0, 0.1)
                module.get_buffer("running_var").uniform_(0.5, 2.0)
        state = {f"module.base_encoder.{name}": tensor for name, tensor in backbone.state_dict().items()}
        torch.save({"epoch": 1, "arch": arch, "state_dict": state}, folder / arch)
    return {
        arch: load_pretrained(folder / arch, backbone_args=arguments, image_size=64)
        for arch, arguments in NETWORKS.items()
    }


@torch.no_grad()
def ours(pretrained: Pretrained, images: torch.Tensor) -> torch.Tensor:
    return pretrained.backbone.eval()(images)


@pytest.mark.parametrize("arch", NETWORKS)
@torch.no_grad()
def test_timm_loads_the_folder(networks, tmp_path, arch):
    notes = export(networks[arch], "huggingface", tmp_path / "out")
    images = torch.rand(2, 3, 64, 64)
    theirs = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    torch.testing.assert_close(theirs(images), ours(networks[arch], images), atol=1e-5, rtol=1e-5)
    assert theirs.pretrained_cfg["mean"] == [0.485, 0.456, 0.406]  # pyright: ignore
    assert any("AutoModel.from_pretrained" in note for note in notes)
    # What versions of timm before 1.0.31 take in the end, whatever they have found before, and where nothing else may lie.
    weights = [path.name for path in (tmp_path / "out").iterdir() if path.suffix in (".safetensors", ".pth", ".bin")]
    assert weights == ["pytorch_model.bin"]
    with pytest.raises(InputError, match="exists already"):
        export(networks[arch], "huggingface", tmp_path / "out")


def test_a_folder_is_whole_or_absent(networks, tmp_path, monkeypatch):
    pretrained, full = next(iter(networks.values())), RuntimeError("PytorchStreamWriter failed writing file data/0")
    (tmp_path / ".out.tmp/transformers").mkdir(parents=True)  # of a command that was killed
    with (
        monkeypatch.context() as patched,
        pytest.raises(InputError, match=r"--output .*out: cannot be written: Pytorch"),
    ):
        patched.setattr(torch, "save", mock.Mock(side_effect=full))
        export(pretrained, "huggingface", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    export(pretrained, "huggingface", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("arch", NETWORKS)
@torch.no_grad()
def test_transformers_loads_the_folder(networks, tmp_path, arch):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers = pytest.importorskip("transformers", exc_type=ImportError)
        export(networks[arch], "huggingface", tmp_path / "out")
        model, report = transformers.AutoModel.from_pretrained(str(tmp_path / "out"), output_loading_info=True)
    assert not any(report.values()), report
    assert type(model).__name__ == ("ViTModel" if arch.startswith("vit") else "ResNetModel")
    images = torch.rand(2, 3, 64, 64)
    feature = model.eval()(images).pooler_output.flatten(1)
    torch.testing.assert_close(feature, ours(networks[arch], images), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("arch", ["resnet18", "vit_small"])
def test_onnxruntime_computes_the_features(networks, tmp_path, monkeypatch, arch):
    pytest.importorskip("onnxscript", exc_type=ImportError)
    onnxruntime = pytest.importorskip("onnxruntime", exc_type=ImportError)
    file = tmp_path / "network.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        notes = export(networks[arch], "onnx", file)
        if arch == "vit_small":
            monkeypatch.setattr(foreign, "ONNX_TOLERANCE", -1.0)
            with pytest.raises(InputError, match="onnxruntime's features differ from torch's"):
                export(networks[arch], "onnx", tmp_path / "other.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["network.onnx"] and "agree with torch's" in notes[1]
    size = networks[arch].image_size
    images = torch.rand(5, 3, size, size)  # another number than at the export
    (theirs,) = onnxruntime.InferenceSession(str(file)).run(None, {"images": images.numpy()})
    torch.testing.assert_close(torch.from_numpy(theirs), ours(networks[arch], images), atol=1e-4, rtol=1e-4)


def test_detectron2_gets_its_names(networks, tmp_path):
    notes = export(networks["resnet50"], "detectron2", tmp_path / "r50.pkl")
    content = pickle.loads((tmp_path / "r50.pkl").read_bytes())
    assert content["matching_heuristics"] is True and "MODEL.RESNETS.STRIDE_IN_1X1 False" in notes[-1]
    found, state = content["model"], networks["resnet50"].backbone.state_dict()
    for theirs, name in {
        "stem.conv1.weight": "conv1.weight",
        "stem.conv1.norm.running_var": "bn1.running_var",
        "res2.0.shortcut.weight": "layer1.0.downsample.0.weight",
        "res2.0.shortcut.norm.bias": "layer1.0.downsample.1.bias",
        "res5.2.conv3.weight": "layer4.2.conv3.weight",
        "res5.2.conv3.norm.weight": "layer4.2.bn3.weight",
    }.items():
        assert (found[theirs] == state[name].numpy()).all()
    prefixes = {name.split(".")[0] for name in found}
    assert prefixes == {"stem", "res2", "res3", "res4", "res5"} and len(found) == 53 * 5
    with pytest.raises(InputError, match="builds ResNets with the imagenet stem, and not vit_small"):
        export(networks["vit_small"], "detectron2", tmp_path / "vit.pkl")


def test_detectron2_gets_three_channels(networks, tmp_path):
    gray = dataclasses.replace(networks["resnet50"], mean=(0.5,), std=(0.25,))
    with pytest.raises(
        InputError, match="--to detectron2: reads images of 3 channels, and this network takes 1; --to timm"
    ):
        export(gray, "detectron2", tmp_path / "gray.pkl")
    assert not list(tmp_path.iterdir())


def test_a_small_stem_is_refused(networks, tmp_path):
    for to in ("huggingface", "detectron2"):
        with pytest.raises(InputError, match=f"--to {to}: .*stem small"):
            export(dataclasses.replace(networks["resnet18"], stem="small"), to, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_missing_package_is_named(networks, tmp_path, monkeypatch):
    monkeypatch.setattr(foreign.importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else name)
    with pytest.raises(InputError, match=r"--to onnx: needs onnxruntime; pip install onnxruntime"):
        export(networks["resnet18"], "onnx", tmp_path / "x.onnx")


def test_the_card_holds_recipe_data_metrics_and_versions(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text(
        json.dumps({"train_batch_size": 4096, "crossbatch": {"data": {"path": "/images"}}})
    )
    (run / "metrics.jsonl").write_text('{"step": 1, "knn_top1": 3.5}\n{"step": 2, "knn_top1": 71.25}\n{"step": 3, "kn')
    said = foreign.write_card(run, "onnx", tmp_path / "x.onnx", ["loaded something"])
    card = (tmp_path / "x.onnx.md").read_text()
    assert "x.onnx.md: the model card" in said
    for text in (
        "loaded something",
        "| knn_top1 | 71.25 |",
        '"train_batch_size": 4096',
        "`/images`",
        torch.__version__,
    ):
        assert text in card
