"""One training step on N GPUs, stage by stage, in ms: the sum of what is not hidden behind something else.

    backbone     crops x roofline (compute.py), or a measured step of one rank
    heads        products of BatchFormer, heads and loss at the same share of the peak
    fixed        see calibration.py; once a chunk
    update       optimizer and moving average: bytes over bandwidth
    contention   of the ranks of a node, for each view
    norms        latency of their collectives, one by one: nothing can be done meanwhile
    stragglers   waiting for each other at all of these (stragglers.py)
    keys         keys, and features of BatchFormer groups that span ranks
    gradients    what does not fit beside the backward pass, if the backend overlaps at all: FSDP2 does, ZeRO 3 does, and the
                 other stages with `overlap_comm`; all in one bucket, nothing can overlap
    parameters   gathered for the forward pass (stage 3), or after the update (ZeRO 1 and 2)
    data         what a step waits for images, if it is known how many come

Every stage names where its number is from.
"""

from dataclasses import dataclass

from benchmarks.scaling.calibration import BACKWARD, Constants
from benchmarks.scaling.catalogue import Machines
from benchmarks.scaling.communication import Layout, seconds
from benchmarks.scaling.compute import Efficiency, step_work
from benchmarks.scaling.stragglers import wait_ms
from benchmarks.scaling.traffic import Traffic, step_traffic
from crossbatch.engine.config import LarsConfig, ResolvedConfig
from crossbatch.models import NUM_VIEWS, MoCo

STACK, NOISE = "pytorch", "eager"  # which constants are ours
OF_BANDWIDTH = 0.8  # that passes over parameters reach: assumed
# Bytes of a parameter: LARS reads w and g, then w, g and v, and writes w and v; AdamW reads four and writes three; the average
# reads two and writes one.
_LARS, _ADAMW, _AVERAGE = 28, 28, 12


@dataclass(frozen=True)
class Stage:
    name: str
    ms: float
    origin: str


@dataclass(frozen=True)
class Estimate:
    images: int  # of a step
    stages: tuple[Stage, ...]
    traffic: Traffic

    @property
    def step_ms(self) -> float:
        return sum(stage.ms for stage in self.stages)

    @property
    def images_per_s(self) -> float:
        return 1000 * self.images / self.step_ms

    def of(self, name: str) -> Stage:
        return next(stage for stage in self.stages if stage.name == name)


@dataclass(frozen=True)
class Known:
    """The backbone's time in a step of one rank, where it was measured."""

    backbone_ms: float
    origin: str


def estimate(
    model: MoCo,
    run: ResolvedConfig,
    machines: Machines,
    constants: Constants,
    efficiency: Efficiency,
    known: Known | None = None,
    feed_per_s: float | None = None,
) -> Estimate:
    """`model` on the "meta" device; `run` resolved for the GPUs of `machines`, with its chunk."""
    traffic = step_traffic(model, run)
    at = _Timed(Layout.of(machines), traffic)
    computed = _computed(model, run, machines, constants, efficiency, known)
    compute_ms = sum(stage.ms for stage in computed)
    waits = sum(traffic.of("norms", "keys", "groups").values()) + 1  # and once for the gradients
    share = constants.share[NOISE]
    fitted = "published runs, fitted (benchmarks scaling backtest)"
    catalogue = f"{machines.link.source.split(';')[0]}" + (
        f"; {machines.network.source.split(';')[0]}" if machines.nodes > 1 else ""
    )
    calls = sum(traffic.of("norms").values())
    stages = [
        *computed,
        Stage("norms", at.ms("norms"), f"{calls} collectives, counted; latency: NCCL's tuning.cc, launch assumed"),
        Stage("stragglers", wait_ms(run.world_size, waits, compute_ms, share), f"{waits} synchronisations; {fitted}"),
        Stage("keys", at.ms("keys", "groups"), f"counted; {catalogue}"),
        Stage("gradients", _gradients(run, at, compute_ms), f"counted; {catalogue}"),
        Stage("parameters", _parameters(run, at, compute_ms), f"counted; {catalogue}"),
    ]
    if feed_per_s is not None:
        needed = sum(stage.ms for stage in stages)
        late = max(0.0, 1000 * run.config.train_batch_size / feed_per_s - needed)
        stages.append(Stage("data", late, "given"))
    return Estimate(run.config.train_batch_size, tuple(stages), traffic)


