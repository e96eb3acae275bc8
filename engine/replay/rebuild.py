"""Rebuilds a step of a run from the nearest checkpoint before it, with the trainer's own step.

Order, augmentation and dropout are functions of the seed and of positions, and the state before a step is that of a checkpoint
plus the steps since, so a step follows from the run and the number of the step. Replay needs no more ranks than one: the global
batch does not depend on their number. Views are equal to the bit; numbers agree up to rounding, and to the bit on as many
ranks with the same kernels. Where the norms of a ResNet saw chunks, the chunks of a replay hold the same images.

    start ──────────── checkpoint ──────────── N - window ───────── N
          steps again   is compared, loaded     steps are watched    is watched, image by image

Replay starts early enough to have seen some steps before N, with which N can be compared. Each checkpoint that it passes is
compared with what the steps have given: a weight that something else than a step has changed, such as a flipped bit, shows
there. Then the state is that of the run again.
"""

import contextlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
import torch.distributed as dist

from crossbatch import InputError
from crossbatch.data import Batch
from crossbatch.data.worker_batches import MAX_TRIES
from crossbatch.engine import checkpoint
from crossbatch.engine.checkpoint import Unreadable, read_manifest
from crossbatch.engine.checkpoint.directory import MANIFEST, step_of
from crossbatch.engine.checkpoint.slices import local_state
from crossbatch.engine.checkpoint.store import check_contents, writer_of
from crossbatch.engine.config import Config, Device, ResolvedConfig, parse_config, resolve
from crossbatch.engine.datasets import stop_on_lost_images
from crossbatch.engine.replay.probe import StepRecord, over_ranks, watched
from crossbatch.engine.run_log import METRICS, read_metrics
from crossbatch.engine.runtime.distributed import mean_over_ranks, on_main
from crossbatch.engine.runtime.world import World
from crossbatch.engine.sharding import LocalShards
from crossbatch.engine.step import TrainStep
from crossbatch.engine.tasks.pretrain import PretrainTask, pretrain_task
from crossbatch.engine.tasks.task import TrainResult
from crossbatch.engine.train_state import CHUNK_KEY, TrainState
from crossbatch.engine.trainer import NONFINITE
from crossbatch.models.backbones import family

# Relative, of a loss: rounding between ranks, kernels, machines.
TOLERANCES = {"fp32": 1e-4, "bf16": 2e-2, "fp16": 2e-2}


@dataclass(frozen=True)
class RecordedRun:
    """Holds what a run directory has recorded of a run of pretraining.

    Attributes:
        path: the run directory.
        config: the resolved configuration of its last start.
        checkpoints: by step, in order.
        metrics: lines of metrics.jsonl by step.
    """

    path: Path
    config: dict[str, Any]
    checkpoints: dict[int, Path]
    metrics: dict[int, dict[str, Any]]

    @staticmethod
    def open(path: Path, flag: str) -> "RecordedRun":
        """Read a run directory. Raises InputError that names `flag`."""
        try:
            config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            if isinstance(error, ValueError):
                what = "its config.json is cut off or damaged"
            else:
                what = "no config.json in it" if path.is_dir() else "no such folder"
            raise InputError(f"{flag} {path}: {what}; allowed: the run directory of a run of pretraining") from None
        settings = config.get("crossbatch") if isinstance(config, dict) else None
        if not isinstance(settings, dict) or "batchformer" not in settings:
            raise InputError(f"{flag} {path}: not a run of pretraining; allowed: a run directory of launch/pretrain.py")
        checkpoints = {step_of(found): found for found in reversed(checkpoint.candidates(path, "auto"))}
        metrics: dict[int, dict[str, Any]] = {}
        with contextlib.suppress(OSError):
            metrics = {line["step"]: line for line in read_metrics(path)}
        return RecordedRun(path, config, checkpoints, metrics)

    @property
    def last_step(self) -> int:
        """Return the last step of which anything was kept."""
        return max([0, *self.checkpoints, *self.metrics])

    def config_at(self, step: int) -> dict[str, Any]:
        """Return the configuration with which `step` was made: that of the next checkpoint, or of the last start."""
        for saved, path in self.checkpoints.items():
            if saved >= step:
                with contextlib.suppress(Unreadable):
                    return read_manifest(path)[1]
        return self.config

    def loss(self, step: int) -> float | None:
        """Return the recorded loss of a step, NaN if it was not finite, None if it was not recorded."""
        line = self.metrics.get(step, {})
        return None if "loss" not in line else math.nan if line["loss"] is None else line["loss"]


