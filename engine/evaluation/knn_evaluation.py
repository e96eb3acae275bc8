"""Runs k-NN as a command, which tells how well a pretrained backbone separates the classes without any training."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from crossbatch.data import Source
from crossbatch.data.worker_batches import EvaluationDataset, WorkerBatch
from crossbatch.engine.config.evaluation import KnnConfig
from crossbatch.engine.datasets import log_skipped_images
from crossbatch.engine.evaluation.evaluation import Evaluation, Report
from crossbatch.engine.evaluation.knn import KnnResult, score, too_few_neighbours
from crossbatch.engine.evaluation.results import confusion_matrix, neighbour_grid
from crossbatch.engine.run_log import command

SHOWN_QUERIES, SHOWN_NEIGHBOURS = 8, 7


class KnnEvaluation(Evaluation):
    """Classifies the evaluation images by their nearest training images; see `Evaluation`."""

    name = "knn"
    config: KnnConfig

    def _evaluate(self) -> tuple[dict[str, Any], Report]:
        bank = self._features(self.train, "training images")
        queries = self._features(self.evaluation, "evaluation images")
        skipped = bank.skipped + queries.skipped
        log_skipped_images(skipped)
        ks, temperature = tuple(dict.fromkeys(self.config.crossbatch.knn.k)), self.config.crossbatch.knn.temperature
        result = score(bank, queries, ks, len(self.class_names), self.collective, temperature)
        images = self._sum_over_ranks(train=len(bank), evaluation=len(queries), skipped=len(skipped))
        notes = too_few_neighbours(ks, images["train"], "crossbatch.knn.k")
        if self.world.is_main and notes:
            print(*notes, sep="\n", flush=True)
        scores = {
            "top1": result.top1(ks[0]),
            "k": ks[0],
            "top1_by_k": {str(k): result.top1(k) for k in ks},
            "temperature": temperature,
            "images": images,
            "notes": notes,
        }
        k, title = ks[0], f"{ks[0]}-NN, top-1 {scores['top1']:.2f} %"
        truth, predicted = (tensor.cpu().numpy() for tensor in (result.queries.labels_N, result.predictions[k]))
        return scores, Report(
            figures={
                "confusion": lambda: confusion_matrix(truth, predicted, self.class_names, title),
                "neighbours": lambda: self._neighbours(result, k, title),
            },
            rows=[
                *((f"top-1, k = {k}", f"{value:.2f} %") for k, value in scores["top1_by_k"].items()),
                ("images", f"{images['evaluation']:,} against {images['train']:,} training images"),
                *([("broken, left out", str(images["skipped"]))] if images["skipped"] else []),
            ],
            next_command=command("linear", self.config.crossbatch.model, self.config.crossbatch.data.path),
        )

    def _neighbours(self, result: KnnResult, k: int, title: str) -> Figure:
        """Draw evenly spread evaluation images, each beside the training images nearest to it."""
        names, rows, sources = self.class_names, [], (self.train, self.evaluation)
        images = EvaluationDataset(sources, self.reading.image_size, channels=len(self.pretrained.channels.mean))

        def pixels(source: Source, index: int) -> np.ndarray:
            found = images[sources.index(source), np.array([index]), False]
            assert isinstance(found, WorkerBatch) and found.views is not None, "it was read before"
            return found.views[0].permute(1, 2, 0).numpy()

        for m in np.unique(np.linspace(0, len(result.queries) - 1, SHOWN_QUERIES).round().astype(int)):
            true, guess = int(result.queries.labels_N[m]), int(result.predictions[k][m])
            query = pixels(self.evaluation, int(result.queries.indices_N[m]))
            nearest = zip(*(part[m, :SHOWN_NEIGHBOURS].tolist() for part in result.neighbours), strict=True)
            neighbours = [
                (pixels(self.train, index), f"{names[label]} {similarity:.2f}", label == true)
                for similarity, label, index in nearest
                if index >= 0
            ]
            rows.append([(query, f"{names[true]}: {names[guess]}", true == guess), *neighbours])
        return neighbour_grid(rows, f"{title}. First column: evaluation image, true class: predicted class")
