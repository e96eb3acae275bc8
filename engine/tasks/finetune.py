"""Fine-tuning: a pretrained backbone and a new head, end to end, with the mathematics of DeiT (Touvron et al., 2021).

Crops and flips come from `crossbatch.data`. Mixup, CutMix and random erasing are timm's; they are drawn anew from
(seed, step, rank) in every step, so a resumed run repeats them.
"""

import json
import random
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.data.mixup import Mixup
from timm.data.random_erasing import RandomErasing
from torch.nn import functional as F

from crossbatch import InputError
from crossbatch.data import Batch, GlobalBatchSampler, Source, TrainLoader, normalize
from crossbatch.data.augment.parameters import crop_and_flip
from crossbatch.engine.checkpoint import Resumed
from crossbatch.engine.config import ResolvedFinetune, autocast_dtype, user_input
from crossbatch.engine.datasets import labelled_images
from crossbatch.engine.evaluation.features import EvalLoaderConfig, extract, fingerprint, gathered
from crossbatch.engine.evaluation.results import confusion_matrix, curves, save_figures, write_results
from crossbatch.engine.optimizers import set_learning_rate
from crossbatch.engine.pretrained.load import Pretrained, load_configured
from crossbatch.engine.run_log import METRICS, SCORES
from crossbatch.engine.runtime.atomic_files import write_atomically
from crossbatch.engine.runtime.distributed import GroupCollective, World
from crossbatch.engine.schedules import finetuning_rate
from crossbatch.engine.sharding import Backend
from crossbatch.engine.step import Progress, StepResult
from crossbatch.engine.tasks.build import build_backend
from crossbatch.engine.tasks.task import TrainData, TrainResult
from crossbatch.models import build_backbone, set_num_chunks
from crossbatch.models.classifier import Classifier

STARTED_FROM = "started_from.json"  # in the run directory: the weights that the run started from, and their fingerprint


