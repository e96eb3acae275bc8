"""Exported weights are the same network in timm, DeiT and torchvision, at the published sizes."""

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.torch
import timm
import torch
import torchvision
from PIL import Image
from timm.models import VisionTransformer

from crossbatch import InputError
from crossbatch.engine.pretrained.export import export
from crossbatch.engine.pretrained.load import Pretrained, load_pretrained
from crossbatch.engine.pretrained.weights import NOTE
from crossbatch.models import build_backbone
from crossbatch.models.norm import ViewBatchNorm
from tests.small_runs import RESNET, VIT, losses, train


def original(arch: str) -> dict:
    """Return a moco-v3 file of `arch` at its published size, with norms that matter."""
    torch.manual_seed(0)
    backbone = build_backbone(arch)
    for module in backbone.modules():
        if isinstance(module, ViewBatchNorm):
            assert module.running_mean is not None and module.running_var is not None
            torch.nn.init.uniform_(module.weight, 0.5, 1.0)
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2.0)
    state = {f"module.base_encoder.{name}": tensor for name, tensor in backbone.state_dict().items()}
    head = "fc" if arch == "resnet50" else "head"
    state |= {f"module.base_encoder.{head}.0.weight": torch.ones(4, 4), "module.predictor.0.weight": torch.ones(4, 4)}
    return {"epoch": 100, "arch": arch, "state_dict": state}


@pytest.fixture(scope="module")
def originals(tmp_path_factory) -> dict[str, Pretrained]:
    folder = tmp_path_factory.mktemp("originals")
    for arch in ("vit_small", "resnet50"):
        torch.save(original(arch), folder / arch)
    return {arch: load_pretrained(folder / arch) for arch in ("vit_small", "resnet50")}


def written(pretrained: Pretrained, to: str, file: Path) -> dict:
    """Export, and return the tensors in the file, under whatever key they are."""
    notes = export(pretrained, to, file)
    content = torch.load(file, weights_only=True)
    state = content.get("model", content.get("state_dict", content))
    assert any(f"{len(state)} tensors written" in note for note in notes), notes
    return state


def test_field_the_advice_names_timm_and_what_to_change_in_deit(originals, tmp_path):
    """With DeiT's timm 0.4.9 the call would fail, as the number of heads is given twice there."""
    deit, timms = ("\n".join(export(originals["vit_small"], to, tmp_path / to)) for to in ("deit", "timm"))
    assert 'timm.create_model("deit_small_patch16_224", num_heads=12) (timm 0.9 or newer)' in deit
    assert 'timm.create_model("vit_small_patch16_224", num_heads=12) (timm 0.9 or newer)' in timms
    assert "DeiT's main.py, with timm 0.4.9, builds its own" in deit and "write num_heads=12 in models.py" in deit
    assert "models.py" not in timms


