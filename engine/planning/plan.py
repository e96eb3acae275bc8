"""Answers for launch/plan.py whether a recipe fits on some GPUs, how fast it will be, what limits it, and what would help.

Every number says where it is from: given, data sheet, computed (from the model's shapes), counted (collectives), published
(fitted to published runs, which the back-test checks), measured (a row), assumed. The range comes from the largest errors that
the back-test makes on runs it has not seen: on one GPU and, of those with synchronised norms, on many.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from crossbatch import InputError
from crossbatch.engine.config import Device, ResolvedConfig, load_config, parse_config, resolve
from crossbatch.engine.gradient_noise import cost_of_batch
from crossbatch.engine.memory_model import CONTEXT, GIB, Memory, StepMemory
from crossbatch.engine.planning.catalogue import GPUS, NETWORKS, Machines, machines
from crossbatch.engine.planning.prediction import (
    ERROR_MANY_GPUS,
    ERROR_ONE_GPU,
    FITTED,
    Constants,
    Estimate,
    Stage,
    estimate,
)
from crossbatch.engine.planning.traffic import totals
from crossbatch.engine.run_log import METRICS, read_metrics
from crossbatch.engine.runtime.chunk_size import MARGIN
from crossbatch.engine.schedules import too_short

IMAGENET = 1_281_167
AUTO_CHUNK = f"as a run would choose: what fits into {MARGIN:g} of the memory"
FITTED_ON_ONE = ("v100-16g", "v100-32g", "a100-80g", "rtx3090")  # GPUs of the published runs in the fit
# Changes that are tried.
CHANGES = (
    ("crossbatch.sharding=fsdp", "zero_optimization.stage=1"),
    ("zero_optimization.stage=0",),
    ("zero_optimization.overlap_comm=true",),
    ("crossbatch.model.checkpoint_activations=norms",),
    ("crossbatch.model.checkpoint_activations=blocks",),
    ("crossbatch.model.checkpoint_activations=none",),
)


@dataclass(frozen=True)
class Question:
    """Holds a recipe with overrides, the machines, and what is known of them."""

    recipe: str | None
    overrides: tuple[str, ...]
    gpu: str
    gpus: int
    nodes: int = 1
    interconnect: str | None = None
    link: str | None = None
    images: int = IMAGENET  # of an epoch
    feed_per_s: float | None = None  # images that all loaders deliver together
    rows: Path | None = None  # measured by the benchmarks
    run: Path | None = None  # a run directory with a measured noise scale


class Noise(NamedTuple):
    """Holds the gradient noise scale of a run, in images, at its last step that has one, and the batch of that run."""

    scale: float
    step: int
    batch: int


class Help(NamedTuple):
    """Holds what to change, what that gains in images/s (as a ratio minus 1), and where this number comes from."""

    change: str
    gain: float
    origin: str


@dataclass(frozen=True)
class Plan:
    """Holds the answer to a question: the configuration as it would run there, with its chunk, and what is predicted."""

    asked: Question
    cfg: ResolvedConfig
    at: Machines
    memory: Memory
    chunk_origin: str
    estimate: Estimate
    is_measured: bool  # whether the backbone's time rests on a measured step
    helps: tuple[Help, ...] = ()  # the best three
    noise: Noise | None = None

    @property
    def fits(self) -> bool:
        return self.memory.fits(self.at.gpu.memory_gib)

    @property
    def images_per_s(self) -> tuple[float, float, float]:
        """Return low, expected and high: expected / (1 + u), expected, expected * (1 + u) with the back-test's errors u."""
        one_gpu = 0.0 if self.is_measured else ERROR_ONE_GPU
        error = 1 + (math.hypot(one_gpu, ERROR_MANY_GPUS) if self.at.gpus > 1 else one_gpu or 0.05)
        rate = self.estimate.images_per_s
        return rate / error, rate, rate * error

    @property
    def hours(self) -> tuple[float, float, float]:
        """Return the hours of the recipe's epochs: at the high rate, expected, at the low one."""
        steps = round(self.asked.images // self.estimate.images * self.cfg.crossbatch.schedule.epochs)
        images = steps * self.estimate.images
        low, rate, high = self.images_per_s
        return images / high / 3600, images / rate / 3600, images / low / 3600


def plan(asked: Question) -> Plan:
    """Predict memory, speed and remedies for a question. Raises InputError if recipe, machines, rows or run are not valid."""
    noise = None if asked.run is None else noise_of(asked.run)
    found = replace(_plan(asked), noise=noise)
    helps = sorted(_helps(asked, found), key=lambda tried: -tried.gain)
    return replace(found, helps=tuple(tried for tried in helps[:3] if tried.gain > 0.005))


def _plan(asked: Question, constants: Constants = FITTED) -> Plan:
    at = machines(asked.gpu, asked.gpus, asked.nodes, asked.interconnect, asked.link)
    config, device = load_config(asked.recipe, asked.overrides), Device("cuda", at.gpu.bf16 > 0, asked.gpu)
    cfg = resolve(config, at.gpus, device, at.gpus_per_node)
    if at.gpu.peak(cfg.precision) == 0:
        raise InputError(
            f"crossbatch.precision: given {cfg.precision}, which {asked.gpu} does not support; allowed: auto, fp16, fp32"
        )
    memory, origin = StepMemory(cfg), "given"
    if cfg.auto_chunk:
        chunk, origin = memory.largest_chunk(MARGIN * (at.gpu.memory_gib * GIB - CONTEXT)), AUTO_CHUNK
        if chunk < 1:
            raise InputError(
                f"--gpu: {asked.gpu} has {at.gpu.memory_gib:g} GiB; not even one image fits beside the batch-wide part of "
                f"{cfg.local_batch} images per rank; take more or larger GPUs, or lower train_batch_size"
            )
        config = config.model_copy(update={"train_micro_batch_size_per_gpu": chunk})
        cfg = resolve(config, at.gpus, device, at.gpus_per_node)
    measured = None if asked.rows is None else _measured_backbone(asked, cfg, at)
    found = estimate(cfg, at, constants, asked.feed_per_s, measured)
    return Plan(asked, cfg, at, memory.at(cfg.chunk), origin, found, measured is not None)


def _helps(asked: Question, found: Plan) -> Iterator[Help]:
    """Yield each change that is tried, with what it gains over `found`."""

    def gain(constants: Constants = FITTED, **changed: Any) -> float:
        try:
            other = _plan(replace(asked, **changed), constants)
        except InputError:
            return 0.0
        return other.estimate.images_per_s / found.estimate.images_per_s - 1 if other.fits else 0.0

    for overrides in CHANGES:
        text = " ".join(f"--set {override}" for override in overrides)
        yield Help(text, gain(overrides=(*asked.overrides, *overrides)), "predicted with this change")
    by_node = "crossbatch.model.norm_ranks=node"
    origin = "predicted; norms then see the images of one node only, which changes results (docs/norms.md)"
    yield Help(f"--set {by_node}", gain(overrides=(*asked.overrides, by_node)), origin)
    if asked.gpus > 1:
        text = "interrupt the ranks half as often (a CPU core for each rank alone, fewer loader workers)"
        yield Help(text, gain(replace(FITTED, share=FITTED.share / 2)), "published runs, fitted")
    faster = [name for name, link in NETWORKS.items() if link.bandwidth > found.at.network.bandwidth]
    if asked.nodes > 1 and faster:
        network = f"{found.at.adapters}x{min(faster, key=lambda name: NETWORKS[name].bandwidth)}"
        yield Help(f"--interconnect {network}", gain(interconnect=network), "data sheet")


def _measured_backbone(asked: Question, cfg: ResolvedConfig, at: Machines) -> Stage | None:
    """Correct the roofline by how far it was off in the last measured step of one such GPU; None without such a step."""
    path = asked.rows or Path()
    try:
        rows = _rows_in(path)
    except (ValueError, OSError) as error:
        raise InputError(
            f"--rows: given {path}; allowed: rows of the benchmarks ({error}); measure with "
            f"`python -m benchmarks step --out {path}`"
        ) from None
    for row in reversed(rows):
        facts = row["settings"]
        is_step = row["stage"] in ("step", "scaling") and row["unit"] in ("ms", "images/s") and "config" in facts
        if not is_step or "part" in facts or "plain" in row["case"] or facts.get("ranks", 1) > 1:
            continue
        there = resolve(parse_config(facts["config"]), 1, cfg.device)
        same_network = there.crossbatch.model.arch == cfg.crossbatch.model.arch and there.precision == cfg.precision
        if same_network and row["machine"]["gpus"][:1] == [at.gpu.card]:
            step_ms = row["p50"] if row["unit"] == "ms" else facts["step_ms"]
            off = step_ms / estimate(there, machines(asked.gpu, 1)).step_ms
            origin = f"measured (row {row['case']!r}, commit {row.get('commit')}): {off:.2f} x the roofline"
            return Stage("backbone", off * estimate(cfg, at).stage("backbone").ms, origin)
    return None


def noise_of(run: Path) -> Noise:
    """Read the last noise scale of a run directory. Raises InputError if there is none."""
    allowed = "allowed: the directory of a pretraining run"
    try:
        lines = read_metrics(run)
        batch = int(json.loads((run / "config.json").read_text())["train_batch_size"])
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"--run: given {run}; {allowed} ({error}); give its --out") from None
    measured = [line for line in lines if "noise_scale" in line]
    if not measured:
        raise InputError(
            f"--run: given {run}; {allowed} with noise_scale in its {METRICS}, which needs several ranks or chunks without "
            f"FSDP2 and cuda_graph; docs/measuring.md says when it is there"
        )
    return Noise(measured[-1]["noise_scale"], measured[-1]["step"], batch)


