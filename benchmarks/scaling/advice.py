"""What would make a planned run faster: each change is planned, too, and compared."""

from dataclasses import replace

from benchmarks.scaling.calibration import Constants
from benchmarks.scaling.catalogue import NETWORKS
from benchmarks.scaling.compute import Efficiency
from benchmarks.scaling.memory import step_memory
from benchmarks.scaling.prediction import NOISE, Estimate, Known, estimate
from benchmarks.scaling.question import Question
from crossbatch import InputError

BUCKET = 10_000_000  # elements of gradients, so that most travel while the backward pass runs
_ZERO, _MODEL = "zero_optimization", "crossbatch.model"
SETTINGS = [
    ("crossbatch.sharding fsdp, stage 1", ["crossbatch.sharding=fsdp", f"{_ZERO}.stage=1"]),
    (f"{_ZERO}.stage 0", [f"{_ZERO}.stage=0"]),
    (
        f"{_ZERO}.overlap_comm true, reduce_bucket_size {BUCKET}",
        [f"{_ZERO}.overlap_comm=true", f"{_ZERO}.reduce_bucket_size={BUCKET}"],
    ),
    (f"{_MODEL}.checkpoint_activations true", [f"{_MODEL}.checkpoint_activations=true"]),
    (f"{_MODEL}.checkpoint_activations false", [f"{_MODEL}.checkpoint_activations=false"]),
]


def helps(
    question: Question, found: Estimate, constants: Constants, efficiency: Efficiency, known: Known | None
) -> list[tuple[str, float, str]]:
    """(what to change, gain in images/s as a ratio - 1, where that is from): the best three."""

    def gain(changed: Question, fitted: Constants = constants) -> float:
        try:
            at = changed.machines()
            run, model, _ = changed.resolved(at)
        except InputError:
            return 0.0
        if not step_memory(model, run, run.chunk).fits(at.gpu.memory_gib):
            return 0.0
        return (
            estimate(model, run, at, fitted, efficiency, known, changed.feed_per_s).images_per_s / found.images_per_s
            - 1
        )

    tries = [
        (text, gain(replace(question, overrides=(*question.overrides, *overrides))), "computed")
        for text, overrides in SETTINGS
    ]
    if question.gpus > 1:
        calmer = replace(constants, share={**constants.share, NOISE: constants.share[NOISE] / 2})
        text = "half the interruptions: a core for every rank that nothing else uses, fewer loader workers"
        tries.append((text, gain(question, calmer), "published runs, fitted"))
    if question.nodes > 1 and (faster := _faster_network(question)) is not None:
        tries.append((f"--interconnect {faster}", gain(replace(question, interconnect=faster)), "data sheet"))
    return sorted((change for change in tries if change[1] > 0.005), key=lambda change: -change[1])[:3]


def _faster_network(question: Question) -> str | None:
    """The next in the catalogue, with as many adapters."""
    at = question.machines()
    faster = [name for name, network in NETWORKS.items() if network.bandwidth > at.network.bandwidth]
    name = min(faster, key=lambda name: NETWORKS[name].bandwidth, default=None)
    return None if name is None else f"{at.adapters}x{name}"
