"""Fine-tuning: a pretrained backbone and a new head, end to end, with the mathematics of DeiT (Touvron et al., 2021).

Crops and flips are the data room's; mixup, CutMix and random erasing are timm's, drawn anew from (seed, step, rank) in every
step, so a resumed run repeats them.
"""

import json
import random
from dataclasses import replace

import numpy as np
import torch
from timm.data.mixup import Mixup
from timm.data.random_erasing import RandomErasing
from torch.nn import functional as F

from crossbatch import InputError
from crossbatch.data import Batch, GlobalBatchSampler, TrainLoader, normalize
from crossbatch.data.augment.parameters import crop_and_flip
from crossbatch.engine.checkpoint import Resumed
from crossbatch.engine.config import ResolvedFinetune, autocast_dtype
from crossbatch.engine.datasets import labelled_images
from crossbatch.engine.evaluation.features import EvalLoaderConfig, extract, gathered
from crossbatch.engine.evaluation.frozen import fingerprint
from crossbatch.engine.evaluation.pictures import confusion_counts, confusion_matrix, curves
from crossbatch.engine.evaluation.results import save_figures, write_results
from crossbatch.engine.optimizers import set_learning_rate
from crossbatch.engine.pretrained.load import Pretrained, load_pretrained
from crossbatch.engine.run_log import METRICS, SCORES
from crossbatch.engine.runtime.atomic_files import write_atomically
from crossbatch.engine.runtime.distributed import GroupCollective
from crossbatch.engine.runtime.nonfinite import describe_nonfinite
from crossbatch.engine.schedules import finetuning_rate
from crossbatch.engine.sharding import Backend, build_backend
from crossbatch.engine.step import Progress
from crossbatch.engine.trainer import Trainer
from crossbatch.models import set_num_chunks
from crossbatch.models.classifier import Classifier


