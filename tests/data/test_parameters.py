"""Tests parameters.py: a pure function of its key, inside the image, and distributed like torchvision's transforms."""

from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from torchvision.transforms import ColorJitter, RandomResizedCrop
from torchvision.transforms import functional as TF

from crossbatch.data.augment.parameters import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    ViewParameters,
    draw_parameters,
    moco_v3_augmentations,
    normalize,
)

VIEW_1, VIEW_2 = moco_v3_augmentations(32, 0.2)
N = 20_000


def parameters(augmentation, n=N, height=375, width=500, seed=0, epoch=0, view=0) -> ViewParameters:
    return draw_parameters(augmentation, seed, epoch, np.arange(n), view, np.full(n, height), np.full(n, width))


def two_sample_pvalue(a: np.ndarray, b: np.ndarray) -> float:
    result: Any = stats.ks_2samp(a, b)  # scipy's annotations lose the result's fields
    return result.pvalue


def assert_same(a: ViewParameters, b: ViewParameters):
    for field in fields(a):
        assert np.array_equal(getattr(a, field.name), getattr(b, field.name)), field.name


def test_an_image_gets_the_same_alone_and_in_any_batch():
    indices, heights, widths = np.array([7, 3, 900, 7]), np.array([30, 40, 50, 30]), np.array([60, 50, 40, 60])
    together = draw_parameters(VIEW_2, 1, 2, indices, 1, heights, widths)
    for row in range(4):
        one = slice(row, row + 1)
        alone = draw_parameters(VIEW_2, 1, 2, indices[one], 1, heights[one], widths[one])
        assert_same(alone, ViewParameters(**{f.name: getattr(together, f.name)[one] for f in fields(together)}))


@pytest.mark.parametrize("other", [{"seed": 1}, {"epoch": 1}, {"view": 1}])
def test_seed_epoch_and_view_change_everything(other):
    a, b = parameters(VIEW_1, 200), parameters(VIEW_1, 200, **other)
    for name in ("crop_top", "crop_width", "brightness", "contrast", "saturation", "hue", "blur_sigma"):
        assert (getattr(a, name) != getattr(b, name)).mean() > 0.9, name
        assert abs(np.corrcoef(getattr(a, name), getattr(b, name))[0, 1]) < 0.3, name


def test_shapes_and_types():
    p = parameters(VIEW_2, 5)
    assert p.crop_top.dtype == p.crop_width.dtype == p.jitter_order.dtype == np.int64
    assert p.flip.dtype == p.jitter.dtype == p.grayscale.dtype == p.solarize.dtype == np.bool_
    assert p.brightness.dtype == p.blur_sigma.dtype == np.float64
    assert p.jitter_order.shape == (5, 4)
    assert all(len(getattr(p, field.name)) == 5 for field in fields(p))


def test_frequencies_are_moco_v3s():
    first, second = parameters(VIEW_1), parameters(VIEW_2, view=1)
    expected = {"flip": 0.5, "jitter": 0.8, "grayscale": 0.2}
    for p in (first, second):
        for name, probability in expected.items():
            assert getattr(p, name).mean() == pytest.approx(probability, abs=0.015), name
    assert (first.blur_sigma > 0).all() and not first.solarize.any()
    assert (second.blur_sigma > 0).mean() == pytest.approx(0.1, abs=0.01)
    assert second.solarize.mean() == pytest.approx(0.2, abs=0.012)
    assert stats.kstest(first.blur_sigma, stats.uniform(0.1, 1.9).cdf).pvalue > 0.001


def test_decisions_are_independent_of_each_other():
    p = parameters(VIEW_2, view=1)
    columns = [p.flip, p.jitter, p.grayscale, p.blur_sigma > 0, p.solarize, p.brightness, p.contrast, p.saturation]
    columns += [p.hue, p.crop_top, p.jitter_order[:, 0]]
    correlation = np.corrcoef(np.array(columns, dtype=float)) - np.eye(len(columns))
    assert np.abs(correlation).max() < 5 / np.sqrt(N)


def test_colour_factors_are_color_jitters():
    torch.manual_seed(0)
    jitter = ColorJitter(0.4, 0.4, 0.2, 0.1)
    ranges = [jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue]
    theirs = np.array([ColorJitter.get_params(*ranges)[1:] for _ in range(3000)], dtype=float)  # type: ignore[arg-type]
    ours = parameters(VIEW_1)
    for column, name in enumerate(("brightness", "contrast", "saturation", "hue")):
        assert two_sample_pvalue(theirs[:, column], getattr(ours, name)) > 0.001, name