class FinetuneStep:
    """One optimizer step of fine-tuning a call; gradients of chunks of the images add up.

    Args:
        backend: the sharded `Classifier` and its optimizer.
        cfg: the resolved configuration.
        device: where the model lives.
        steps_per_epoch: of the schedule.
        chunk: images that the network sees at once, at most.
        rank: this rank, for the random numbers of mixup and erasing.
    """

    def __init__(
        self, backend: Backend, cfg: ResolvedFinetune, device: torch.device, steps_per_epoch: int, chunk: int, rank: int
    ):
        self.backend, self.cfg, self.device, self.steps_per_epoch = backend, cfg, device, steps_per_epoch
        self.rank, self.chunk = rank, chunk
        self.chunks = -(-cfg.local_batch // chunk)
        assert isinstance(backend.model, Classifier)
        self.model = backend.model
        self.model.autocast_dtype = autocast_dtype(cfg.precision)
        set_num_chunks(self.model.online, self.chunks)
        self.mix = _mixing(cfg, self.model.online.head.out_features)
        self.erase = RandomErasing(self.cfg.crossbatch.finetune.random_erasing, mode="pixel", device=device.type)
        self.progress = Progress.start(cfg.precision)

    def __call__(self, images: torch.Tensor, labels: torch.Tensor) -> StepResult[torch.Tensor]:
        """Train on uint8 images [n, 3, H, W] and int64 labels [n]; the result's output is the mean loss of this rank."""
        progress = self.progress
        _seed_everything(self.cfg.crossbatch.seed, progress.step, self.rank)
        inputs = normalize(images.to(self.device, non_blocking=True))
        inputs, targets = self._targets(self.erase(inputs), labels.to(self.device))
        inputs = inputs.to(memory_format=torch.channels_last)
        losses = []
        for number, (some, wanted) in enumerate(
            zip(inputs.tensor_split(self.chunks), targets.tensor_split(self.chunks), strict=True), start=1
        ):
            logits = self.backend("logits", some)
            loss = F.cross_entropy(logits.float(), wanted, label_smoothing=self._smoothing, reduction="sum") / len(
                inputs
            )
            self.backend.backward(loss, progress.loss_scale, is_last=number == self.chunks)
            losses.append(loss.detach())
        lr = self.learning_rate(progress.updates)
        set_learning_rate(self.backend.optimizer, lr)
        grad_norm = self.backend.step(progress.loss_scale)
        if progress.finished(grad_norm, self.cfg.precision):
            self.backend.update_momentum(self.cfg.crossbatch.finetune.ema_decay)
            self.model.average_buffers()
        return StepResult(torch.stack(losses).sum(), grad_norm, {"lr": lr})

    def learning_rate(self, updates: int) -> float:
        """Return the scheduled learning rate of the step after `updates` updates."""
        schedule = self.cfg.crossbatch.schedule
        return finetuning_rate(
            updates / self.steps_per_epoch,
            self.cfg.lr_peak,
            schedule.epochs,
            schedule.warmup_epochs,
            schedule.deit_compat,
        )

    @property
    def _smoothing(self) -> float:
        return (
            self.cfg.crossbatch.finetune.label_smoothing if self.mix is None else 0.0
        )  # mixed targets are smooth already

    def _targets(self, inputs: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return inputs and labels, or mixed inputs and the class probabilities [n, num_classes] that belong to them."""
        return (inputs, labels) if self.mix is None else self.mix(inputs, labels)


@dataclass
class FinetuneTask:
    """A `Task` of a classifier that starts from pretrained weights; `finetune_task` builds it.

    Attributes:
        source: the training images, with labels.
        evaluation: the images to evaluate on, with labels.
        pretrained: the backbone to start from. It stays as it is: every `build_step` copies its weights.
        origin: what the run directory keeps about these weights: {"fingerprint": ..., "loaded": ...}.
        predictions: true and predicted classes of the last evaluation.
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
    timer: None = None

    def build_step(self, chunk: int) -> FinetuneStep:
        """Build the classifier from the pretrained weights and a random head."""
        settings, pretrained = self.cfg.crossbatch.finetune, self.pretrained
        backbone = build_backbone(
            pretrained.arch, pretrained.image_size, pretrained.stem, backbone_args=pretrained.backbone_args
        )
        backbone.load_state_dict(pretrained.backbone.state_dict())
        try:
            model = Classifier(backbone, len(self.source.class_names), settings.drop_path, settings.ema_decay > 0)
        except ValueError as error:
            raise InputError(f"crossbatch.finetune.{error}") from None
        model.to(self.device).set_collective(GroupCollective())
        backend = build_backend(model, self.cfg)
        return FinetuneStep(backend, self.cfg, self.device, self.data.steps_per_epoch, chunk, self.world.rank)

    def on_start(self, step: FinetuneStep, resumed: Resumed | None, allow_change: Iterable[str]) -> list[str]:
        """Return what was loaded, and keep it in the run directory: a run may not go on from other weights."""
        origin = self.origin
        if resumed:
            origin = _read_origin(resumed.checkpoint.parents[1]) or origin
            other_weights = origin["fingerprint"] != self.origin["fingerprint"]
            if other_weights and "crossbatch.model.checkpoint" not in allow_change:
                raise InputError(
                    f"--resume {resumed.checkpoint}: started from other weights, {origin['loaded']}; give --checkpoint as "
                    f"then, choose another --out, or accept it with --allow-change crossbatch.model.checkpoint"
                )
        if self.world.is_main:
            write_atomically(self.out / STARTED_FROM, json.dumps(origin, indent=2) + "\n")
        return [str(self.pretrained)]

    def train_on(self, step: FinetuneStep, batch: Batch) -> TrainResult:
        """Train on the images with their labels; several views of an image are several images."""
        labels = torch.as_tensor(self.source.labels[batch.indices])
        result = step(batch.views.flatten(0, 1), labels.repeat(len(batch.views)))
        return TrainResult({"loss": result.output}, result.rates, result.grad_norm, {"loss": result.output})

    def evaluation_due(self, num_steps: int, is_last: bool) -> bool:
        """Return whether to evaluate: every some epochs, and at the end."""
        every_steps = self.cfg.crossbatch.evaluate.every_epochs * self.data.steps_per_epoch
        return is_last or (num_steps > 0 and num_steps % every_steps == 0)

    @torch.no_grad()
    def evaluate(self, step: FinetuneStep) -> dict[str, float]:
        """Return the top-1 accuracy over the evaluation images, in percent; of the moving average, too, if there is one."""
        networks = {"top1": "logits"}
        if self.cfg.crossbatch.finetune.ema_decay:
            networks["average_top1"] = "average_logits"
        step.model.eval()
        found = {name: self._predict(step, method) for name, method in networks.items()}
        step.model.train()
        self.predictions = found["top1"]
        return {name: 100 * float((truth == predicted).mean()) for name, (truth, predicted) in found.items()}

    def _predict(self, step: FinetuneStep, method: str) -> tuple[np.ndarray, np.ndarray]:
        """Return true and predicted class of every evaluation image that can be read, once each, on every rank."""
        batch_size = max(32, min(256, step.chunk))
        loader = EvalLoaderConfig(
            self.cfg.crossbatch.data.image_size, batch_size, max(self.cfg.workers, 0), self.device
        )

        def logits(images: torch.Tensor) -> torch.Tensor:
            return step.backend(method, images)

        labelled = np.flatnonzero(self.evaluation.labels >= 0)
        collective = step.model.collective
        rows = gathered(extract(logits, self.evaluation, labelled, loader, collective), collective)
        return rows.labels_N.cpu().numpy(), rows.features_NC.argmax(1).cpu().numpy()

    def on_end(self, scores: list[tuple[int, dict[str, float]]]) -> list[str]:
        """Write results.json and figures. The best score is chosen by the images that it is measured on, and says so."""
        if not scores or not self.world.is_main:
            return []
        (last_step, last), names = scores[-1], self.source.class_names
        lines = [json.loads(line) for line in (self.out / METRICS).read_text(encoding="utf-8").splitlines()]
        scored = [line for line in lines if "top1" in line]  # before an interruption, too
        best = max(scored, key=lambda line: line["top1"])
        origin = _read_origin(self.out) or self.origin
        results = {
            "command": "finetune",
            **last,
            "step": last_step,
            "best_top1": best["top1"],
            "best_step": best["step"],
            "images": len(self.evaluation),
            "classes": len(names),
            "loaded": origin["loaded"],
        }
        write_results(self.out, results)
        assert self.predictions is not None
        figures = {"confusion": confusion_matrix(*self.predictions, names, f"fine-tuned, step {last_step}")}
        if len(scored) > 1:
            top1 = {SCORES[name]: [line[name] for line in scored] for name in last}
            figures["accuracy"] = curves(top1, [round(line["epoch"]) for line in scored], "fine-tuning")
        save_figures(self.out, figures, last_step)
        return []


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
    source, evaluation = labelled_images(cfg.crossbatch.data.path, out / "data_index")
    pretrained = load_configured(cfg.crossbatch.model, cfg.crossbatch.data.image_size)
    cfg = _with_network(cfg, pretrained)
    origin = {"fingerprint": fingerprint(pretrained.backbone), "loaded": pretrained.summary()}
    data = _open_data(cfg, source, world, device)
    return FinetuneTask(cfg, world, device, out, data, source, evaluation, pretrained, origin)


def _with_network(cfg: ResolvedFinetune, pretrained: Pretrained) -> ResolvedFinetune:
    """Return `cfg` with the network of the weights in it, so that config.json says what was trained, as in pretraining."""
    network = {"arch": pretrained.arch, "stem": pretrained.stem, "backbone_args": dict(pretrained.backbone_args)}
    model = cfg.crossbatch.model.model_copy(update=network)
    crossbatch = cfg.crossbatch.model_copy(update={"model": model})
    return replace(cfg, config=cfg.config.model_copy(update={"crossbatch": crossbatch}))


def _open_data(cfg: ResolvedFinetune, source: Source, world: World, device: torch.device) -> TrainData:
    """Return the training images. An epoch has as many crops as there are images, however often each comes.

    This is the repeated augmentation of Hoffer et al. (2020).
    """
    data, seed, batch = cfg.crossbatch.data, cfg.crossbatch.seed, cfg.train_batch_size
    with user_input("train_batch_size"):
        sampler = GlobalBatchSampler(seed, len(source), batch // data.repeats, world.size, world.rank)
    loader = TrainLoader(
        source,
        sampler=sampler,
        augmentations=[crop_and_flip(data.image_size, data.crop_min)] * data.repeats,
        seed=seed,
        workers=cfg.workers,
        max_skipped_fraction=data.max_skipped_fraction,
        backend=data.backend,
        device=device,
    )
    return TrainData(sampler, loader, max(1, len(source) // batch))


def _read_origin(out: Path) -> dict[str, Any] | None:
    """Return what a run directory keeps about the weights that its run started from; None if it keeps nothing."""
    file = out / STARTED_FROM
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


def _mixing(cfg: ResolvedFinetune, num_classes: int) -> Mixup | None:
    settings = cfg.crossbatch.finetune
    if not (settings.mixup or settings.cutmix):
        return None
    return Mixup(settings.mixup, settings.cutmix, label_smoothing=settings.label_smoothing, num_classes=num_classes)


def _seed_everything(seed: int, step: int, rank: int) -> None:
    """Seed torch, which draws the dropped paths, numpy, which draws mixup's boxes, and Python, for timm's erased rectangles."""
    number = int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0])
    torch.manual_seed(number)
    np.random.seed(number)
    random.seed(number)
