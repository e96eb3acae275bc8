"""The few constants of the model, fitted to published runs, and how well they predict runs that they were not fitted to.

A step of b images on each of N GPUs, g of them in a node:

    T = fixed + c b + contention b (g - 1) + wait(N) + exposed communication

    fixed         what a step takes however few its images. One number, for a V100, less where the memory is faster
    c             what an image takes; from the smaller run, or from the roofline (engine/planning/compute.py)
    contention    what every further GPU of a node costs each image; one number for a framework with its loader
    wait          stragglers; the share of time that a rank is interrupted is one number for frameworks that compile or capture
                  their step ("graph"), one for those in which Python drives it ("eager")
    communication nothing fitted: bandwidths and latencies of the catalogue

published.csv: training images/s of one code on the same GPUs, a known smaller run and a wanted larger one. MLPerf's are medians
over the logs of a submission. SwAV (2x224 + 6x96 px) runs 53 norms once for each crop size and one more; apex's and torch 1.4's
took five collectives each (NVIDIA/apex #980). `norms_over`: ranks that share a norm's statistics, 0 if each keeps its own.
Not in it, because what they need is not published: pytorch #39358 (synchronised norms "2x", no sizes), mosaicml/composer #1391
(no step time), MoCo v3, Fast-MoCo, Barlow Twins and others (one size each).

published_one_gpu.csv: supervised training, 224 px; none in TF32, which our runs never ask for (the roofline has it 1.4 times
too fast). `score_heads`: heads of a ViT whose attention kept its scores (before PyTorch 2).

Leave one out: every row is predicted with constants fitted to all others.
"""

import csv
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from scipy.optimize import least_squares

from crossbatch.engine.planning.catalogue import find_gpu, machines
from crossbatch.engine.planning.communication import collective_ms, wait_ms
from crossbatch.engine.planning.compute import Efficiency, work_of
from crossbatch.engine.planning.prediction import BACKWARD, Constants

BUCKETS = 20  # that gradients travel in during the backward pass: MLPerf's setting; DDP's 25 MB make about as many
# Where fits start, and where what no row speaks about stays.
START_FIXED_MS, START_CONTENTION_MS, START_SHARE = 4.0, 0.007, {"graph": 0.003, "eager": 0.03}
_PULL = 0.01  # of the start, beside the rows' errors, in natural logarithms
_FOLDER = Path(__file__).parent

R = TypeVar("R", "Row", "Single")


@dataclass(frozen=True)
class Run:
    """A published training run."""

    gpus: int
    nodes: int
    batch: int  # images of a GPU
    images_per_s: float
    norms_over: int = 0  # ranks that share the statistics of a norm; 0: norms are not synchronised

    @property
    def step_ms(self) -> float:
        return 1000 * self.gpus * self.batch / self.images_per_s


@dataclass(frozen=True)
class Row:
    """A published pair of runs: the smaller is known, the larger is wanted."""

    name: str
    stack: str  # whose contention within a node
    noise: str  # "graph" or "eager"
    gpu: str
    network: str | None  # None: that of the catalogue
    known: Run
    wanted: Run
    gradient_mb: float
    calls: int  # collectives of the norms in a step
    source: str

    @property
    def publication(self) -> str:
        return self.name.split()[0]

    @property
    def synchronisations(self) -> int:
        """Points of a step where ranks wait for each other: two for each synchronised norm, of five collectives each."""
        return 2 * self.calls // 5 or 1

    @property
    def images_per_s(self) -> float:
        return self.wanted.images_per_s


@dataclass(frozen=True)
class Single:
    """A published run on one GPU."""

    arch: str
    gpu: str
    precision: str
    score_heads: int
    images_per_s: float
    source: str

    @property
    def name(self) -> str:
        return f"{self.arch}, {self.gpu}, {self.precision}"


@dataclass(frozen=True)
class Tested:
    """A published row, predicted by constants that have not seen it, and by those that have. Errors are ratios - 1."""

    name: str
    published: float
    predicted: float
    error: float
    error_fitted: float
    source: str


@dataclass(frozen=True)
class Fit:
    """Constants of every framework in the rows."""

    fixed_ms: float  # on a V100
    contention_ms: dict[str, float]  # by stack
    share: dict[str, float]  # by noise

    def of(self, stack: str, noise: str, efficiency: Efficiency) -> Constants:
        return Constants(self.fixed_ms, self.contention_ms[stack], self.share[noise], efficiency)


def _read(name: str) -> list[dict[str, Any]]:
    with (_FOLDER / name).open(newline="", encoding="utf-8") as file:
        return [{key: _number(value) for key, value in line.items()} for line in csv.DictReader(file)]


def _number(text: str) -> Any:
    return float(text) if "." in text and text.replace(".", "").isdigit() else int(text) if text.isdigit() else text


def _row(line: dict[str, Any]) -> Row:
    fields = ("gpus", "nodes", "batch", "images_per_s", "norms_over")
    line["known"], line["wanted"] = (Run(*(line.pop(before + name) for name in fields)) for before in ("known_", ""))
    return Row(**line)


ROWS = [_row(line) for line in _read("published.csv")]
SINGLE = [Single(**line) for line in _read("published_one_gpu.csv")]


