"""Compares pil.py with the same composition written with torchvision's own functions."""

import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from timm.data.auto_augment import rand_augment_transform
from torchvision.transforms import CenterCrop, Compose, Resize
from torchvision.transforms import functional as TF

from crossbatch.data import counter
from crossbatch.data.augment.backends import augment_function, make_views
from crossbatch.data.augment.parameters import (
    ImageSize,
    ViewParameters,
    crop_and_flip,
    draw_parameters,
    height_width,
    moco_v3_augmentations,
)
from crossbatch.data.augment.pil import augment, evaluation_image

AUGMENTATIONS = moco_v3_augmentations(32, 0.2)


def photo(seed: int, size=(45, 37)) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def with_torchvision(image: Any, p: ViewParameters, row: int, image_size: ImageSize) -> np.ndarray:
    """Apply MoCo v3's pipeline, operation by operation, with the drawn parameters."""
    box = [int(a[row]) for a in (p.crop_top, p.crop_left, p.crop_height, p.crop_width)]
    image = TF.resized_crop(image, *box, size=list(height_width(image_size)))
    if p.jitter[row]:
        for number in p.jitter_order[row]:
            if number == 0:
                image = TF.adjust_brightness(image, p.brightness[row])
            elif number == 1:
                image = TF.adjust_contrast(image, p.contrast[row])
            elif number == 2:
                image = TF.adjust_saturation(image, p.saturation[row])
            else:
                image = TF.adjust_hue(image, p.hue[row])
    if p.grayscale[row]:
        image = TF.rgb_to_grayscale(image, num_output_channels=3)
    if p.blur_sigma[row] > 0:
        image = image.filter(ImageFilter.GaussianBlur(radius=float(p.blur_sigma[row])))
    if p.solarize[row]:
        image = TF.solarize(image, 128)
    if p.flip[row]:
        image = TF.hflip(image)
    return np.asarray(image)


@pytest.mark.parametrize("view", [0, 1])
def test_bits_are_torchvisions(view):
    n = 200
    # More of the rare operations than MoCo v3 has, so that 200 images meet every combination.
    augmentation = replace(
        AUGMENTATIONS[view], solarize_probability=0.4, grayscale_probability=0.3, saturation=0.9, hue=0.5
    )
    p = draw_parameters(augmentation, 0, 0, np.arange(n), view, np.full(n, 37), np.full(n, 45))
    assert p.solarize.any() and p.grayscale.any() and p.flip.any() and not p.jitter.all()
    for row in range(n):
        image = photo(row)
        assert np.array_equal(augment(np.asarray(image), p, row, 32), with_torchvision(image, p, row, 32)), row


def test_solarize_threshold():
    always = replace(AUGMENTATIONS[1], solarize_probability=1.0)
    p = draw_parameters(always, 0, 0, np.arange(1), 1, np.array([37]), np.array([45]))
    low, high = (augment(np.asarray(photo(0)), p, 0, 32, threshold) for threshold in (0, 256))
    assert np.array_equal(low, 255 - high)


def test_two_views_are_the_views_of_each_image():
    images = [np.asarray(image) for image in (photo(0), photo(1, (20, 90)), photo(2, (1, 1)))]
    indices = np.array([5, 900, 2])
    views = make_views(augment, images, AUGMENTATIONS, 3, 4, indices)
    assert views.shape == (2, 3, 3, 32, 32) and views.dtype == torch.uint8
    sizes = np.array([37, 90, 1]), np.array([45, 20, 1])
    for view in range(2):
        p = draw_parameters(AUGMENTATIONS[view], 3, 4, indices, view, *sizes)
        for row, image in enumerate(images):
            expected = augment(image, p, row, 32)
            assert np.array_equal(views[view, row].permute(1, 2, 0).numpy(), expected)
    assert not torch.equal(views[0, 0], views[1, 0])


def test_the_source_image_is_not_changed():
    image = np.array(photo(0))
    before = image.tobytes()
    make_views(augment, [image] * 8, AUGMENTATIONS, 0, 0, np.arange(8))
    assert image.tobytes() == before


@pytest.mark.parametrize(("image_size", "shorter"), [(224, 256), (96, 110), (64, 64), (32, 32)])  # 64 and less: no zoom
def test_evaluation_image(image_size, shorter):
    image = photo(0, (300, 200))
    expected = Compose([Resize(shorter), CenterCrop(image_size)])(image)
    got = evaluation_image(image, image_size)
    assert got.dtype == torch.uint8
    assert np.array_equal(got.permute(1, 2, 0).numpy(), np.asarray(expected))


