"""One training step on N GPUs, stage by stage, in ms: the sum of what is not hidden behind something else.

backbone     crops x roofline (compute.py), or a measured step of one rank
heads        products of BatchFormer, heads and loss at the same share of the peak
fixed        what a step takes however few its images; once a chunk
update       optimizer and moving average: bytes over bandwidth
contention   what every further GPU of a node costs each view: cores, memory and power of a host, shared
norms        latency of their collectives, one by one: nothing can be done meanwhile
stragglers   waiting for each other at all of these (communication.py)
keys         keys, and features of BatchFormer groups that span ranks
gradients    what does not fit beside the backward pass, if the backend overlaps at all: FSDP2 does, ZeRO 3 does, and the
             other stages with `overlap_comm`; all in one bucket, nothing can overlap
parameters   gathered for the forward pass (stage 3), or after the update (ZeRO 1 and 2)
data         what a step waits for images, if it is known how many come
"""

from dataclasses import dataclass

from crossbatch.engine.config import ResolvedConfig
from crossbatch.engine.planning.catalogue import GPUS, Gpu, Machines
from crossbatch.engine.planning.communication import collective_ms, wait_ms
from crossbatch.engine.planning.compute import Efficiency, step_work
from crossbatch.engine.planning.traffic import Traffic, of_parts, step_traffic
from crossbatch.engine.sketch import Sketch
from crossbatch.models import NUM_VIEWS

BACKWARD = 2 / 3  # of the computation


@dataclass(frozen=True)
class Constants:
    """What was fitted to published runs, for PyTorch driven step by step."""

    fixed_ms: float  # of a step on a V100; goes with the bandwidth, as weights, gradients and velocities do
    contention_ms: float  # of an image, for every further GPU of a node
    share: float  # of a rank's time that it is interrupted
    efficiency: Efficiency

    def fixed_on(self, gpu: Gpu) -> float:
        return self.fixed_ms * GPUS["v100-32g"].bandwidth / gpu.bandwidth


# What `python -m benchmarks scaling backtest` finds (tests/benchmarks/test_scaling_model.py holds them together), and the
# largest errors that it makes on runs left out of the fit: on one GPU, and on many with synchronised norms.
FITTED = Constants(7.99, 0.00861, 0.0386, Efficiency(0.572, 17.94))
ERROR_ONE_GPU, ERROR_MANY_GPUS = 0.108, 0.214
_FITTED = "published runs, fitted (benchmarks scaling backtest)"

LIMITS = {
    "backbone": "the backbone",
    "heads": "BatchFormer, heads and loss",
    "fixed": "what a step takes however few its images",
    "contention": "the ranks of a node, for the host",
    "norms": "the latency of the norms' collectives",
    "stragglers": "waiting for the slowest rank at every norm",
    "keys": "gathered keys",
    "gradients": "gradients on the network",
    "parameters": "parameters on the network",
    "data": "images from the loader",
}


@dataclass(frozen=True)
class Stage:
    """A part of a step, and where its number is from."""

    name: str
    ms: float
    origin: str


@dataclass(frozen=True)
class Estimate:
    """A predicted step."""

    images: int
    stages: tuple[Stage, ...]
    traffic: Traffic

    @property
    def step_ms(self) -> float:
        return sum(stage.ms for stage in self.stages)

    @property
    def images_per_s(self) -> float:
        return 1000 * self.images / self.step_ms

    @property
    def limits(self) -> tuple[str, ...]:
        """Name the two stages that take most, in words."""
        most = sorted(self.stages, key=lambda stage: -stage.ms)[:2]
        return tuple(LIMITS[stage.name] for stage in most if stage.ms > 0.05 * self.step_ms)

    def stage(self, name: str) -> Stage:
        return next(stage for stage in self.stages if stage.name == name)


