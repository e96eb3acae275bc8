"""Tests images of one, two or more channels: decoding, views, evaluation images and normalisation."""

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageFilter

from crossbatch.data import EvaluationLoader, TrainLoader, moco_v3_augmentations, normalize, open_source
from crossbatch.data.augment.backends import has_dali
from crossbatch.data.augment.parameters import channels_of, draw_parameters
from crossbatch.data.augment.pil import augment_channels, evaluation_image
from crossbatch.data.decode import BrokenImage, decode, decode_channels
from crossbatch.data.worker_batches import EvaluationDataset

RNG = np.random.default_rng(0)


def planes(count: int, height: int = 30, width: int = 40, dtype: Any = np.uint8) -> list[np.ndarray]:
    return [RNG.integers(0, np.iinfo(dtype).max + 1, (height, width), dtype=dtype) for _ in range(count)]


def encoded(images: list[Image.Image], file_format: str = "TIFF") -> bytes:
    file, more = io.BytesIO(), {"save_all": True, "append_images": images[1:]} if len(images) > 1 else {}
    images[0].save(file, file_format, **more)
    return file.getvalue()


def pages(arrays: list[np.ndarray]) -> bytes:
    return encoded([Image.fromarray(array) for array in arrays])


@pytest.mark.parametrize("count", [1, 2, 5])
def test_the_pages_of_a_tiff_are_channels(count):
    arrays = planes(count)
    assert np.array_equal(decode_channels(pages(arrays), count), np.stack(arrays, axis=2))
    deep = planes(count, dtype=np.uint16)
    assert np.array_equal(decode_channels(pages(deep), count), np.stack(deep, axis=2) >> 8)


@pytest.mark.parametrize(("mode", "channels"), [("LA", 2), ("RGBA", 4), ("CMYK", 4), ("L", 1), ("1", 1), ("LA", 1)])
def test_the_bands_of_an_image_are_channels(mode, channels):
    image = Image.fromarray(np.dstack(planes(4))).convert(mode)
    want = np.atleast_3d(np.asarray(image.convert("L") if mode == "1" else image))[..., :channels]
    assert np.array_equal(decode_channels(encoded([image], "TIFF"), channels), want)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_colours_become_one_channel_by_their_luma(mode):
    image = Image.fromarray(np.dstack(planes(3))).convert(mode)
    data = encoded([image], "PNG")
    assert np.array_equal(decode_channels(data, 1)[..., 0], np.asarray(decode(data).convert("L")))


@pytest.mark.parametrize(
    ("data", "channels", "message"),
    [
        (pages(planes(2)), 5, "the image has 2 channels, not 5"),
        (encoded([Image.new("RGB", (4, 4))], "PNG"), 2, "the image has 3 channels, not 2"),
        (encoded([Image.new("RGBA", (4, 4))], "PNG"), 2, "the image has 4 channels, not 2"),
        (pages([*planes(1), *planes(1, 9)]), 2, "must match exactly"),
        (b"no image", 1, "not an image"),
        (pages(planes(3))[:-2000], 3, "bytes"),
    ],
)
def test_images_that_have_other_channels_are_broken(data, channels, message):
    with pytest.raises(BrokenImage, match=message):
        decode_channels(data, channels)


@pytest.fixture
def stacks(tmp_path) -> Path:
    """Write 12 stacks of five channels, and one of four."""
    (tmp_path / "train").mkdir()
    for number in range(13):
        (tmp_path / f"train/{number:02d}.tif").write_bytes(pages(planes(4 if number == 5 else 5)))
    return tmp_path


