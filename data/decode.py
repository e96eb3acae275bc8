"""Decodes image files with PIL, the reference, and ordinary JPEGs with OpenCV, to the same pixels; reads the headers of JPEGs.

An image is decoded as torchvision's ImageFolder does it: RGB, alpha dropped, EXIF orientation ignored (a photograph
taken sideways lies on its side). The content decides, not the name: a PNG called `.jpg` is a PNG.

Whatever PIL raises over damaged bytes becomes a `BrokenImage`. Its format plugins parse in plain Python, so that damage
shows as nearly any exception: OSError, SyntaxError, struct.error, zlib.error, IndexError, ...

DALI and OpenCV get only what they surely read as PIL does: baseline or progressive JPEGs of one or three components with their
header in order (`jpeg_size`). All else (PNG, CMYK, arithmetic coding, cut-off files, ...) goes to PIL, because DALI 2.4 crashed
on batches with several damaged headers, and OpenCV makes images of files that are cut off.

A JPEG holds the frequencies of blocks of 8 x 8 pixels, so a decoder can stop at a half, a quarter or an eighth of the
resolution. That halves the time for a photograph of 12 megapixels, and PIL and OpenCV give the same pixels then, too.

Of an animation and of a TIFF with several pages, the first is the image. Pixels of 16 bits are divided by 256.
"""

import contextlib
import functools
import io
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from PIL import Image, features

# Not all that PIL knows: EPS, for one, is handed to an interpreter.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000")
_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".jp2")  # of files that are images
# Formats that not every PIL reads: its name for them, and what reads them.
_OPTIONAL = {".avif": ("AVIF", "pillow>=11.3"), ".heic": ("HEIF", "pillow-heif"), ".heif": ("HEIF", "pillow-heif")}

_PNG = b"\x89PNG\r\n\x1a\n"
_PADDING = 1024  # bytes after the end of a JPEG that some writers leave
_MAX_PIXELS = 178_956_970  # what PIL opens without calling it a decompression bomb
_FRAMES = (0xC0, 0xC1, 0xC2)  # baseline, extended sequential, progressive; all with Huffman codes
_START_OF_SCAN = 0xDA
_SEGMENTS = (0xC4, 0xDB, 0xDD, *range(0xE0, 0xF0), 0xFE)  # tables, restart interval, application data, comment

_REDUCED = {1: 0, 2: 16, 4: 32, 8: 64}  # cv2.IMREAD_REDUCED_GRAYSCALE_2, _4 and _8: bits that go with IMREAD_COLOR_RGB


@functools.cache
def missing_plugins() -> dict[str, str]:
    """Return {extension of files that cannot be read here: what to install for them}, after registering what is installed."""
    readable = {"AVIF"} & {name.upper() for name in features.get_supported()}
    try:
        from pillow_heif import register_heif_opener  # pyright: ignore[reportMissingImports]

        register_heif_opener()
        readable.add("HEIF")
    except ImportError:
        pass
    return {extension: package for extension, (name, package) in _OPTIONAL.items() if name not in readable}


@functools.cache
def readable_extensions() -> tuple[str, ...]:
    """Return the extensions, in lower case, of files that are images which can be read here."""
    return (*_EXTENSIONS, *(extension for extension in _OPTIONAL if extension not in missing_plugins()))


class BrokenImage(OSError):
    """Raised when an image file is damaged or is not an image."""


class ImagesLost(RuntimeError):
    """Raised when no images come: a worker died, there is no memory to pass them on, or a disk or server does not answer."""


def decode(encoded: bytes, reduction: int = 1) -> Image.Image:
    """Decode an image file with PIL, to mode RGB; `reduction` as in `decode_pixels`. Raises BrokenImage."""
    with _broken(encoded):
        try:
            return _decode(encoded, reduction)
        except ValueError:  # also of PIL's limits on what nobody reads here
            return _decode(_without_png_text(encoded), reduction)


@contextlib.contextmanager
def _broken(encoded: bytes) -> Iterator[None]:
    """Raise whatever PIL does over an image file as BrokenImage."""
    try:
        yield
    except Exception as error:
        what = "not an image" if isinstance(error, Image.UnidentifiedImageError) else f"{error}"
        raise BrokenImage(f"{what} ({type(error).__name__}, {len(encoded)} bytes)") from error


class Encoded(NamedTuple):
    """Holds an image file that is not decoded yet, with its size in pixels."""

    data: bytes
    height: int
    width: int


def decode_pixels(encoded: bytes, reduction: int = 1, by_pil: bool = False) -> np.ndarray:
    """Decode an image file to RGB, uint8 [h, w, 3]: an ordinary JPEG with OpenCV (unless `by_pil`), all else with PIL.

    A `reduction` of 2, 4 or 8, of an ordinary JPEG only, makes each side that much shorter, rounded up. Raises BrokenImage.
    """
    if by_pil or jpeg_size(encoded) is None:
        return np.array(decode(encoded, reduction))
    return decode_jpeg(encoded, reduction)


def decode_jpeg(encoded: bytes, reduction: int = 1) -> np.ndarray:
    """Decode, as `decode_pixels`, what is known to be an ordinary JPEG."""
    import cv2  # not needed to import this package

    flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION | _REDUCED[reduction]
    pixels = cv2.imdecode(np.frombuffer(encoded, dtype=np.uint8), flags)
    return np.array(decode(encoded, reduction)) if pixels is None else pixels