@dataclass(frozen=True)
class StateFault:
    """Says where the state in a checkpoint, or on a rank that stopped, differs from a replay by more than rounding.

    Attributes:
        step: after how many steps.
        name: of the tensor: parameters.NAME, buffers.NAME or optimizer.KEY.NAME.
        element: index into the tensor of the element that differs most.
        saved, replayed: its value in the checkpoint or on the rank, and after the replay.
        elements: how many elements of the tensor differ beyond the limit, and how many there are.
        tensors: how many tensors differ beyond the limit.
        rank: the rank that held the element.
        where: "in the checkpoint", or "when the run stopped", of which only the largest value of each tensor is known.
    """

    step: int
    name: str
    element: tuple[int, ...]
    saved: float
    replayed: float
    elements: tuple[int, int]
    tensors: int
    rank: int | None
    where: str = "in the checkpoint"

    @property
    def bits(self) -> list[int]:
        """Return the numbers of the bits, from 0, in which the two fp32 values differ."""
        saved, replayed = np.array([self.saved, self.replayed], np.float32).view(np.uint32).tolist()
        return [bit for bit in range(32) if (saved ^ replayed) >> bit & 1]


@dataclass
class Rebuilt:
    """Holds a step that was computed again: its images, what the probe saw, and how it agrees with the run.

    Attributes:
        run: the run.
        step: its number, from 1, as in metrics.jsonl.
        task: what is trained, with the configuration of the replay.
        ranks: how many ranks the run had.
        start: the step of the state from which the replay started; 0 is the seed.
        epoch: the epoch of the step, from 0.
        indices: the global batch, int64 [B]: indices of images in the data set; of a broken image, of the one in its place.
        order: the same before broken images were replaced.
        names: of these images.
        first: position of this rank's first image in the global batch.
        views: this rank's views, uint8 [V, n, C, H, W].
        record: what the probe saw of the step.
        before: records of the steps before it, by step.
        result: what the step returned on this rank.
        losses: replayed losses by step.
        state_faults: of the checkpoints on the way, the first one first.
        compared: the steps of these checkpoints.
        state_before: parameters before the step, by name, if they were asked for.
        changed_files: images whose files are newer than the run's record of the step, or of the first one with another loss.
    """

    run: RecordedRun
    step: int
    task: PretrainTask
    ranks: int
    start: int = 0
    epoch: int = 0
    indices: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    order: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    names: list[str] = field(default_factory=list)
    first: int = 0
    views: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    record: StepRecord = field(default_factory=StepRecord)
    before: dict[int, StepRecord] = field(default_factory=dict)
    result: TrainResult = field(init=False)
    losses: dict[int, float] = field(default_factory=dict)
    state_faults: list[StateFault] = field(default_factory=list)
    compared: list[int] = field(default_factory=list)
    state_before: dict[str, torch.Tensor] = field(default_factory=dict)
    changed_files: list[str] = field(default_factory=list)

    @property
    def parted_at(self) -> int | None:
        """Return the first replayed step whose loss is not the recorded one."""
        tolerance = TOLERANCES[self.task.cfg.precision]
        for step, loss in sorted(self.losses.items()):
            recorded = self.run.loss(step)
            if recorded is not None and not same_number(recorded, loss, tolerance):
                return step
        return None

    @property
    def origin(self) -> str:
        """Return in words from where the replay started."""
        return "the seed" if self.start == 0 else f"checkpoint {self.start}"

    def place(self, position: int) -> tuple[int, int]:
        """Return the rank of the run that had the image at `position` of the global batch, and its position there."""
        return divmod(position, len(self.indices) // self.ranks)

    def positions(self, rank: int | None, image: int | None) -> list[int]:
        """Return the positions in the global batch of an image, or of all images of a rank of the run; none if both are None.

        Raises InputError if that rank did not have the image.
        """
        n = len(self.indices) // self.ranks
        if image is None:
            return [] if rank is None else list(range(rank * n, (rank + 1) * n))
        found = np.flatnonzero((self.indices == image) | (self.order == image)).tolist()
        if not found:
            self._refuse(image)
        if rank is not None and rank not in [position // n for position in found]:
            raise InputError(
                f"--rank: given {rank}; rank {found[0] // n} had image {image} in step {self.step}; give that one"
            )
        return found

    def make(self, window: int, ranks_in_one: int, keep_state: bool, say: Callable[[str], object]) -> None:
        """Make the step, and the steps between a checkpoint and it; see `rebuild`."""
        readable = on_main(self._readable_checkpoints)
        starts = [0, *(step for step in readable if step < self.step)]
        self.start = min([max(starts), *(step for step in starts if step >= self.step - 1 - window)])
        self._check_images(readable)
        say(f"making steps {self.start + 1} to {self.step} of {self.run.path} again, from {self.origin}")
        candidates = [readable[self.start]] if self.start else []
        self.state = TrainState(self.task, self.task.device, candidates, allow_change=tuple(self.run.config))
        self.state.build(self.task.cfg.chunk)
        assert isinstance(self.state.step, TrainStep)
        self.state.step.ranks_in_one = ranks_in_one
        self._begin = self._tensors()
        batches = self.task.data.batches(self.start)
        for step in range(self.start, self.step):
            if step > self.start and step in readable:
                self._pass(readable[step])
            if keep_state and step == self.step - 1:
                held = self.state.step.backend.local_parameters()
                self.state_before = {name: _flat(shards) for name, shards in held.items()}
            if step == self.step - 1 and not self.state_faults:
                self.state_faults += self._faults_at_stop()
            self._train(batches, is_watched=step >= self.step - 1 - window)
        self._describe_batch()
        self._find_changed_files()
        # What changed a weight may show in the next checkpoint only.
        later = [step for step in readable if self.step <= step <= self.step + window]
        is_known = any(self.run.loss(step) is not None for step in self.losses) and self.parted_at is None
        if later and not self.state_faults and (later[0] == self.step or not is_known):
            for _ in range(self.step, later[0]):
                self._train(batches, is_watched=False)
            self._pass(readable[later[0]])

    def find_order(self, image: int | None) -> None:
        """Find the images of the step, in order. Raises InputError if `image` is not one of them and cannot replace one."""
        self._sampler = replace(self.task.data.sampler, world_size=1, rank=0)
        self.epoch, at = divmod(self.step - 1, self._sampler.steps_per_epoch)
        self.order, images = self._sampler.batch(self.epoch, at), self._sampler.num_images
        if image is None:
            return
        if not 0 <= image < images:
            raise InputError(f"--image: given {image}; allowed: 0 to {images - 1}, the images of the data set")
        if not np.isin((image - np.arange(MAX_TRIES)) % images, self.order).any():  # else it may replace a broken one
            self._refuse(image)

    def _refuse(self, image: int) -> NoReturn:
        """Raise InputError that says in which step of the epoch an image is."""
        for step in range(self._sampler.steps_per_epoch):
            if image in self._sampler.batch(self.epoch, step):
                there = self.epoch * self._sampler.steps_per_epoch + step + 1
                raise InputError(
                    f"--image: given {image}, which is not in step {self.step}; in this epoch, it is in step {there}"
                )
        raise InputError(
            f"--image: given {image}, which is in no step of epoch {self.epoch}, that of step {self.step}: images that do not "
            f"fill the last batch are left out; give a step of another epoch"
        )

    def _train(self, batches: Iterator[Batch], is_watched: bool) -> None:
        """Make the next step."""
        with stop_on_lost_images():
            batch = next(batches)
        step, state = self.state.step.progress.step + 1, self.state
        assert isinstance(state.step, TrainStep)
        if is_watched:
            with watched(state.step, keep_inputs=step == self.step) as record:
                result = state.train_on(batch)
            self.before[step] = over_ranks(record)
        else:
            result = state.train_on(batch)
        self.losses[step] = float(mean_over_ranks(result.metrics["loss"].detach().double().view(1)))
        if step == self.step:
            self.record, self.result, self._batch = self.before.pop(step), result, batch

    def _describe_batch(self) -> None:
        """Say which images the step had, on all ranks."""
        sampler, mine = self.task.data.sampler, self._batch.indices
        everyone: list[np.ndarray] = [mine] * sampler.world_size
        dist.all_gather_object(everyone, mine)
        self.indices = np.concatenate(everyone)
        self.first, self.views = sampler.rank * len(mine), self._batch.views.cpu()
        source = self.task.data.loader.source
        self.names = [source.name(index) for index in self.indices.tolist()]

    def _find_changed_files(self) -> None:
        """Find images of the step, and of the first one with another loss, whose files are newer than the run's record."""
        source: Any = self.task.data.loader.source
        if getattr(source, "folder", None) is None:
            return
        folder = Path(source.folder)
        folder = folder if folder.is_dir() else folder.parent  # of list://, whose names begin where the list is
        for step in sorted({self.step, self.parted_at or self.step}):
            recorded_at = self._recorded_at(step)
            if recorded_at is None:
                return
            for index in self._sampler.batch(*divmod(step - 1, self._sampler.steps_per_epoch)).tolist():
                with contextlib.suppress(OSError):
                    if (folder / source.name(index)).stat().st_mtime > recorded_at:
                        self.changed_files.append(source.name(index))

    def _recorded_at(self, step: int) -> float | None:
        """Return when the run had certainly made a step, as a file's time; None if nothing says so."""
        saved = [path / MANIFEST for number, path in self.run.checkpoints.items() if number >= step]
        with contextlib.suppress(OSError):
            return (saved[0] if saved else self.run.path / METRICS).stat().st_mtime
        return None

    def _readable_checkpoints(self) -> dict[int, Path]:
        """Return the checkpoints that are whole."""
        readable = {}
        for step, path in self.run.checkpoints.items():
            with contextlib.suppress(Unreadable):
                check_contents(path, read_manifest(path)[0])
                readable[step] = path
        return readable

    def _check_images(self, readable: dict[int, Path]) -> None:
        """Raise InputError if the images are not those of the run, as far as their names and labels tell."""
        data, given = self.task.data, self.task.cfg.crossbatch.data.path
        for path in readable.values():
            manifest, _ = read_manifest(path)
            images, checksum = data.sampler.num_images, manifest.images_checksum
            if manifest.images != images or checksum not in (None, data.checksum):
                same = "as many, but others" if manifest.images == images else f"{manifest.images}"
                raise InputError(
                    f"--data {given}: holds {images} images, and the run had {same} (names, order or labels); give the images "
                    f"that the run had"
                )
            return

    def _tensors(self) -> dict[str, torch.Tensor]:
        """Return copies of all tensors that a checkpoint keeps, flattened, in host memory."""
        return {name: _flat(held) for name, held in local_state(self.state.step.backend).items()}

    def _pass(self, path: Path) -> None:
        """Compare the state with a checkpoint, and go on from the checkpoint."""
        step = self.state.step.progress.step
        self.state_faults += _faults(path, step, self._begin, self._tensors())
        self.compared.append(step)
        self.state.load([path])
        self._begin = self._tensors()

    def _faults_at_stop(self) -> list[StateFault]:
        """Compare the state before the step with the largest weights that the ranks had when they stopped in it."""
        try:
            stopped = json.loads((self.run.path / NONFINITE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return []
        if stopped["step"] != self.step:
            return []
        found = []
        shapes = {name: held.shape for name, held in self.state.step.backend.local_parameters().items()}
        now = self._tensors()
        for name, largest in stopped["weights"].items():
            replayed = now[f"parameters.{name}"]
            value = math.nan if largest["value"] is None else largest["value"]
            saved = replayed.clone()
            saved[largest["element"]] = value
            excess = float(_excess(saved, self._begin[f"parameters.{name}"], replayed).max())
            if excess > 1:
                element = (
                    tuple(int(i) for i in np.unravel_index(largest["element"], shapes[name])) if shapes[name] else ()
                )
                before = float(replayed[largest["element"]])
                found.append((excess, name, element, value, before, len(replayed), largest["rank"]))
        if not found:
            return []
        _, name, element, value, before, total, rank = max(found, key=lambda one: one[0])
        fault = StateFault(self.step - 1, f"parameters.{name}", element, value, before, (1, total), len(found), rank)
        return [replace(fault, where="when the run stopped")]


def _flat(held: LocalShards) -> torch.Tensor:
    parts = sorted(held.slices, key=lambda part: part.start)
    return torch.cat([part.local.detach().flatten() for part in parts]).cpu().clone()


def _faults(path: Path, step: int, begin: dict[str, torch.Tensor], now: dict[str, torch.Tensor]) -> list[StateFault]:
    """Return the tensor of a checkpoint that differs most from the replayed one, or none within the limits of rounding.

    Ranks that sum in another order may turn the sign of a gradient that is zero but for rounding, and AdamW makes a whole step
    of it. So a tensor may differ by twice as much as it has moved in the replayed steps.
    """
    saved = checkpoint.read(path, "")
    found: list[tuple[float, str]] = []
    for name, replayed in now.items():
        excess = _excess(saved[name], begin[name], replayed)
        if len(replayed) and excess.max() > 1:
            found.append((float(excess.max()), name))
    if not found:
        return []
    # A changed weight also changes what follows from it: the optimizer's state, the moving average, running statistics.
    tiers = [_tier(name) for _, name in found]
    _, name = max(one for one, tier in zip(found, tiers, strict=True) if tier == min(tiers))
    shape = read_manifest(path)[0].shapes[name]
    excess = _excess(saved[name], begin[name], now[name])
    at = int(excess.argmax())
    element = tuple(int(i) for i in np.unravel_index(at, shape)) if shape else ()
    values = float(saved[name].flatten()[at]), float(now[name][at])
    beyond = int((excess > 1).sum()), len(excess)
    return [StateFault(step, name, element, *values, beyond, len(found), writer_of(path, name, at))]


def _excess(saved: torch.Tensor, begin: torch.Tensor, replayed: torch.Tensor) -> torch.Tensor:
    """Return by how many times each element differs more than rounding might make it."""
    saved, begin, replayed = saved.flatten().double(), begin.double(), replayed.double()
    if not len(replayed):
        return replayed
    limit = 2 * (replayed - begin).abs().max() + 1e-3 * replayed.abs().max() + 1e-12
    return ((saved - replayed).abs() / limit).nan_to_num(math.inf, math.inf)


def _tier(name: str) -> int:
    """Order tensors by how directly a fault may sit in them: weights, moving average, optimizer, running statistics."""
    tiers = ("parameters.momentum.", "parameters.", "optimizer.", "buffers.")
    return (1, 0, 2, 3)[next(number for number, start in enumerate(tiers) if name.startswith(start))]


def same_number(one: float, other: float, tolerance: float) -> bool:
    """Return whether two numbers agree within the relative `tolerance`, or are both not finite."""
    if not (math.isfinite(one) and math.isfinite(other)):
        return math.isfinite(one) == math.isfinite(other)
    return abs(one - other) <= tolerance * max(abs(one), abs(other))


def replay_config(saved: dict[str, Any], world: World, data: str | None) -> tuple[ResolvedConfig, int]:
    """Return the configuration for a replay of a step that was made with `saved`, and how many of its ranks each rank replaces.

    The replicas of a replay are whole (ZeRO stage 0), nothing is evaluated, and nothing is compiled or captured, because hooks
    must run. Raises InputError if this number of ranks cannot repeat what the norms saw.
    """
    raw = json.loads(json.dumps({name: value for name, value in saved.items() if name != "world_size"}))
    section, ranks, chunk = raw["crossbatch"], saved["world_size"], raw[CHUNK_KEY]
    batch = raw["train_batch_size"]
    raw["zero_optimization"], section["sharding"] = {"stage": 0}, "zero"
    section["model"] |= {"compile": False, "cuda_graph": False}
    section["evaluate"] = {"knn_every_epochs": 0, "every_epochs": 0}
    section["log"] = {}
    if data is not None:
        section["data"]["path"] = data
    norm_ranks, ranks_in_one = section["model"].get("norm_ranks", "world"), 1
    chunks = 1 if chunk == "auto" else -(-batch // ranks // chunk)
    if world.size != ranks:
        if norm_ranks not in ("world", ranks):
            raise InputError(
                f"crossbatch.model.norm_ranks: {norm_ranks} of {ranks} ranks shared statistics in this run, and its replay "
                f"has {world.size}; allowed: {ranks}; start it with torchrun --nproc_per_node {ranks}"
            )
        section["model"]["norm_ranks"] = "world"
        if chunks == 1:
            raw[CHUNK_KEY] = max(1, batch // world.size)
        elif family(section["model"]["arch"]) != "vit":
            if ranks % world.size:
                raise InputError(
                    f"WORLD_SIZE: {world.size} ranks replay a run of {ranks} in {chunks} chunks, over which norms took their "
                    f"statistics; allowed: a divisor of {ranks}"
                )
            ranks_in_one = ranks // world.size
            raw[CHUNK_KEY] = chunk * ranks_in_one
    config: Config = parse_config(raw)
    return resolve(config, world.size, Device.detect(), world.local_size), ranks_in_one


def check_step(run: RecordedRun, step: int) -> int:
    """Return how many ranks the run had at `step`. Raises InputError if the run did not get that far."""
    every = run.config["crossbatch"]["log"]["every_steps"] if "log" in run.config["crossbatch"] else 1
    last = run.last_step + max(every, 1)  # what a run that died had done is known up to the last line
    if step > last:
        raise InputError(
            f"--step: given {step}; {run.path} has come to step {run.last_step}, as its metrics and checkpoints say; allowed: "
            f"1 to {last}"
        )
    return run.config_at(step)["world_size"]


def rebuild(
    run: RecordedRun,
    step: int,
    window: int,
    data: str | None,
    world: World,
    device: torch.device,
    scratch: Path,
    image: int | None = None,
    keep_state: bool = False,
    say: Callable[[str], object] = lambda text: None,
) -> Rebuilt:
    """Make step number `step` of `run` again and watch it; all ranks of a process group call it.

    Args:
        run: the run.
        step: from 1, as in metrics.jsonl.
        window: how many steps before it to watch, where checkpoints or the seed allow it.
        data: where the images are now; None: where they were.
        world: this rank among those of the replay.
        device: where the model lives.
        scratch: a folder for the listing of the images.
        image: an index in the data set that the step must have.
        keep_state: whether to keep the parameters before the step.
        say: is told what will be done, before it takes its time.

    Raises:
        InputError: if the images or the number of ranks are others, or if the step does not have `image`.
    """
    saved = run.config_at(step)
    cfg, ranks_in_one = replay_config(saved, world, data)
    task = pretrain_task(cfg, world, device, scratch)
    try:
        rebuilt = Rebuilt(run, step, task, saved["world_size"])
        rebuilt.find_order(image)
        rebuilt.make(window, ranks_in_one, keep_state, say)
    finally:
        task.close()
    return rebuilt
