"""Compares the fast backends with the reference on PIL: the same crops, colours, order and broken images."""

import contextlib
import importlib
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional

from crossbatch.data.augment import backends
from crossbatch.data.augment import pil as torchvision_backend
from crossbatch.data.augment.parameters import (
    ViewAugmentation,
    draw_parameters,
    moco_v3_augmentations,
    reduced,
    reductions,
)
from crossbatch.data.decode import decode, decode_pixels, jpeg_size
from crossbatch.data.loader import TrainLoader
from crossbatch.data.sampler import GlobalBatchSampler
from crossbatch.data.sources import open_source
from tests.data.damage import WHOLE, damaged_files, encoded

SIZE = 64
VIEWS = moco_v3_augmentations(SIZE)
DALI = pytest.param("dali", marks=pytest.mark.skipif(not backends.has_dali(), reason="needs DALI"))
FAST = ["opencv", DALI]


def photo(number: int, width: int, height: int) -> Image.Image:
    """Draw something colourful and smooth with edges, as a JPEG of a scene is at this scale."""
    random = np.random.default_rng(number)
    coarse = Image.fromarray(random.integers(0, 256, (7, 9, 3), dtype=np.uint8))
    image = coarse.resize((width, height), Image.Resampling.BICUBIC)
    for _ in range(3):
        colour = tuple(int(value) for value in random.integers(0, 256, 3))
        x, y = int(random.integers(0, width)), int(random.integers(0, height))
        image.paste(colour, (x, y, x + width // 4, y + height // 3))
    return image


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("photos")
    sizes = np.random.default_rng(0).integers(60, 300, (48, 2))
    for number, (width, height) in enumerate(sizes):
        file = root / "train" / f"class_{number % 3}" / f"{number:03}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encoded(photo(number, int(width), int(height)), "JPEG", quality=92))
    return root


def read(
    root: Path, backend: str, augmentations=VIEWS, batch=24, start=0, device="cpu", scaled_decode=True, **order
) -> list:
    source = open_source(root, "train")
    loader = TrainLoader(
        source,
        sampler=GlobalBatchSampler(0, len(source), batch, **order),
        augmentations=augmentations,
        seed=3,
        workers=0,
        max_skipped_fraction=1.0,
        backend=backend,
        device=torch.device(device),
        scaled_decode=scaled_decode,
    )
    batches = list(loader.epoch(1, start))
    loader.close()
    return batches


def difference(found: list, want: list) -> torch.Tensor:
    """Return the mean absolute difference of every view, as a part of the value range: [batches, 2, n]."""
    pairs = zip(found, want, strict=True)
    return torch.stack([(a.views.cpu().float() - b.views.float()).abs().mean((2, 3, 4)) / 255 for a, b in pairs])


@pytest.mark.parametrize("size", [SIZE, (48, 80)])
@pytest.mark.parametrize("backend", FAST)
def test_views_agree_with_the_reference(photos, backend, size):
    views = moco_v3_augmentations(size)
    want, found = (read(photos, name, views) for name in ("torchvision", backend))
    assert all(np.array_equal(a.indices, b.indices) for a, b in zip(found, want, strict=True))
    assert found[0].views.is_contiguous() is False and found[0].views[0].is_contiguous(
        memory_format=torch.channels_last
    )
    assert difference(found, want).max() < 0.02 and difference(found, want).mean() < 0.01
    other = torch.stack([(b.views[0].float() - b.views[1].float()).abs().mean((1, 2, 3)) / 255 for b in want])
    assert other.mean() > 0.05  # different views differ by more


@pytest.mark.parametrize("backend", ["torchvision", *FAST])
@pytest.mark.parametrize("count", [1, 3])
def test_one_view_to_classify_and_three_of_repeated_augmentation(photos, backend, count):
    augmentations = (VIEWS[1], VIEWS[1], VIEWS[0])[:count]
    batch = read(photos, backend, augmentations)[0]
    images = [open_source(photos, "train").open(int(index)) for index in batch.indices]
    widths, heights = np.array([image.size for image in images]).T
    assert batch.views.shape == (count, 24, 3, SIZE, SIZE)
    for view, augmentation in enumerate(augmentations):
        p = draw_parameters(augmentation, 3, 1, batch.indices, view, heights, widths)
        want = np.stack(
            [torchvision_backend.augment(np.asarray(image), p, row, SIZE) for row, image in enumerate(images)]
        )
        apart = np.abs(batch.views[view].permute(0, 2, 3, 1).numpy().astype(int) - want).mean((1, 2, 3)) / 255
        assert apart.max() < (0.02 if backend != "torchvision" else 1e-9)


@pytest.mark.parametrize("sigmas", [(0.1, 2.0), (2.0, 9.0)])
def test_compiled_colours_are_those_of_pil_to_the_bit(sigmas):
    """Operations are frequent here, so that 100 views meet every combination; large blurs have boxes of several pixels."""
    colours, n = pytest.importorskip("crossbatch.data.augment.compiled_colours"), 100
    often = replace(
        VIEWS[1], grayscale_probability=0.3, solarize_probability=0.4, saturation=0.9, hue=0.5, blur_sigma=sigmas
    )
    whole = replace(often, blur_probability=0.7, crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0))
    for side in (64, 5):
        p = draw_parameters(whole, 0, 0, np.arange(n), 0, np.full(n, side), np.full(n, side))
        for row in range(n):
            pixels = np.asarray(photo(row, side, side))
            want = torchvision_backend.augment(pixels, p, row, side)
            assert np.array_equal(colours.colour(pixels, p, row), want), row


def test_the_hue_of_every_colour_turns_as_in_pil():
    colours = pytest.importorskip("crossbatch.data.augment.compiled_colours")
    planes = np.array(np.meshgrid(*(np.arange(0, 256, 3, dtype=np.uint8),) * 3)).reshape(3, -1)
    image: Any = Image.fromarray(np.ascontiguousarray(planes.T)[None])  # torchvision's annotations know tensors only
    for turn in (-0.41, -0.07, 0.0, 0.05, 0.5):
        found = planes.copy()
        colours._turn(*found, int(turn * 255) % 256)
        assert np.array_equal(found.T[None], np.asarray(functional.adjust_hue(image, turn)))


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """Six JPEGs of 1000 to 2100 px, one of them gray, one progressive, one turned by EXIF, and two that end too early."""
    folder = tmp_path_factory.mktemp("large") / "train/a"
    folder.mkdir(parents=True)
    turned = Image.Exif()
    turned[0x0112] = 6
    options = [{}, {"progressive": True}, {"exif": turned}, {"subsampling": 0}, {}, {}]
    for number, more in enumerate(options):
        image = photo(number, 2100 - 130 * number, 1000 + 170 * number)
        data = encoded(image.convert("L") if number == 4 else image, "JPEG", quality=85, **more)
        (folder / f"{number}.jpg").write_bytes(data)
        if number > 3:
            (folder / f"{number}_cut.jpg").write_bytes(data[: len(data) // 2])
    return folder.parents[1]


@pytest.mark.parametrize("reduction", [1, 2, 4, 8])
def test_opencv_decodes_jpegs_to_the_pixels_of_pil(large, reduction):
    for file in sorted(large.rglob("?.jpg")):
        data = file.read_bytes()
        want = decode_pixels(data, reduction, by_pil=True)
        size = jpeg_size(data)
        assert size is not None
        height, width = size
        assert want.shape == (-(-height // reduction), -(-width // reduction), 3)
        assert np.array_equal(decode_pixels(data, reduction), want), file.name


def test_reductions_leave_every_crop_twice_as_large_as_the_view():
    p = draw_parameters(VIEWS[0], 0, 0, np.arange(6), 0, np.full(6, 4000), np.full(6, 3000))
    sides = np.array([127, 128, 255, 256, 512, 1024])
    p, square = replace(p, crop_height=sides, crop_width=sides + 1), np.full(6, 900)
    assert reductions([p], square, square, 64).tolist() == [1, 1, 1, 2, 4, 8]
    assert reductions([p], square, square - 1, 64).tolist() == [1] * 6
    assert reductions([p, replace(p, crop_width=sides * 0 + 300)], square, square, 64).tolist() == [1, 1, 1, 2, 2, 2]
    cut = reduced(replace(p, crop_top=sides, crop_left=sides * 0 + 3), np.full(6, 4))
    assert cut.crop_top.tolist() == [32, 32, 64, 64, 128, 256] and cut.crop_left.tolist() == [1] * 6
    assert cut.crop_height[:3].tolist() == [32, 32, 64]  # from 127 / 4 to 254 / 4, both rounded


@pytest.mark.parametrize("backend", ["torchvision", *FAST])
def test_large_jpegs_are_decoded_at_a_reduced_resolution(large, backend, monkeypatch):
    """The views differ little from those of whole images, more than not at all, and two backends' views still agree."""
    seen = []
    original = reductions
    for module in ("backends", "dali"):
        with contextlib.suppress(ImportError):
            at = importlib.import_module(f"crossbatch.data.augment.{module}")
            monkeypatch.setattr(at, "reductions", lambda *a: seen.append(original(*a)) or seen[-1])
    small = tuple(replace(augmentation, crop_scale=(0.3, 1.0)) for augmentation in VIEWS)
    found = read(large, backend, small, batch=4)
    assert set(np.concatenate(seen)) >= {4, 8}
    whole = read(large, "torchvision", small, batch=4, scaled_decode=False)
    assert [batch.skipped for batch in found] == [batch.skipped for batch in whole] and any(b.skipped for b in found)
    apart = difference(found, whole)
    assert 0 < apart.max() < 0.03
    assert difference(found, read(large, "torchvision", small, batch=4)).max() < 0.02
    if backend == "torchvision":
        assert difference(read(large, "opencv", small, batch=4, scaled_decode=False), whole).max() < 0.02


@pytest.mark.parametrize("backend", ["torchvision", *FAST])
def test_a_broken_large_jpeg_does_not_change_the_images_beside_it(large, backend):
    """A JPEG that turns out to be broken while views are made is replaced, in every size of batches alike."""
    folder = large / "train/a"
    data = bytearray((folder / "5.jpg").read_bytes())
    at = data.index(b"\xff\xc4")
    data[at + 5 : at + 21] = bytes([255] * 16)  # a Huffman table with more codes than there can be
    (folder / "3_table.jpg").write_bytes(bytes(data))
    try:
        assert jpeg_size(bytes(data)) is not None
        one, all_of_them = read(large, backend, batch=3), read(large, backend, batch=9)
        views = {int(i): v for b in one for i, v in zip(b.indices, b.views.unbind(1), strict=True)}
        assert sum("3_table.jpg" in name for batch in one for name in batch.skipped) >= 1
        assert sorted(name for b in one for name in b.skipped) == sorted(all_of_them[0].skipped)
        rows = dict(zip(all_of_them[0].indices.tolist(), all_of_them[0].views.unbind(1), strict=True))
        assert sum(torch.equal(views[i], rows[i]) for i in views.keys() & rows.keys()) >= 5
    finally:
        (folder / "3_table.jpg").unlink()


@pytest.mark.gpu
@pytest.mark.parametrize("backend", [DALI])
def test_views_on_a_gpu_agree_with_the_reference(photos, backend):
    found = read(photos, backend, device="cuda")
    assert found[0].views.is_cuda
    assert difference(found, read(photos, "torchvision")).max() < 0.02


@pytest.mark.parametrize("backend", FAST)
def test_crops_agree_to_a_pixel(tmp_path, backend):
    """Red is the column here and green the row, so that a crop says where it is from."""
    (tmp_path / "train/a").mkdir(parents=True)
    y, x = np.mgrid[:200, :250]
    picture = Image.fromarray(np.stack([x, y, 0 * x], axis=2).astype(np.uint8))
    for number in range(24):
        picture.save(tmp_path / f"train/a/{number:02}.png")
    plain = ViewAugmentation(SIZE, (0.08, 1.0), 0.0, 0.0, jitter_probability=0.0, grayscale_probability=0.0)
    want, found = (read(tmp_path, name, (plain, plain)) for name in ("torchvision", backend))
    apart = [(a.views.float() - b.views.float()).abs() for a, b in zip(found, want, strict=True)]
    assert torch.stack(apart).max() <= 1.0


@pytest.mark.parametrize("backend", FAST)
def test_batches_from_the_middle_and_on_other_ranks_are_the_same(photos, backend):
    whole = read(photos, backend, batch=12)
    for one, other in zip(read(photos, backend, batch=12, start=2), whole[2:], strict=True):
        assert np.array_equal(one.indices, other.indices) and torch.equal(one.views, other.views)
    ranks = [read(photos, backend, batch=12, world_size=3, rank=rank) for rank in range(3)]
    for step, batch in enumerate(whole):
        assert torch.equal(torch.cat([ranks[rank][step].views for rank in range(3)], dim=1), batch.views)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")  # PIL's, of an image that the others do not complain about
@pytest.mark.parametrize("backend", FAST)
def test_the_same_images_are_broken_and_replaced_alike(tmp_path, backend):
    """320 damaged files go through the whole loader; nothing crashes and nothing hangs."""
    folder = tmp_path / "train/a"
    folder.mkdir(parents=True)
    for number, (name, data) in enumerate(damaged_files(320)):
        if name != "large.png":
            (folder / f"{number:04}_{name}").write_bytes(data)
            (folder / f"{number:04}_then.jpg").write_bytes(encoded(photo(number, 60, 50), "JPEG"))
    tiny = tuple(replace(augmentation, image_size=16) for augmentation in VIEWS)
    want, found = (read(tmp_path, name, tiny, batch=63) for name in ("torchvision", backend))
    source, broken = open_source(tmp_path, "train"), [name for batch in want for name in batch.skipped]
    assert len(broken) > 100 and not any(name.split("_", 1)[1] in WHOLE for name in broken)
    assert [name for batch in found for name in batch.skipped] == broken
    assert all(np.array_equal(a.indices, b.indices) for a, b in zip(found, want, strict=True))
    # Decoders fill in damaged parts of a picture each in their own way; whole pictures agree.
    close = difference(found, want) < 0.02
    assert close.float().mean() > 0.9
    for batch, rows in zip(want, close.all(1), strict=True):
        names = [source.name(int(index)) for index in batch.indices]
        assert not set(names) & set(broken)
        assert all(
            rows[i] for i, name in enumerate(names) if name.endswith("then.jpg") or name.split("_", 1)[1] in WHOLE
        )


def test_dali_that_refuses_a_file_gets_what_pil_sees(photos, monkeypatch):
    """DALI refuses every file here, as it would a JPEG that only PIL reads."""
    dali_backend = pytest.importorskip("crossbatch.data.augment.dali")
    want = read(photos, "dali")
    original, refused = dali_backend.encoded, dali_backend.Encoded(os.urandom(64), 60, 60)

    def encoded(source, index, by_pil=False):
        return original(source, index, by_pil) if by_pil else refused

    monkeypatch.setattr(dali_backend, "encoded", encoded)
    assert difference(read(photos, "dali"), want).max() < 0.005


def test_dali_reads_a_file_once(tmp_path):
    """This holds for a file that PIL must decode for it, too."""
    dali_backend = pytest.importorskip("crossbatch.data.augment.dali")

    class Counted:
        reads, has_files = 0, True

        def read(self, index: int) -> bytes:
            self.reads += 1
            return encoded(photo(index, 40, 30), "PNG")

    source = Counted()
    image = dali_backend.encoded(source, 0)
    assert (source.reads, image.height, image.width, image.data[:2]) == (1, 30, 40, b"BM")


def test_dali_takes_what_a_source_without_files_opens():
    """Its `open` may do more than to decode what `read` returns."""
    dali_backend = pytest.importorskip("crossbatch.data.augment.dali")

    class Turned:
        def read(self, index: int) -> bytes:
            return encoded(photo(index, 40, 30), "JPEG")

        def open(self, index: int) -> Image.Image:
            return decode(self.read(index)).transpose(Image.Transpose.ROTATE_90)

    image = dali_backend.encoded(Turned(), 0)
    assert (image.height, image.width) == (40, 30)
    assert np.array_equal(np.array(decode(image.data)), np.array(Turned().open(0)))


def test_dali_works_on_the_gpu_of_this_rank(monkeypatch):
    dali_backend, asked = pytest.importorskip("crossbatch.data.augment.dali"), []

    def graph(*arguments, device_id, **options):
        asked.append(device_id)
        return SimpleNamespace(build=lambda: None)

    monkeypatch.setattr(dali_backend, "_graph", graph)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 5)
    for device in ("cuda", "cuda:3", "cpu"):
        dali_backend.DaliPipeline(None, VIEWS, 0, iter(()), 1, torch.device(device)).close()
    assert asked == [5, 3, None]


@pytest.mark.gpu
def test_compiled_colour_kernels():
    test_colour_kernels(0.0, (19, 19))
    test_colour_kernels(1.0, (13, 27))


@pytest.mark.parametrize("size", [(19, 19), (13, 27)])
@pytest.mark.parametrize("blur", [0.0, 1.0])
def test_colour_kernels(blur, size):
    """All but the blur equals PIL's bits, save for a float on the edge between two bytes."""
    pytest.importorskip("triton")
    from crossbatch.data.augment import triton_colours as colour_cuda

    augmentation = replace(
        VIEWS[1],
        image_size=size,
        solarize_probability=0.4,
        grayscale_probability=0.3,
        saturation=0.9,
        hue=0.5,
        blur_probability=blur,
    )
    count = 12
    p = draw_parameters(augmentation, 0, 0, np.arange(count), 1, np.full(count, 37), np.full(count, 45))
    images = [photo(number, 45, 37) for number in range(count)]
    plain = replace(p, jitter=0 * p.jitter, grayscale=0 * p.grayscale, blur_sigma=0 * p.blur_sigma)
    plain = replace(plain, solarize=0 * p.solarize, flip=0 * p.flip)
    crops = np.stack(
        [torchvision_backend.augment(np.asarray(image), plain, row, size) for row, image in enumerate(images)]
    )
    want = np.stack([torchvision_backend.augment(np.asarray(image), p, row, size) for row, image in enumerate(images)])
    device = "cpu" if os.environ["TRITON_INTERPRET"] == "1" else "cuda"
    out = torch.zeros(count, *size, 3, dtype=torch.uint8, device=device)
    colour_cuda.colour_view(torch.from_numpy(crops).to(device), p, augmentation, out)
    apart = np.abs(out.cpu().numpy().astype(int) - want)
    assert p.solarize.any() and p.grayscale.any() and p.flip.any()
    if blur:
        assert apart.mean((1, 2, 3)).max() < 0.02 * 255
    else:
        assert (apart > 0).mean() < 0.01 and apart.max() <= 12


def test_size_of_a_jpeg():
    for width, height in ((40, 30), (1, 300)):
        for options in ({}, {"progressive": True}, {"exif": b"Exif\x00\x00" + 1000 * b"\x00"}, {"quality": 20}):
            data = encoded(photo(0, width, height).convert("RGB"), "JPEG", **options)
            assert jpeg_size(data) == (height, width)
    data = encoded(photo(0, 40, 30), "JPEG")
    assert jpeg_size(encoded(photo(0, 40, 30).convert("L"), "JPEG")) == (30, 40)
    assert jpeg_size(encoded(photo(0, 40, 30).convert("CMYK"), "JPEG")) is None  # PIL's business
    assert jpeg_size(encoded(photo(0, 40, 30), "PNG")) is None
    assert all(jpeg_size(data[:length]) is None for length in range(0, len(data), 7))


def test_choice(monkeypatch):
    found = {"nvidia": True, "nvidia.dali": True}
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: found.get(name) or None)
    assert (
        backends.choose_backend("auto", "cuda")[0] == "dali" and backends.choose_backend("auto", "cpu")[0] == "opencv"
    )
    found["nvidia.dali"] = False
    assert backends.choose_backend("auto", "cuda") == ("opencv", "DALI is not installed")
    with pytest.raises(ValueError, match=r"dali is not installed; pip install"):
        backends.choose_backend("dali", "cuda")
    with pytest.raises(ValueError, match=r"`backend` \(='pil'\) must be one of auto, dali, opencv, torchvision"):
        backends.choose_backend("pil", "cpu")
