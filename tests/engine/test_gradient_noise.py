"""The noise scale against gradients of ranks and chunks that are computed one by one, and against its definition."""

import json
from pathlib import Path
from unittest import mock

import pytest
import torch

from crossbatch.engine.step import TrainStep
from crossbatch.models import MoCo
from tests.small_runs import ADAMW, VIT, name_of, run, zero

CHUNKED = ["train_micro_batch_size_per_gpu=5"]  # 12 images: 4 + 4 + 4; 6: 3 + 3


def by_formula(whole: float, parts: float, sizes: list[int]) -> dict[str, float]:
    """|G|^2 and tr(Sigma), from E |g|^2 = |G|^2 + tr / B and E |g_k|^2 = (m_k / B)^2 |G|^2 + m_k tr / B^2."""
    images = sum(sizes)
    squared = sum((size / images) ** 2 for size in sizes)
    found = torch.linalg.solve(
        torch.tensor([[1.0, 1 / images], [squared, 1 / images]], dtype=torch.float64),
        torch.tensor([whole, parts], dtype=torch.float64),
    )
    return {"square": float(found[0]), "variance": float(found[1])}


def squares(gradients) -> float:
    return sum(float(g.double().square().sum()) for g in gradients)


def of_chunks(step: TrainStep, views: torch.Tensor) -> dict[str, float]:
    """Estimate from the gradients of the backbone that autograd finds for each chunk alone."""
    model = step.backend.model
    assert isinstance(model, MoCo)
    parameters = [p for p in model.online.backbone.parameters() if p.requires_grad]
    sizes = [chunk.shape[1] for chunk in views.tensor_split(step.chunks, dim=1)]
    online, momentum = (f.unflatten(0, (2, -1)) for f in model.features(step._to_device(views), with_grad=True))
    leaf = online.detach().requires_grad_()
    model.contrast(leaf.flatten(0, 1), momentum.flatten(0, 1), step.progress.step, step.seed).loss.backward()
    model.zero_grad()
    assert leaf.grad is not None
    of_parts, start = [], 0
    for size in sizes:
        alone = torch.zeros_like(leaf)
        alone[:, start : start + size] = leaf.grad[:, start : start + size]
        of_parts.append(torch.autograd.grad(online, parameters, alone, retain_graph=True))
        start += size
    whole = [sum(gradients) for gradients in zip(*of_parts, strict=True)]
    return by_formula(squares(whole), sum(map(squares, of_parts)), sizes)


def of_ranks(step: TrainStep, views: torch.Tensor) -> dict[str, float]:
    """Estimate from the gradients that each rank finds before anything is reduced."""
    model = step.backend.model
    assert isinstance(model, MoCo)
    model.loss(step._to_device(views), step.progress.step, step.seed).loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    everyone = model.collective
    ranks = everyone.world_size
    parts = everyone.all_reduce(torch.tensor(squares(gradients) / ranks**2, dtype=torch.float64)).item()
    whole = squares(everyone.all_reduce(g.clone()) / ranks for g in gradients)
    model.zero_grad()
    return by_formula(whole, parts, [views.shape[1]] * ranks)


def noise_of_a_run(overrides: list[str], out: str, expects: bool) -> tuple[list[dict], list[dict]]:
    """Two steps: what metrics.jsonl says, and what is expected, step by step."""
    expected, original = [], TrainStep.__call__

    def call(self: TrainStep, views: torch.Tensor):
        if expects:
            expected.append((of_chunks if self.cfg.world_size == 1 else of_ranks)(self, views))
            assert self.noise is not None
            self.noise.end_step(0.0, 1.0, counts=False)  # forgets the gradients that were computed here
        return original(self, views)

    with mock.patch.object(TrainStep, "__call__", call):
        assert run([*ADAMW, *overrides], out, 2, "none") == ""
    return lines_of(out), expected


def lines_of(out) -> list[dict]:
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


SPLITS = {"chunks": (1, CHUNKED), "ranks": (2, []), "ranks-in-chunks": (2, ["train_micro_batch_size_per_gpu=3"])}


@pytest.mark.parametrize("split", SPLITS)
def test_the_estimates_are_those_of_gradients_computed_one_by_one(pools, tmp_path, split):
    ranks, chunks = SPLITS[split]
    overrides = [*VIT, *chunks, "crossbatch.batchformer.dropout=0.5"]
    (lines, expected), *_ = pools(ranks).run(noise_of_a_run, [*overrides, *zero(0)], str(tmp_path / "zero0"), True)
    found = [line["gradient_noise"] for line in lines]
    assert len(found) == len(expected) == 2
    for of_step, want in zip(found, expected, strict=True):
        assert of_step == pytest.approx(want, rel=1e-3, abs=1e-4 * want["variance"] / 12)
    for backend in (zero(2), zero(3)):
        out = tmp_path / name_of(backend)
        (lines, _), *_ = pools(ranks).run(noise_of_a_run, [*overrides, *backend], str(out), False)
        for line, of_step in zip(lines, found, strict=True):
            assert line["gradient_noise"] == pytest.approx(of_step, rel=1e-3, abs=1e-4 * of_step["variance"] / 12)
