"""Fits the few constants of the model to published runs, and tests them on runs that they were not fitted to.

A step of b images on each of N GPUs, g of them in a node, takes

    T = fixed + c b + contention b (g - 1) + wait(N) + exposed communication

    fixed         what a step takes however few its images. One number, for a V100, less where the memory is faster
    c             what an image takes; from the smaller run, or from the roofline (engine/planning/prediction.py)
    contention    what every further GPU of a node costs each image; one number for a framework with its loader
    wait          stragglers; the share of time that a rank is interrupted is one number for frameworks that compile or capture
                  their step ("graph"), one for those in which Python drives it ("eager")
    communication nothing fitted: bandwidths and latencies of the catalogue

published.csv: training images/s of one code on the same GPUs, a known smaller run and a wanted larger one. MLPerf's are medians
over the logs of a submission. SwAV (2x224 + 6x96 px) runs 53 norms once for each crop size and one more; apex's and torch 1.4's
took five collectives each (NVIDIA/apex #980). Not in it, because what they need is not published: pytorch #39358 (synchronised
norms "2x", no sizes), mosaicml/composer #1391 (no step time), MoCo v3, Fast-MoCo, Barlow Twins and others (one size each).

published_one_gpu.csv: supervised training, 224 px; none in TF32, which our runs never ask for (the roofline has it 1.4 times
too fast).
"""

import csv
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter
from scipy.optimize import least_squares

from crossbatch.engine.nested import nest
from crossbatch.engine.planning.catalogue import GPUS, machines
from crossbatch.engine.planning.communication import collective_ms, wait_ms
from crossbatch.engine.planning.prediction import BACKWARD, fixed_ms_on, work_of

Constants = dict[str, float]
Predict = Callable[[Any, Constants], float]

BUCKETS = 20  # that gradients travel in during the backward pass: MLPerf's setting; DDP's 25 MB make about as many
PULL = 0.01  # towards where a fit starts, beside the rows' errors: what no row speaks about stays there
# The contention of each framework in ms, and the share of time that each kind of step is interrupted.
START = {"fixed_ms": 4.0, "pytorch": 0.007, "tensorflow": 0.007, "mxnet": 0.007, "paddle": 0.007}
START |= {"eager": 0.03, "graph": 0.003}
START_ONE_GPU = {"of_peak": 0.5, "moves": 20.0}


@dataclass(frozen=True)
class Run:
    """Describes a published training run; `batch` is the images of one GPU in a step."""

    gpus: int
    nodes: int
    batch: int
    images_per_s: float
    norms_over: int  # ranks that share the statistics of a norm; 0: norms are not synchronised

    @property
    def step_ms(self) -> float:
        return 1000 * self.gpus * self.batch / self.images_per_s


@dataclass(frozen=True)
class ScalingRow:
    """Describes a published pair of runs: from the known smaller one, the wanted larger one is predicted."""

    name: str
    stack: str  # whose contention within a node
    noise: str  # "graph" or "eager"
    gpu: str
    network: str
    known: Run
    wanted: Run
    gradient_mb: float
    calls: int  # collectives of the norms in a step
    source: str

    @property
    def images_per_s(self) -> float:
        return self.wanted.images_per_s


@dataclass(frozen=True)
class OneGpuRow:
    """Describes a published run on one GPU."""

    arch: str
    gpu: str
    precision: str
    score_heads: int  # of a ViT whose attention kept its scores (before PyTorch 2)
    images_per_s: float
    source: str

    @property
    def name(self) -> str:
        return f"{self.arch}, {self.gpu}, {self.precision}"


def _read(name: str, rows: TypeAdapter) -> Any:
    with (Path(__file__).parent / name).open(newline="", encoding="utf-8") as file:
        return rows.validate_python([nest(line) for line in csv.DictReader(file)])


ROWS: list[ScalingRow] = _read("published.csv", TypeAdapter(list[ScalingRow]))
SINGLE: list[OneGpuRow] = _read("published_one_gpu.csv", TypeAdapter(list[OneGpuRow]))


