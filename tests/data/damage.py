"""Makes damaged input for the tests of sources and of every backend: image files, and tar shards.

`damaged_files` yields (name, bytes) of files that lie under an image's name in somebody's data set. Most are broken, some only
look strange; who reads them gives an image or reports a broken one, and neither crashes nor hangs. `WHOLE` names those that PIL
users expect to see, with (width, height).

`damaged_shards` yields tar shards with what can have happened to them. Their images are told apart by `payload`: what a source
reads must have the label of the image it is.
"""

import io
import struct
import tarfile
import zlib
from collections.abc import Iterator

import numpy as np
from PIL import Image

from crossbatch.data.decode import missing_plugins

WHOLE = {  # of damaged_files: what is no damage
    "png.jpg": (40, 30),
    "webp.jpg": (40, 30),
    "gif.jpg": (40, 30),
    "bmp.png": (40, 30),
    "cmyk.jpg": (40, 30),
    "gray.jpg": (40, 30),
    "gray_alpha.png": (40, 30),
    "one_bit.png": (40, 30),
    "palette_transparent.png": (40, 30),
    "rgba.png": (40, 30),
    "sixteen_bit.png": (40, 30),
    "exif_rotated.jpg": (40, 30),
    "progressive.jpg": (40, 30),
    "one_pixel.jpg": (1, 1),
    "one_pixel.png": (1, 1),
    "one_column.png": (1, 500),
    "one_row.jpg": (500, 1),
    "large.png": (8000, 8000),
    "trailing_bytes.jpg": (40, 30),
}