def _computed(
    model: MoCo,
    run: ResolvedConfig,
    machines: Machines,
    constants: Constants,
    efficiency: Efficiency,
    known: Known | None,
) -> list[Stage]:
    gpu, views = machines.gpu, NUM_VIEWS * run.local_batch
    work = step_work(model, run)
    crop_s, limit = work.per_crop.seconds(gpu, run.precision, efficiency)
    backbone = Stage(
        "backbone",
        1000 * work.crops * crop_s,
        f"counted {work.crops * work.per_crop.flops / 1e12:.1f} TFLOP, limited by {limit}; efficiency: published runs, fitted",
    )
    if known is not None:
        backbone = Stage("backbone", known.backbone_ms, known.origin)
    heads = 1000 * work.heads_flops / (gpu.peak(run.precision) * efficiency.of_peak)
    contention = constants.contention_ms[STACK] * views * (machines.gpus_per_node - 1)
    fitted = "published runs, fitted (benchmarks scaling backtest)"
    return [
        backbone,
        Stage("heads", heads, f"counted {work.heads_flops / 1e12:.2f} TFLOP; efficiency: published runs, fitted"),
        Stage("fixed", constants.fixed_on(gpu) * run.chunks, fitted),
        Stage("update", _update(model, run, machines), f"bytes over {OF_BANDWIDTH:g} of the bandwidth (assumed)"),
        Stage("contention", contention, fitted),
    ]


def _update(model: MoCo, run: ResolvedConfig, machines: Machines) -> float:
    stage = run.config.zero_optimization.stage
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    averaged = sum(p.numel() for p in model.momentum.parameters())
    stepped = trained / (run.world_size if stage > 0 else 1)
    is_fsdp = run.config.crossbatch.sharding == "fsdp"
    followed = averaged / (run.world_size if stage == 3 or (is_fsdp and stage > 0) else 1)
    per_parameter = _LARS if isinstance(run.config.optimizer.params, LarsConfig) else _ADAMW
    return 1e3 * (stepped * per_parameter + followed * _AVERAGE) / (OF_BANDWIDTH * 1e9 * machines.gpu.bandwidth)


class _Timed:
    """Messages of a step, in ms."""

    def __init__(self, layout: Layout, traffic: Traffic):
        self.layout, self.traffic = layout, traffic

    def each(self, *parts: str) -> list[float]:
        return [
            1000 * seconds(message.kind, message.size, self.layout)
            for message, calls in self.traffic.of(*parts).items()
            for _ in range(calls)
        ]

    def ms(self, *parts: str) -> float:
        return sum(self.each(*parts))


def overlaps(run: ResolvedConfig) -> bool:
    """Whether gradients travel while the backward pass runs."""
    zero = run.config.zero_optimization
    if run.config.crossbatch.sharding == "fsdp":
        return True
    return zero.overlap_comm if zero.overlap_comm is not None and zero.stage > 0 else zero.stage == 3


def _gradients(run: ResolvedConfig, at: _Timed, compute_ms: float) -> float:
    tiny = at.ms("gradient norm", "LARS")
    each = at.each("gradients")
    if not each or not overlaps(run):
        return sum(each) + tiny
    # The last chunk's backward pass is what they can hide behind.
    return max(each[-1], sum(each) - BACKWARD * compute_ms / run.chunks) + tiny


def _parameters(run: ResolvedConfig, at: _Timed, compute_ms: float) -> float:
    each = at.each("parameters")
    if not each or (run.config.zero_optimization.stage < 3 and run.config.crossbatch.sharding == "zero"):
        return sum(each)  # after the update, before the next forward pass
    return max(each[0], sum(each) - (1 - BACKWARD) * compute_ms)


def messages_by_part(traffic: Traffic) -> dict[str, tuple[int, float]]:
    """Part -> (calls, bytes)."""
    parts: dict[str, tuple[int, float]] = {}
    for message, calls in traffic.calls.items():
        before = parts.get(message.part, (0, 0.0))
        parts[message.part] = before[0] + calls, before[1] + calls * message.size
    return parts
