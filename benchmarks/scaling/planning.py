"""Does a recipe fit on some GPUs, how fast will it be, what limits it, and what would help: the answers of launch/plan.py.

Every number says where it is from: given, data sheet, computed (from the model's shapes), counted (collectives), published
(fitted to published runs, which the back-test checks), measured (a row), assumed. The range comes from the largest errors that
the back-test makes on runs it has not seen: on one GPU and, of those with synchronised norms, on many.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.flops import CARDS
from benchmarks.results import read
from benchmarks.scaling.advice import helps
from benchmarks.scaling.calibration import Constants, calibrated, leave_one_out, leave_one_out_single, typical
from benchmarks.scaling.catalogue import Machines, find_gpu, machines
from benchmarks.scaling.compute import Efficiency, step_work
from benchmarks.scaling.memory import GIB, Memory, step_memory
from benchmarks.scaling.prediction import Estimate, Known, estimate, messages_by_part
from benchmarks.scaling.published import ROWS, SINGLE
from benchmarks.scaling.question import Question
from crossbatch.engine.config import Device, ResolvedConfig, parse_config, resolve
from crossbatch.engine.tasks.build import build_model
from crossbatch.models import MoCo

EPOCHS = 100
LIMITS = {
    "backbone": "the backbone",
    "heads": "BatchFormer, heads and loss",
    "fixed": "what a step takes however few its images",
    "update": "optimizer and moving average",
    "contention": "the ranks of a node, for the host",
    "norms": "the latency of the norms' collectives",
    "stragglers": "waiting for the slowest rank at every norm",
    "keys": "gathered keys",
    "gradients": "gradients on the network",
    "parameters": "parameters on the network",
    "data": "images from the loader",
}


@dataclass(frozen=True)
class Answer:
    question: Question
    run: ResolvedConfig
    machines: Machines
    chunk_origin: str
    memory: Memory
    estimate: Estimate
    uncertainty: float  # of images/s: low = expected / (1 + it), high = expected x (1 + it)
    helps: tuple[tuple[str, float, str], ...]  # (what to change, gain in images/s as a ratio - 1, origin)
    notes: tuple[str, ...]

    @property
    def fits(self) -> bool:
        return self.memory.fits(self.machines.gpu.memory_gib)

    @property
    def images_per_s(self) -> tuple[float, float, float]:
        """Low, expected, high."""
        rate = self.estimate.images_per_s
        return rate / (1 + self.uncertainty), rate, rate * (1 + self.uncertainty)

    @property
    def hours(self) -> tuple[float, float, float]:
        """Of 100 epochs: expected, at the high rate, at the low one."""
        steps = self.question.images // self.estimate.images * EPOCHS
        low, rate, high = (steps * self.estimate.images / r / 3600 for r in self.images_per_s)
        return rate, high, low

    @property
    def limits(self) -> tuple[str, ...]:
        """The two stages that take most, in words."""
        most = sorted(self.estimate.stages, key=lambda stage: -stage.ms)[:2]
        return tuple(LIMITS[stage.name] for stage in most if stage.ms > 0.05 * self.estimate.step_ms)


def answer(question: Question) -> Answer:
    """Raises InputError for a recipe, machines or rows that cannot be."""
    at = question.machines()
    run, model, chunk_origin = question.resolved(at)
    constants, efficiency = calibrated()
    known, note = (None, None) if question.rows is None else _measured(question, run, model, constants, efficiency)
    found = estimate(model, run, at, constants, efficiency, known, question.feed_per_s)
    return Answer(
        question,
        run,
        at,
        chunk_origin,
        step_memory(model, run, run.chunk),
        found,
        _uncertainty(run, known),
        tuple(helps(question, found, constants, efficiency, known)),
        tuple(_notes(question, run, found, known, note)),
    )


def _uncertainty(run: ResolvedConfig, known: Known | None) -> float:
    compute = 0.0 if known is not None else typical(leave_one_out_single())[1]
    if run.world_size == 1:
        return compute or 0.05
    synchronised = [row for row in ROWS if row.wanted.norms_over]
    return math.hypot(compute, typical(leave_one_out(wanted=synchronised))[1])


def _measured(
    question: Question, run: ResolvedConfig, model: MoCo, constants: Constants, efficiency: Efficiency
) -> tuple[Known | None, str | None]:
    """The backbone's time by the roofline, times how far it was off in a measured step of one rank; or why not."""
    assert question.rows is not None
    arch, name = run.config.crossbatch.model.arch, question.gpu.lower()
    for row in reversed(read(question.rows).rows):
        facts, gpus = row["settings"], row["machine"]["gpus"]
        of_one_rank = facts.get("ranks", 1) == 1 and not facts.get("predicted") and "plain" not in row["case"]
        if row["stage"] not in ("step", "scaling") or not of_one_rank or "config" not in facts or "part" in facts:
            continue
        step_ms = row["p50"] if row["unit"] == "ms" else facts.get("step_ms")
        if step_ms is None:  # of memory
            continue
        config = parse_config(facts["config"])
        ours = config.crossbatch
        if [CARDS.get(gpu) for gpu in gpus[:1]] != [name] or (ours.model.arch, ours.precision) != (arch, run.precision):
            continue
        there = resolve(config, 1, Device("cuda", find_gpu(name).bf16 > 0, name))
        with torch.device("meta"):
            guess = estimate(build_model(there), there, machines(name, 1), constants, efficiency)
        factor = step_ms / guess.step_ms
        work = step_work(model, run)
        seconds, _ = work.per_crop.seconds(find_gpu(name), run.precision, efficiency)
        origin = f"measured (row {row['case']!r}, commit {row.get('commit')}): {factor:.2f} x the roofline"
        return Known(1000 * work.crops * seconds * factor, origin), None
    return None, f"no row of one rank with {arch} in {run.precision} on {question.gpu} in {question.rows}"