def picture(width: int = 40, height: int = 30, mode: str = "RGB") -> Image.Image:
    """Draw smooth colours with some noise, the same each time."""
    y, x = np.mgrid[:height, :width]
    noise = np.random.default_rng(0).integers(0, 40, (height, width, 3))
    pixels = np.stack([x * 200 // width, y * 200 // height, (x + y) * 200 // (width + height)], axis=2) + noise
    return Image.fromarray(pixels.astype(np.uint8)).convert(mode)


def encoded(image: Image.Image, file_format: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def damaged_files(count: int = 300, seed: int = 0) -> Iterator[tuple[str, bytes]]:
    """Yield at least `count` files: the known kinds first, then random truncations, flipped bits, holes and splices."""
    kinds = {**_strange(), **_broken()}
    yield from kinds.items()
    numbers = np.random.default_rng(seed)
    whole = [
        ("jpg", encoded(picture(), "JPEG", quality=90)),
        ("progressive.jpg", encoded(picture(), "JPEG", progressive=True)),
        ("png", encoded(picture(), "PNG")),
        ("webp", encoded(picture(), "WEBP")),
        ("bmp", encoded(picture(), "BMP")),
        ("tif", encoded(picture(), "TIFF", compression="tiff_lzw")),
        ("gif", encoded(picture(), "GIF")),
        ("jp2", encoded(picture(), "JPEG2000")),
    ]
    if ".avif" not in missing_plugins():
        whole.append(("avif", encoded(picture(), "AVIF")))
    for number in range(max(0, count - len(kinds))):
        extension, content = whole[number % len(whole)]
        how = _DAMAGES[number // len(whole) % len(_DAMAGES)]
        yield f"{number:04d}_{how.__name__.strip('_')}.{extension}", how(content, numbers)


def _strange() -> dict[str, bytes]:
    """Return whole images that are not what their names or a quick look say."""
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    sixteen = Image.fromarray(np.asarray(picture(mode="L")).astype(np.uint16) * 257)
    files = {
        "png.jpg": encoded(picture(), "PNG"),
        "webp.jpg": encoded(picture(), "WEBP"),
        "gif.jpg": encoded(picture(), "GIF"),
        "bmp.png": encoded(picture(), "BMP"),
        "cmyk.jpg": encoded(picture(mode="CMYK"), "JPEG"),
        "gray.jpg": encoded(picture(mode="L"), "JPEG"),
        "gray_alpha.png": encoded(picture(mode="LA"), "PNG"),
        "one_bit.png": encoded(picture(mode="1"), "PNG"),
        "palette_transparent.png": encoded(picture().quantize(8), "PNG", transparency=b"\x00\x80"),
        "rgba.png": encoded(picture(mode="RGBA"), "PNG"),
        "sixteen_bit.png": encoded(sixteen, "PNG"),
        "exif_rotated.jpg": encoded(picture(), "JPEG", exif=exif),
        "progressive.jpg": encoded(picture(), "JPEG", progressive=True),
        "one_pixel.jpg": encoded(picture(1, 1), "JPEG"),
        "one_pixel.png": encoded(picture(1, 1), "PNG"),
        "one_column.png": encoded(picture(1, 500), "PNG"),
        "one_row.jpg": encoded(picture(500, 1), "JPEG"),
        "large.png": encoded(Image.new("1", (8000, 8000), 1), "PNG"),  # 200 MB as RGB, 8 kB here
        "trailing_bytes.jpg": encoded(picture(), "JPEG") + b"trailing bytes",
    }
    assert files.keys() == WHOLE.keys()
    return files


def _broken() -> dict[str, bytes]:
    jpeg, png = encoded(picture(), "JPEG"), encoded(picture(), "PNG")
    return {
        "empty.jpg": b"",
        "text.jpg": b"This is not an image.\n" * 20,
        "html.jpg": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
        "zeros.jpg": bytes(5000),
        "random.png": np.random.default_rng(1).bytes(5000),
        "only_the_start.jpg": b"\xff\xd8\xff",
        "only_the_signature.png": png[:8],
        "only_the_header.png": png[:33],
        "half.jpg": jpeg[: len(jpeg) // 2],
        "half.png": png[: len(png) // 2],
        "no_end.png": png[:-12],
        "zero_size.png": _png_header(0, 0),
        "bomb.png": _png_header(60_000, 60_000),
        "gigantic.png": _png_header(2**31 - 1, 2**31 - 1),
        "zero_height.jpg": _jpeg_with_height(jpeg, 0),
        "taller_than_its_data.jpg": _jpeg_with_height(jpeg, 60_000),
        "exif_garbage.jpg": jpeg[:2] + b"\xff\xe1\x00\x12Exif\x00\x00MM\x00*\xff\xff\xff\xff\xff\xff" + jpeg[2:],
        "postscript.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n",
        "svg.png": b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
        "zip.jpg": b"PK\x03\x04" + bytes(100),
    }


def _png_header(width: int, height: int) -> bytes:
    """Return a PNG that claims a size and holds next to nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")


def _jpeg_with_height(jpeg: bytes, height: int) -> bytes:
    frame = jpeg.index(b"\xff\xc0") + 5
    return jpeg[:frame] + struct.pack(">H", height) + jpeg[frame + 2 :]


def _cut(content: bytes, numbers: np.random.Generator) -> bytes:
    return content[: int(numbers.integers(1, len(content)))]


def _flipped(content: bytes, numbers: np.random.Generator) -> bytes:
    damaged = bytearray(content)
    damaged[int(numbers.integers(len(content)))] ^= 1 << int(numbers.integers(8))
    return bytes(damaged)


def _flipped_header(content: bytes, numbers: np.random.Generator) -> bytes:
    """Flip several bits in the first 100 bytes."""
    damaged = bytearray(content)
    for place in numbers.integers(0, min(100, len(content)), 4):
        damaged[int(place)] ^= 1 << int(numbers.integers(8))
    return bytes(damaged)


def _hole(content: bytes, numbers: np.random.Generator) -> bytes:
    """Put zeros in the middle, as after a crash."""
    start = int(numbers.integers(len(content)))
    length = min(int(numbers.integers(1, 512)), len(content) - start)
    return content[:start] + bytes(length) + content[start + length :]


def _missing(content: bytes, numbers: np.random.Generator) -> bytes:
    start = int(numbers.integers(len(content)))
    return content[:start] + content[start + int(numbers.integers(1, 64)) :]


def _spliced(content: bytes, numbers: np.random.Generator) -> bytes:
    """Keep the start of the file and let noise follow."""
    start = int(numbers.integers(1, len(content)))
    return content[:start] + numbers.bytes(len(content) - start)


_DAMAGES = (_cut, _flipped, _flipped_header, _hole, _missing, _spliced)

# ---- shards ----

SAMPLES = 8  # of each shard
CLASSES = 5
SAMPLE_BYTES = 5 * 512  # header, label, header, two blocks of image


def payload(shard: int, number: int) -> bytes:
    """Return what stands for image `number` of a shard. It is never decoded; all shards have keys and sizes alike."""
    return b"shard %d image %02d " % (shard, number) * 40


def label_of(shard: int, number: int) -> int:
    return (number + 2 * shard) % CLASSES


def shard(which: int) -> bytes:
    """Return a whole shard, in webdataset's order of members."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for number in range(SAMPLES):
            members = (
                (f"{number:04d}.cls", b"%d" % label_of(which, number)),
                (f"{number:04d}.jpg", payload(which, number)),
            )
            for name, data in members:
                header = tarfile.TarInfo(name)
                header.size = len(data)
                tar.addfile(header, io.BytesIO(data))
    return file.getvalue()


def damaged_shards(count: int = 100, seed: int = 0) -> Iterator[tuple[str, bytes]]:
    """Yield what `shard(0)` can have become, by name."""
    whole, numbers = shard(0), np.random.default_rng(seed)
    yield "empty", b""
    yield "text", b"This is not an archive.\n" * 100
    yield "zeros", bytes(len(whole))
    yield "another_shard", shard(1)
    yield "two_in_one", whole + shard(1)
    yield "half_of_another", whole[: SAMPLES // 2 * SAMPLE_BYTES] + shard(1)[SAMPLES // 2 * SAMPLE_BYTES :]
    yield "shifted_by_a_block", bytes(512) + whole[:-512]
    samples, end = whole[: SAMPLES * SAMPLE_BYTES], whole[SAMPLES * SAMPLE_BYTES :]
    for number in range(count - 7):
        how = _DAMAGES[number % len(_DAMAGES)]
        yield f"{number:04d}_{how.__name__.strip('_')}", how(samples, numbers) + (b"" if how is _cut else end)
