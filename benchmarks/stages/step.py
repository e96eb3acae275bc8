"""Measures a training step of bs4096.json, in one piece and in chunks, beside plain torch and the same tuned (plain_step.py).

Time: the same images in 1 and in 8 chunks, and with checkpointed activations. A step of more than one chunk runs the online
backbone forward twice: 9.75 units of compute for 8 chunks (a backward pass counts two) where one chunk has 8. On a GPU, with
ResNet-50: the 256 images that a rank has of 16; then a whole step of 4096 images on this one GPU, with the automatic chunk and
with chunks of 512; then 64, 128, 512, ... images up to what fits; fp16; the tuned plain step compiled. ViT-S has 256 images,
and our step of it is compiled, too.
On a CPU ResNet-50 with 64 images (half an hour, 16 GB) and a small ViT.

A figure of engine.planning for each of our steps on this GPU stands in the rows before anything is measured. Every row says
how near it comes to the limits of the machine (benchmarks/limits.py). The plain steps may be left out for lack of memory or of
a compiler; the rows beside them then say so.

Parts: the spans of the real step (crossbatch.engine.runtime.timing), in steps of their own after the others; "other" is what
the spans leave out.

Memory, which chunks save: a process of its own for each case. On a CPU what the first step adds to resident memory, at B, 2B
and 4B images; on a GPU the peak of the allocator with model and optimizer.
"""

import gc
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import flops, limits
from benchmarks.measure import call_ms, clocks, compare, compare_peaks, peak_mib
from benchmarks.rows import Row
from benchmarks.stages import Effort, recipe
from benchmarks.stages.plain_step import FOUND_SCALE, PlainStep
from crossbatch.data.augment.parameters import height_width
from crossbatch.engine.config import Device, ResolvedConfig
from crossbatch.engine.memory_model import StepMemory
from crossbatch.engine.planning.catalogue import CARDS, machines
from crossbatch.engine.planning.prediction import estimate
from crossbatch.engine.runtime.chunk_size import MARGIN, automatic_chunk, free_bytes
from crossbatch.engine.runtime.timing import WHOLE, StepTimer
from crossbatch.engine.runtime.world import world_from_environment
from crossbatch.engine.step import TrainStep

RESNET, VIT = "ResNet-50, 224 px", "ViT-S, 224 px"
LARGE, LARGE_CHUNK = 4096, 512
PLAIN, TUNED, COMPILED, OURS = "plain torch", "tuned plain torch", "tuned plain torch, compiled", "ours"
OURS_COMPILED = "ours, compiled"
SIZES = (64, 128, 256, 512, 1024, 2048)
SMALL = "ResNet-18 of width 16, 32 px"
NETWORKS = {
    RESNET: [],
    VIT: ["crossbatch.model.arch=vit_small"],
    "ResNet-50, 96 px": ["crossbatch.data.image_size=96"],
    "ViT-S of 4 blocks, 32 px": [
        "crossbatch.model.arch=vit_small",
        'crossbatch.model.backbone_args={"patch_size": 8, "depth": 4}',
        "crossbatch.data.image_size=32",
    ],
    "ResNet-18, 64 px": ["crossbatch.model.arch=resnet18", "crossbatch.data.image_size=64"],
    SMALL: [
        "crossbatch.model.arch=resnet18",
        "crossbatch.model.stem=small",
        'crossbatch.model.backbone_args={"width": 16}',
        "crossbatch.data.image_size=32",
    ],
}


