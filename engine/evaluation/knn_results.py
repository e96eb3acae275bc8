"""k-NN as a command: how well a pretrained backbone tells the classes apart without any training."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from crossbatch.data import Source
from crossbatch.data.augment.pil import evaluation_image
from crossbatch.engine.config import to_dict
from crossbatch.engine.config.evaluation import KnnConfig
from crossbatch.engine.datasets import labelled_images
from crossbatch.engine.evaluation import pictures
from crossbatch.engine.evaluation import results as report
from crossbatch.engine.evaluation.features import EvalLoaderConfig, FeatureSet, extract
from crossbatch.engine.evaluation.frozen import FrozenBackbone, load_configured
from crossbatch.engine.evaluation.knn import Scored, score
from crossbatch.engine.run_log import command, print_summary
from crossbatch.engine.runtime.distributed import GroupCollective, World, on_main

SHOWN_QUERIES, SHOWN_NEIGHBOURS = 8, 7


class KnnEvaluation:
    """One evaluation on this rank, inside a process group; writes to `out`. Raises InputError."""

    def __init__(self, config: KnnConfig, world: World, device: torch.device, workers: int, out: Path):
        self.config, self.world, self.out = config, world, out
        ours = config.crossbatch
        self.ks = tuple(dict.fromkeys(ours.knn.k))
        self.collective = GroupCollective()
        self.pretrained = load_configured(ours.model, ours.data.image_size)
        on_main(lambda: report.create_output_dir(out, "knn"))
        self.train, self.evaluation = labelled_images(ours.data.path, out / "data_index")
        self.frozen = FrozenBackbone(self.pretrained, device, ours.precision)
        size, at_once = self.pretrained.image_size, config.train_micro_batch_size_per_gpu
        self.reading = EvalLoaderConfig(size, at_once, workers, device)

    def run(self) -> dict[str, Any]:
        """What results.json holds."""
        started = time.perf_counter()
        if self.world.is_main:
            print(f"loaded {self.pretrained}", flush=True)
        bank, queries = self._features(self.train, "training images"), self._features(self.evaluation, "evaluation")
        report.log_skipped_images(bank.skipped + queries.skipped)
        temperature = self.config.crossbatch.knn.temperature
        classes = len(self.train.class_names)
        scored = score(bank, queries, self.ks, classes, self.collective, temperature)
        counts = torch.tensor(
            [len(bank), len(queries), len(bank.skipped) + len(queries.skipped)], device=self.reading.device
        )
        images = dict(zip(("train", "evaluation", "skipped"), self.collective.all_reduce(counts).tolist(), strict=True))
        top1 = {str(k): scored.top1(k) for k in self.ks}
        results = {
            "command": "knn",
            "top1": scored.top1(self.ks[0]),
            "k": self.ks[0],
            "top1_by_k": top1,
            "temperature": temperature,
            "images": images,
            "classes": classes,
            "pretrained": self.pretrained.summary(),
            "seconds": time.perf_counter() - started,
            "config": {**to_dict(self.config), "world_size": self.world.size},
        }
        if self.world.is_main:
            self._write(results, scored)
        return results

    def _features(self, source: Source, what: str) -> FeatureSet:
        share = -(-len(source) // self.world.size)
        with report.progress_bar(f"features: {what}", share, self.world.is_main) as advance:
            return extract(self.frozen, source, np.arange(len(source)), self.reading, self.collective, advance)

    def _write(self, results: dict[str, Any], scored: Scored) -> None:
        k, top1 = results["k"], results["top1"]
        truth, said = scored.queries.labels_N.cpu().numpy(), scored.predictions[k].cpu().numpy()
        names = self.train.class_names
        title = f"{k}-NN, top-1 {top1:.2f} %"
        matrix = pictures.confusion_matrix(pictures.confusion_counts(truth, said, len(names)), names, title)
        report.save_figures(self.out, {"confusion": matrix, "neighbours": self._grid(scored, k, title)})
        report.write_results(self.out, results)
        images = results["images"]
        rows = [
            *((f"top-1, k = {k}", f"{value:.2f} %") for k, value in results["top1_by_k"].items()),
            ("images", f"{images['evaluation']:,} against {images['train']:,} training images"),
            *([("broken, left out", str(images["skipped"]))] if images["skipped"] else []),
            ("results", str(self.out / report.RESULTS)),
        ]
        ours = self.config.crossbatch
        print_summary(rows, [command("linear", ours.model, ours.data.path)], self.out)

    def _grid(self, scored: Scored, k: int, title: str) -> Figure:
        """Evaluation images, evenly spread, each with the training images nearest to it."""
        queries, near = scored.queries, scored.neighbours
        shown = np.unique(np.linspace(0, len(queries) - 1, SHOWN_QUERIES).round().astype(int))
        names, size = self.train.class_names, self.reading.image_size

        def pixels(source: Source, index: int) -> np.ndarray:
            return evaluation_image(source.open(index), size).permute(1, 2, 0).numpy()

        rows = []
        for m in shown:
            true, said = int(queries.labels_N[m]), int(scored.predictions[k][m])
            row = [(pixels(self.evaluation, int(queries.indices_N[m])), f"{names[true]}: {names[said]}", true == said)]
            for similarity, label, index in zip(
                *(part[m, :SHOWN_NEIGHBOURS].tolist() for part in vars(near).values()), strict=True
            ):
                if index >= 0:
                    row.append((pixels(self.train, index), f"{names[label]} {similarity:.2f}", label == true))
            rows.append(row)
        return pictures.neighbour_grid(rows, f"{title}. First column: evaluation image, true class: predicted class")
