"""A short run of the quickstart's recipe has to learn: what its last steps reach is stated, and --init starts from there.

Each bound is the mean of runs with four seeds, minus or plus four standard deviations between them. k-NN accuracy alone tells
little after so few steps: its gain differs by 3 points between seeds, and features that only spread gain 4. The loss and the
similarities of views tell a run that learns from one that does not. Seen, as (loss, gap of similarities, points of k-NN):

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


def test_a_short_run_learns(tmp_path):
    arguments = [argument.format(tmp_path / "shapes") for argument in SHORTER]
    command = [sys.executable, "launch/pretrain.py", "--deepspeed_config", "ds_configs/quickstart.json"]

    def lines(out: Path, *more: str | Path) -> list[dict]:
        subprocess.run([*command, "--out", out, *arguments, *more], check=True, timeout=900)
        return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]

    run = lines(tmp_path / "run")
    loss, positive, negative = (
        statistics.mean(line[key] for line in run[-LAST:])
        for key in ("loss", "positive_similarity", "negative_similarity")
    )
    assert LOSS[0] < loss < LOSS[1]
    assert positive - negative > GAP
    after = run[-1]["knn_top1"]
    assert after > KNN
    again = lines(tmp_path / "second", "--init", tmp_path / "run", "--seed", "5", "--steps", "1")
    assert again[0]["knn_top1"] == pytest.approx(after, abs=0.5)
