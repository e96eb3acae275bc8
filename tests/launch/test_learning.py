"""A short run of the quickstart's recipe has to learn: what its last steps reach is stated, and --init starts from there.

Each bound is the mean of runs with four seeds, minus or plus four standard deviations between them. k-NN accuracy alone tells
little after so few steps: its gain differs by 3 points between seeds, and features that only spread gain 4. The loss and the
similarities of views tell a run that learns from one that does not. Seen, as (loss, gap of similarities, points of k-NN), here
and in `pytest tests/launch/test_learning.py -m slow -s`, which breaks each on purpose:

    seeds 0 to 3                              (5.10, 0.062, 8.9) (5.01, 0.068, 4.1) (4.98, 0.070, 10.0) (5.11, 0.060, 2.2)
    keys of other images in the loss          (5.59, 0.000, 6.9)
    a momentum encoder that is never updated  (5.37, 0.032, 7.0) (5.32, 0.035, 4.1)
    both views of an image the same           (0.09, 0.866, 4.5) (0.10, 0.826, 3.2)
    an optimizer that goes the wrong way      (19.7, -0.115, 4.4)
"""

import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

SHORTER = [
    "--set=crossbatch.data.path=shapes://{}?train=1600&val=800&size=48",
    "--set=crossbatch.data.image_size=40",
    "--set=train_batch_size=32",
    "--set=crossbatch.batchformer.group_size=32",
    "--set=crossbatch.schedule.epochs=5",
    "--set=crossbatch.evaluate.knn_every_epochs=5",
    "--set=crossbatch.evaluate.every_epochs=5",
    "--set=crossbatch.log.every_steps=1",
    "--set=crossbatch.precision=fp32",
    "--set=optimizer.params.base_lr=8e-3",
]
LAST = 30  # steps, whose mean is compared
LOSS = 4.80, 5.31
GAP = 0.046  # at least, between the mean similarity of the views of an image and of different images
KNN = 14.5  # percent at least; chance is 12.5, and the untrained network has 20


# Code for the process that trains, before it starts.
FAULTS = {
    "keys of other images in the loss": """
from crossbatch.models import MoCo
contrast = MoCo.contrast
MoCo.contrast = lambda self, online, momentum, *more: contrast(self, online, momentum.roll(1, 0), *more)
""",
    "a momentum encoder that is never updated": """
from crossbatch.engine.sharding.zero import ZeroBackend
ZeroBackend.update_momentum = lambda self, momentum: None
""",
    "both views of an image the same": """
from crossbatch.engine.step import TrainStep
step = TrainStep.__call__
TrainStep.__call__ = lambda self, views: step(self, views[:1].expand_as(views).contiguous())
""",
    "an optimizer that goes the wrong way": """
from crossbatch.engine import step
step.set_learning_rate = lambda optimizer, lr, _: [group.update(lr=-lr) for group in optimizer.param_groups]
""",
}
START = """
import sys
from crossbatch.engine.runtime.exit_codes import run_main
from crossbatch.launch.pretrain import main
sys.argv[0] = "launch/pretrain.py"
run_main(main)
"""


def train(out: Path, *more: str | Path, fault: str = "") -> list[dict]:
    """Return the lines of metrics.jsonl."""
    arguments = [argument.format(out.parent / "shapes") for argument in SHORTER]
    command = [sys.executable, "-c", fault + START, "--deepspeed_config", "ds_configs/quickstart.json"]
    subprocess.run([*command, "--out", out, *arguments, *more], check=True, timeout=900)
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def has_learned(run: list[dict]) -> bool:
    loss, positive, negative = (
        statistics.mean(line[key] for line in run[-LAST:])
        for key in ("loss", "positive_similarity", "negative_similarity")
    )
    print(f"loss {loss:.2f}, gap {positive - negative:.3f}, k-NN {run[-1]['knn_top1']:.2f} %")
    return LOSS[0] < loss < LOSS[1] and positive - negative > GAP and run[-1]["knn_top1"] > KNN


@pytest.mark.long
def test_a_short_run_learns(tmp_path):
    run = train(tmp_path / "run")
    assert has_learned(run)
    again = train(tmp_path / "second", "--init", tmp_path / "run", "--seed", "5", "--steps", "1")
    assert again[0]["knn_top1"] == pytest.approx(run[-1]["knn_top1"], abs=0.5)


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_run_does_not(tmp_path, fault):
    assert not has_learned(train(tmp_path / "run", fault=FAULTS[fault]))
