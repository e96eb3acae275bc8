"""Pretraining: MoCo v3 + BatchFormer on two views of every image, watched by k-NN."""

from typing import Any

import torch
from torchvision.utils import make_grid

from crossbatch.data import Batch, GlobalBatchSampler, TrainLoader, moco_v3_augmentations
from crossbatch.engine.config import ResolvedConfig
from crossbatch.engine.config.evaluation import FrozenModelConfig
from crossbatch.engine.datasets import input_errors, training_images
from crossbatch.engine.evaluation.knn import KnnMonitor
from crossbatch.engine.run_log import command
from crossbatch.engine.runtime.chunk_size import automatic_chunk, remember
from crossbatch.engine.runtime.distributed import GroupCollective
from crossbatch.engine.runtime.nonfinite import LossMonitor, describe_nonfinite
from crossbatch.engine.runtime.profiling import RunProfile, check_steps_left
from crossbatch.engine.runtime.timing import StepTimer, mean_ms
from crossbatch.engine.step import StepResult, TrainStep
from crossbatch.engine.tasks.build import build_backend, build_model
from crossbatch.engine.trainer import Trainer
from crossbatch.models import MoCoOutput

CHUNK = "chunk.json"  # in the run directory: what `train_micro_batch_size_per_gpu: "auto"` came to


class PretrainTask(Trainer):
    """A `Trainer` of MoCo v3; `profile`: steps to look into, see `engine.profile`, 0 for none."""

    run: ResolvedConfig
    train_step: TrainStep

    def __init__(self, *arguments: Any, profile: int = 0, **more: Any):
        super().__init__(*arguments, **more)
        self.taken: list[dict[str, float]] = []  # parts of the steps since the last line of metrics, as far as read
        self.profile = None
        if profile:
            check_steps_left(profile, self.stop - self.step)
            batch, folder = self.run.config.train_batch_size, self.out / "profile"
            self.profile = RunProfile(folder, profile, self.world.rank, batch, self.log.note)

    def open_data(self) -> tuple[GlobalBatchSampler, TrainLoader]:
        data = self.ours.data
        source, evaluation = training_images(data.path, self.out / "data_index")
        batch, seed = self.run.config.train_batch_size, self.ours.seed
        with input_errors("train_batch_size"):
            order = GlobalBatchSampler(seed, len(source), batch, self.world.size, self.world.rank, data.shuffle_window)
        self.alarms = LossMonitor(self.ours.watch)
        self.monitor, self.has_labels = None, evaluation is not None
        if self.ours.evaluate.knn_every_epochs and evaluation is not None:
            self.monitor = KnnMonitor(self.run, source, evaluation, self.device)
        loader = TrainLoader(
            source,
            sampler=order,
            augmentations=moco_v3_augmentations(data.image_size, data.crop_min),
            seed=seed,
            workers=self.run.workers,
            max_skipped_fraction=data.max_skipped_fraction,
            backend=data.backend,
            device=self.device,
        )
        return order, loader

    def choose_chunk(self) -> int:
        if not self.run.auto_chunk:
            return self.run.chunk
        cache = self.out / CHUNK
        chunk, why = automatic_chunk(self.run, self.world, self.device, cache)
        if chunk < self.run.local_batch:
            self.notes.append(why)
        return chunk

    def remember_chunk(self) -> None:
        remember(self.out / CHUNK, self.run, self.chunk)

    def build_step(self, chunk: int) -> TrainStep:
        model = build_model(self.run).to(self.device)
        model.set_collective(GroupCollective())
        if model.batchformer is not None:
            self.notes.append("BatchFormer: {} ({})".format(*model.batchformer.kernel_on(self.device)))
        self.timer = StepTimer(self.device)
        backend = build_backend(model, self.run)
        return TrainStep(backend, self.run, self.device, self.order.steps_per_epoch, chunk, self.timer)

    def started(self, batch: Batch) -> None:
        self.log.pictures("views", view_pairs(batch.views), 0)

    def train_on(self, batch: Batch) -> StepResult[MoCoOutput]:
        result = self.train_step(batch.views)
        if self.profile is not None:
            self.taken += self.timer.read()
            self.profile.stepped(self.taken[-1], self.clock.last_wait_s)
        return result

    def stage_ms(self) -> dict[str, float]:
        steps, self.taken = self.taken + self.timer.read(), []
        return mean_ms(steps)

    def values(self, output: MoCoOutput) -> dict[str, torch.Tensor]:
        terms = {f"loss_terms/{name}": term for name, term in output.terms.items()}
        return {"loss": output.loss, **output.signals, **terms}

    def describe_nonfinite(self, output: MoCoOutput) -> str:
        terms = {f"loss term {name}": term for name, term in output.terms.items()}
        return describe_nonfinite({"the features": output.signals["feature_std"], "the loss": output.loss, **terms})

    def evaluation_due(self) -> bool:
        if self.monitor is None:
            return False
        return self.step == self.stop or self.step % (self.ours.evaluate.knn_every_epochs * self.steps_per_epoch) == 0

    def evaluate(self) -> dict[str, float]:
        assert self.monitor is not None
        return {"knn_top1": self.monitor.top1(self.train_step.backend)}

    def next_commands(self) -> list[str]:
        frozen = FrozenModelConfig(checkpoint=str(self.out))
        return [command("linear", frozen, self.ours.data.path)] if self.has_labels else []

    def recorded(self, metrics: dict) -> None:
        if metrics.get("loss") is not None and metrics["feature_std"] is not None:
            for alarm in self.alarms.check(metrics["loss"], metrics["feature_std"]):
                self.log.warn(f"step {self.step}: {alarm}")


def view_pairs(views: torch.Tensor, count: int = 16) -> torch.Tensor:
    """uint8 views [2, n, 3, H, W] -> one picture [3, ., .]; view 1 above its view 2, eight images a row."""
    pairs = [row for some in zip(*(view[:count].split(8) for view in views), strict=True) for row in some]
    return make_grid(torch.cat(pairs), nrow=8, pad_value=255)
