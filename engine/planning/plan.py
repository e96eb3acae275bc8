"""Does a recipe fit on some GPUs, how fast will it be, what limits it, and what would help: the answers of launch/plan.py.

Every number says where it is from: given, data sheet, computed (from the model's shapes), counted (collectives), published
(fitted to published runs, which the back-test checks), measured (a row), assumed. The range comes from the largest errors that
the back-test makes on runs it has not seen: on one GPU and, of those with synchronised norms, on many.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from crossbatch import InputError
from crossbatch.engine.config import Device, ResolvedConfig, load_config, parse_config, resolve
from crossbatch.engine.memory_model import CONTEXT, GIB, Memory, StepMemory
from crossbatch.engine.planning.catalogue import CARDS, NETWORKS, Machines, machines
from crossbatch.engine.planning.prediction import (
    ERROR_MANY_GPUS,
    ERROR_ONE_GPU,
    FITTED,
    Constants,
    Estimate,
    Stage,
    estimate,
)
from crossbatch.engine.planning.traffic import is_lower_bound, totals
from crossbatch.engine.runtime.chunk_size import MARGIN
from crossbatch.engine.sketch import sketch

IMAGENET = 1_281_167
FITTED_ON_ONE = ("v100-16g", "v100-32g", "a100-80g", "rtx3090")  # GPUs of the published runs in the fit
_BUCKET = 10_000_000  # elements of gradients, so that most travel while the backward pass runs
SETTINGS = {
    "crossbatch.sharding fsdp, stage 1": ["crossbatch.sharding=fsdp", "zero_optimization.stage=1"],
    "zero_optimization.stage 0": ["zero_optimization.stage=0"],
    f"zero_optimization.overlap_comm true, reduce_bucket_size {_BUCKET}": [
        "zero_optimization.overlap_comm=true",
        f"zero_optimization.reduce_bucket_size={_BUCKET}",
    ],
    "crossbatch.model.checkpoint_activations true": ["crossbatch.model.checkpoint_activations=true"],
    "crossbatch.model.checkpoint_activations false": ["crossbatch.model.checkpoint_activations=false"],
}


@dataclass(frozen=True)
class Question:
    """A recipe with overrides, the machines, and what is known of them."""

    recipe: str | None
    overrides: tuple[str, ...]
    gpu: str
    gpus: int
    nodes: int = 1
    interconnect: str | None = None
    link: str | None = None
    images: int = IMAGENET  # of an epoch
    feed_per_s: float | None = None  # images that the loaders deliver
    rows: Path | None = None  # measured by the benchmarks


@dataclass(frozen=True)
class Setting:
    """A question with its names looked up: the configuration as it would run there, with its chunk."""

    cfg: ResolvedConfig
    at: Machines
    memory: Memory
    chunk_origin: str

    @staticmethod
    def of(asked: Question) -> "Setting":
        """Resolve a question. Raises InputError for a recipe or machines that cannot be."""
        at = machines(asked.gpu, asked.gpus, asked.nodes, asked.interconnect, asked.link)
        config, device = load_config(asked.recipe, asked.overrides), Device("cuda", at.gpu.bf16 > 0, asked.gpu)
        cfg = resolve(config, at.gpus, device, at.gpus_per_node)
        if at.gpu.peak(cfg.precision) == 0:
            raise InputError(
                f"crossbatch.precision: given {cfg.precision}; {asked.gpu} has none; allowed: auto, fp16, fp32"
            )
        memory = StepMemory(cfg)
        if not cfg.auto_chunk:
            return Setting(cfg, at, memory.at(cfg.chunk), "given")
        chunk = memory.largest_chunk(MARGIN * (at.gpu.memory_gib * GIB - CONTEXT))
        if chunk < 1:
            raise InputError(
                f"--gpu: {asked.gpu} has {at.gpu.memory_gib:g} GiB; not even one image fits beside the batch-wide part of "
                f"{cfg.local_batch} images a rank; take more or larger GPUs, or lower train_batch_size"
            )
        cfg = resolve(
            config.model_copy(update={"train_micro_batch_size_per_gpu": chunk}), at.gpus, device, at.gpus_per_node
        )
        return Setting(cfg, at, memory.at(chunk), f"as a run would choose: what fits into {MARGIN:g} of the memory")

    @property
    def fits(self) -> bool:
        return self.memory.fits(self.at.gpu.memory_gib)


@dataclass(frozen=True)
class Plan:
    """The answer to a question."""

    question: Question
    setting: Setting
    estimate: Estimate
    uncertainty: float  # of images/s: low = expected / (1 + it), high = expected x (1 + it)
    helps: tuple[
        tuple[str, float, str], ...
    ]  # (what to change, gain in images/s as a ratio - 1, origin): the best three
    notes: tuple[str, ...]  # what is extrapolated

    @property
    def images_per_s(self) -> tuple[float, float, float]:
        """Return low, expected and high."""
        rate = self.estimate.images_per_s
        return rate / (1 + self.uncertainty), rate, rate * (1 + self.uncertainty)

    @property
    def epochs(self) -> float:
        return self.setting.cfg.config.crossbatch.schedule.epochs

    @property
    def hours(self) -> tuple[float, float, float]:
        """Return the hours of the recipe's epochs: at the high rate, expected, at the low one."""
        images = self.question.images // self.estimate.images * self.estimate.images * self.epochs
        low, rate, high = self.images_per_s
        return images / high / 3600, images / rate / 3600, images / low / 3600