def estimate(
    sketched: Sketch,
    cfg: ResolvedConfig,
    at: Machines,
    constants: Constants = FITTED,
    feed_per_s: float | None = None,
    measured: Stage | None = None,
) -> Estimate:
    """Predict a step of `cfg`, resolved for the GPUs of `at`, with its chunk.

    Args:
        sketched: the network of `cfg`.
        feed_per_s: images that the loaders deliver; enough, if None.
        measured: takes the place of the stage "backbone".
    """
    traffic = step_traffic(sketched.model, cfg)
    computed = _computed(sketched, cfg, at, constants)
    computed[0] = measured or computed[0]
    compute_ms = sum(stage.ms for stage in computed)
    calls = of_parts(traffic, "norms").total()
    waits = of_parts(traffic, "norms", "keys", "groups").total() + 1  # and once for the gradients
    links = [at.link] + [at.network] * (at.nodes > 1)
    counted = "counted; " + "; ".join(link.source.split(";")[0] for link in links)
    stages = [
        *computed,
        Stage(
            "norms",
            _sum_ms(traffic, at, "norms"),
            f"{calls} collectives, counted; latency: NCCL's tuning.cc, launch assumed",
        ),
        Stage(
            "stragglers", wait_ms(at.gpus, waits, compute_ms, constants.share), f"{waits} synchronisations; {_FITTED}"
        ),
        Stage("keys", _sum_ms(traffic, at, "keys", "groups"), counted),
        Stage("gradients", _gradients_ms(traffic, cfg, at, compute_ms), counted),
        Stage("parameters", _parameters_ms(traffic, cfg, at, compute_ms), counted),
    ]
    if feed_per_s is not None:
        needed = sum(stage.ms for stage in stages)
        stages.append(Stage("data", max(0.0, 1000 * cfg.config.train_batch_size / feed_per_s - needed), "given"))
    return Estimate(cfg.config.train_batch_size, tuple(stages), traffic)


def _computed(sketched: Sketch, cfg: ResolvedConfig, at: Machines, constants: Constants) -> list[Stage]:
    work, efficiency = step_work(cfg), constants.efficiency
    crop_s, limit = work.per_crop.seconds(at.gpu, cfg.precision, efficiency)
    # The queries' side costs three forward passes, the keys' side one: about twice what both cost forward.
    heads_flops = 2 * sketched.heads_flops
    heads_ms = 1000 * heads_flops / (at.gpu.peak(cfg.precision) * efficiency.of_peak)
    contention_ms = constants.contention_ms * NUM_VIEWS * cfg.local_batch * (at.gpus_per_node - 1)
    tflop, reached = work.crops * work.per_crop.flops / 1e12, "efficiency: published runs, fitted"
    return [
        Stage("backbone", 1000 * work.crops * crop_s, f"counted {tflop:.1f} TFLOP, limited by {limit}; {reached}"),
        Stage("heads", heads_ms, f"counted {heads_flops / 1e12:.2f} TFLOP; {reached}"),
        Stage("fixed", constants.fixed_on(at.gpu) * cfg.chunks, _FITTED),
        Stage("contention", contention_ms, _FITTED),
    ]


def _sum_ms(traffic: Traffic, at: Machines, *parts: str) -> float:
    return sum(calls * collective_ms(m.kind, m.size, at) for m, calls in of_parts(traffic, *parts).items())


def _gradients_ms(traffic: Traffic, cfg: ResolvedConfig, at: Machines, compute_ms: float) -> float:
    tiny, all_ms = _sum_ms(traffic, at, "gradient norm", "LARS"), _sum_ms(traffic, at, "gradients")
    zero = cfg.config.zero_optimization
    overlaps = zero.stage == 3 if zero.overlap_comm is None or zero.stage == 0 else zero.overlap_comm
    if not all_ms or not (overlaps or cfg.config.crossbatch.sharding == "fsdp"):
        return all_ms + tiny
    # They can hide behind the last chunk's backward pass, but for the last of them.
    return max(_smallest_ms(traffic, at, "gradients"), all_ms - BACKWARD * compute_ms / cfg.chunks) + tiny


def _parameters_ms(traffic: Traffic, cfg: ResolvedConfig, at: Machines, compute_ms: float) -> float:
    all_ms = _sum_ms(traffic, at, "parameters")
    if not all_ms or (cfg.config.zero_optimization.stage < 3 and cfg.config.crossbatch.sharding == "zero"):
        return all_ms  # after the update, before the next forward pass
    return max(_smallest_ms(traffic, at, "parameters"), all_ms - (1 - BACKWARD) * compute_ms)


def _smallest_ms(traffic: Traffic, at: Machines, part: str) -> float:
    """The time of one call that nothing hides: that of the first block, at the start or the end of a pass."""
    return min(collective_ms(message.kind, message.size, at) for message in of_parts(traffic, part))