def automatic_views(
    policy: str | None, indices, epoch: int = 3, interpolation: str = "bilinear", backend="torchvision"
):
    images = [np.array(photo(number, (50, 40))) for number in range(9)]
    view = crop_and_flip(24, 0.3, interpolation, auto_augment=policy)
    chosen = [images[index] for index in indices]
    return make_views(augment_function(backend), chosen, [view], 5, epoch, np.array(indices))[0]


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_field_randaugment_is_timms_and_a_function_of_the_image(interpolation):
    policy, indices = "rand-m9-mstd0.5-inc1", [0, 1, 2, 3, 4, 5]
    views = automatic_views(policy, indices, interpolation=interpolation)
    plain = automatic_views(None, indices, interpolation=interpolation)
    resample = Image.Resampling[interpolation.upper()]
    gray = (124, 116, 104)
    timms = rand_augment_transform(policy, {"translate_const": 10, "img_mean": gray, "interpolation": resample})
    seeds = counter.bits(counter.AUTO_AUGMENT, 5, 3, 0, np.array(indices)).tolist()
    for view, before, seed in zip(views, plain, seeds, strict=True):
        random.seed(seed)
        np.random.seed(seed % 2**32)
        expected = timms(Image.fromarray(before.permute(1, 2, 0).numpy()))
        assert np.array_equal(view.permute(1, 2, 0).numpy(), np.asarray(expected))
    assert not torch.equal(views, plain)
    random.seed(1)
    state = random.getstate()
    assert torch.equal(automatic_views(policy, [4, 1], interpolation=interpolation), views[[4, 1]])
    assert random.getstate() == state
    assert not torch.equal(automatic_views(policy, indices, 4, interpolation), views)


def test_field_bicubic_is_pils_and_opencv_agrees():
    views = automatic_views(None, range(6), interpolation="bicubic")
    assert not torch.equal(views, automatic_views(None, range(6)))
    other = automatic_views(None, range(6), interpolation="bicubic", backend="opencv")
    assert (views.float() - other.float()).abs().mean() < 2
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (50, 60, 3), dtype=np.uint8))
    want = TF.resize(image, [24 * 2], TF.InterpolationMode.BICUBIC)  # pyright: ignore[reportArgumentType]
    assert torch.equal(evaluation_image(image, 48, "bicubic"), TF.pil_to_tensor(TF.center_crop(want, [48])))


def test_field_colour_jitter_is_timms_range():
    parameters = draw_parameters(
        crop_and_flip(24, 0.3, color_jitter=0.3), 0, 0, np.arange(500), 0, *[np.full(500, 40)] * 2
    )
    assert parameters.jitter.all()
    for factor in (parameters.brightness, parameters.contrast, parameters.saturation):
        assert 0.7 <= factor.min() < 0.72 and 1.28 < factor.max() <= 1.3
    assert not parameters.hue.any()
    with pytest.raises(
        ValueError, match=r"`auto_augment` \(='rnd'\) is no name that timm knows; give RandAugment as rand-m9"
    ):
        crop_and_flip(24, 0.3, auto_augment="rnd")


def test_rectangular_views():
    """Crops have the shape of the view, times 3/4 to 4/3; the bits are torchvision's."""
    augmentation = replace(AUGMENTATIONS[1], image_size=(16, 40), blur_probability=0.5)
    n = 400
    p = draw_parameters(augmentation, 0, 0, np.arange(n), 1, np.full(n, 300), np.full(n, 500))
    shape = p.crop_width / p.crop_height / 2.5
    assert 0.74 < shape.min() < 0.8 and 1.25 < shape.max() < 1.35
    for row in range(40):
        image = photo(row, (500, 300))
        got, want = augment(np.asarray(image), p, row, (16, 40)), with_torchvision(image, p, row, (16, 40))
        assert got.shape == (16, 40, 3) and np.array_equal(got, want), row
    image = np.asarray(photo(0, (30, 30)))  # no wide crop fits but the largest
    wide = draw_parameters(augmentation, 0, 0, np.arange(9), 1, np.full(9, 30), np.full(9, 30))
    assert (wide.crop_width <= 30).all() and (wide.crop_width / wide.crop_height >= 2.5 * 0.74).all()
    assert make_views(augment, [image] * 9, [augmentation], 0, 0, np.arange(9)).shape == (1, 9, 3, 16, 40)


@pytest.mark.parametrize(
    ("image_size", "of_image", "resized"),
    [
        ((32, 64), (300, 200), (64, 42)),  # small views: no zoom; the image is as wide as the view, and higher
        ((32, 64), (300, 100), (96, 32)),  # wider than the view
        ((112, 224), (300, 200), (256, 170)),
        ((224, 112), (300, 200), (384, 256)),
    ],
)
def test_rectangular_evaluation_images(image_size, of_image, resized):
    image = photo(0, of_image)
    want = CenterCrop(image_size)(image.resize(resized, Image.Resampling.BILINEAR))
    assert np.array_equal(evaluation_image(image, image_size).permute(1, 2, 0).numpy(), np.asarray(want))