def plan(asked: Question) -> Plan:
    """Answer a question. Raises InputError for a recipe, machines or rows that cannot be."""
    setting = Setting.of(asked)
    measured, note = (None, []) if asked.rows is None else _measured(asked.rows, asked.gpu, setting)
    found = _estimate(asked, setting, measured=measured)
    one = 0.0 if measured is not None else ERROR_ONE_GPU
    uncertainty = math.hypot(one, ERROR_MANY_GPUS) if asked.gpus > 1 else one or 0.05
    helps = sorted((h for h in _helps(asked, setting, found, measured) if h[1] > 0.005), key=lambda h: -h[1])[:3]
    notes = (*note, *_notes(asked, setting, found, measured))
    return Plan(asked, setting, found, uncertainty, tuple(helps), notes)


def _estimate(
    asked: Question, setting: Setting, constants: Constants = FITTED, measured: Stage | None = None
) -> Estimate:
    return estimate(sketch(setting.cfg), setting.cfg, setting.at, constants, asked.feed_per_s, measured)


def _helps(
    asked: Question, setting: Setting, found: Estimate, measured: Stage | None
) -> Iterator[tuple[str, float, str]]:
    """Plan with each change, and compare: (change, gain, origin of the gain)."""

    def gain(changed: Question, constants: Constants = FITTED) -> float:
        try:
            other = Setting.of(changed)
        except InputError:
            return 0.0
        faster = _estimate(changed, other, constants, measured).images_per_s if other.fits else 0.0
        return faster / found.images_per_s - 1

    for text, overrides in SETTINGS.items():
        yield text, gain(replace(asked, overrides=(*asked.overrides, *overrides))), "computed"
    if asked.gpus > 1:
        calmer = replace(FITTED, share=FITTED.share / 2)
        text = "half the interruptions: a core for every rank that nothing else uses, fewer loader workers"
        yield text, gain(asked, calmer), "published runs, fitted"
    faster = [name for name, link in NETWORKS.items() if link.bandwidth > setting.at.network.bandwidth]
    if asked.nodes > 1 and faster:
        network = f"{setting.at.adapters}x{min(faster, key=lambda name: NETWORKS[name].bandwidth)}"
        yield f"--interconnect {network}", gain(replace(asked, interconnect=network)), "data sheet"