def test_jitter_orders_are_all_permutations_equally_often():
    orders = parameters(VIEW_1).jitter_order
    assert (np.sort(orders, axis=1) == np.arange(4)).all()
    _, counts = np.unique(orders, axis=0, return_counts=True)
    assert len(counts) == 24 and stats.chisquare(counts).pvalue > 0.001


@pytest.mark.parametrize(("height", "width"), [(375, 500), (32, 32), (500, 90)])
def test_crops_are_random_resized_crops(height, width):
    """Area, ratio and place are distributed as torchvision's own draws; 500 x 90 is narrow enough to exercise the retries."""
    torch.manual_seed(0)
    image, n = Image.new("RGB", (width, height)), 4000
    scale, ratio = [0.2, 1.0], [3 / 4, 4 / 3]
    theirs = np.array([RandomResizedCrop.get_params(image, scale, ratio) for _ in range(n)], dtype=float)  # type: ignore[arg-type]
    p = parameters(VIEW_1, n, height, width)
    ours = np.stack([p.crop_top, p.crop_left, p.crop_height, p.crop_width], axis=1).astype(float)
    for name, function in {
        "area": lambda c: c[:, 2] * c[:, 3],
        "ratio": lambda c: c[:, 3] / c[:, 2],
        "top": lambda c: c[:, 0],
        "left": lambda c: c[:, 1],
        "center": lambda c: c[:, 0] + c[:, 2] / 2,
    }.items():
        assert two_sample_pvalue(function(theirs), function(ours)) > 0.001, name


SIZES = [(1, 1), (1, 2), (2, 1), (1, 1000), (1000, 1), (3, 7), (31, 33), (17, 400), (4000, 3), (224, 224), (2, 3)]


@pytest.mark.parametrize("crop_min", [0.001, 0.08, 1.0])
def test_crops_lie_inside_the_image_whatever_its_size(crop_min):
    augmentation = replace(VIEW_1, crop_scale=(crop_min, 1.0))
    heights, widths = (np.repeat(side, 200) for side in np.array(SIZES).T)
    p = draw_parameters(augmentation, 0, 0, np.arange(len(heights)), 0, heights, widths)
    assert (p.crop_top >= 0).all() and (p.crop_left >= 0).all()
    assert (p.crop_height >= 1).all() and (p.crop_width >= 1).all()
    assert (p.crop_top + p.crop_height <= heights).all() and (p.crop_left + p.crop_width <= widths).all()


def test_a_blur_that_is_off_leaves_all_else_as_it_was():
    for view, sharp in zip((VIEW_1, VIEW_2), moco_v3_augmentations(32, 0.2, blur_probability=(0.0, 0.0)), strict=True):
        blurred, p = parameters(view, 200), parameters(sharp, 200)
        assert blurred.blur_sigma.any() and not p.blur_sigma.any()
        assert_same(replace(blurred, blur_sigma=p.blur_sigma), p)


def test_places_reach_both_borders():
    p = parameters(VIEW_1, 2000, 12, 12)
    assert (p.crop_top == 0).any() and (p.crop_top + p.crop_height == 12).any()
    small = p.crop_width == 8
    assert set(p.crop_left[small].tolist()) == set(range(5))


@pytest.mark.parametrize(
    ("height", "width", "crop"),
    [(100, 900, (0, 383, 100, 133)), (900, 100, (383, 0, 133, 100)), (50, 50, (0, 0, 50, 50))],
)
def test_fallback_is_torchvisions_central_crop(height, width, crop):
    """With crop_scale above 1 no try ever fits."""
    p = parameters(replace(VIEW_1, crop_scale=(3.0, 3.0)), 3, height, width)
    torch.manual_seed(0)
    image = Image.new("RGB", (width, height))
    assert RandomResizedCrop.get_params(image, [3.0, 3.0], [3 / 4, 4 / 3]) == crop  # type: ignore[arg-type]
    for row in range(3):
        assert (p.crop_top[row], p.crop_left[row], p.crop_height[row], p.crop_width[row]) == crop


def test_normalize_is_to_tensor_and_normalize():
    pixels = np.random.default_rng(0).integers(0, 256, (2, 4, 3, 5, 6), dtype=np.uint8)
    got = normalize(torch.from_numpy(pixels))
    for view in range(2):
        for row in range(4):
            expected = TF.normalize(
                TF.to_tensor(pixels[view, row].transpose(1, 2, 0)), list(IMAGENET_MEAN), list(IMAGENET_STD)
            )
            torch.testing.assert_close(got[view, row], expected, rtol=0, atol=1e-6)
    half = normalize(torch.from_numpy(pixels), torch.float16)
    assert half.dtype == torch.float16
    assert torch.equal(half, got.half())