class FinetuneStep:
    """One optimizer step on images of this rank; chunks of them add their gradients up.

    Args:
        backend: the sharded `Classifier` and its optimizer.
        steps_per_epoch: for the schedule.
        chunk: images that the network sees at once, at most.
    """

    def __init__(
        self, backend: Backend, run: ResolvedFinetune, device: torch.device, steps_per_epoch: int, chunk: int, rank: int
    ):
        self.backend, self.run, self.device, self.steps_per_epoch = backend, run, device, steps_per_epoch
        self.rank = rank
        self.ours = run.config.crossbatch
        self.chunks = -(-run.local_batch // chunk)
        assert isinstance(backend.model, Classifier)
        self.model = backend.model
        self.model.autocast_dtype = autocast_dtype(run.precision)
        set_num_chunks(self.model.online, self.chunks)
        self.mix = _mixing(run, self.model.online.head.out_features)
        self.erase = RandomErasing(self.ours.finetune.random_erasing, mode="pixel", device=device.type)
        self.progress = Progress.start(run.precision)

    def __call__(self, images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, float]:
        """Trains on uint8 [n, 3, H, W] and int64 [n].

        Returns:
            The mean loss of this rank, and the global gradient norm, which is not finite if the step was skipped.
        """
        progress = self.progress
        _seed_everything(self.ours.seed, progress.step, self.rank)
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
            self.backend.backward(loss, progress.loss_scale, more=number < self.chunks)
            losses.append(loss.detach())
        set_learning_rate(self.backend.optimizer, self.learning_rate(progress.updates))
        gradient_norm = self.backend.step(progress.loss_scale)
        if progress.finished(gradient_norm, self.run.precision):
            self.backend.update_momentum(self.ours.finetune.average)
            self.model.average_buffers()
        return torch.stack(losses).sum(), gradient_norm

    def learning_rate(self, updates: int) -> float:
        schedule = self.ours.schedule
        return finetuning_rate(
            updates / self.steps_per_epoch,
            self.run.lr_peak,
            schedule.epochs,
            schedule.warmup_epochs,
            schedule.deit_compat,
        )

    @property
    def _smoothing(self) -> float:
        return self.ours.finetune.label_smoothing if self.mix is None else 0.0  # mixed targets are smooth already

    def _targets(self, inputs: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and labels, or mixed inputs and the class probabilities [n, num_classes] that belong to them."""
        return (inputs, labels) if self.mix is None else self.mix(inputs, labels)


START = "started_from.json"  # in the run directory


class FinetuneTask(Trainer):
    """From the weights in `crossbatch.model.checkpoint`."""

    run: ResolvedFinetune
    train_step: FinetuneStep

    def open_data(self) -> tuple[GlobalBatchSampler, TrainLoader]:
        data, world = self.ours.data, self.world
        self.source, self.evaluation = labelled_images(data.path, self.out / "data_index")
        pretrained = self._pretrained()
        self.run = _with_network(self.run, pretrained)
        self.ours = self.run.config.crossbatch
        self.loaded, self.start = pretrained.summary(), fingerprint(pretrained.backbone)
        self.notes.append(str(pretrained))
        different = self.run.config.train_batch_size // data.repeats
        order = GlobalBatchSampler(self.ours.seed, len(self.source), different, world.size, world.rank)
        loader = TrainLoader(
            self.source,
            order,
            [crop_and_flip(data.image_size, data.crop_min)] * data.repeats,
            self.ours.seed,
            workers=self.run.workers,
            max_skipped_fraction=data.max_skipped_fraction,
            backend=data.backend,
            device=self.device,
        )
        return order, loader

    def count_steps(self) -> int:
        """An epoch is as many crops as there are images, however often each of them comes (Hoffer et al., 2020)."""
        return max(1, len(self.source) // self.run.config.train_batch_size)

    def _build(self, chunk: int) -> Resumed | None:
        """Also keeps in START what was loaded: a run that is continued must not be told of other weights."""
        resumed = super()._build(chunk)
        kept = self.out / START
        if resumed is None:
            if self.world.is_main:
                write_atomically(kept, json.dumps({"fingerprint": self.start, "loaded": self.loaded}, indent=2) + "\n")
            return None
        kept = resumed.checkpoint.parents[1] / START
        before = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {"fingerprint": self.start}
        if before["fingerprint"] != self.start and "crossbatch.model.checkpoint" not in self.allow_change:
            raise InputError(
                f"--resume {resumed.checkpoint}: started from other weights, {before['loaded']}; give --checkpoint as then, "
                f"choose another --out, or accept it with --allow-change crossbatch.model.checkpoint"
            )
        self.loaded = before.get("loaded", self.loaded)
        return resumed

    def build_step(self, chunk: int) -> FinetuneStep:
        backbone, settings = self._pretrained().backbone, self.ours.finetune
        classes = len(self.source.class_names)
        try:
            model = Classifier(backbone, classes, settings.drop_path, settings.average > 0).to(self.device)
        except ValueError as error:
            raise InputError(f"crossbatch.{error}") from None
        model.set_collective(GroupCollective())
        backend = build_backend(model, self.run)
        return FinetuneStep(backend, self.run, self.device, self.count_steps(), chunk, self.world.rank)

    def train_on(self, batch: Batch) -> tuple[torch.Tensor, float]:
        labels = torch.as_tensor(self.source.labels[batch.indices])
        return self.train_step(batch.views.flatten(0, 1), labels.repeat(len(batch.views)))

    def values(self, result: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": result}

    def rates(self) -> dict[str, float]:
        return {"lr": self.train_step.learning_rate(max(0, self.train_step.progress.updates - 1))}

    def describe_nonfinite(self, result: torch.Tensor) -> str:
        return describe_nonfinite({"the loss": result})

    def evaluation_due(self) -> bool:
        every = self.ours.evaluate.every_epochs * self.steps_per_epoch
        return self.step == self.stop or (self.step > 0 and self.step % every == 0)

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Top-1 over the evaluation images, each counted once; of the moving average, too, where there is one."""
        backend = self.train_step.backend
        networks = {"top1": "logits", "average_top1": "average_logits"}
        if not self.ours.finetune.average:
            del networks["average_top1"]
        backend.model.eval()
        found = {name: self._predictions(part) for name, part in networks.items()}
        backend.model.train()
        self.last_predictions = found["top1"]
        return {name: 100 * float((truth == predicted).mean()) for name, (truth, predicted) in found.items()}

    def _predictions(self, part: str) -> tuple[np.ndarray, np.ndarray]:
        """True and predicted class of every evaluation image that can be read, on every rank."""
        reading = EvalLoaderConfig(
            self.ours.data.image_size, max(32, min(256, self.chunk)), max(self.run.workers, 0), self.device
        )

        def logits(images: torch.Tensor) -> torch.Tensor:
            return self.train_step.backend(part, images)

        everything = np.flatnonzero(self.evaluation.labels >= 0)
        collective = self.train_step.model.collective
        rows = gathered(extract(logits, self.evaluation, everything, reading, collective), collective)
        return rows.labels_N.cpu().numpy(), rows.features_NC.argmax(1).cpu().numpy()

    def ended(self) -> None:
        """results.json, of the last evaluation and of the best one, which was chosen by what it is measured on; pictures."""
        if not self.scores or not self.world.is_main:
            return
        lines = [json.loads(line) for line in (self.out / METRICS).read_text(encoding="utf-8").splitlines()]
        scored = [line for line in lines if "top1" in line]  # before an interruption, too
        names, best = self.source.class_names, max(scored, key=lambda line: line["top1"])
        results = {
            "command": "finetune",
            **self.scores[-1][1],
            "step": self.scores[-1][0],
            "best_top1": best["top1"],
            "best_step": best["step"],
            "images": len(self.evaluation),
            "classes": len(names),
            "loaded": self.loaded,
        }
        write_results(self.out, results)
        counts = confusion_counts(*self.last_predictions, len(names))
        figures = {"confusion": confusion_matrix(counts, names, f"fine-tuned, step {self.scores[-1][0]}")}
        if len(scored) > 1:
            top1 = {SCORES[name]: [line[name] for line in scored] for name in self.scores[-1][1]}
            figures["accuracy"] = curves(top1, [round(line["epoch"]) for line in scored], "fine-tuning")
        save_figures(self.out, figures, self.step)

    def _pretrained(self) -> Pretrained:
        model = self.ours.model
        if model.checkpoint is None:
            raise InputError("crossbatch.model.checkpoint: not given; name what to start from with --checkpoint")
        return load_pretrained(
            model.checkpoint, model.arch, model.stem, model.backbone_args, self.ours.data.image_size, model.encoder
        )


def _with_network(run: ResolvedFinetune, pretrained: Pretrained) -> ResolvedFinetune:
    """The configuration says what the network is, as that of pretraining does."""
    ours = run.config.crossbatch
    model = replace(
        ours.model, arch=pretrained.arch, stem=pretrained.stem, backbone_args=dict(pretrained.backbone_args)
    )
    return replace(run, config=replace(run.config, crossbatch=replace(ours, model=model)))


def _mixing(run: ResolvedFinetune, num_classes: int) -> Mixup | None:
    settings = run.config.crossbatch.finetune
    if not (settings.mixup or settings.cutmix):
        return None
    return Mixup(settings.mixup, settings.cutmix, label_smoothing=settings.label_smoothing, num_classes=num_classes)


def _seed_everything(seed: int, step: int, rank: int) -> None:
    """torch draws the paths that are dropped, numpy (in timm's mixup) partners and boxes, Python timm's erased rectangles."""
    number = int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0])
    torch.manual_seed(number)
    np.random.seed(number)
    random.seed(number)
