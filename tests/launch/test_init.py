"""--init: a run starts from weights, says so, refuses those of another network, and does not read them when resumed."""

import json
import shutil
from pathlib import Path

import pytest
import timm
import torch
import torchvision

from crossbatch.engine import checkpoint
from crossbatch.engine.checkpoint.changes import differences
from crossbatch.engine.config import Device, load_config, resolve
from crossbatch.engine.tasks.build import build_model
from crossbatch.engine.tasks.pretrain import start_from
from tests.launch.test_pretrain import TINY, call
from tests.small_runs import BASE

# FSDP2, because DeepSpeed can be started only once in a process.
OFF = ["--set=crossbatch.evaluate.knn_every_epochs=0", "--set=crossbatch.evaluate.every_epochs=0"]
RUN = [*TINY, "-a", "resnet18", *OFF, "--set=crossbatch.sharding=fsdp"]
FREEZE = "--set=crossbatch.schedule.freeze_backbone_epochs=1"


def backbones(run: Path, step: int) -> dict[str, torch.Tensor]:
    """Return the weights of both backbones in a checkpoint, without the statistics of their norms."""
    return checkpoint.read(run / f"checkpoints/step-{step:08}", "parameters.")


def test_a_run_continues_from_the_weights_of_another(monkeypatch, capsys, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    assert call(monkeypatch, *RUN, "--out", first) == 0
    # The heads are others: a seed of its own draws them. The backbone waits, so a checkpoint shows how it started.
    command = [*RUN, FREEZE, "--out", second, "--init", first, "--seed", 5]
    assert call(monkeypatch, *command, "--steps", 1) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert f"both backbones start from resnet18 of {first}/checkpoints/step-00000008, online encoder" in said
    assert (
        "tensors loaded, none missing" in said and "the rest is new" in said and "optimizer" in said
    )  # what was ignored
    theirs, ours = backbones(first, 8), backbones(second, 1)
    for name, tensor in ours.items():
        if ".backbone." in name:
            assert tensor.equal(theirs[name.replace("momentum.", "online.")]), name
    assert not ours["predictor.0.weight"].equal(theirs["predictor.0.weight"])
    for folder in (second, second / "checkpoints/step-00000001"):
        assert json.loads((folder / "config.json").read_text())["crossbatch"]["model"]["init"] == str(first)
    loaded = json.loads((second / "started_from.json").read_text())["loaded"]
    assert loaded["from"].startswith(f"{first}/checkpoints/step-00000008") and loaded["ignored"]["optimizer"] > 0
    # The weights are gone, and the run goes on.
    shutil.move(first, tmp_path / "elsewhere")
    assert call(monkeypatch, *command, "--steps", 2) == 0
    assert "both backbones start from" not in capsys.readouterr().out
    assert checkpoint.read_manifest(second / "checkpoints/step-00000002")[0].step == 2
    without = [*command[: command.index("--init")], "--seed", 5]
    assert call(monkeypatch, *without, "--steps", 3) == 2
    assert f"crossbatch.model.init: was '{first}', is None" in capsys.readouterr().err
    # A run from before the keys goes on.
    now = json.loads((tmp_path / "elsewhere/config.json").read_text())
    before = json.loads((tmp_path / "elsewhere/config.json").read_text())
    assert "init" not in before["crossbatch"]["model"]
    del before["crossbatch"]["schedule"]["freeze_backbone_epochs"]
    assert differences(before, now) == []
    assert call(monkeypatch, *RUN, "--out", tmp_path / "elsewhere", "--init", second) == 2
    assert f"crossbatch.model.init: was None, is '{second}'" in capsys.readouterr().err


def features_after_init(file: Path, arch: str, args: dict, images: torch.Tensor) -> torch.Tensor:
    """Return the features of the online encoder, after checking that those of the momentum encoder are the same."""
    keys = [f"crossbatch.model.{key}" for key in (f"arch={arch}", f"init={file}", f"backbone_args={json.dumps(args)}")]
    keys += ["crossbatch.model.stem=imagenet", "crossbatch.data.image_size=224"]
    cfg = resolve(load_config(None, [*BASE, *keys]), 1, Device("cpu"))
    model = build_model(cfg)
    start_from(model, cfg)
    model.eval()
    assert model.momentum.backbone(images).equal(model.online.backbone(images))
    return model.online.backbone(images)


@torch.no_grad()
def features_of_both(file: str, library: str, arch: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the features by the library that made the file and by a run before its first step, on a rank of a pool."""
    torch.manual_seed(3)
    name = {"vit_small": "vit_small_patch16_224"}.get(arch, arch)
    theirs = torchvision.models.get_model(name) if library == "torchvision" else timm.create_model(name, num_classes=10)
    for module in theirs.modules():  # as if it had been trained
        if isinstance(module, torch.nn.BatchNorm2d | torch.nn.LayerNorm):
            module.weight.uniform_(0.5, 1.5)
            module.bias.normal_(0, 0.1)
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)  # pyright: ignore
            module.running_var.uniform_(0.5, 2)  # pyright: ignore
    torch.save(theirs.state_dict(), file)
    if library == "torchvision":
        theirs.fc = torch.nn.Identity()
    else:
        theirs.reset_classifier(0)  # pyright: ignore
    images = torch.randn(2, 3, 224, 224)
    ours = features_after_init(Path(file), arch, {"num_heads": 6} if arch == "vit_small" else {}, images)
    return ours, theirs.eval()(images)


@pytest.mark.parametrize(
    ("library", "arch"),
    [
        ("torchvision", "resnet18"),
        *(pytest.param("timm", arch, marks=pytest.mark.slow) for arch in ("resnet18", "vit_small")),
    ],
)
def test_features_are_those_of_the_file_before_the_first_step(one_rank, tmp_path, library, arch):
    ((ours, theirs),) = one_rank.run(features_of_both, str(tmp_path / "weights.pth"), library, arch)
    assert theirs.std() > 0.1
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def empty_run(file: Path) -> None:
    (file / "checkpoints").mkdir(parents=True)


WRONG = {
    "another network": (lambda file: torch.save(torchvision.models.resnet34().state_dict(), file), [], "is not a resnet18"),
    "another family": (
        lambda file: torch.save(torchvision.models.resnet18().state_dict(), file),
        ["-a", "vit_small", "--set=crossbatch.model.backbone_args={}"],
        "is not a vit_small",
    ),
    "no file": (lambda _: None, [], "no such file or folder"),
    "no backbone": (lambda file: torch.save(torch.nn.Linear(2, 2).state_dict(), file), [], "is not a resnet18"),
    "no weights": (lambda file: file.write_text("hello"), [], "cannot be read"),
    "no checkpoint": (empty_run, [], "no checkpoint"),
    "heads": (
        lambda file: torch.save(timm.create_model("vit_small_patch16_224").state_dict(), file),
        ["-a", "vit_small", "--set=crossbatch.model.backbone_args={}"],
        "does not say how many heads",
    ),
    "channels": (
        lambda file: torch.save(torchvision.models.resnet18().state_dict(), file),
        ["--set=crossbatch.data.channels=1"],
        "is for images with 3 channels; crossbatch.data.channels: given 1",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_other_weights_are_refused(monkeypatch, capsys, tmp_path, case):
    write, arguments, message = WRONG[case]
    file = tmp_path / "weights.pth"
    write(file)
    given = [*RUN, '--set=crossbatch.model.backbone_args={"width": 64}', *arguments]
    assert call(monkeypatch, *given, "--init", file, "--out", tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert str(file) in error and message in error and "--checkpoint" not in error
    assert not list((tmp_path / "run").glob("checkpoints/*"))


@pytest.mark.long
def test_runs_that_do_not_fit(monkeypatch, capsys, tmp_path):
    assert call(monkeypatch, *RUN, "--out", tmp_path / "narrow", "--steps", 1) == 0
    init = [*RUN, "--init", tmp_path / "narrow", "--steps", 1]
    assert call(monkeypatch, *init, "--set=crossbatch.model.backbone_args={}", "--out", tmp_path / "wide") == 2
    assert """--set crossbatch.model.backbone_args='{"width": 8}'""" in capsys.readouterr().err
    # Other statistics of the channels, and no weights to freeze, are only said.
    assert call(monkeypatch, *init, "--set=crossbatch.data.mean=[0.5, 0.5, 0.5]", "--out", tmp_path / "shifted") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "trained on images with crossbatch.data.mean [0.485, 0.456, 0.406]" in said and "too short to learn" in said
    assert call(monkeypatch, *RUN, FREEZE, "--out", tmp_path / "random", "--steps", 1) == 0
    assert "freezes random weights" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("key", ["freeze_backbone_epochs", "warmup_epochs"])
def test_what_takes_the_whole_run_is_refused(monkeypatch, capsys, key):
    assert call(monkeypatch, "--dry-run", *TINY, f"--set=crossbatch.schedule.{key}=2") == 2
    assert f"crossbatch.schedule.{key}: given 2 of 2 epochs" in capsys.readouterr().err
