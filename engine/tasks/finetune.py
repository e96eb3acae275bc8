"""Fine-tunes a pretrained backbone and a new head, end to end, as DeiT does (Touvron et al., 2021)."""

import contextlib
import json
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from crossbatch import InputError
from crossbatch.data import Batch, Source
from crossbatch.data.augment.parameters import crop_and_flip
from crossbatch.engine.checkpoint import Resumed, is_allowed
from crossbatch.engine.config import ResolvedFinetune, user_input
from crossbatch.engine.datasets import (
    TrainData,
    check_loaders,
    found_images,
    labelled_images,
    log_skipped_images,
    longest_wait_s,
    remote_options,
    train_data,
)
from crossbatch.engine.evaluation.features import EvalLoaderConfig, extract, fingerprint, gathered
from crossbatch.engine.evaluation.results import confusion_matrix, curves, save_figures, write_results
from crossbatch.engine.pretrained.load import Pretrained, load_configured
from crossbatch.engine.run_log import SCORES, read_metrics
from crossbatch.engine.runtime.atomic_files import write_atomically
from crossbatch.engine.runtime.distributed import GroupCollective, on_all_ranks
from crossbatch.engine.runtime.world import World
from crossbatch.engine.tasks.build import build_backend
from crossbatch.engine.tasks.finetune_step import FinetuneStep
from crossbatch.engine.tasks.task import STARTED_FROM, TrainResult
from crossbatch.models import build_backbone
from crossbatch.models.classifier import Classifier


