"""k-NN as a command: how well a pretrained backbone tells the classes apart without any training."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from crossbatch.data import Source
from crossbatch.data.augment.pil import evaluation_image
from crossbatch.engine.config.evaluation import KnnConfig
from crossbatch.engine.evaluation.evaluation import Evaluation, Report
from crossbatch.engine.evaluation.knn import KnnResult, score
from crossbatch.engine.evaluation.pictures import confusion_counts, confusion_matrix, neighbour_grid
from crossbatch.engine.evaluation.results import log_skipped_images
from crossbatch.engine.run_log import command
from crossbatch.engine.runtime.distributed import World

SHOWN_QUERIES, SHOWN_NEIGHBOURS = 8, 7


class KnnEvaluation(Evaluation):
    """Classifies the evaluation images by their nearest training images; see `Evaluation`."""

    config: KnnConfig

    def __init__(self, config: KnnConfig, world: World, device: torch.device, workers: int, out: Path):
        super().__init__("knn", config, world, device, workers, out)

    def _evaluate(self) -> tuple[dict[str, Any], KnnResult]:
        bank = self._features(self.train, "training images")
        queries = self._features(self.evaluation, "evaluation images")
        log_skipped_images(bank.skipped + queries.skipped)
        ks, temperature = tuple(dict.fromkeys(self.config.crossbatch.knn.k)), self.config.crossbatch.knn.temperature
        result = score(bank, queries, ks, len(self.class_names), self.collective, temperature)
        skipped = len(bank.skipped) + len(queries.skipped)
        scores = {
            "top1": result.top1(ks[0]),
            "k": ks[0],
            "top1_by_k": {str(k): result.top1(k) for k in ks},
            "temperature": temperature,
            "images": self._sum_over_ranks(train=len(bank), evaluation=len(queries), skipped=skipped),
        }
        return scores, result

    def _report(self, results: dict[str, Any], details: KnnResult) -> Report:
        k, images, names = results["k"], results["images"], self.class_names
        truth, predicted = (tensor.cpu().numpy() for tensor in (details.queries.labels_N, details.predictions[k]))
        title = f"{k}-NN, top-1 {results['top1']:.2f} %"
        return Report(
            figures={
                "confusion": confusion_matrix(confusion_counts(truth, predicted, len(names)), names, title),
                "neighbours": self._neighbours(details, k, title),
            },
            rows=[
                *((f"top-1, k = {k}", f"{value:.2f} %") for k, value in results["top1_by_k"].items()),
                ("images", f"{images['evaluation']:,} against {images['train']:,} training images"),
                *([("broken, left out", str(images["skipped"]))] if images["skipped"] else []),
            ],
            next_command=command("linear", self.config.crossbatch.model, self.config.crossbatch.data.path),
        )

    def _neighbours(self, result: KnnResult, k: int, title: str) -> Figure:
        """Draw evenly spread evaluation images, each beside the training images nearest to it."""
        queries, near, names = result.queries, result.neighbours, self.class_names
        shown = np.unique(np.linspace(0, len(queries) - 1, SHOWN_QUERIES).round().astype(int))

        def pixels(source: Source, index: int) -> np.ndarray:
            return evaluation_image(source.open(index), self.reading.image_size).permute(1, 2, 0).numpy()

        rows = []
        for m in shown:
            true, guess = int(queries.labels_N[m]), int(result.predictions[k][m])
            row = [
                (pixels(self.evaluation, int(queries.indices_N[m])), f"{names[true]}: {names[guess]}", true == guess)
            ]
            for similarity, label, index in zip(
                *(part[m, :SHOWN_NEIGHBOURS].tolist() for part in vars(near).values()), strict=True
            ):
                if index >= 0:
                    row.append((pixels(self.train, index), f"{names[label]} {similarity:.2f}", label == true))
            rows.append(row)
        return neighbour_grid(rows, f"{title}. First column: evaluation image, true class: predicted class")
