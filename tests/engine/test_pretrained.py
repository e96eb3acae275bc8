"""Weights come from anything that holds them, and from nothing that only looks like it."""

import argparse
import json
import pathlib
import shutil

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import torchvision

from crossbatch import InputError
from crossbatch.engine import checkpoint
from crossbatch.engine.pretrained.load import load_pretrained
from crossbatch.engine.pretrained.weights import NOTE, PROBE, PROBE_FILE
from crossbatch.models import build_backbone
from tests.engine.originals import original_file

SMALL_VIT = {"embed_dim": 24, "depth": 2, "num_heads": 2, "patch_size": 4}


def of_prefix(state: dict, prefix: str) -> dict:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def equal(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(tensor.equal(other[name]) for name, tensor in one.items())


@pytest.mark.parametrize("encoder", ["online", "momentum"])
@pytest.mark.parametrize("name", ["resnet", "vit"])
def test_a_sharded_run(tiny_runs, name, encoder):
    out = tiny_runs(name)
    newest = out / "checkpoints" / "step-00000002"
    stored = {part: checkpoint.read(newest, f"{part}.") for part in ("parameters", "buffers")}
    want = {k: v for part in stored.values() for k, v in of_prefix(part, f"{encoder}.backbone.").items()}
    for path in (out, newest):
        pretrained = load_pretrained(path, encoder=encoder)
        assert equal(pretrained.backbone.state_dict(), want)
        assert str(newest) in pretrained.description and encoder in pretrained.description
    assert pretrained.arch == {"resnet": "resnet18", "vit": "vit_small"}[name]
    assert (pretrained.stem, pretrained.image_size) == ({"resnet": "small", "vit": "imagenet"}[name], 16)
    assert pretrained.num_heads == {"resnet": None, "vit": 2}[name]
    assert pretrained.loaded == len(want) and not pretrained.missing
    # Everything else is accounted for.
    shapes = checkpoint.read_manifest(newest)[0].shapes
    assert sum(pretrained.ignored.values()) == len(shapes) - len(want)
    assert pretrained.ignored["optimizer"] > 0 and pretrained.ignored["momentum projector"] > 0


def test_the_two_encoders_differ(tiny_runs):
    online, momentum = (load_pretrained(tiny_runs("resnet"), encoder=e).backbone for e in ("online", "momentum"))
    assert not online.get_parameter("layer1.0.conv1.weight").equal(momentum.get_parameter("layer1.0.conv1.weight"))


@pytest.mark.parametrize("encoder", ["online", "momentum"])
@pytest.mark.parametrize(("arch", "args"), [("resnet18", None), ("vit_small", SMALL_VIT)])
def test_an_original_file(tmp_path, arch, args, encoder):
    content = original_file(arch, add_bf=True, optimizer="AdamW")
    torch.save(content, tmp_path / "checkpoint_0001.pth.tar")
    pretrained = load_pretrained(tmp_path / "checkpoint_0001.pth.tar", backbone_args=args, encoder=encoder)
    place = {"online": "base_encoder", "momentum": "momentum_encoder"}[encoder]
    theirs = of_prefix(content["state_dict"], f"module.{place}.")
    want = {name: value for name, value in theirs.items() if not name.startswith(("fc.", "head."))}
    assert len(want) > 20 and equal(pretrained.backbone.state_dict(), want)
    assert pretrained.arch == arch
    assert sum(pretrained.ignored.values()) == len(content["state_dict"]) - len(want)
    said = str(pretrained)
    assert f"{len(want)} tensors loaded, none missing" in said and "predictor" in said


def test_what_others_write(tmp_path):
    theirs = torchvision.models.resnet18()
    torch.save(theirs.state_dict(), tmp_path / "torchvision.pth")
    torch.save({"state_dict": theirs.state_dict(), "arch": "resnet18"}, tmp_path / "nested.pth")
    old = {name: value for name, value in theirs.state_dict().items() if not name.endswith("num_batches_tracked")}
    torch.save(old, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    safetensors.torch.save_file(theirs.state_dict(), tmp_path / "file.safetensors")
    for name in ("torchvision.pth", "nested.pth", "old.pth", "file.safetensors"):
        pretrained = load_pretrained(tmp_path / name, arch="resnet18")
        assert pretrained.backbone.get_parameter("layer4.1.conv2.weight").equal(
            theirs.get_parameter("layer4.1.conv2.weight")
        )
        assert pretrained.ignored["fc"] == 2 and pretrained.image_size == 224
        assert len(pretrained.missing) == (20 if name == "old.pth" else 0)
    images = torch.rand(2, 3, 64, 64)
    theirs.fc = torch.nn.Identity()  # pyright: ignore[reportAttributeAccessIssue]
    torch.testing.assert_close(pretrained.backbone.eval()(images), theirs.eval()(images))


def test_a_file_of_deit_with_its_arguments(tmp_path):
    """DeiT keeps an argparse.Namespace beside the weights, which is data."""
    model = build_backbone("vit_base", 16, backbone_args=SMALL_VIT)
    content = {"model": {**model.state_dict(), "head.weight": torch.zeros(3, 24)}, "args": argparse.Namespace(lr=1.0)}
    torch.save({**content, "epoch": 3, "optimizer": {}}, tmp_path / "deit.pth")
    pretrained = load_pretrained(tmp_path / "deit.pth", arch="vit_base", backbone_args=SMALL_VIT)
    assert equal(pretrained.backbone.state_dict(), model.state_dict()) and pretrained.ignored == {"head": 1}


def test_positions_are_resampled_for_images_of_another_size(tmp_path):
    torch.save(original_file("vit_small", False, "AdamW"), tmp_path / "file")
    same = load_pretrained(tmp_path / "file", backbone_args=SMALL_VIT)
    larger = load_pretrained(tmp_path / "file", backbone_args=SMALL_VIT, image_size=32)
    assert (same.image_size, larger.image_size) == (16, 32) and not same.notes
    assert "positions resampled from 4 x 4 to 8 x 8 patches" in str(larger)
    before, after = (p.backbone.get_parameter("pos_embed") for p in (same, larger))
    assert after.shape == (1, 65, 24) and after[:, 0].equal(before[:, 0])
    grids = [table[0, 1:].unflatten(0, (side, side)).movedim(-1, 0) for table, side in ((before, 4), (after, 8))]
    torch.testing.assert_close(
        grids[1].unflatten(1, (4, 2)).unflatten(3, (4, 2)).mean((2, 4)), grids[0], atol=0.2, rtol=0
    )
    assert larger.backbone.eval()(torch.rand(2, 3, 32, 32)).shape == (2, 24)


class Bomb:
    def __reduce__(self):
        return print, ("boom",)


def twelve_heads(num_heads: int | None) -> dict:
    """Return a file for a ViT with shapes that fit 12 heads as well as 6."""
    args = {"embed_dim": 24, "depth": 2, "patch_size": 4}
    model = timm.models.VisionTransformer(img_size=16, patch_size=4, embed_dim=24, depth=2, num_heads=6, num_classes=0)
    note = {} if num_heads is None else {NOTE: {"num_heads": num_heads}}
    return {"model": model.state_dict(), **note, "args": args}


def probe_of_an_original() -> dict:
    state = {f"module.{name}": value for name, value in torchvision.models.resnet18().state_dict().items()}
    return {"epoch": 90, "arch": "resnet18", "state_dict": state, "best_acc1": torch.tensor(68.9), "optimizer": {}}


def with_nan() -> dict:
    state = torchvision.models.resnet18().state_dict()
    state["layer1.0.conv1.weight"][0, 0, 0, 0] = torch.nan
    return state


WRONG = {
    "another arch than asked for": (
        lambda: original_file("resnet18", False, "LARS"),
        {"arch": "resnet50"},
        "holds a resnet18",
    ),
    "another arch": (lambda: torchvision.models.resnet18().state_dict(), {"arch": "resnet34"}, "is not a resnet34"),
    "no arch": (lambda: torchvision.models.resnet18().state_dict(), {}, "give it with -a, one of resnet18"),
    "unknown arch": (
        lambda: torchvision.models.resnet18().state_dict(),
        {"arch": "resnet19"},
        "did you mean 'resnet18'",
    ),
    "another stem": (
        lambda: original_file("resnet18", False, "LARS"),
        {"stem": "small"},
        "check -a, crossbatch.model.stem",
    ),
    "another size": (lambda: original_file("vit_small", False, "AdamW"), {}, "of another shape"),
    "heads unknown": (
        lambda: twelve_heads(None),
        {"arch": "vit_small"},
        "MoCo v3's ViT-S has 12, DeiT's and timm's has 6",
    ),
    "six heads": (
        lambda: twelve_heads(6),
        {"arch": "vit_small", "backbone_args": {"embed_dim": 24, "depth": 2, "patch_size": 4}},
        "has 6 heads, but vit_small has 12, with the same shapes",
    ),
    "a probe": (probe_of_an_original, {}, "is the file of a linear probe"),
    "a probe without its accuracy": (
        lambda: {name: value for name, value in probe_of_an_original().items() if name != "best_acc1"},
        {},
        "but no base_encoder",
    ),
    "our probe": (lambda: {"kind": PROBE, "heads": {}}, {"arch": "resnet18"}, "is the file of a linear probe"),
    "a converted probe": (lambda: {"model": {}}, {"arch": "vit_base"}, "holds no backbone"),
    "a classifier only": (lambda: {"fc.weight": torch.ones(2)}, {"arch": "resnet18"}, "holds no backbone"),
    "no momentum encoder": (with_nan, {"arch": "resnet18", "encoder": "momentum"}, "holds only one network"),
    "not finite": (with_nan, {"arch": "resnet18"}, "layer1.0.conv1.weight"),
    "a list": (lambda: [1, 2], {}, "holds a list"),
    "code": (lambda: {"state_dict": Bomb()}, {"arch": "resnet18"}, "which could run code; nothing of it was run"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_not_meant_is_refused(tmp_path, capsys, case):
    content, arguments, words = WRONG[case]
    torch.save(content(), tmp_path / "file.pth")
    with pytest.raises(InputError) as error:
        load_pretrained(tmp_path / "file.pth", **arguments)
    assert words in str(error.value) and "file.pth" in str(error.value)
    assert "\n" not in str(error.value) and "boom" not in capsys.readouterr().out


def test_six_heads_that_are_meant(tmp_path):
    torch.save(twelve_heads(None), tmp_path / "file.pth")
    args = {"embed_dim": 24, "depth": 2, "patch_size": 4, "num_heads": 6}
    assert load_pretrained(tmp_path / "file.pth", arch="vit_small", backbone_args=args).num_heads == 6


@pytest.mark.parametrize("kept", [0, 3, 100, -100])
@pytest.mark.parametrize("name", ["file.pth", "file.safetensors"])
def test_a_file_that_is_cut_off(tmp_path, name, kept):
    state = torchvision.models.resnet18().state_dict()
    if name.endswith("pth"):
        torch.save(state, tmp_path / name)
    else:
        safetensors.torch.save_file(state, tmp_path / name)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:kept])
    with pytest.raises(InputError, match="cannot be read") as error:
        load_pretrained(tmp_path / name, arch="resnet18")
    assert "\n" not in str(error.value)


def test_paths_without_weights(tmp_path, tiny_runs):
    def refused(path) -> str:
        with pytest.raises(InputError) as error:
            load_pretrained(path)
        assert str(error.value).startswith("--checkpoint ")
        return str(error.value)

    assert "no such file or folder" in refused(tmp_path / "absent")
    assert "no checkpoint in it" in refused(tmp_path)
    (tmp_path / PROBE_FILE).touch()
    assert "is the folder of a linear probe" in refused(tmp_path)
    shutil.copytree(tiny_runs("resnet"), tmp_path / "run")
    step = tmp_path / "run/checkpoints/step-00000002"
    largest = max(step.glob("*.bin"), key=lambda file: file.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-1])
    assert "step-00000002: damaged" in refused(tmp_path / "run")
    config = json.loads((step / "config.json").read_text())
    assert config["crossbatch"]["model"]["arch"] == "resnet18"


def resnet(prefix: str = "") -> dict[str, torch.Tensor]:
    return {f"{prefix}{name}": value for name, value in torchvision.models.resnet18().state_dict().items()}


FROM_ELSEWHERE = {  # what a program saves -> the prefix of the online backbone
    "timm": (lambda: {"epoch": 3, "arch": "resnet18", "state_dict": resnet(), "optimizer": {}, "version": 2}, ""),
    "moco v2": (
        lambda: {
            "epoch": 200,
            "arch": "resnet18",
            "state_dict": {**resnet("module.encoder_q."), **resnet("module.encoder_k."), "module.queue": torch.ones(4)},
        },
        "encoder_q.",
    ),
    "lightning": (
        lambda: {
            "epoch": 9,
            "global_step": np.int64(90),
            "pytorch-lightning_version": "2.5",
            "state_dict": {**resnet("backbone."), **resnet("momentum_backbone."), "classifier.bias": torch.ones(4)},
            "hyper_parameters": {"lr": np.float64(0.3), "path": pathlib.PosixPath("/data"), "std": np.ones(3)},
        },
        "backbone.",
    ),
    "torch.compile": (lambda: {"model": resnet("_orig_mod.")}, "_orig_mod."),
}


@pytest.mark.parametrize("program", FROM_ELSEWHERE)
def test_field_files_of_other_programs_are_read(tmp_path, program):
    content, prefix = FROM_ELSEWHERE[program]
    content = content()
    torch.save(content, tmp_path / "file.ckpt")
    tensors = content.get("state_dict", content.get("model"))
    for encoder, other in (
        ("online", prefix),
        ("momentum", {"encoder_q.": "encoder_k."}.get(prefix, f"momentum_{prefix}")),
    ):
        if encoder == "momentum" and program in ("timm", "torch.compile"):
            with pytest.raises(InputError, match="holds only one network"):
                load_pretrained(tmp_path / "file.ckpt", arch="resnet18", encoder="momentum")
            continue
        read = load_pretrained(tmp_path / "file.ckpt", arch="resnet18", encoder=encoder)
        module = "module." if program == "moco v2" else ""
        want = of_prefix({k: v for k, v in tensors.items() if k.startswith(module + other)}, module + other)
        assert equal(read.backbone.state_dict(), {k: v for k, v in want.items() if not k.startswith("fc.")})
    if program in ("timm", "moco v2"):  # which say what they hold
        assert load_pretrained(tmp_path / "file.ckpt").arch == "resnet18"


def test_files_of_mae_and_dino(tmp_path):
    vit = timm.models.VisionTransformer(img_size=16, patch_size=4, embed_dim=24, depth=2, num_heads=2, num_classes=0)
    state, decoder = vit.state_dict(), ("mask_token", "decoder_pos_embed", "decoder_blocks.0.norm1.weight")
    torch.save({"model": {**state, **{name: torch.ones(24) for name in decoder}}}, tmp_path / "mae.pth")
    teacher = {f"backbone.{name}": value + 1 for name, value in state.items()}
    student = {f"module.backbone.{name}": value for name, value in state.items()}
    heads = {"head.mlp.0.weight": torch.ones(2, 2)}
    torch.save({"student": student, "teacher": {**teacher, **heads}, "epoch": 9}, tmp_path / "dino.pth")
    for file, encoder, offset in (("mae", "online", 0), ("dino", "online", 0), ("dino", "momentum", 1)):
        read = load_pretrained(tmp_path / f"{file}.pth", "vit_small", backbone_args=SMALL_VIT, encoder=encoder)
        assert equal(read.backbone.state_dict(), {name: value + offset for name, value in state.items()})
        assert sum(read.ignored.values()) == (3 if file == "mae" else len(state) + 1)


def test_field_a_classifier_of_pytorch_examples_is_named(tmp_path):
    torch.save(probe_of_an_original(), tmp_path / "file")
    with pytest.raises(
        InputError, match=r"or of a classifier trained with pytorch/examples.* a file with its state_dict alone"
    ):
        load_pretrained(tmp_path / "file")


def test_field_several_networks_are_named(tmp_path):
    torch.save({"state_dict": {**resnet("a."), **resnet("b.")}}, tmp_path / "file")
    with pytest.raises(
        InputError, match=r"holds networks named a\., b\., and none of them is clearly the online encoder"
    ):
        load_pretrained(tmp_path / "file", arch="resnet18")


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64, torch.float8_e4m3fn])
def test_field_weights_that_are_no_floats(tmp_path, dtype):
    torch.save({name: value.to(dtype) for name, value in resnet().items()}, tmp_path / "file")
    with pytest.raises(InputError, match=f"not plain floating-point numbers: .* is {str(dtype)[6:]}.*allowed: float64"):
        load_pretrained(tmp_path / "file", arch="resnet18")