class Setup(NamedTuple):
    """Holds the sizes and options of one step to measure; `network` is one of NETWORKS."""

    network: str
    images: int
    chunk: int
    kind: str = OURS
    checkpointed: bool = False
    precision: str = "auto"
    chunk_name: str = ""

    @property
    def case(self) -> str:
        """Return the name of the row of this step."""
        chunks = -(-self.images // self.chunk)
        ours = self.chunk_name or f"{chunks} chunk{'s' * (chunks > 1)}"
        words = [self.network, f"{self.images} images", *([] if self.precision == "auto" else [self.precision])]
        words += [ours if self.kind == OURS else self.kind, *["activations checkpointed"] * self.checkpointed]
        return ", ".join(words)

    @property
    def passes(self) -> float:
        """Count the forward passes of a view through a backbone: online, again in chunks or blocks, and for the keys."""
        chunks = -(-self.images // self.chunk)
        return 2 + (1 - 1 / chunks) + self.checkpointed

    def config(self) -> ResolvedConfig:
        """Return bs4096.json with this network and these sizes."""
        overrides = [
            *NETWORKS[self.network],
            f"train_batch_size={self.images}",
            f"train_micro_batch_size_per_gpu={self.chunk}",
            f"crossbatch.batchformer.group_size={min(self.images, 256)}",
            f"crossbatch.model.checkpoint_activations={'blocks' if self.checkpointed else 'none'}",
            f"crossbatch.model.compile={str(self.kind == OURS_COMPILED).lower()}",
            f"crossbatch.precision={self.precision}",
        ]
        return recipe.load("bs4096", overrides)

    def settings(self) -> dict[str, Any]:
        """Return the settings of its row."""
        cfg = self.config()
        sizes = {"backbone": self.network, "images": self.images, "chunk": self.chunk, "precision": cfg.precision}
        return recipe.settings("bs4096", NETWORKS[self.network], cfg, **sizes)

    def build(self, device: torch.device) -> Callable[[torch.Tensor], Any]:
        """Return the step, which is called with views."""
        cfg = self.config()
        if self.kind in (OURS, OURS_COMPILED):
            step = TrainStep(recipe.build(cfg, device), cfg, device, steps_per_epoch=1000, chunk=cfg.chunk)
            step.progress.loss_scale = FOUND_SCALE if cfg.precision == "fp16" else 1.0
            return step
        return PlainStep(cfg, device, tuned=self.kind != PLAIN, compiled=self.kind == COMPILED)


def run(effort: Effort) -> Iterator[Row]:
    """Yield the speed of a copy, the predictions, the times of steps and of their parts, and the memory of steps.

    A group that fails does not stop the next one. Raises RuntimeError at the end if one did.
    """
    gpu, failed = Device.detect().type == "cuda", []
    weighed = [partial(_memory, *sizes) for sizes in _weighed(effort, gpu)]
    for measure in [] if gpu else weighed:  # first, because this process keeps what it has freed
        yield from measure()
    copy = limits.copy_row(effort.pick(16, 1000, 1000))
    yield copy
    with recipe.one_rank() as device:  # once for all: DeepSpeed remembers the groups of the first
        groups = list(_groups(effort, device))
        yield from _predictions([setup for group in groups for setup in group], _weighed(effort, gpu))
        times = [partial(_time, group, effort, device, copy.settings["gb_per_s"]) for group in groups]
        for measure in [*times[:-1], *weighed, times[-1]] if gpu else times:
            try:
                yield from measure()
            except Exception:
                traceback.print_exc()
                failed.append(measure.args[0])
    if failed:
        raise RuntimeError(f"groups of cases that failed ({len(failed)}): {failed}")


def _weighed(effort: Effort, gpu: bool) -> list[tuple[str, int, int]]:
    """Return (network, images, images of a chunk) of the steps that are weighed."""
    if gpu:
        return effort.pick([], [(RESNET, 256, 32)], [(RESNET, 256, 32)])
    weighed = [(SMALL, images, 64) for images in effort.pick([256], [256, 1024], [256, 512, 1024])]
    return weighed + [(RESNET, images, 8) for images in effort.pick([], [], [16, 32, 64])]


def _groups(effort: Effort, device: torch.device) -> Iterator[list[Setup]]:
    """Yield the steps that are measured in turns, the baseline first; what matters most comes first."""
    if device.type == "cpu" or effort is Effort.QUICK:
        brief = {"ResNet-50, 96 px": 64, "ViT-S of 4 blocks, 32 px": 256}
        full = {RESNET: 64, "ViT-S of 4 blocks, 32 px": 256}
        for network, images in effort.pick({"ResNet-18, 64 px": 16}, brief, full).items():
            yield _beside_plain(network, images)
        return
    largest = _largest(RESNET, device)
    images = min(256, largest)
    yield _beside_plain(RESNET, images)
    automatic = _automatic_chunk(RESNET, device)
    yield [Setup(RESNET, LARGE, automatic, chunk_name="automatic chunk")]
    if automatic >= LARGE_CHUNK:
        yield [Setup(RESNET, LARGE, LARGE_CHUNK, chunk_name=f"chunks of {LARGE_CHUNK}")]
    yield from (_whole(RESNET, size) for size in SIZES if size <= largest and size != images)
    yield _whole(RESNET, images, "fp16")
    vits = min(256, _largest(VIT, device))
    yield _beside_plain(VIT, vits)
    # Last, because to compile takes a minute or two.
    yield [Setup(VIT, vits, vits, kind) for kind in (OURS, OURS_COMPILED)]
    yield [Setup(RESNET, images, images, kind) for kind in (f"{TUNED} beside its compiled form", COMPILED)]


def _whole(network: str, images: int, precision: str = "auto") -> list[Setup]:
    """Return both plain steps, and ours in one chunk."""
    return [Setup(network, images, images, kind, precision=precision) for kind in (PLAIN, TUNED, OURS)]


def _beside_plain(network: str, images: int) -> list[Setup]:
    """Return the same, and ours in 8 chunks and with checkpointed activations."""
    more = [Setup(network, images, images // 8), Setup(network, images, images, checkpointed=True)]
    return [*_whole(network, images), *more]


def _largest(network: str, device: torch.device) -> int:
    """Return the most images of SIZES that fit in one chunk, or 32."""
    free, largest = MARGIN * free_bytes(device, 1), 32
    for size in SIZES:
        if StepMemory(Setup(network, size, size).config()).at(size).without_context > free:
            break
        largest = size
    return largest


def _automatic_chunk(network: str, device: torch.device) -> int:
    """Return the chunk that a run of 4096 images would choose here."""
    with tempfile.TemporaryDirectory() as folder:
        cfg = Setup(network, LARGE, LARGE).config()
        return automatic_chunk(cfg, world_from_environment(), device, Path(folder) / "chunk.json")[0]


def _predictions(timed: Sequence[Setup], weighed: Sequence[tuple[str, int, int]]) -> Iterator[Row]:
    """Yield what engine.planning says of our steps on one such GPU; nothing on a card that it does not know."""
    card = CARDS.get(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    if card is None:
        return
    settings = {"predicted": True, "of": "engine.planning", "gpu": card}
    for setup in timed:
        if setup.kind == OURS:
            facts = settings | {"prediction_of": setup.case, "images": setup.images, "chunk": setup.chunk}
            step_ms = estimate(setup.config(), machines(card, 1)).step_ms
            yield Row.of_one(f"{setup.case}: predicted", step_ms, "ms", facts)
    for sizes in weighed:
        for case, setup in _memory_setups(*sizes).items():
            needed = StepMemory(setup.config()).at(setup.chunk).without_context
            yield Row.of_one(f"{case}: predicted", needed / 2**20, "MiB", settings | {"prediction_of": case})


def _time(group: list[Setup], effort: Effort, device: torch.device, copy_gb_per_s: float) -> Iterator[Row]:
    gc.collect()  # modules with hooks hold each other, and the memory of the group before
    setups, cfg = {setup.case: setup for setup in group}, group[0].config()
    views = _views(cfg)
    steps = {case: setup.build(device) for case, setup in setups.items()}
    cases = {case: partial(step, views) for case, step in steps.items()}
    optional = [case for case, setup in setups.items() if setup.kind != OURS]
    sample = _settled_ms if device.type == "cuda" and cfg.local_batch < LARGE else call_ms
    rows = compare(cases, {}, effort, sample=sample, optional=optional)
    for row in flops.with_rates(rows, flops.of_step(cfg), cfg.precision):
        setup = setups[row.case]
        if len(group) == 1:
            row.baseline = row.ratio = None
        row.settings |= setup.settings()
        chunks = -(-setup.images // setup.chunk)
        alone_ms = limits.products(cfg, -(-setup.images // chunks)).of_step(chunks, setup.passes)
        row.settings["of_convolutions"] = alone_ms / row.p50
        if setup.kind not in (COMPILED, OURS_COMPILED):  # operators inside are not seen
            moved = limits.bytes_moved(cases[row.case], device)
            row.settings |= {"bytes_moved": moved, "of_bandwidth": moved / (1e6 * copy_gb_per_s) / row.p50}
        yield row
    cases.clear()  # the parts need the memory of the plain steps
    timed = {
        case: step for case, step in steps.items() if isinstance(step, TrainStep) and not setups[case].checkpointed
    }
    steps.clear()
    if all(setup.chunk == setup.images for setup in group):
        return
    timers = {case: StepTimer(device) for case in timed}
    for case, timer in timers.items():
        timed[case].use_timer(timer)
    for _ in range(1 + (2 if cfg.local_batch == LARGE else effort.pick(3, 5, 20 if device.type == "cuda" else 5))):
        for step in timed.values():  # in turns, as above
            step(views)
    for case, timer in timers.items():
        yield from _parts(case, timer.read()[1:], setups[case].settings())


def _settled_ms(call: Callable[[], object]) -> float:
    """Return the milliseconds of a call after one that does not count.

    The steps of a group keep their memory in blocks of other sizes, so the allocator starts anew for each turn.
    """
    torch.cuda.empty_cache()
    call()
    return call_ms(call)


def _parts(case: str, steps: list[dict[str, float]], settings: dict) -> Iterator[Row]:
    """Yield a row for each part; `share` is its part of the sum over the same steps, so all shares add up to one."""
    total, now = sum(taken[WHOLE] for taken in steps), clocks()
    for part in steps[0]:
        values = [taken[part] for taken in steps]
        facts = {**settings, "part": part, "of": case, "share": sum(values) / total}
        yield Row.of_samples(f"{case}: {part}", values, settings=facts, clocks=now)


def _memory_setups(network: str, images: int, chunk: int) -> dict[str, Setup]:
    """Return the steps that are weighed, by case."""
    return {
        f"{network}, memory, {images} images, 1 chunk": Setup(network, images, images),
        f"{network}, memory, {images} images, chunks of {chunk}": Setup(network, images, chunk),
    }


def _memory(network: str, images: int, chunk: int) -> Iterator[Row]:
    setups = _memory_setups(network, images, chunk)
    for row in compare_peaks({case: partial(_peak, setup) for case, setup in setups.items()}, {}):
        row.settings = setups[row.case].settings()
        yield row


def _peak(setup: Setup) -> float:
    cfg = setup.config()
    with recipe.one_rank() as device:
        step, views = setup.build(device), _views(cfg)
        if device.type == "cpu":
            return peak_mib(lambda: step(views))
        for _ in range(2):
            step(views)
        return torch.cuda.max_memory_allocated() / 2**20


def _views(cfg: ResolvedConfig) -> torch.Tensor:
    """Return uint8 views [2, n, 3, H, W] as the loader hands them over."""
    size = height_width(cfg.config.crossbatch.data.image_size)
    views = torch.randint(0, 256, (2, cfg.local_batch, *size, 3), dtype=torch.uint8).permute(0, 1, 4, 2, 3)
    return views.pin_memory() if cfg.device.type == "cuda" else views
