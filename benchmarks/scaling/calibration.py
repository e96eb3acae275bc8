"""The few constants of the model, fitted to published runs, and how well they predict the runs that they were not fitted to.

A step of b images on each of N GPUs, g of them in a node:

    T = fixed + c b + contention b (g - 1) + wait(N) + exposed communication

    fixed         what a step takes however few its images: weights, gradients, the optimizer. One number, for a V100, and
                  less where the memory is faster
    c             what an image takes; from the run that is known, or from the roofline (compute.py)
    contention    what every further GPU of a node costs each image: cores, memory and power of a host, shared. One number for
                  a framework with its loader
    wait          stragglers.py; the share of time that a rank is interrupted is one number for frameworks that compile or
                  capture their step, one for those in which Python drives it
    communication nothing fitted: bandwidths and latencies of the catalogue (communication.py)

Leave one out: every row is predicted with constants fitted to all others.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import least_squares

from benchmarks.scaling.catalogue import GPUS, Gpu, find_gpu, machines
from benchmarks.scaling.communication import Layout, seconds
from benchmarks.scaling.compute import Efficiency, work_of_arch
from benchmarks.scaling.published import ROWS, SINGLE, Row, Run, Single
from benchmarks.scaling.stragglers import wait_ms

BUCKETS = (
    20  # that gradients travel in while the backward pass runs: MLPerf's setting, and DDP's 25 MB make about as many
)
BACKWARD = 2 / 3  # of the computation
# Where fits start, and where what no row speaks about stays.
START_FIXED_MS, START_CONTENTION_MS, START_SHARE = 4.0, 0.007, {"graph": 0.003, "eager": 0.03}
# Ranks of a CPU: gloo between processes of one machine (assumed).
LOOPBACK = {"inside": 2.0, "between": 2.0, "hop_us": (30.0, 30.0), "network_us": (30.0, 30.0)}
_PULL = 0.01  # of the start, beside the rows' errors, in natural logarithms


@dataclass(frozen=True)
class Constants:
    fixed_ms: float  # on a V100
    contention_ms: dict[str, float]  # by stack, for an image and a further GPU
    share: dict[str, float]  # by noise

    def fixed_on(self, gpu: Gpu) -> float:
        """ms: weights, gradients and velocities are read and written once a step, so it goes with the bandwidth."""
        return self.fixed_ms * GPUS["v100-32g"].bandwidth / gpu.bandwidth

    def with_stack(self, name: str, stack: str, noise: str) -> "Constants":
        """And another, which is as those two."""
        contention = {**self.contention_ms, name: self.contention_ms[stack]}
        return Constants(self.fixed_ms, contention, {**self.share, name: self.share[noise]})

    def table(self) -> list[tuple[str, str, str]]:
        """(name, value, meaning)."""
        return [
            ("fixed", f"{self.fixed_ms:.1f} ms", "of a step, however few its images, on a V100; goes with bandwidth"),
            *(
                (f"contention, {name}", f"{1000 * value:.1f} us", "of an image, for every further GPU of a node")
                for name, value in self.contention_ms.items()
            ),
            *(
                (f"interrupted, {name}", f"{100 * value:.1f} %", "of a rank's time, in pauses of 3 ms")
                for name, value in self.share.items()
            ),
        ]


@dataclass(frozen=True)
class Tested:
    """A published row, predicted by constants that have not seen it, and by those that have. Errors are ratios - 1."""

    name: str
    published: float
    predicted: float
    error: float
    error_fitted: float
    source: str


def predict(row: Row, constants: Constants) -> float:
    """Images/s of the wanted run, from the known one."""
    known, wanted = row.known, row.wanted
    fixed = 0.0 if row.gpu == "cpu" else constants.fixed_on(find_gpu(row.gpu))
    work = known.step_ms - fixed - _beside(row, known, known.step_ms, constants)
    again = work * wanted.batch / known.batch
    step = fixed + again + _beside(row, wanted, known.step_ms * wanted.batch / known.batch, constants)
    return 1000 * wanted.gpus * wanted.batch / step


def _beside(row: Row, run: Run, step_ms: float, constants: Constants) -> float:
    """ms of a step that are neither fixed nor computation; `step_ms` is about what the step takes."""
    contention = constants.contention_ms[row.stack] * run.batch * (run.gpus // run.nodes - 1)
    share = constants.share[row.noise]
    # Gradients travel in buckets during the backward pass: exposed is the last, or what does not fit beside the pass.
    bucket = _collective_ms(row.gpu, run.gpus, run.nodes, row.network, "all-reduce", row.gradient_bytes / BUCKETS)
    exposed = max(bucket, BUCKETS * bucket - BACKWARD * step_ms)
    if not run.norms_over:
        return contention + wait_ms(run.gpus, 1, step_ms, share) + exposed
    nodes = 1 if run.norms_over <= run.gpus // run.nodes else run.nodes
    tiny = row.calls * _collective_ms(row.gpu, run.norms_over, nodes, row.network, "all-gather", 0.0)
    return contention + wait_ms(run.norms_over, row.synchronisations, step_ms, share) + tiny + exposed


@functools.cache
def _collective_ms(gpu: str, gpus: int, nodes: int, network: str | None, kind: str, size: float) -> float:
    if gpu == "cpu":
        return 1000 * seconds(kind, size, Layout(gpus, nodes, **LOOPBACK))
    return 1000 * seconds(kind, size, Layout.of(machines(gpu, gpus, nodes, network)))


def fit(rows: Sequence[Row] = tuple(ROWS), start: Constants | None = None) -> Constants:
    """Least squares of the logarithms of predicted over published, large errors counting less."""
    stacks = list(dict.fromkeys(row.stack for row in [*ROWS, *rows]))
    noises = list(dict.fromkeys(row.noise for row in [*ROWS, *rows]))

    def constants(x: np.ndarray) -> Constants:
        values = np.exp(x).tolist()
        contention = dict(zip(stacks, values[1 : 1 + len(stacks)], strict=True))
        return Constants(values[0], contention, dict(zip(noises, values[1 + len(stacks) :], strict=True)))

    def vector(of: Constants | None) -> np.ndarray:
        if of is None:
            shares = [START_SHARE.get(noise, START_SHARE["eager"]) for noise in noises]
            return np.log([START_FIXED_MS, *(_start_contention(rows, stack) for stack in stacks), *shares])
        return np.log([of.fixed_ms, *(of.contention_ms[s] for s in stacks), *(of.share[n] for n in noises)])

    default = vector(None)

    def errors(x: np.ndarray) -> list[float]:
        now = constants(x)
        return [math.log(predict(row, now) / row.wanted.images_per_s) for row in rows] + list(_PULL * (x - default))

    found = least_squares(errors, vector(start), loss="soft_l1", f_scale=0.05, diff_step=1e-3, xtol=1e-4, ftol=1e-6)
    return constants(found.x)


def _start_contention(rows: Sequence[Row], stack: str) -> float:
    """On a CPU, whose cores ranks share, a further rank costs an image as much as the first does."""
    times = [row.known.step_ms / row.known.batch for row in rows if row.stack == stack and row.gpu == "cpu"]
    return times[0] if times else START_CONTENTION_MS


def leave_one_out(rows: Sequence[Row] = tuple(ROWS), wanted: Sequence[Row] | None = None) -> list[Tested]:
    """Of `wanted`, all by default."""
    return _leave_out(rows, {row: row.name for row in wanted or rows})


def leave_publication_out(rows: Sequence[Row] = tuple(ROWS)) -> list[Tested]:
    """Harder: constants that have not seen any row of the same publication, nor its framework, if nobody else has it."""
    return _leave_out(rows, {row: row.publication for row in rows})


def _leave_out(rows: Sequence[Row], wanted: dict[Row, str]) -> list[Tested]:
    """Each row by constants fitted to the rows whose name and publication are not its key."""
    everything = fit(rows)
    without = {
        key: fit([row for row in rows if key not in (row.name, row.publication)], everything)
        for key in set(wanted.values())
    }
    tested = []
    for row, key in wanted.items():
        published = row.wanted.images_per_s
        predicted, fitted = predict(row, without[key]), predict(row, everything)
        errors = predicted / published - 1, fitted / published - 1
        tested.append(Tested(row.name, published, predicted, *errors, row.source))
    return tested


def single_images_per_s(row: Single, efficiency: Efficiency) -> float:
    """Supervised training on one GPU, by the roofline."""
    work = work_of_arch(row.arch, 224, row.precision)
    if row.score_heads:
        work = replace(work, kept=work.kept + _scores_kept(row.score_heads))
    return 1 / work.seconds(find_gpu(row.gpu), row.precision, efficiency)[0]


def _scores_kept(heads: int, blocks: int = 12, tokens: int = 197) -> float:
    """Bytes: probabilities in fp32, as softmax gives them under autocast, and in fp16, as the product takes them."""
    return blocks * heads * tokens**2 * 6.0


def fit_efficiency(rows: Sequence[Single] = tuple(SINGLE)) -> Efficiency:
    def errors(x: np.ndarray) -> list[float]:
        efficiency = Efficiency(*np.exp(x).tolist())
        return [math.log(single_images_per_s(row, efficiency) / row.images_per_s) for row in rows]

    found = least_squares(errors, np.log([0.5, 20.0]), loss="soft_l1", f_scale=0.05, diff_step=1e-3)
    return Efficiency(*np.exp(found.x).tolist())


def leave_one_out_single(rows: Sequence[Single] = tuple(SINGLE)) -> list[Tested]:
    everything, tested = fit_efficiency(rows), []
    for i, row in enumerate(rows):
        without = fit_efficiency([*rows[:i], *rows[i + 1 :]])
        predicted, fitted = single_images_per_s(row, without), single_images_per_s(row, everything)
        name = f"{row.arch}, {row.gpu}, {row.precision}"
        errors = (predicted / row.images_per_s - 1, fitted / row.images_per_s - 1)
        tested.append(Tested(name, row.images_per_s, predicted, *errors, row.source))
    return tested


@functools.cache
def calibrated() -> tuple[Constants, Efficiency]:
    """Fitted to everything published."""
    return fit(), fit_efficiency()


def typical(tested: Sequence[Tested]) -> tuple[float, float]:
    """Median and largest absolute error."""
    errors = np.abs([row.error for row in tested])
    return float(np.median(errors)), float(errors.max())
