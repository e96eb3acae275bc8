"""Tests decode.py: every kind of file becomes RGB or a BrokenImage."""

import io
import os
import shutil
import tarfile
import time

import cv2
import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from crossbatch.data import describe_source, open_source
from crossbatch.data.decode import BrokenImage, decode, encode_bmp, missing_plugins, readable_extensions

GRAYS = [51, 204]


def encoded(mode: str, file_format: str = "PNG", **options) -> bytes:
    """Encode a 2 x 1 image, dark gray and light gray, in the given mode."""
    gray = Image.fromarray(np.array([GRAYS], dtype=np.uint8))
    if mode == "I;16":
        image = Image.fromarray(np.array([GRAYS], dtype=np.uint16) << 8)
    elif mode == "P-transparent":
        image = gray.convert("RGB").quantize(4)
        options["transparency"] = b"\x00\x80"
    else:
        image = gray.convert("RGB").convert(mode)
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "P-transparent", "I;16"])
def test_every_mode_becomes_rgb(mode):
    image = decode(encoded(mode))
    assert image.mode == "RGB"
    assert np.array_equal(np.asarray(image), [[[value] * 3 for value in GRAYS]])


@pytest.mark.parametrize("file_format", ["TIFF", "JPEG"])
def test_cmyk_becomes_rgb(file_format):
    image = decode(encoded("CMYK", file_format))
    assert image.mode == "RGB"
    assert np.abs(np.asarray(image).mean(2) - GRAYS).max() < 6


def test_exif_orientation_is_ignored():
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    assert decode(encoded("RGB", "JPEG", exif=exif)).size == (2, 1)


def test_bmp_keeps_every_pixel():
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    assert np.array_equal(np.asarray(decode(encode_bmp(Image.fromarray(pixels)))), pixels)


@pytest.mark.parametrize(
    "damaged", [b"", b"some text", encoded("RGB")[:40], encoded("RGB", "JPEG")[:-30], b"%!PS-Adobe-3.0 EPSF-3.0\n"]
)
def test_broken(damaged):
    with pytest.raises(BrokenImage, match=f"{len(damaged)} bytes"):
        decode(damaged)


@pytest.mark.parametrize("kind", ["zTXt", "iTXt", "tEXt", "iCCP"])
def test_field_a_png_with_much_text_is_an_image(kind):
    """PIL refuses more than 1 MB of text or profile in a chunk, and more than 64 MB in all."""
    info, file, image = PngImagePlugin.PngInfo(), io.BytesIO(), Image.new("RGB", (8, 6), (1, 2, 3))
    if kind == "tEXt":
        for number in range(3):
            info.add_text(f"a{number}", "x" * 25_000_000)
    elif kind != "iCCP":
        (info.add_text if kind == "zTXt" else info.add_itxt)("a", "x" * 2_000_000, zip=True)
    image.save(file, "PNG", pnginfo=info, **({"icc_profile": bytes(2_000_000)} if kind == "iCCP" else {}))
    assert np.array_equal(np.asarray(decode(file.getvalue())), np.asarray(image))
    with pytest.raises(BrokenImage):
        decode(file.getvalue()[:-40])


@pytest.mark.parametrize(
    ("file_format", "options"),
    [
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("TIFF", {"compression": "tiff_deflate", "save_all": True, "append_images": [Image.new("L", (9, 9))]}),
        ("GIF", {}),
        ("GIF", {"save_all": True, "append_images": [Image.new("L", (2, 1))]}),
        ("JPEG2000", {}),
        ("AVIF", {"quality": 100}),
        ("HEIF", {"quality": -1}),
    ],
)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_field_other_formats(file_format, options, mode):
    """Of several pages or frames, the first is the image."""
    if file_format == "HEIF" and ".heic" in missing_plugins():
        pytest.skip("pillow-heif is not installed")
    if file_format == "AVIF" and ".avif" in missing_plugins():
        pytest.skip("this PIL was built without AVIF")
    image = decode(encoded(mode, file_format, **options))
    assert image.mode == "RGB" and image.size == (2, 1)
    assert np.abs(np.asarray(image).astype(int) - np.array(GRAYS)[None, :, None]).max() <= (
        file_format in ("AVIF", "HEIF")
    )