def _rows_in(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a file, or of all *.jsonl of a folder. Raises ValueError or OSError unless there are some."""
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    rows = [json.loads(line) for file in files for line in file.read_text().splitlines() if line.strip()]
    needed = {"stage", "case", "unit", "p50", "settings", "machine"}
    if not rows or not all(isinstance(row, dict) and needed <= row.keys() for row in rows):
        raise ValueError("lines without stage, case, p50, ..." if rows else "there are none")
    return rows


def notes(found: Plan) -> Iterator[str]:
    """Say in sentences what of an answer is extrapolated."""
    asked, cfg = found.asked, found.cfg
    if not found.is_measured and asked.rows is not None:
        wanted = f"{cfg.crossbatch.model.arch} in {cfg.precision} on one {asked.gpu}"
        yield f"images/s: {asked.rows} has no step of {wanted}"
    if not found.is_measured:
        yield "images/s: no step of this recipe was measured; the backbone's speed is that of published supervised training"
    if found.at.gpu not in [GPUS[name] for name in FITTED_ON_ONE]:
        yield f"images/s: no published run on {asked.gpu} is in the fit; its speed follows from its data sheet alone"
    if asked.gpus > 1:
        yield "stragglers: their share is fitted to supervised training and to SwAV's synchronised norms, not to MoCo v3"
    if asked.gpus > 64:
        yield f"stragglers: {asked.gpus} GPUs are more than the 64 of the largest published run with synchronised norms"
    if asked.feed_per_s is None:
        rate = found.estimate.images_per_s
        yield (
            f"data: the loaders are assumed to deliver {rate:,.0f} images/s, {rate / asked.gpus:,.0f} for each GPU, with two "
            f"views each; give --feed N if they deliver less"
        )
    if cfg.crossbatch.sharding == "zero" and cfg.config.zero_optimization.stage == 3 and cfg.chunks > 1:
        yield "parameters: in stage 3 with several chunks, DeepSpeed gathers module by module, more than is counted here"
    yield "memory: computed from shapes and checked on CPUs; not yet measured on this GPU"


def as_dict(found: Plan) -> dict[str, Any]:
    """Convert the whole answer to JSON types, for scripts."""
    cfg, at = found.cfg, found.at
    noise = None
    if found.noise is not None:
        steps, images = cost_of_batch(cfg.train_batch_size, found.noise.scale)
        noise = {**found.noise._asdict(), "steps_over_fewest": steps, "images_over_fewest": images}
    network = {"gb_per_s": at.network.bandwidth * at.adapters, "origin": at.network.source} if at.nodes > 1 else None
    names = ("low", "expected", "high")
    rate, hours = (dict(zip(names, three, strict=True)) for three in (found.images_per_s, found.hours))
    parts = [{"name": part.name, "gib": part.bytes / GIB, "origin": part.origin} for part in found.memory.parts]
    return {
        "gpu": {"name": found.asked.gpu, "memory_gib": at.gpu.memory_gib, "origin": at.gpu.source},
        "gpus": at.gpus,
        "nodes": at.nodes,
        "link": {"gb_per_s": at.link.bandwidth, "origin": at.link.source},
        "network": network,
        "train_batch_size": cfg.config.train_batch_size,
        "local_batch": cfg.local_batch,
        "chunk": cfg.chunk,
        "chunks": cfg.chunks,
        "chunk_origin": found.chunk_origin,
        "precision": cfg.precision,
        "fits": found.fits,
        "memory_gib": {"total": found.memory.total / GIB, "parts": parts},
        "images_per_s": {**rate, "extrapolated": True},
        "noise": noise,
        "hours": {**hours, "epochs": cfg.crossbatch.schedule.epochs, "images": found.asked.images},
        "step_ms": found.estimate.step_ms,
        "stages": [vars(stage) for stage in found.estimate.stages],
        "limited_by": list(found.estimate.limits),
        "collectives": totals(found.estimate.traffic),
        "helps": [tried._asdict() for tried in found.helps],
        "warnings": too_short(cfg.config, found.asked.images),
        "notes": list(notes(found)),
    }