def predict(row: Row, fit: Fit) -> float:
    """Predict images/s of the wanted run from the known one."""
    known, wanted = row.known, row.wanted
    constants = fit.of(row.stack, row.noise, Efficiency(1, 1))
    fixed = constants.fixed_on(find_gpu(row.gpu))
    work = known.step_ms - fixed - _beside(row, known, known.step_ms, constants)
    larger = wanted.batch / known.batch
    step = fixed + work * larger + _beside(row, wanted, known.step_ms * larger, constants)
    return 1000 * wanted.gpus * wanted.batch / step


def _beside(row: Row, run: Run, step_ms: float, constants: Constants) -> float:
    """ms of a step that are neither fixed nor computation; `step_ms` is about what the step takes."""
    contention = constants.contention_ms * run.batch * (run.gpus // run.nodes - 1)
    # Gradients travel in buckets during the backward pass: exposed is the last, or what does not fit beside the pass.
    bucket = _collective_ms(row.gpu, run.gpus, run.nodes, row.network, "all-reduce", 1e6 * row.gradient_mb / BUCKETS)
    exposed = max(bucket, BUCKETS * bucket - BACKWARD * step_ms)
    if not run.norms_over:
        return contention + exposed + wait_ms(run.gpus, 1, step_ms, constants.share)
    nodes = 1 if run.norms_over <= run.gpus // run.nodes else run.nodes
    tiny = row.calls * _collective_ms(row.gpu, run.norms_over, nodes, row.network, "all-gather", 0.0)
    return contention + exposed + tiny + wait_ms(run.norms_over, row.synchronisations, step_ms, constants.share)


@functools.cache
def _collective_ms(gpu: str, gpus: int, nodes: int, network: str | None, kind: str, size: float) -> float:
    return collective_ms(kind, size, machines(gpu, gpus, nodes, network))


def fit(rows: Sequence[Row] = tuple(ROWS), start: Fit | None = None) -> Fit:
    """Fit by least squares of the logarithms of predicted over published, large errors counting less."""
    stacks, noises = (list(dict.fromkeys(getattr(row, name) for row in ROWS)) for name in ("stack", "noise"))
    default = Fit(START_FIXED_MS, dict.fromkeys(stacks, START_CONTENTION_MS), START_SHARE)

    def vector(of: Fit) -> np.ndarray:
        return np.log([of.fixed_ms, *(of.contention_ms[s] for s in stacks), *(of.share[n] for n in noises)])

    def unpacked(x: np.ndarray) -> Fit:
        fixed_ms, *values = np.exp(x).tolist()
        return Fit(fixed_ms, dict(zip(stacks, values)), dict(zip(noises, values[len(stacks) :])))  # noqa: B905

    def errors(x: np.ndarray) -> list[float]:
        now = unpacked(x)
        return [math.log(predict(row, now) / row.images_per_s) for row in rows] + list(_PULL * (x - vector(default)))

    begin = vector(start or default)
    return unpacked(least_squares(errors, begin, loss="soft_l1", f_scale=0.05, diff_step=1e-3, xtol=1e-4, ftol=1e-6).x)


def predict_single(row: Single, efficiency: Efficiency) -> float:
    """Predict images/s of supervised training on one GPU, by the roofline."""
    work = work_of(row.arch, 224, row.precision)
    # Scores of 12 blocks on 197 tokens: probabilities in fp32, as softmax gives them, and in fp16, as the product takes them.
    work = replace(work, kept=work.kept + 12 * row.score_heads * 197**2 * 6.0)
    return 1 / work.seconds(find_gpu(row.gpu), row.precision, efficiency)[0]


def fit_efficiency(rows: Sequence[Single] = tuple(SINGLE), start: Efficiency | None = None) -> Efficiency:
    def errors(x: np.ndarray) -> list[float]:
        return [math.log(predict_single(row, Efficiency(*np.exp(x))) / row.images_per_s) for row in rows]

    begin = np.log([0.5, 20.0] if start is None else [start.of_peak, start.moves])
    return Efficiency(*np.exp(least_squares(errors, begin, loss="soft_l1", f_scale=0.05, diff_step=1e-3).x).tolist())


def leave_one_out() -> list[Tested]:
    return _leave_out(ROWS, fit, predict, lambda row: row.name)


def leave_publication_out() -> list[Tested]:
    """Harder: constants that have not seen any row of the same publication, nor its framework, if nobody else has it."""
    return _leave_out(ROWS, fit, predict, lambda row: row.publication)


def leave_one_out_single() -> list[Tested]:
    return _leave_out(SINGLE, fit_efficiency, predict_single, lambda row: row.name)


def _leave_out(
    rows: list[R], fit: Callable[..., Any], predict: Callable[[R, Any], float], key: Callable[[R], str]
) -> list[Tested]:
    """Predict each row by constants fitted to the rows with another key."""
    everything = fit(rows)
    without = {name: fit([row for row in rows if key(row) != name], everything) for name in {key(row) for row in rows}}
    tested = []
    for row in rows:
        rate, fitted = predict(row, without[key(row)]), predict(row, everything)
        errors = rate / row.images_per_s - 1, fitted / row.images_per_s - 1
        tested.append(Tested(row.name, row.images_per_s, rate, *errors, row.source))
    return tested


def typical(tested: Sequence[Tested]) -> tuple[float, float]:
    """Return the median and the largest absolute error."""
    errors = np.abs([row.error for row in tested])
    return float(np.median(errors)), float(errors.max())