@torch.no_grad()
def features(model: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    return model.eval()(images)


@pytest.mark.parametrize(("to", "name"), [("timm", "vit_small_patch16_224"), ("deit", "deit_small_patch16_224")])
def test_a_vit_is_the_same_in_timm(originals, tmp_path, to, name):
    state = written(originals["vit_small"], to, tmp_path / "vit.pth")
    theirs = timm.create_model(name, num_heads=12)
    report = theirs.load_state_dict(state, strict=False)
    assert sorted(report.missing_keys) == ["head.bias", "head.weight"] and not report.unexpected_keys
    assert isinstance(theirs, VisionTransformer)
    theirs.reset_classifier(0)
    images = torch.rand(2, 3, 224, 224)
    ours = features(originals["vit_small"].backbone, images)
    torch.testing.assert_close(features(theirs, images), ours, atol=1e-5, rtol=0)
    for block in theirs.blocks.children():  # timm's default loads without a word, and is another network
        vars(block.get_submodule("attn")).update(num_heads=6, head_dim=64, scale=64**-0.5)
    assert (features(theirs, images) - ours).abs().max() > 0.1


@pytest.mark.parametrize("to", ["torchvision", "timm"])
def test_a_resnet_is_the_same_in_torchvision_and_timm(originals, tmp_path, to):
    state = written(originals["resnet50"], to, tmp_path / "resnet.pth")
    theirs = torchvision.models.resnet50() if to == "torchvision" else timm.create_model("resnet50")
    report = theirs.load_state_dict(state, strict=False)
    assert sorted(report.missing_keys) == ["fc.bias", "fc.weight"] and not report.unexpected_keys
    theirs.fc = torch.nn.Identity()  # pyright: ignore[reportAttributeAccessIssue]
    images = torch.rand(2, 3, 96, 96)
    ours = features(originals["resnet50"].backbone, images)
    torch.testing.assert_close(features(theirs, images), ours, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("to", "name"), [("timm", "v.pth"), ("timm", "v.safetensors"), ("safetensors", "v.weights"), ("deit", "v")]
)
def test_the_file_says_how_many_heads_it_has(tiny_runs, tmp_path, to, name):
    before = load_pretrained(tiny_runs("vit"))
    advice = " ".join(export(before, to, tmp_path / name))
    assert "30 tensors written" in advice and "num_heads=2, patch_size=4, img_size=16)" in advice
    if "safetensors" in (to, name.rpartition(".")[2]):
        metadata = safetensors.safe_open(tmp_path / name, "pt").metadata()
        assert metadata["num_heads"] == "2" and json.loads(metadata[NOTE])["arch"] == "vit_small"
    else:
        assert torch.load(tmp_path / name, weights_only=True)["num_heads"] == 2
    after = load_pretrained(tmp_path / name)
    assert (after.arch, after.backbone_args, after.image_size) == (before.arch, before.backbone_args, 16)
    images = torch.rand(2, 3, 16, 16)
    assert features(after.backbone, images).equal(features(before.backbone, images))
    with pytest.raises(InputError, match=r"has num_heads 2; crossbatch.model.backbone_args.num_heads: given 12"):
        load_pretrained(tmp_path / name, backbone_args={"num_heads": 12})


def test_what_others_cannot_build_goes_to_safetensors(tiny_runs, tmp_path):
    small_stem = load_pretrained(tiny_runs("resnet"))
    for to, words in (
        ("torchvision", "stem small, width 8"),
        ("timm", "stem small"),
        ("deit", "DeiT trains only ViTs"),
    ):
        with pytest.raises(InputError, match=f"--to {to}: .*{words}.*; --to safetensors"):
            export(small_stem, to, tmp_path / "file")
    with pytest.raises(InputError, match="torchvision's ViTs differ"):
        export(load_pretrained(tiny_runs("vit")), "torchvision", tmp_path / "file")
    assert not list(tmp_path.iterdir())
    assert "cannot build" in export(small_stem, "safetensors", tmp_path / "file.safetensors")[-1]
    again = load_pretrained(tmp_path / "file.safetensors").backbone
    images = torch.rand(2, 3, 16, 16)
    assert features(again, images).equal(features(small_stem.backbone, images))


def test_an_existing_file_is_replaced_whole_or_not_at_all(tiny_runs, tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "something").touch()
    with pytest.raises(InputError, match=r"--output .*taken: cannot be written"):
        export(load_pretrained(tiny_runs("vit")), "deit", tmp_path / "taken")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_rectangular_images(one_rank, tmp_path):
    """A run on images of [height, width] goes on, and its ViT has the same features when loaded, exported and in timm."""
    settings = [*VIT, "crossbatch.data.image_size=[8,24]", "crossbatch.evaluate.knn_every_epochs=1"]
    for steps in (1, 2):
        one_rank.run(train, settings, str(tmp_path / "run"), steps)
    assert len(losses(tmp_path / "run")) == 2
    before = load_pretrained(tmp_path / "run")
    assert before.image_size == (8, 24) and before.backbone.grid == (2, 6) and not before.notes
    images = torch.rand(2, 3, 8, 24)
    ours = features(before.backbone, images)
    for name in ("v.pth", "v.safetensors"):
        advice = " ".join(export(before, "timm", tmp_path / name))
        after = load_pretrained(tmp_path / name)
        assert after.image_size == (8, 24) and features(after.backbone, images).equal(ours)
    assert "img_size=(8, 24)" in advice
    call = advice[advice.index('timm.create_model("') :].partition(")) ")[0].removeprefix("timm.create_model(")
    theirs = timm.create_model("vit_small_patch16_224", **eval(f"dict({call.partition(', ')[2]}))"), num_classes=0)
    theirs.load_state_dict(safetensors.torch.load_file(tmp_path / "v.safetensors"), strict=False)
    torch.testing.assert_close(features(theirs, images), ours, atol=1e-5, rtol=0)
    square = load_pretrained(tmp_path / "run", image_size=16)
    assert square.notes == ["positions resampled from 2 x 6 to 4 x 4 patches"]


@pytest.mark.parametrize("network", [RESNET, VIT])
def test_images_of_two_channels(one_rank, tmp_path, network):
    """The run says how its images are normalised, and exports keep it; other programs are told of the channels."""
    rng = np.random.default_rng(0)
    for number in range(48):
        label, split = number % 4, "val" if number < 16 else "train"
        file = tmp_path / f"images/{split}/{label}/{number}.tif"
        file.parent.mkdir(parents=True, exist_ok=True)
        first, second = rng.integers(0, 50 + 50 * label, (2, 20, 20), dtype=np.uint8)
        Image.fromarray(first).save(file, save_all=True, append_images=[Image.fromarray(second)])
    channels = [
        "crossbatch.data.channels=2",
        "crossbatch.data.mean=[0.2,0.4]",
        f"crossbatch.data.path={tmp_path}/images",
    ]
    settings = [*network, *channels, "crossbatch.evaluate.knn_every_epochs=1", "crossbatch.evaluate.knn_k=5"]
    one_rank.run(train, settings, str(tmp_path / "run"), 2)
    before = load_pretrained(tmp_path / "run")
    assert (
        before.backbone.in_channels == 2 and before.mean == (0.2, 0.4) and before.std == pytest.approx((0.226, 0.226))
    )
    images = torch.rand(2, 2, 16, 16)
    export(before, "safetensors", tmp_path / "file.safetensors")
    after = load_pretrained(tmp_path / "file.safetensors")
    assert after.channels == before.channels and features(after.backbone, images).equal(
        features(before.backbone, images)
    )
    with pytest.raises(InputError, match="three channels, and this one has 2; allowed: timm"):
        export(before, "deit", tmp_path / "file")
    if network is VIT:
        assert "img_size=16, in_chans=2)" in " ".join(export(before, "timm", tmp_path / "file"))
