"""--init: a run starts from weights, says so, refuses those of another network, and does not read them when resumed."""

import json
import shutil
from pathlib import Path

import pytest
import timm
import torch
import torchvision

from crossbatch.engine.config import Device, load_config, resolve
from crossbatch.engine.tasks.build import build_model
from crossbatch.engine.tasks.pretrain import start_from
from tests.launch.test_pretrain import TINY, call
from tests.small_runs import BASE, LARS, RESNET, fsdp, parameters, train, zero

RUN = [*TINY, "-a", "resnet18", "--set=crossbatch.evaluate.knn_every_epochs=1"]


def metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_a_run_continues_from_the_weights_of_another(monkeypatch, capsys, tmp_path):
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    shapes = f"--data=shapes://{tmp_path}/images?train=64&val=100&size=16"
    assert call(monkeypatch, *RUN, shapes, "--out", first) == 0
    # The heads are others: a seed of its own draws them.
    assert call(monkeypatch, *RUN, shapes, "--out", second, "--init", first, "--seed", 5, "--steps", 1) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "both backbones start from resnet18" in said and "tensors loaded, none missing" in said
    assert "projector, predictor: new" in said and "optimizer" in said  # what was ignored
    assert metrics(second)[0]["step"] == 0
    assert metrics(second)[0]["knn_top1"] == pytest.approx(metrics(first)[-1]["knn_top1"], abs=0.5)
    assert call(monkeypatch, *RUN, shapes, "--out", third, "--seed", 5, "--steps", 1) == 0
    assert abs(metrics(third)[0]["knn_top1"] - metrics(first)[-1]["knn_top1"]) > 0.5
    checkpoint = sorted(second.glob("checkpoints/step-*"))[-1]
    for folder in (second, checkpoint):
        assert json.loads((folder / "config.json").read_text())["crossbatch"]["model"]["init"] == str(first)
    # The weights are gone, and the run goes on.
    shutil.move(first, tmp_path / "elsewhere")
    assert call(monkeypatch, *RUN, shapes, "--out", second, "--init", first, "--seed", 5, "--steps", 2) == 0
    assert "both backbones start from" not in capsys.readouterr().out
    assert metrics(second)[-1]["step"] == 2


def features_after_init(file: Path, arch: str, args: dict) -> torch.Tensor:
    """Return the features of the online encoder, after checking that those of the momentum encoder are the same."""
    keys = [f"crossbatch.model.{key}" for key in (f"arch={arch}", f"init={file}", f"backbone_args={json.dumps(args)}")]
    keys += ["crossbatch.model.stem=imagenet", "crossbatch.data.image_size=224"]
    cfg = resolve(load_config(None, [*BASE, *keys]), 1, Device("cpu"))
    model = build_model(cfg)
    start_from(model, cfg)
    model.eval()
    images = torch.randn(4, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert model.momentum.backbone(images).equal(model.online.backbone(images))
        return model.online.backbone(images)


def features_agree(file: str, library: str, arch: str) -> tuple[float, float]:
    """Return the largest difference of a feature, and the largest feature, on a rank of a pool."""
    torch.manual_seed(3)
    args = {}
    if library == "torchvision":
        theirs = torchvision.models.get_model(arch)
    elif arch == "resnet18":
        theirs = timm.create_model("resnet18", num_classes=10)
    else:
        theirs, args = timm.create_model("vit_small_patch16_224", num_classes=10), {"num_heads": 6}
    torch.save(theirs.state_dict(), file)
    if library == "torchvision":
        theirs.fc = torch.nn.Identity()
    else:
        theirs.reset_classifier(0)
    images = torch.randn(4, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = theirs.eval()(images)
    ours = features_after_init(Path(file), arch, args)
    return (ours - want).abs().max().item(), want.abs().max().item()


@pytest.mark.parametrize(
    ("library", "arch"), [("torchvision", "resnet18"), ("timm", "resnet18"), ("timm", "vit_small")]
)
def test_features_are_those_of_the_file_before_the_first_step(one_rank, tmp_path, library, arch):
    for difference, largest in one_rank.run(features_agree, str(tmp_path / "weights.pth"), library, arch):
        assert difference <= 1e-5 * max(1.0, largest)


@pytest.mark.parametrize("backend", [zero(0), zero(3), fsdp(3)])
def test_a_frozen_backbone_stays_until_its_time(two_ranks, tmp_path, backend):
    overrides = [
        *RESNET,
        *LARS,
        *backend,
        "crossbatch.schedule.freeze_backbone_epochs=0.75",
        "crossbatch.checkpoint.keep=9",
    ]
    overrides += ["crossbatch.schedule.warmup_epochs=0", "crossbatch.checkpoint.every_steps=1"]
    found = {}
    for steps in (1, 3, 4):  # of 4 an epoch; each goes on from the last one
        two_ranks.run(train, overrides, str(tmp_path / "run"), steps)
        found[steps] = parameters(tmp_path / "run")
    for name, before in found[1].items():
        if "backbone." in name:
            assert before.equal(found[3][name]), name
    moved = [name for name in found[1] if not found[1][name].equal(found[3][name])]
    assert any("predictor" in name for name in moved) and any("batchformer" in name for name in moved)
    online = "parameters.online.backbone.conv1.weight"
    name = next(name for name in found[1] if online.endswith(name))
    assert not found[3][name].equal(found[4][name])


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (lambda: torchvision.models.resnet34(), [], "is not a resnet18"),
        (None, [], "no such file or folder"),
        (lambda: torch.nn.Linear(2, 2), [], "holds no backbone"),
        (lambda: timm.create_model("vit_small_patch16_224"), ["-a", "vit_small", "--set=crossbatch.model.backbone_args={}"],
         "does not say how many heads"),
    ],
)  # fmt: skip
def test_other_weights_are_refused(monkeypatch, capsys, tmp_path, make, arguments, message):
    file = tmp_path / "weights.pth"
    if make:
        torch.save(make().state_dict(), file)
    given = [*TINY, "-a", "resnet18", '--set=crossbatch.model.backbone_args={"width": 64}', *arguments]
    assert call(monkeypatch, *given, "--init", file, "--out", tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert f"--init {file}" in error and message in error and "--checkpoint" not in error
    assert not list((tmp_path / "run").glob("checkpoints/*"))


def test_a_run_of_another_width_is_refused(monkeypatch, capsys, tmp_path):
    assert call(monkeypatch, *RUN, "--out", tmp_path / "narrow", "--steps", 1) == 0
    wide = [*RUN, "--set=crossbatch.model.backbone_args={}", "--init", tmp_path / "narrow", "--out", tmp_path / "wide"]
    assert call(monkeypatch, *wide) == 2
    assert """--set crossbatch.model.backbone_args='{"width": 8}'""" in capsys.readouterr().err


def test_freezing_the_whole_run_is_refused(monkeypatch, capsys):
    assert call(monkeypatch, "--dry-run", *TINY, "--set=crossbatch.schedule.freeze_backbone_epochs=2") == 2
    assert "crossbatch.schedule.freeze_backbone_epochs: given 2 of 2 epochs" in capsys.readouterr().err
