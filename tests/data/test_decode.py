"""Tests decode.py: every kind of file becomes RGB or a BrokenImage."""

import io

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from crossbatch.data.decode import BrokenImage, decode, encode_bmp

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