@pytest.mark.parametrize("extension", [".png", ".tiff"])
def test_field_sixteen_bits_of_colour(extension):
    pixels = np.random.default_rng(0).integers(0, 2**16, (5, 7, 3), dtype=np.uint16)
    whole, file = cv2.imencode(extension, pixels)
    assert whole and np.array_equal(np.asarray(decode(file.tobytes())), pixels[..., ::-1] >> 8)


def test_field_floats_have_no_range():
    """PIL would make an image of 0 and 1 black."""
    file = io.BytesIO()
    Image.fromarray(np.ones((4, 4), dtype=np.float32)).save(file, "TIFF")
    with pytest.raises(BrokenImage, match="pixels are floats, which have no agreed range"):
        decode(file.getvalue())


def test_field_a_plugin_that_is_missing(monkeypatch, tmp_path):
    """It is said once, with what to install: with the counts at the start, or, of a list or a single image, as an error."""
    content = b"\0\0\0\x1cftypheic\0\0\0\0mif1heic"
    monkeypatch.setattr("crossbatch.data.decode.missing_plugins", lambda: {".heic": "pillow-heif"})
    monkeypatch.setattr("crossbatch.data.sources.listing.missing_plugins", lambda: {".heic": "pillow-heif"})
    monkeypatch.setattr("crossbatch.data.sources.file_list.missing_plugins", lambda: {".heic": "pillow-heif"})
    readable_extensions.cache_clear()
    try:
        with pytest.raises(BrokenImage, match=r"to read .heic: pip install 'pillow-heif'"):
            decode(content)
        for number in range(2):
            (tmp_path / f"{number}.HEIC").write_bytes(content)
        (tmp_path / "list.txt").write_text("0.HEIC\n1.HEIC\n")
        with pytest.raises(ValueError, match=r"lists images that need a plugin \(2\): pip install 'pillow-heif'"):
            open_source(f"list://{tmp_path}/list.txt")
        (tmp_path / "list.txt").unlink()
        with pytest.raises(ValueError, match=r"no images \(it holds 2 .heic \(pip install 'pillow-heif'\)\)"):
            open_source(tmp_path)
        Image.new("RGB", (2, 2)).save(tmp_path / "x.tif")
        words = "1 images, no labels (2 files passed over: 2 .heic (pip install 'pillow-heif'))"
        assert describe_source(open_source(tmp_path)).startswith(words)
    finally:
        readable_extensions.cache_clear()


def test_field_a_plugin_that_comes_makes_a_kept_listing_old(monkeypatch, tmp_path):
    write_members = {"train/a.tar": ["0.jpg", "1.heic"], "folder/train/a": ["0.jpg", "1.heic"]}
    for place, names in write_members.items():
        for name in names:
            (tmp_path / "files" / name).parent.mkdir(exist_ok=True)
            (tmp_path / "files" / name).write_bytes(encoded("RGB", "JPEG"))
        if place.endswith(".tar"):
            (tmp_path / place).parent.mkdir(parents=True)
            with tarfile.open(tmp_path / place, "w") as tar:
                for name in names:
                    tar.add(tmp_path / "files" / name, name)
        else:
            shutil.copytree(tmp_path / "files", tmp_path / place)
    hour_ago = time.time() - 3600
    for path in [*tmp_path.rglob("*"), tmp_path]:
        os.utime(path, (hour_ago, hour_ago))
    try:
        for missing, images in (({".heic": "x"}, 1), ({".heic": "x"}, 1), ({}, 2), ({".heic": "x"}, 1)):
            for module in ("decode", "sources.listing"):
                monkeypatch.setattr(f"crossbatch.data.{module}.missing_plugins", lambda missing=missing: missing)
            readable_extensions.cache_clear()
            for root in (tmp_path, tmp_path / "folder"):
                assert len(open_source(root, cache=tmp_path / "cache")) == images
    finally:
        readable_extensions.cache_clear()
