"""Pretrains with MoCo v3 + BatchFormer on two views of every image, and scores the features along the way."""

import json
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from crossbatch import InputError
from crossbatch.data import Batch, has_evaluation_split
from crossbatch.data.augment.parameters import channels_of
from crossbatch.engine.checkpoint import Resumed, create_run_directory
from crossbatch.engine.config import ResolvedConfig
from crossbatch.engine.config.evaluation import FrozenModelConfig
from crossbatch.engine.datasets import (
    TrainData,
    check_loaders,
    found_images,
    longest_wait_s,
    remote_options,
    train_data,
    training_images,
    view_augmentations,
)
from crossbatch.engine.evaluation.knn import too_few_neighbours
from crossbatch.engine.evaluation.monitor import FeatureMonitor
from crossbatch.engine.pretrained.load import Pretrained, load_pretrained
from crossbatch.engine.pretrained.weights import mismatch
from crossbatch.engine.run_log import command
from crossbatch.engine.runtime.atomic_files import write_atomically
from crossbatch.engine.runtime.chunk_size import automatic_chunk, remember
from crossbatch.engine.runtime.distributed import on_all_ranks, on_main
from crossbatch.engine.runtime.timing import StepTimer
from crossbatch.engine.runtime.world import World
from crossbatch.engine.schedules import too_short
from crossbatch.engine.step import TrainStep
from crossbatch.engine.tasks.build import build_backend, build_model, connect
from crossbatch.engine.tasks.task import STARTED_FROM, TrainResult
from crossbatch.models import MoCo
from crossbatch.models.compiled import compiled_modules
from crossbatch.models.vit import ViT

CHUNK = "chunk.json"  # in the run directory: what `train_micro_batch_size_per_gpu: "auto"` came to


@dataclass
class PretrainTask:
    """Trains MoCo v3, as a `Task`; `pretrain_task` builds it.

    Attributes:
        monitor: scores the features; None if the configuration asks for no score, or the images allow none.
        has_labels: whether there are labelled images for the evaluation commands.
        notes: what the log says of the images and of an automatic chunk.
        timer: measures the parts of the steps, from the first `build_step` on.
        origin: what the backbone of a new run started from; None for random weights and in a resumed run.
    """

    cfg: ResolvedConfig
    device: torch.device
    out: Path
    data: TrainData
    monitor: FeatureMonitor | None
    has_labels: bool
    notes: list[str]
    timer: StepTimer | None = None
    origin: Pretrained | None = None

    def build_step(self, chunk: int, resumes: bool = False) -> TrainStep:
        """Build the network with random weights, in a new run with the backbone of `crossbatch.model.init`.

        A chunk smaller than configured is remembered for the run's continuation.
        """
        model = build_model(self.cfg)
        self.origin = None
        if self.cfg.crossbatch.model.init is not None and not resumes:
            self.origin = start_from(model, self.cfg)
        model.to(self.device)
        connect(model, self.cfg)
        if chunk < self.cfg.chunk:
            remember(self.out / CHUNK, self.cfg, chunk)
        self.timer = StepTimer(self.device)
        backend = build_backend(model, self.cfg)
        return TrainStep(backend, self.cfg, self.device, self.data.steps_per_epoch, chunk, self.timer)

    def on_start(self, step: TrainStep, resumed: Resumed | None, allow_change: Iterable[str]) -> list[str]:
        """Return what was found, loaded and chosen: images, weights, the chunk, the kernels; and warnings about the recipe."""
        model = step.backend.model
        assert isinstance(model, MoCo)
        notes = [*self.notes, *(f"warning: {doubt}" for doubt in self._doubts())]
        if self.origin is not None:
            loaded = {"loaded": self.origin.summary()}
            on_main(lambda: write_atomically(self.out / STARTED_FROM, json.dumps(loaded, indent=2) + "\n"))
            notes.append(f"both backbones start from {self.origin}; the rest is new")
        if model.batchformer is not None:
            notes.append("BatchFormer: {} ({})".format(*model.batchformer.kernel_on(self.device)))
        if compiled := Counter(type(module).__name__.removeprefix("FSDP") for module in compiled_modules(model)):
            parts = ", ".join(f"{count} x {kind}" for kind, count in compiled.items())
            notes.append(f"torch.compile: {parts}, each when it is first called")
        return notes

    def _doubts(self) -> list[str]:
        """Return what speaks against a run: it is too short to learn, or does not fit to the weights that it starts from."""
        section, found = self.cfg.crossbatch, too_short(self.cfg.config, self.data.sampler.num_images)
        if section.schedule.freeze_backbone_epochs and section.model.init is None:
            found.append("crossbatch.schedule.freeze_backbone_epochs freezes random weights; give others with --init")
        data, origin = section.data, self.origin
        if origin and origin.knows_channels and origin.channels != channels_of(data.channels, data.mean, data.std):
            found.append(
                f"--init {section.model.init}: trained on images with crossbatch.data.mean {[*origin.mean]} and std "
                f"{[*origin.std]}; this run has others; set both to these"
            )
        return found

    def train_on(self, step: TrainStep, batch: Batch) -> TrainResult:
        """Train on two views of every image."""
        model = step.backend.model
        assert isinstance(model, MoCo)
        if model.awaits_capture:
            # Its threads allocate on the GPU, which can break the capture of a graph. It starts again with the next batch.
            self.data.loader.close()
        result = step(batch.views)
        output, terms = result.output, result.output.terms.items()
        metrics = {"loss": output.loss, **output.signals, **{f"loss_terms/{name}": term for name, term in terms}}
        suspects = {"features": output.signals["feature_std"], "loss": output.loss}
        suspects |= {f"loss term {name}": term for name, term in terms}
        return TrainResult(metrics, result.rates, result.grad_norm, suspects, step.noise)

    def evaluations_due(self, num_steps: int, is_last: bool) -> Collection[str]:
        """Return which scores of the features are due: before the first step, every `every_epochs` epochs, and at the end."""
        every_epochs, steps = self.monitor.every_epochs if self.monitor else {}, self.data.steps_per_epoch
        return [name for name, every in every_epochs.items() if is_last or num_steps % (every * steps) == 0]

    def evaluate(
        self, step: TrainStep, due: Collection[str], between_batches: Callable[[int], object]
    ) -> dict[str, float]:
        """Return the scores of the features that are `due`."""
        assert self.monitor is not None
        return self.monitor.scores(step.backend, due, between_batches)

    def on_end(self, scores: list[tuple[int, dict[str, float]]]) -> list[str]:
        """Return the command of a linear probe."""
        backbone = FrozenModelConfig(checkpoint=str(self.out))
        return [command("linear", backbone, self.cfg.crossbatch.data.path)] if self.has_labels else []

    def close(self) -> None:
        """End the processes that load images."""
        self.data.loader.close()
        if self.monitor is not None:
            self.monitor.close()


