"""Does what k-NN and the linear probe have in common: opens weights and images, extracts features, writes results."""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from matplotlib.figure import Figure
from rich.progress import Progress

from crossbatch import RunStopped
from crossbatch.data import Source
from crossbatch.engine.config import to_dict
from crossbatch.engine.config.evaluation import KnnConfig, LinearConfig
from crossbatch.engine.datasets import check_loaders, found_images, labelled_images, remote_options
from crossbatch.engine.evaluation.features import EvalLoaderConfig, FeatureSet, FrozenBackbone, extract
from crossbatch.engine.evaluation.results import RESULTS, create_output_dir, save_figures, write_results
from crossbatch.engine.pretrained.load import load_configured
from crossbatch.engine.run_log import print_summary
from crossbatch.engine.runtime.distributed import GroupCollective, on_all_ranks, on_main
from crossbatch.engine.runtime.output import console
from crossbatch.engine.runtime.world import World


@dataclass
class Report:
    """Holds what an evaluation shows to a person: figures, a closing table, and the next command."""

    figures: dict[str, Callable[[], Figure]]  # drawn after the results are written
    rows: list[tuple[str, str]]  # of the closing table
    next_command: str
    step: int = 0  # of the figures in TensorBoard


class Evaluation(ABC):
    """Evaluates a frozen backbone on this rank, inside a process group.

    A subclass computes the scores in `_evaluate`.

    Args:
        workers: loader processes of this rank.
        out: folder that the results are written to; it may hold an earlier result of the same command.

    Raises:
        InputError: if weights or images cannot be opened, or `out` holds something else.
    """

    name: ClassVar[str]  # of the command

    def __init__(self, config: KnnConfig | LinearConfig, world: World, device: torch.device, workers: int, out: Path):
        self.config, self.world, self.device, self.out = config, world, device, out
        section = config.crossbatch
        self.collective = GroupCollective()
        self.pretrained = on_all_ranks(lambda: load_configured(section.model, section.data.image_size))
        on_main(lambda: create_output_dir(out, self.name))
        remote = remote_options(section.data)
        self.train, self.evaluation = labelled_images(section.data.path, out / "data_index", remote)
        self.class_names = self.train.class_names
        self.frozen = FrozenBackbone(self.pretrained.backbone, device, section.precision)
        batch_size = config.train_micro_batch_size_per_gpu
        channels = self.pretrained.channels
        self.reading = EvalLoaderConfig(self.pretrained.image_size, batch_size, workers, device, channels=channels)
        check_loaders(world, self.reading.open(self.train, self.evaluation))

    def run(self) -> dict[str, Any]:
        """Evaluate, write everything to `out`, and return what results.json holds. Raises InputError or RunStopped."""
        started = time.perf_counter()
        if self.world.is_main:
            found = found_images(self.config.crossbatch.data.path, self.train, self.evaluation)
            print("\n".join([*found, f"loaded {self.pretrained}"]), flush=True)
        scores, report = self._evaluate()
        results = {
            "command": self.name,
            **scores,
            "classes": len(self.class_names),
            "pretrained": self.pretrained.summary(),
            "seconds": time.perf_counter() - started,
            "config": {**to_dict(self.config), "world_size": self.world.size},
        }
        if self.world.is_main:
            failure = None
            try:
                write_results(self.out, results)  # first: a figure that fails must not lose the numbers
            except OSError as error:
                failure = error
            save_figures(self.out, report.figures, report.step)
            print_summary([*report.rows, ("results", str(self.out / RESULTS))], [report.next_command], self.out)
            if failure is not None:
                raise RunStopped(
                    f"top-1 is {results['top1']:.2f} %, but {self.out / RESULTS} cannot be written: {failure.strerror}; make "
                    f"room, and repeat the command"
                ) from failure
        return results

    @abstractmethod
    def _evaluate(self) -> tuple[dict[str, Any], Report]:
        """Return the scores for results.json, and what rank 0 shows; every rank calls it."""

    def _features(self, source: Source, what: str) -> FeatureSet:
        """Extract the features of this rank's share of `source`, with a progress bar on the terminal of rank 0."""
        terminal = console(stderr=True)
        hidden = not (self.world.is_main and terminal.is_terminal)
        with Progress(console=terminal, disable=hidden) as bar:
            task = bar.add_task(f"features: {what}", total=-(-len(source) // self.world.size))
            advance = partial(bar.advance, task)
            return extract(self.frozen, source, np.arange(len(source)), self.reading, self.collective, advance)

    def _sum_over_ranks(self, **counts: int) -> dict[str, int]:
        """Return the sums of the counts of all ranks, under the same names."""
        total = self.collective.all_reduce(torch.tensor(list(counts.values()), device=self.device)).tolist()
        return dict(zip(counts, total, strict=True))