def test_a_view_has_what_each_channel_has(stacks):
    """A channel is cropped, resized, brightened, contrasted, blurred, solarized and flipped as a gray image."""
    augmentation = replace(moco_v3_augmentations(16, channels=5)[1], blur_probability=0.5, solarize_probability=0.5)
    n, image = 60, np.dstack(planes(5))
    p = draw_parameters(augmentation, 0, 0, np.arange(n), 1, np.full(n, 30), np.full(n, 40))
    for row in range(n):
        for channel, got in enumerate(np.moveaxis(augment_channels(image, p, row, 16), 2, 0)):
            box = (
                p.crop_left[row],
                p.crop_top[row],
                p.crop_left[row] + p.crop_width[row],
                p.crop_top[row] + p.crop_height[row],
            )
            view = (
                Image.fromarray(image[..., channel])
                .crop((int(box[0]), int(box[1]), int(box[2]), int(box[3])))
                .resize((16, 16), Image.Resampling.BILINEAR)
            )
            for operation, factor in p.jitters(row):
                if operation < 2:
                    enhance = (ImageEnhance.Brightness, ImageEnhance.Contrast)[operation]
                    view = enhance(view).enhance(factor)
            if p.blur_sigma[row] > 0:
                view = view.filter(ImageFilter.GaussianBlur(float(p.blur_sigma[row])))
            want = np.asarray(view)
            want = np.where(want >= 128, 255 - want, want) if p.solarize[row] else want
            assert np.array_equal(got, want[:, ::-1] if p.flip[row] else want)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("backend", ["auto", "opencv"])
def test_a_loader_of_five_channels(stacks, backend, workers):
    views = moco_v3_augmentations((8, 12), channels=5)
    loader = TrainLoader(
        open_source(stacks),
        batch_size=13,
        augmentations=views,
        workers=workers,
        backend=backend,
        max_skipped_fraction=0.5,
    )
    with loader:
        batch = next(iter(loader.epoch(0)))
    assert batch.views.shape == (2, 13, 5, 8, 12) and batch.skipped == ["05.tif"]
    if workers:
        with TrainLoader(open_source(stacks), batch_size=13, augmentations=views, max_skipped_fraction=0.5) as loader:
            assert next(iter(loader.epoch(0))).views.equal(batch.views)


@pytest.mark.skipif(not has_dali(), reason="needs DALI")
def test_dali_has_three_channels(stacks):
    with pytest.raises(ValueError, match="dali reads three channels, but images have 5; choose auto or opencv"):
        TrainLoader(
            open_source(stacks), batch_size=4, augmentations=moco_v3_augmentations(8, channels=5), backend="dali"
        )


def test_evaluation_images_of_five_channels(stacks):
    source = open_source(stacks)
    loader = EvaluationLoader(EvaluationDataset([source], 16, channels=5), 13, workers=0)
    ((images, indices),) = loader.read(source, np.arange(13))
    loader.close()
    assert images.shape == (12, 5, 16, 16) and 5 not in indices and "4 channels, not 5" in loader.skipped[0]
    pixels = decode_channels(source.read(2), 5)
    for channel in range(5):
        want = evaluation_image(Image.fromarray(np.ascontiguousarray(pixels[..., channel])), 16)
        assert images[2, channel].equal(want[0])


def test_normalisation():
    channels = channels_of(2, [0.1, 0.5], [0.5, 0.25])
    views = torch.randint(0, 256, (3, 2, 4, 4), dtype=torch.uint8)
    want = (views.double() / 255 - torch.tensor([0.1, 0.5]).view(2, 1, 1)) / torch.tensor([0.5, 0.25]).view(2, 1, 1)
    torch.testing.assert_close(normalize(views, channels=channels).double(), want, atol=1e-6, rtol=1e-6)
    gray = channels_of(1)
    assert gray.mean == pytest.approx((0.449,)) and gray.std == pytest.approx((0.226,))
    with pytest.raises(ValueError, match=r"^mean has 3 numbers, but images have 2 channels; give one for each"):
        channels_of(2, [1, 2, 3])
    with pytest.raises(ValueError, match=r"^std has 1 numbers, but images have 3 channels"):
        channels_of(3, "auto", [1])