def _measured(path: Path, gpu: str, setting: Setting) -> tuple[Stage | None, list[str]]:
    """Correct the roofline by how far it was off in a measured step of one rank: the stage, or None and why not."""
    arch, precision = setting.cfg.config.crossbatch.model.arch, setting.cfg.precision
    for row in reversed(_rows(path)):
        facts = row.get("settings", {})
        step_ms = row["p50"] if row.get("unit") == "ms" else facts.get("step_ms")
        if step_ms is None or row["stage"] not in ("step", "scaling") or "plain" in row["case"]:
            continue
        if facts.get("ranks", 1) > 1 or facts.get("predicted") or "config" not in facts or "part" in facts:
            continue
        config = parse_config(facts["config"])
        cards = [CARDS.get(name) for name in row["machine"]["gpus"][:1]]
        if (cards, config.crossbatch.model.arch, config.crossbatch.precision) != ([gpu.lower()], arch, precision):
            continue
        there = resolve(config, 1, setting.cfg.device)
        off = step_ms / estimate(sketch(there), there, machines(gpu, 1)).step_ms
        computed = estimate(sketch(setting.cfg), setting.cfg, setting.at).stage("backbone").ms
        origin = f"measured (row {row['case']!r}, commit {row.get('commit')}): {off:.2f} x the roofline"
        return Stage("backbone", off * computed, origin), []
    return None, [f"no row of one rank with {arch} in {precision} on {gpu} in {path}"]


def _rows(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a .jsonl file, or of all in a folder, in the order in which they were written."""
    if not path.exists():
        raise InputError(
            f"--rows: {path}: no such file or folder; measure with `python -m benchmarks step --out {path}`"
        )
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    try:
        return [json.loads(line) for file in files for line in file.read_text().splitlines() if line.strip()]
    except (ValueError, OSError) as error:
        raise InputError(f"--rows: {path} holds something else than rows of the benchmarks ({error})") from None


def _notes(asked: Question, setting: Setting, found: Estimate, measured: Stage | None) -> Iterator[str]:
    if measured is None:
        yield "images/s: no step of this was measured on GPUs; computation as in published supervised training"
    if asked.gpu.lower() not in FITTED_ON_ONE:
        yield f"{asked.gpu}: no published run of it is in the fit; by its data sheet alone"
    if asked.gpus > 1:
        yield "stragglers: fitted to supervised training and to SwAV's norms; nobody has published MoCo v3's"
    if asked.gpus > 64:
        yield f"{asked.gpus} GPUs: beyond the 64 of the largest published run with synchronised norms"
    if asked.feed_per_s is None:
        each = found.images_per_s / asked.gpus
        yield f"data: assumed to keep up; each GPU takes {each:.0f} images/s, two views each (say how many come with --feed)"
    if is_lower_bound(setting.cfg):
        yield "collectives: DeepSpeed's stage 3 with several chunks gathers module by module; more than counted here"
    yield "memory: computed from shapes, checked on CPUs; on this GPU not yet measured"


def as_dict(found: Plan) -> dict[str, Any]:
    """Convert the whole answer to JSON types, for scripts."""
    asked, cfg, at, memory = found.question, found.setting.cfg, found.setting.at, found.setting.memory
    network = {"gb_per_s": at.network.bandwidth * at.adapters, "origin": at.network.source} if at.nodes > 1 else None
    rate, hours = (
        dict(zip(("low", "expected", "high"), three, strict=True)) for three in (found.images_per_s, found.hours)
    )
    return {
        "gpu": {"name": asked.gpu, "memory_gib": at.gpu.memory_gib, "origin": at.gpu.source},
        "gpus": at.gpus,
        "nodes": at.nodes,
        "link": {"gb_per_s": at.link.bandwidth, "origin": at.link.source},
        "network": network,
        "train_batch_size": cfg.config.train_batch_size,
        "local_batch": cfg.local_batch,
        "chunk": cfg.chunk,
        "chunks": cfg.chunks,
        "chunk_origin": found.setting.chunk_origin,
        "precision": cfg.precision,
        "fits": found.setting.fits,
        "memory_gib": {
            "total": memory.total / GIB,
            "parts": [{"name": p.name, "gib": p.bytes / GIB, "origin": p.origin} for p in memory.parts],
        },
        "images_per_s": {**rate, "extrapolated": True},
        "hours": {**hours, "epochs": found.epochs, "images": asked.images},
        "step_ms": found.estimate.step_ms,
        "stages": [vars(stage) for stage in found.estimate.stages],
        "limited_by": list(found.estimate.limits),
        "collectives": totals(found.estimate.traffic),
        "helps": [{"change": text, "gain": gain, "origin": origin} for text, gain, origin in found.helps],
        "notes": list(found.notes),
    }