def start_from(model: MoCo, cfg: ResolvedConfig) -> Pretrained:
    """Load the backbone that `crossbatch.model.init` names into both encoders of `model`; every rank calls it.

    Raises InputError, on all ranks, if a rank cannot read it, or if it is another network than the configured one.
    """
    wanted, data = cfg.crossbatch.model, cfg.crossbatch.data
    path = wanted.init
    assert path is not None

    def load() -> Pretrained:
        found = load_pretrained(path, wanted.arch, wanted.stem, wanted.backbone_args, data.image_size, flag="--init")
        if len(found.mean) != data.channels:
            raise InputError(
                f"--init {path}: is for images with {len(found.mean)} channels; crossbatch.data.channels: given "
                f"{data.channels}; set it to {len(found.mean)}, or leave out --init"
            )
        ours = model.online.backbone
        heads = int(ours.blocks[0].attn.num_heads) if isinstance(ours, ViT) else None  # pyright: ignore
        if mismatch(ours.state_dict(), found.backbone.state_dict()) or found.num_heads != heads:
            args = json.dumps(found.backbone_args)
            raise InputError(
                f"--init {path}: its {found.arch} has crossbatch.model.backbone_args {args}, and the configured one "
                f"{json.dumps(dict(wanted.backbone_args))}; give --set crossbatch.model.backbone_args='{args}'"
            )
        return found

    pretrained = on_all_ranks(load)
    for encoder in (model.online, model.momentum):
        encoder.backbone.load_state_dict(pretrained.backbone.state_dict())
    return pretrained


def pretrain_task(cfg: ResolvedConfig, world: World, device: torch.device, out: Path) -> PretrainTask:
    """Open the images and find a chunk that fits into memory; all ranks of a process group call it.

    Args:
        cfg: the resolved configuration.
        world: this rank among the others.
        device: where the model will live.
        out: the run directory, which keeps an index of the images and the chunk.

    Raises:
        InputError: if the images cannot be used, or not even one of them fits into memory.
    """
    settings, evaluates = cfg.crossbatch.data, cfg.crossbatch.evaluate.knn_every_epochs > 0
    try:
        remote = remote_options(settings, longest_wait_s(cfg))
        source, evaluation = training_images(settings.path, out / "data_index", evaluates, remote)
    except InputError as error:
        said = str(error)
        with suppress(ValueError):  # of a path that cannot be opened at all, which the error says
            if evaluates and settings.path is not None and has_evaluation_split(settings.path):
                said += "; or set crossbatch.evaluate.knn_every_epochs=0 to train without k-NN"
        raise InputError(said) from None
    views = view_augmentations(settings)
    data = train_data(cfg, world, device, source, views, shuffle_window=settings.shuffle_window)
    monitor, notes = None, found_images(settings.path, source, evaluation, evaluates)
    if evaluation is not None or cfg.crossbatch.evaluate.every_epochs:
        monitor = FeatureMonitor(cfg, source, evaluation, device)
    if monitor and evaluation is not None:
        bank, k = len(monitor.bank_indices), cfg.crossbatch.evaluate.knn_k
        notes += too_few_neighbours([k], bank, "crossbatch.evaluate.knn_k")
    check_loaders(world, data.loader, *([monitor.loader] if monitor else []))
    chunk = cfg.chunk
    if cfg.auto_chunk:
        on_main(lambda: create_run_directory(out))
        chunk, why = automatic_chunk(cfg, world, device, out / CHUNK)
        notes += [why] if chunk < cfg.local_batch else []
    cfg = replace(cfg, chunk=chunk, chunks=-(-cfg.local_batch // chunk))
    assert settings.path is not None
    has_labels = source.has_labels and has_evaluation_split(settings.path)
    return PretrainTask(cfg, device, out, data, monitor, has_labels, notes)
