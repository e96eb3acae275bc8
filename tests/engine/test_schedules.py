"""Schedules at their landmarks, from the formulas of MoCo v3."""

import math

import pytest

from crossbatch.engine.config import load_config
from crossbatch.engine.schedules import encoder_momentum, learning_rate, too_short


def test_learning_rate_starts_at_0_peaks_after_warmup_and_ends_at_0():
    rate = [learning_rate(epoch, peak=9.6, epochs=100, warmup_epochs=10) for epoch in (0, 5, 10, 55, 100)]
    assert rate == pytest.approx([0, 4.8, 9.6, 4.8, 0])
    assert learning_rate(20, 9.6, 100, 10) == pytest.approx(9.6 * (1 + math.cos(math.pi / 9)) / 2)


def test_without_warmup_the_first_rate_is_the_peak():
    assert learning_rate(0, 2.0, 10, 0) == 2.0


def test_encoder_momentum_rises_to_1_without_regard_to_warmup():
    values = [encoder_momentum(epoch, 0.99, 100, cosine=True) for epoch in (0, 25, 50, 100)]
    assert values == pytest.approx([0.99, 1 - 0.01 * (1 + math.cos(math.pi / 4)) / 2, 0.995, 1.0])
    assert encoder_momentum(70, 0.99, 100, cosine=False) == 0.99


def test_runs_that_are_too_short_to_learn():
    def said(images: int, *overrides: str) -> str:
        return "; ".join(too_short(load_config("ds_configs/quickstart.json", list(overrides)), images))

    assert said(6000) == ""
    assert "7 epochs x 5000 images / 128 images a step = 273 steps; allow 300 at least" in said(5000)
    assert "322 steps; allow 500 at least" in said(6000, "crossbatch.momentum.base=0.99")
    assert said(6000, "crossbatch.momentum.base=1.0") == ""
    for recipe, of_its_data in (("r50_1gpu", 1_281_167), ("imagenet100", 126_689), ("cifar10", 50_000)):
        assert too_short(load_config(f"ds_configs/{recipe}.json"), of_its_data) == []