def _notes(
    question: Question, run: ResolvedConfig, found: Estimate, known: Known | None, note: str | None
) -> Sequence[str]:
    """What is extrapolated."""
    notes = [] if note is None else [note]
    if known is None:
        notes.append("images/s: no step of this was measured on GPUs; computation as in published supervised training")
    if question.gpu.lower() not in {row.gpu for row in SINGLE}:
        notes.append(f"{question.gpu}: no published run of it is in the fit; by its data sheet alone")
    if question.gpus > 1:
        notes.append("stragglers: fitted to supervised training and to SwAV's norms; nobody has published MoCo v3's")
    if question.gpus > max(row.wanted.gpus for row in ROWS if row.wanted.norms_over):
        notes.append(f"{question.gpus} GPUs: beyond the 64 of the largest published run with synchronised norms")
    if question.feed_per_s is None:
        notes.append(
            f"data: assumed to keep up; each GPU takes {found.images_per_s / run.world_size:.0f} images/s, two views each (say "
            "how many come with --feed)"
        )
    if not found.traffic.exact:
        notes.append(
            "collectives: DeepSpeed's stage 3 with several chunks gathers module by module; more than counted here"
        )
    notes.append("memory: computed from shapes, checked on CPUs; on this GPU not yet measured")
    return notes


def as_dict(found: Answer) -> dict[str, Any]:
    """For scripts."""
    low, expected, high = found.images_per_s
    hours, soonest, latest = found.hours
    at, run = found.machines, found.run
    return {
        "gpu": {"name": found.question.gpu, "memory_gib": at.gpu.memory_gib, "origin": at.gpu.source},
        "gpus": at.gpus,
        "nodes": at.nodes,
        "link": {"gb_per_s": at.link.bandwidth, "origin": at.link.source},
        "network": {"gb_per_s": at.network.bandwidth * at.adapters, "origin": at.network.source}
        if at.nodes > 1
        else None,
        "train_batch_size": run.config.train_batch_size,
        "local_batch": run.local_batch,
        "chunk": run.chunk,
        "chunks": run.chunks,
        "chunk_origin": found.chunk_origin,
        "precision": run.precision,
        "fits": found.fits,
        "memory_gib": {
            "total": found.memory.total / GIB,
            "parts": [{"name": p.name, "gib": p.bytes / GIB, "origin": p.origin} for p in found.memory.parts],
        },
        "images_per_s": {"low": low, "expected": expected, "high": high, "extrapolated": True},
        "hours_per_100_epochs": {"expected": hours, "low": soonest, "high": latest, "images": found.question.images},
        "step_ms": found.estimate.step_ms,
        "stages": [{"name": s.name, "ms": s.ms, "origin": s.origin} for s in found.estimate.stages],
        "limited_by": list(found.limits),
        "collectives": {
            part: {"calls": calls, "bytes": size}
            for part, (calls, size) in messages_by_part(found.estimate.traffic).items()
        },
        "helps": [{"change": text, "gain": value, "origin": origin} for text, value, origin in found.helps],
        "notes": list(found.notes),
    }
