"""launch/convert.py: `shards` writes what `--data` can name, `export` what others can load; both say what they cannot."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision
from PIL import Image

from crossbatch.data.sources import open_source
from crossbatch.engine.pretrained.load import load_pretrained
from crossbatch.launch import convert
from tests.commands import caller
from tests.engine.originals import original_file

call = caller(convert)


@pytest.fixture
def images(tmp_path) -> Path:
    rng = np.random.default_rng(0)
    for name in ("train/a/1.jpg", "train/a/2.jpg", "train/b/3.png", "test/a/4.jpg", "test/b/5.jpg"):
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8)).save(tmp_path / "images" / name)
    (tmp_path / "images/train/b/empty.jpg").touch()
    return tmp_path / "images"


def test_shards(monkeypatch, capsys, images, tmp_path):
    out = tmp_path / "shards"
    assert call(monkeypatch, "shards", "--data", images, "--output", out, "--images-per-shard", 2) == 0
    said = capsys.readouterr()
    assert f"{out}/train: 3 images in 2 shards, 1 broken images left out" in said.out and f"--data {out}" in said.out
    assert "left out, broken: b/empty.jpg: not an image" in said.err
    assert sorted(path.name for path in (out / "train").iterdir()) == [
        "index.npz", "train-000000.tar", "train-000001.tar"
    ]  # fmt: skip
    for split, numbers in (("train", (0, 1, 2)), ("eval", (0, 1))):
        before, after = open_source(images, split), open_source(out, split)
        assert before.class_names == after.class_names
        assert sorted((after.read(i), int(after.labels[i])) for i in range(len(after))) == sorted(
            (before.read(i), int(before.labels[i])) for i in numbers
        )


def test_bad_input(monkeypatch, capsys, images, tmp_path):
    def refused(*arguments) -> str:
        assert call(monkeypatch, "shards", *arguments) == 2
        return capsys.readouterr().err

    assert "--data: " in refused("--data", tmp_path / "absent", "--output", tmp_path / "out")
    flags = ("--data", images, "--output", tmp_path, "--images-per-shard", 0)
    assert "argument --images-per-shard: given 0; allowed: a whole number >= 1" in refused(*flags)
    (tmp_path / "out/val").mkdir(parents=True)
    assert "out/val exists already; remove it" in refused("--data", images, "--output", tmp_path / "out")
    assert not (tmp_path / "out/train").exists()
    (tmp_path / "file").touch()
    assert "--output: cannot write" in refused("--data", images, "--output", tmp_path / "file/out")
    shutil.rmtree(images / "test")
    for image in images.rglob("*.*g"):
        image.write_bytes(b"")
    assert "none of the 4 images" in refused("--data", images, "--output", tmp_path / "other")
    assert list((tmp_path / "other").iterdir()) == []


EXPORTS = [("vit", "timm", "v.pth"), ("vit", "deit", "v.pth"), ("vit", "safetensors", "v.safetensors"),
           ("resnet", "safetensors", "r.safetensors"), ("resnet", "moco-v3", "r.pth.tar")]  # fmt: skip


@pytest.mark.parametrize(("run", "to", "name"), EXPORTS)
def test_export_of_a_run_can_be_loaded_again(monkeypatch, capsys, tiny_runs, tmp_path, run, to, name):
    monkeypatch.chdir(tmp_path)  # FILE without a folder
    assert call(monkeypatch, "export", "--checkpoint", tiny_runs(run), "--to", to, "--output", name) == 0
    said = capsys.readouterr().out
    want = load_pretrained(tiny_runs(run)).backbone.state_dict()
    if to != "moco-v3":
        assert f"{name}: {len(want)} tensors written" in said
    known = {"stem": "small", "backbone_args": {"width": 8}} if to == "moco-v3" else {}
    again = load_pretrained(tmp_path / name, **known).backbone.state_dict()
    assert again.keys() == want.keys() and all(tensor.equal(want[key]) for key, tensor in again.items())
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_export_of_an_original(monkeypatch, capsys, tmp_path):
    torch.save(original_file("resnet18", True, "LARS"), tmp_path / "checkpoint_0001.pth.tar")
    export = ["export", "--checkpoint", tmp_path / "checkpoint_0001.pth.tar", "--output", tmp_path / "new/r.pth"]
    for flags, encoder in (([], "base_encoder"), (["--encoder", "momentum"], "momentum_encoder")):
        assert call(monkeypatch, *export, "--to", "torchvision", *flags) == 0
        said = capsys.readouterr().out
        assert "r.pth: 120 tensors written" in said and "torchvision.models.resnet18()" in said
        state = torch.load(tmp_path / "new/r.pth", weights_only=True)
        theirs = original_file("resnet18", True, "LARS")["state_dict"]
        assert len(state) == 120 and all(
            value.equal(theirs[f"module.{encoder}.{name}"]) for name, value in state.items()
        )
        model = torchvision.models.resnet18()
        assert sorted(model.load_state_dict(state, strict=False).missing_keys) == ["fc.bias", "fc.weight"]


def test_export_refuses_what_would_be_wrong(monkeypatch, capsys, tiny_runs, tmp_path):
    def refused(checkpoint, to, *flags) -> str:
        output = ("--output", tmp_path / "out/file.pth")
        assert call(monkeypatch, "export", "--checkpoint", checkpoint, "--to", to, *output, *flags) == 2
        assert not (tmp_path / "out").exists()
        return capsys.readouterr().err

    probe = {"epoch": 90, "arch": "vit_small", "state_dict": {"module.head.weight": torch.ones(2, 2)}, "best_acc1": 1.0}
    torch.save(probe, tmp_path / "probe.pth.tar")
    assert "is the file of a linear probe" in refused(tmp_path / "probe.pth.tar", "deit")
    six = timm.models.VisionTransformer(img_size=32, embed_dim=384, depth=1, num_heads=6, num_classes=0)
    torch.save({"model": six.state_dict()}, tmp_path / "six.pth")
    said = refused(tmp_path / "six.pth", "timm", "-a", "vit_small", '--set=crossbatch.model.backbone_args={"depth": 1}')
    assert "MoCo v3's ViT-S has 12, DeiT's and timm's has 6" in said
    assert "--to torchvision: torchvision's ViTs differ" in refused(tiny_runs("vit"), "torchvision")
    assert "--to deit: DeiT trains only ViTs" in refused(tiny_runs("resnet"), "deit")
    assert "stem small, width 8" in refused(tiny_runs("resnet"), "torchvision")
    assert "holds a resnet18, but vit_base" in refused(tiny_runs("resnet"), "timm", "-a", "vit_base")
    assert "--to moco-v3: writes the whole run" in refused(tiny_runs("resnet"), "moco-v3", "--encoder", "momentum")
    assert "no checkpoint in it" in refused(tmp_path / "six.pth", "moco-v3")


@pytest.mark.parametrize("command", ["shards", "export"])
def test_help_has_an_example(monkeypatch, capsys, command):
    assert call(monkeypatch, command, "--help") == 0
    assert f"example: python launch/convert.py {command} --" in capsys.readouterr().out


def test_field_an_image_that_cannot_be_read_is_no_fault_of_the_output(images, tmp_path, monkeypatch, capsys):
    (images / "train/b/link.jpg").symlink_to("nowhere")
    assert call(monkeypatch, "shards", "--data", images, "--output", tmp_path / "out") == 2
    said = capsys.readouterr()
    assert "error: --data: cannot read b/link.jpg: No such file or directory; nothing was written" in said.err
    assert "read: 5 images, 2 classes in train/\n" in said.out and not (tmp_path / "out/train").exists()


def test_field_the_command_line_of_convert_to_deit(tmp_path, monkeypatch, capsys):
    torch.save(original_file("vit_small", False, "AdamW"), tmp_path / "file")
    args = '--set=crossbatch.model.backbone_args={"embed_dim": 24, "depth": 2, "num_heads": 2, "patch_size": 4}'
    assert call(monkeypatch, "--input", tmp_path / "file", "--output", tmp_path / "deit.pth", args) == 0
    assert set(torch.load(tmp_path / "deit.pth", weights_only=True)) == {"model", "num_heads", "crossbatch"}
