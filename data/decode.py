"""From an encoded file to pixels with PIL, the reference for every other decoder.

An image here is what torchvision's ImageFolder makes of it: RGB, alpha dropped, EXIF orientation ignored (a photograph
taken sideways lies on its side). The content decides, not the name: a PNG called `.jpg` is a PNG.

Whatever PIL raises over damaged bytes comes out as `BrokenImage`. Its format plugins parse in plain Python, so that
damage shows as nearly any exception: OSError, SyntaxError, struct.error, zlib.error, IndexError, ...
"""

import io

import numpy as np
from PIL import Image

# Not all that PIL knows: EPS, for one, is handed to an interpreter.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000")


class BrokenImage(OSError):
    """These bytes are not a whole image."""


def decode(encoded: bytes) -> Image.Image:
    """The image in an encoded file, fully decoded, mode RGB. Raises BrokenImage."""
    try:
        with Image.open(io.BytesIO(encoded), formats=_FORMATS) as image:
            return to_rgb(image)
    except Exception as error:
        what = "not an image" if isinstance(error, Image.UnidentifiedImageError) else f"{error}"
        raise BrokenImage(f"{what} ({type(error).__name__}, {len(encoded)} bytes)") from error


def encode_bmp(image: Image.Image) -> bytes:
    """`image` as an uncompressed BMP: what sources without files give a decoder that wants one."""
    file = io.BytesIO()
    image.save(file, "BMP")
    return file.getvalue()


def to_rgb(image: Image.Image) -> Image.Image:
    """Decode fully and convert to RGB.

    Two modes need help. PIL warns about palettes with several transparent entries unless they pass through RGBA; and it
    clips 16-bit gray at 255 (a white rectangle) where it should be divided by 256.
    """
    if image.mode == "RGB":
        image.load()
        return image
    if image.mode == "P" and "transparency" in image.info:
        return image.convert("RGBA").convert("RGB")
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")
    return image.convert("RGB")