def predict(row: ScalingRow, constants: Constants) -> float:
    """Predict images/s of the wanted run from the known one."""
    known, wanted = row.known, row.wanted
    fixed = fixed_ms_on(GPUS[row.gpu], constants["fixed_ms"])
    work = known.step_ms - fixed - _beside_ms(row, known, known.step_ms, constants)
    larger = wanted.batch / known.batch
    step = fixed + work * larger + _beside_ms(row, wanted, known.step_ms * larger, constants)
    return 1000 * wanted.gpus * wanted.batch / step


def _beside_ms(row: ScalingRow, run: Run, step_ms: float, constants: Constants) -> float:
    """Predict what of a step is neither fixed nor computation; `step_ms` is about what the whole step takes."""
    contention = constants[row.stack] * run.batch * (run.gpus // run.nodes - 1)
    # Gradients travel in buckets during the backward pass: exposed is the last, or what does not fit beside the pass.
    at = machines(row.gpu, run.gpus, run.nodes, row.network)
    bucket = collective_ms("all-reduce", 1e6 * row.gradient_mb / BUCKETS, at)
    exposed = max(bucket, BUCKETS * bucket - BACKWARD * step_ms)
    if not run.norms_over:
        return contention + exposed + wait_ms(run.gpus, 1, step_ms, constants[row.noise])
    nodes = 1 if run.norms_over <= run.gpus // run.nodes else run.nodes
    tiny = row.calls * collective_ms("all-gather", 0.0, machines(row.gpu, run.norms_over, nodes, row.network))
    # A norm is five collectives, but ranks wait for each other twice: forward and backward.
    return contention + exposed + tiny + wait_ms(run.norms_over, 2 * row.calls // 5, step_ms, constants[row.noise])


def predict_one_gpu(row: OneGpuRow, constants: Constants) -> float:
    """Predict images/s of supervised training on one GPU, by the roofline."""
    work = work_of(row.precision, row.arch, 224, published=True)
    # Scores of 12 blocks on 197 tokens: probabilities in fp32, as softmax gives them, and in fp16, as the product takes them.
    work = replace(work, kept=work.kept + 12 * row.score_heads * 197**2 * 6.0)
    return 1 / work.seconds(GPUS[row.gpu], row.precision, **constants)[0]


MANY_GPUS = (ROWS, predict, START)
ONE_GPU = (SINGLE, predict_one_gpu, START_ONE_GPU)


def fit(rows: Sequence[Any], predict: Predict, start: Constants, near: Constants | None = None) -> Constants:
    """Fit constants by least squares of the logarithms of predicted over published; large errors count less.

    The search begins at `near`, which saves time, or at `start`.
    """
    middle, begin = (np.log(list(constants.values())) for constants in (start, near or start))

    def named(x: np.ndarray) -> Constants:
        return dict(zip(start, np.exp(x).tolist(), strict=True))

    def errors(x: np.ndarray) -> list[float]:
        constants = named(x)
        return [math.log(predict(row, constants) / row.images_per_s) for row in rows] + list(PULL * (x - middle))

    return named(least_squares(errors, begin, loss="soft_l1", f_scale=0.05, diff_step=1e-3, xtol=1e-4, ftol=1e-6).x)


def leave_out(rows: Sequence[Any], predict: Predict, start: Constants, by_publication: bool = False) -> np.ndarray:
    """Predict every row by constants fitted to the others, and return the errors: predicted / published - 1.

    With `by_publication` it is harder: the constants have not seen any row of the same publication, the name's first word.
    """
    errors, near = [], fit(rows, predict, start)
    for row in rows:
        key = row.name.split()[0] if by_publication else row.name
        others = [other for other in rows if not other.name.startswith(key)]
        errors.append(predict(row, fit(others, predict, start, near)) / row.images_per_s - 1)
    return np.array(errors)


def linear_scaling(rows: Sequence[ScalingRow]) -> np.ndarray:
    """Return the errors of what one would guess without a model: that each GPU stays as fast as in the known run."""
    guesses = [row.known.images_per_s / row.known.gpus * row.wanted.gpus for row in rows]
    return np.array(guesses) / [row.images_per_s for row in rows] - 1
