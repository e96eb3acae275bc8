"""schedule.freeze_backbone_epochs: nothing of the backbone changes until its time; its optimizer starts from nothing then."""

import json
from pathlib import Path
from unittest import mock

import pytest
import torch

from crossbatch.engine import checkpoint
from crossbatch.models import MoCo
from tests.small_runs import ADAMW, LARS, RESNET, VIT, fsdp, name_of, run, slow_unless, train, zero

FROZEN = [
    "crossbatch.schedule.freeze_backbone_epochs=0.75",  # 3 steps of an epoch's 4
    "crossbatch.schedule.warmup_epochs=0",
    "crossbatch.checkpoint.every_steps=1",
    "crossbatch.checkpoint.asynchronous=false",  # on a slow disk, a save could be left out
    "crossbatch.checkpoint.keep=9",
    "gradient_clipping=0.5",
]
SHALLOW = [*VIT, 'crossbatch.model.backbone_args={"embed_dim": 24, "depth": 1, "num_heads": 2, "patch_size": 4}']
OFTEN = [(zero(1), ADAMW), (fsdp(3), ADAMW)]


def cases():
    for backend in [*map(zero, range(4)), *map(fsdp, range(4)), zero(1, "cpu"), zero(3, "cpu")]:
        for optimizer in (LARS, ADAMW):
            model = RESNET if optimizer is LARS else SHALLOW
            often = (backend, optimizer) in OFTEN
            yield pytest.param(
                backend, optimizer, model, marks=slow_unless(often), id=name_of(backend) + name_of(optimizer)
            )


def tensors(out: Path, step: int) -> dict[str, torch.Tensor]:
    found = checkpoint.read(out / f"checkpoints/step-{step:08}", "")
    return {name: tensor for name, tensor in found.items() if not name.startswith("random.")}


@pytest.mark.parametrize(("backend", "optimizer", "model"), [*cases()])
def test_a_frozen_backbone_moves_from_its_own_first_step(two_ranks, tmp_path, backend, optimizer, model):
    overrides = [*model, *optimizer, *backend, *FROZEN, "train_micro_batch_size_per_gpu=3"]
    two_ranks.run(train, overrides, str(tmp_path / "run"), 5)
    before, thawed = tensors(tmp_path / "run", 3), tensors(tmp_path / "run", 4)
    for step in (1, 2, 3):
        for name, tensor in tensors(tmp_path / "run", step).items():
            if name.startswith("optimizer.") and ".backbone." in name:
                assert not tensor.any(), (step, name)
            elif name.startswith("parameters.online.backbone."):
                assert tensor.equal(before[name]), (step, name)
                assert tensor.equal(before[name.replace("online", "momentum")]), (step, name)
            elif step < 3 and name.startswith(("parameters.predictor", "parameters.batchformer", "optimizer.")):
                assert not tensor.equal(before[name]) or not tensor.any(), (step, name)
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    (lr,) = (line["lr"] for line in lines if line["step"] == 4)
    moved = 0
    for key in [name for name in thawed if name.startswith("parameters.online.backbone.")]:
        name, w = key.removeprefix("parameters."), before[key]
        if optimizer is LARS:
            velocity = thawed[f"optimizer.mu.{name}"]
            if w.dim() > 1:  # ||q d|| = tc ||w||; of an older velocity there would be more
                torch.testing.assert_close(velocity.norm(), 0.1 * w.norm())
            want = w - lr * velocity
        elif (average := f"optimizer.exp_avg.{name}") in thawed:  # not the patches, which never train
            g = thawed[average] / 0.1
            torch.testing.assert_close(thawed[f"optimizer.exp_avg_sq.{name}"], g**2 * 0.001)
            want = w * (1 - lr * 0.1) - lr * g / (g.abs() + 0.1)
        else:
            want = w
        torch.testing.assert_close(thawed[key], want)
        moved += not w.equal(thawed[key])
    assert moved > 5
    end = tensors(tmp_path / "run", 5)
    for step in (2, 4):
        out, start = tmp_path / f"from {step}", tmp_path / f"run/checkpoints/step-{step:08}"
        assert two_ranks.run(run, overrides, str(out), 5, str(start)) == ["", ""]
        resumed = tensors(out, 5)
        assert not [name for name, tensor in end.items() if not tensor.equal(resumed[name])]


def passes_with_gradient(out: str) -> list[bool]:
    seen, embed = [], MoCo.embed

    def spy(self, images):
        seen.append(torch.is_grad_enabled())
        return embed(self, images)

    with mock.patch.object(MoCo, "embed", spy):
        train([*RESNET, *LARS, *zero(0), *FROZEN], out, 5)
    return seen


def test_a_frozen_backbone_does_not_go_backward(one_rank, tmp_path):
    assert one_rank.run(passes_with_gradient, str(tmp_path)) == [[False, False, False, True, True]]