@dataclass
class FinetuneTask:
    """Trains a classifier from pretrained weights, as a `Task`; `finetune_task` builds it.

    Attributes:
        source: the training images, with labels.
        evaluation: the images to evaluate on, with labels.
        pretrained: the backbone to start from. It stays as it is: every `build_step` copies its weights.
        origin: what the run directory keeps about these weights: {"fingerprint": ..., "loaded": ...}.
        predictions: true and predicted classes of the last evaluation.
        named: broken images that the log names already.
    """

    cfg: ResolvedFinetune
    world: World
    device: torch.device
    out: Path
    data: TrainData
    source: Source
    evaluation: Source
    pretrained: Pretrained
    origin: dict[str, Any]
    predictions: tuple[np.ndarray, np.ndarray] | None = None
    named: set[str] = field(default_factory=set)
    timer: None = None

    def build_step(self, chunk: int, resumes: bool = False) -> FinetuneStep:
        """Build the classifier from the pretrained weights and a random head."""
        settings, pretrained = self.cfg.crossbatch.finetune, self.pretrained
        backbone = build_backbone(
            pretrained.arch,
            pretrained.image_size,
            pretrained.stem,
            backbone_args=pretrained.backbone_args,
            in_channels=len(pretrained.mean),
        )
        backbone.load_state_dict(pretrained.backbone.state_dict())
        with user_input("crossbatch.finetune."):
            model = Classifier(backbone, len(self.source.class_names), settings.drop_path, settings.ema_decay > 0)
        model.to(self.device).set_collective(GroupCollective())
        backend = build_backend(model, self.cfg)
        channels = pretrained.channels
        return FinetuneStep(backend, self.cfg, self.device, self.data.steps_per_epoch, chunk, self.world.rank, channels)

    def on_start(self, step: FinetuneStep, resumed: Resumed | None, allow_change: Iterable[str]) -> list[str]:
        """Return what was loaded, and keep it in the run directory: a run may not go on from other weights."""
        ours = self.origin["fingerprint"]
        if resumed and (resumed.checkpoint.parents[1] / STARTED_FROM).exists():
            self.origin = json.loads((resumed.checkpoint.parents[1] / STARTED_FROM).read_text(encoding="utf-8"))
            if self.origin["fingerprint"] != ours and not is_allowed("crossbatch.model.checkpoint", allow_change):
                raise InputError(
                    f"--resume {resumed.checkpoint}: started from other weights, {self.origin['loaded']}; give the "
                    f"--checkpoint of that start, choose another --out, or accept it with --allow-change "
                    f"crossbatch.model.checkpoint"
                )
        if self.world.is_main:
            write_atomically(self.out / STARTED_FROM, json.dumps(self.origin, indent=2) + "\n")
        return [*found_images(self.cfg.crossbatch.data.path, self.source, self.evaluation), str(self.pretrained)]

    def train_on(self, step: FinetuneStep, batch: Batch) -> TrainResult:
        """Train on the images with their labels; several views of an image are several images."""
        assert batch.labels is not None
        result = step(batch.views.flatten(0, 1), batch.labels.repeat(len(batch.views)))
        return TrainResult({"loss": result.output}, result.rates, result.grad_norm, {"loss": result.output})

    def evaluations_due(self, num_steps: int, is_last: bool) -> Collection[str]:
        """Return whether to evaluate: every `every_epochs` epochs, and at the end."""
        every_steps = self.cfg.crossbatch.evaluate.every_epochs * self.data.steps_per_epoch
        return ["accuracy"] if is_last or (num_steps > 0 and num_steps % every_steps == 0) else []

    @torch.no_grad()
    def evaluate(
        self, step: FinetuneStep, due: Collection[str], between_batches: Callable[[int], object]
    ) -> dict[str, float]:
        """Return the top-1 accuracy over the evaluation images, in percent; of the moving average, too, if there is one."""
        networks = {"top1": "logits"}
        if self.cfg.crossbatch.finetune.ema_decay:
            networks["average_top1"] = "average_logits"
        step.model.eval()
        found = {name: self._predict(step, method, between_batches) for name, method in networks.items()}
        step.model.train()
        self.predictions = found["top1"]
        return {name: 100 * float((truth == predicted).mean()) for name, (truth, predicted) in found.items()}

    def _predict(
        self, step: FinetuneStep, method: str, between_batches: Callable[[int], object]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return true and predicted class of every evaluation image that can be read, once each, on every rank."""
        labelled, collective = np.flatnonzero(self.evaluation.labels >= 0), step.model.collective

        def predicted(images: torch.Tensor) -> torch.Tensor:
            return step.backend(method, images).argmax(1, keepdim=True)

        reading = self._reading(step.chunk)
        rows = gathered(extract(predicted, self.evaluation, labelled, reading, collective, between_batches), collective)
        log_skipped_images(rows.skipped, self.named)
        return rows.labels_N.cpu().numpy(), rows.features_NC[:, 0].long().cpu().numpy()

    def _reading(self, chunk: int) -> EvalLoaderConfig:
        """Say how evaluation images are loaded; `chunk` is what the network sees at once."""
        cfg, data, batch_size = self.cfg, self.cfg.crossbatch.data, max(32, min(256, chunk))
        return EvalLoaderConfig(
            data.image_size,
            batch_size,
            cfg.workers,
            self.device,
            data.interpolation,
            longest_wait_s(cfg),
            self.pretrained.channels,
        )

    def on_end(self, scores: list[tuple[int, dict[str, float]]]) -> list[str]:
        """Write results.json and figures. The best score is chosen by the images that it is measured on, and says so."""
        if not scores or not self.world.is_main:
            return []
        (last_step, last), names = scores[-1], self.source.class_names
        scored = [{"step": step, "epoch": step / self.data.steps_per_epoch, **found} for step, found in scores]
        with contextlib.suppress(OSError):  # on a full disk, those of this process are left
            lines = read_metrics(self.out)
            scored = [line for line in lines if "top1" in line] or scored  # before an interruption, too
        best = max(scored, key=lambda line: line["top1"])
        results = {"command": "finetune", **last, "step": last_step}
        results |= {"best_top1": best["top1"], "best_step": best["step"]}
        results |= {"images": len(self.evaluation), "classes": len(names), "loaded": self.origin["loaded"]}
        write_results(self.out, results)
        assert self.predictions is not None
        predictions, title = self.predictions, f"fine-tuned, step {last_step}"
        figures = {"confusion": lambda: confusion_matrix(*predictions, names, title)}
        if len(scored) > 1:
            top1 = {SCORES[name]: [line[name] for line in scored] for name in last}
            figures["accuracy"] = lambda: curves(top1, [round(line["epoch"]) for line in scored], "fine-tuning")
        save_figures(self.out, figures, last_step)
        return []

    def close(self) -> None:
        """End the processes that load images."""
        self.data.loader.close()


def finetune_task(cfg: ResolvedFinetune, world: World, device: torch.device, out: Path) -> FinetuneTask:
    """Open the images and read the pretrained weights, which say what the network is; all ranks of a process group call it.

    Args:
        cfg: the resolved configuration; `crossbatch.model.checkpoint` names the weights.
        world: this rank among the others.
        device: where the model will live.
        out: the run directory, which keeps an index of the images.

    Raises:
        InputError: if the images or the weights cannot be used.
    """
    remote = remote_options(cfg.crossbatch.data, longest_wait_s(cfg))
    source, evaluation = labelled_images(cfg.crossbatch.data.path, out / "data_index", remote)
    pretrained = on_all_ranks(lambda: load_configured(cfg.crossbatch.model, cfg.crossbatch.data.image_size))
    cfg = _with_network(cfg, pretrained)
    origin = {"fingerprint": fingerprint(pretrained.backbone), "loaded": pretrained.summary()}
    settings = cfg.crossbatch.data
    with user_input("crossbatch.data.auto_augment"):
        colours = settings.color_jitter, settings.auto_augment
        view = crop_and_flip(settings.image_size, settings.crop_min, settings.interpolation, *colours)
    view = replace(view, channels=len(pretrained.mean))
    data = train_data(cfg, world, device, source, [view] * settings.repeats, repeats=settings.repeats)
    task = FinetuneTask(cfg, world, device, out, data, source, evaluation, pretrained, origin)
    check_loaders(world, data.loader, task._reading(cfg.chunk).open(evaluation))
    return task


def _with_network(cfg: ResolvedFinetune, pretrained: Pretrained) -> ResolvedFinetune:
    """Return `cfg` with the network of the weights in it, so that config.json says what was trained, as in pretraining."""
    network = {"arch": pretrained.arch, "stem": pretrained.stem, "backbone_args": dict(pretrained.backbone_args)}
    model = cfg.crossbatch.model.model_copy(update=network)
    crossbatch = cfg.crossbatch.model_copy(update={"model": model})
    return replace(cfg, config=cfg.config.model_copy(update={"crossbatch": crossbatch}))