def decode_channels(encoded: bytes, channels: int) -> np.ndarray:
    """Decode an image file with PIL to so many channels as it stores: uint8 [h, w, channels]. Raises BrokenImage.

    They are the bands of the file (1 to 4), or those of all pages of a TIFF, in their order. Pixels of 16 bits are divided by
    256. Colours become one channel by their luma, and alpha is dropped where that leaves the right number.
    """
    with _broken(encoded), _opened(encoded) as image:
        pages = getattr(image, "n_frames", 1) if image.format == "TIFF" else 1
        bands = []
        for page in range(pages):
            if page:
                image.seek(page)
            bands.append(_bands(image))
        if channels == 1 and pages == 1 and bands[0].shape[2] in (3, 4) and image.mode != "CMYK":
            bands = [np.asarray(Image.fromarray(bands[0][..., :3]).convert("L"))[..., None]]
        elif pages == 1 and image.mode in ("LA", "RGBA") and bands[0].shape[2] == channels + 1:
            bands = [bands[0][..., :-1]]
        pixels = np.concatenate(bands, axis=2)
    if pixels.shape[2] != channels:
        raise BrokenImage(f"the image has {pixels.shape[2]} channels, not {channels}")
    return pixels


def _bands(image: Image.Image) -> np.ndarray:
    """Return the bands of an opened image, uint8 [h, w, bands]."""
    if image.mode.startswith("I"):
        return _high_bytes(image)[..., None]
    if image.mode not in ("L", "LA", "RGBA", "CMYK"):
        image = image.convert("L") if image.mode == "1" else to_rgb(image)
    return np.atleast_3d(np.asarray(image))


def _decode(encoded: bytes, reduction: int) -> Image.Image:
    with _opened(encoded) as image:
        if reduction > 1:
            image.draft("RGB", (image.width // reduction, image.height // reduction))
        return to_rgb(image)


def _opened(encoded: bytes) -> Image.Image:
    """Return an image file opened by PIL, of the formats that are read here. Raises whatever PIL does."""
    formats = _FORMATS
    if encoded[4:8] == b"ftyp":  # the box that AVIF and HEIC files begin with, and what it is
        extension = ".avif" if encoded[8:12] in (b"avif", b"avis") else ".heic"
        if extension in missing_plugins():
            raise OSError(f"to read {extension}: pip install '{missing_plugins()[extension]}'")
        formats = (_OPTIONAL[extension][0],)
    return Image.open(io.BytesIO(encoded), formats=formats)


def _without_png_text(encoded: bytes) -> bytes:
    """Return a PNG without text and colour profile, for which PIL has limits of 1 MB; any other file as it is."""
    if not encoded.startswith(_PNG):
        return encoded
    kept, at = [_PNG], len(_PNG)
    while at + 12 <= len(encoded):  # a chunk: length of the data, type, data, checksum
        end = at + 12 + int.from_bytes(encoded[at : at + 4], "big")
        if encoded[at + 4 : at + 8] not in (b"tEXt", b"zTXt", b"iTXt", b"iCCP"):
            kept.append(encoded[at:end])
        at = end
    return b"".join(kept)


def encode_bmp(image: Image.Image) -> bytes:
    """Encode `image` as an uncompressed BMP, for sources without files and decoders that need a file."""
    file = io.BytesIO()
    image.save(file, "BMP")
    return file.getvalue()


def to_rgb(image: Image.Image) -> Image.Image:
    """Decode an opened image fully and convert it to RGB.

    Three modes need special care. PIL warns about palettes with several transparent entries unless they pass through RGBA. It
    clips 16-bit gray at 255 (a white rectangle) where it should be divided by 256. Floats, which it would clip, too, have no
    agreed range: a ValueError.
    """
    if image.mode == "RGB":
        image.load()
        return image
    if image.mode == "F":
        raise ValueError("pixels are floats, which have no agreed range; write them with 8 or 16 bits")
    if image.mode == "P" and "transparency" in image.info:
        return image.convert("RGBA").convert("RGB")
    if image.mode.startswith("I"):
        return Image.fromarray(_high_bytes(image)).convert("RGB")
    return image.convert("RGB")


def _high_bytes(image: Image.Image) -> np.ndarray:
    """Return gray pixels of 16 bits divided by 256, uint8 [h, w]."""
    return (np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)


def jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Read (height, width) in pixels from the header of an ordinary JPEG (ITU-T T.81, annex B); None for any other file."""
    if data[:2] != b"\xff\xd8" or b"\xff\xd9" not in data[-_PADDING:]:
        return None
    at, size = 2, None
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:  # a fill byte
            at += 1
            continue
        if marker == _START_OF_SCAN:
            return size
        length = int.from_bytes(data[at + 2 : at + 4], "big")
        if marker in _FRAMES and size is None:
            # Its header: precision, height, width, components, and three bytes for each of these.
            frame = data[at + 4 : at + 2 + length]
            if len(frame) < 6 or frame[0] != 8 or frame[5] not in (1, 3) or len(frame) != 6 + 3 * frame[5]:
                return None
            size = int.from_bytes(frame[1:3], "big"), int.from_bytes(frame[3:5], "big")
            if not 0 < size[0] * size[1] <= _MAX_PIXELS:
                return None
        elif marker not in _SEGMENTS or length < 2:
            return None
        at += 2 + length
    return None
