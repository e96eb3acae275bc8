"""Small labelled drawings: a data set that can be written anywhere in seconds and still says something about a method.

One of eight shapes, in random colour, size, place and rotation, on a random textured background, with clutter. Colour
and texture carry no information about the class, so comparing raw pixels does hardly better than chance (measured in
tests/data/test_shapes.py), and a k-NN score that rises above it during pretraining comes from learned features.
"""

import contextlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from crossbatch import InputError
from crossbatch.data import counter

_OVERSAMPLING = 3  # drawn at three times the side, then shrunk: antialiasing
_NUMBERS = 400  # random numbers set aside per image; a drawing uses at most ~330
_MANIFEST = "shapes.json"

Points = list[tuple[float, float]]  # outline in the unit disc


def _regular(corners: int) -> Points:
    return [(math.cos(a), math.sin(a)) for a in (2 * math.pi * k / corners for k in range(corners))]


def _star() -> Points:
    radii = (1.0, 0.4)
    return [(radii[k % 2] * x, radii[k % 2] * y) for k, (x, y) in enumerate(_regular(10))]


def _cross() -> Points:
    a, b = 0.95, 0.28
    corners = [(a, b), (b, b), (b, a), (-b, a), (-b, b), (-a, b)]
    return corners + [(-x, -y) for x, y in corners]


def _arrow() -> Points:
    return [(1, 0), (0.15, 0.75), (0.15, 0.25), (-1, 0.25), (-1, -0.25), (0.15, -0.25), (0.15, -0.75)]


def _crescent() -> Points:
    outer = [(math.cos(a), math.sin(a)) for a in np.linspace(0.6, 2 * math.pi - 0.6, 40)]
    inner = [(0.5 + 0.66 * math.cos(a), 0.66 * math.sin(a)) for a in np.linspace(2 * math.pi - 1.02, 1.02, 40)]
    return outer + inner


def _ring() -> Points:
    """Two circles joined by a seam of no width."""
    outer = _regular(48)
    return [*outer, outer[0], *((0.55 * x, 0.55 * y) for x, y in reversed([*outer, outer[0]]))]


OUTLINES: dict[str, Callable[[], Points]] = {
    "arrow": _arrow,
    "crescent": _crescent,
    "cross": _cross,
    "disc": lambda: _regular(48),
    "ring": _ring,
    "square": lambda: _regular(4),
    "star": _star,
    "triangle": lambda: _regular(3),
}


def write_shapes(directory: str | Path, train: int, val: int, size: int, seed: int, key: str = "crossbatch.data.path"):
    """Write `train` + `val` JPEGs (quality 90, `size` px) as `<directory>/train/<class>/NNNNN.jpg` and `.../val/...`.

    Written into a sibling folder and renamed when complete, so what stands under `directory` is never half a data set.
    Does nothing if `directory` holds this very data set; raises InputError if it holds anything else.
    """
    directory = Path(directory)
    settings = {"train": train, "val": val, "size": size, "seed": seed}
    if _is_written(directory, settings, key):
        return
    draft = directory.with_name(f"{directory.name}.writing-{os.getpid()}")
    try:
        for number, (split, count) in enumerate((("train", train), ("val", val))):
            for name in OUTLINES:
                (draft / split / name).mkdir(parents=True, exist_ok=True)
            for index in range(count):
                name = list(OUTLINES)[index % len(OUTLINES)]
                image = draw_shape(name, size, seed, number, index)
                image.save(draft / split / name / f"{index:05d}.jpg", quality=90)
        (draft / _MANIFEST).write_text(json.dumps(settings))
        with contextlib.suppress(OSError):  # another process finished first: the check below decides
            draft.rename(directory)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    assert _is_written(directory, settings, key), f"{directory} could not be written"


def _is_written(directory: Path, settings: dict[str, int], key: str) -> bool:
    if min(settings["train"], settings["val"]) < len(OUTLINES):
        raise InputError(
            f"{key}: shapes:// with train={settings['train']}, val={settings['val']}: each must be at least "
            f"{len(OUTLINES)}, one image per class"
        )
    if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        return False
    manifest = directory / _MANIFEST
    if not manifest.is_file():
        raise InputError(f"{key}: {directory} exists and was not written by shapes://; name another folder")
    written = json.loads(manifest.read_text())
    if written != settings:
        raise InputError(
            f"{key}: {directory} holds shapes with {written}, asked for were {settings}; "
            f"remove it or name another folder"
        )
    return True


def draw_shape(name: str, size: int, seed: int, split: int, index: int) -> Image.Image:
    """The drawing of shape `name` that (seed, split, index) stands for: RGB, `size` px."""
    numbers = iter(counter.uniform(counter.SHAPES_DRAWS + np.arange(_NUMBERS), seed, split, index).tolist())
    side = size * _OVERSAMPLING
    image = _background(numbers, size).resize((side, side), Image.Resampling.NEAREST)  # smooth already: 3x cheaper so
    pen = ImageDraw.Draw(image)
    for _ in range(int(5 * next(numbers))):
        _draw_clutter(pen, numbers, side)
    radius = side * (0.24 + 0.18 * next(numbers))
    x, y = (radius + (side - 2 * radius) * next(numbers) for _ in range(2))
    angle = 2 * math.pi * next(numbers)
    colour = _colour_unlike(image.getpixel((int(x), int(y))), numbers)
    pen.polygon(_place(OUTLINES[name](), x, y, radius, angle), fill=colour)
    return image.resize((size, size), Image.Resampling.BOX)


def _place(points: Points, x: float, y: float, radius: float, angle: float) -> Points:
    c, s = radius * math.cos(angle), radius * math.sin(angle)
    return [(x + c * u - s * v, y + s * u + c * v) for u, v in points]


def _colour(numbers: Iterator[float]) -> tuple[int, int, int]:
    return int(256 * next(numbers)), int(256 * next(numbers)), int(256 * next(numbers))


def _colour_unlike(other, numbers: Iterator[float]) -> tuple[int, int, int]:
    """A colour that stands out from `other`: the furthest of four."""
    candidates = [_colour(numbers) for _ in range(4)]
    return max(candidates, key=lambda colour: sum((a - b) ** 2 for a, b in zip(colour, other, strict=True)))


def _draw_clutter(pen: ImageDraw.ImageDraw, numbers: Iterator[float], side: int):
    """A short stroke or a dot: too small to be one of the shapes."""
    x, y = side * next(numbers), side * next(numbers)
    angle, length = 2 * math.pi * next(numbers), side * (0.05 + 0.2 * next(numbers))
    end = (x + length * math.cos(angle), y + length * math.sin(angle))
    pen.line([(x, y), end], fill=_colour(numbers), width=max(1, side // 40))


def _background(numbers: Iterator[float], side: int) -> Image.Image:
    """Two random colours mixed by a smooth noise, stripes or a gradient, plus a fainter smooth noise."""
    low, high = np.array(_colour(numbers), dtype=np.float32), np.array(_colour(numbers), dtype=np.float32)
    kind = int(3 * next(numbers))
    angle, waves, phase = 2 * math.pi * next(numbers), 2 + 6 * next(numbers), 2 * math.pi * next(numbers)
    axis = np.linspace(-0.5, 0.5, side, dtype=np.float32)
    along = math.cos(angle) * axis[:, None] + math.sin(angle) * axis  # [side, side], the distance along a direction
    if kind == 0:
        mix = _smooth_noise(numbers, side)
    elif kind == 1:
        mix = 0.5 + 0.5 * np.sin(2 * math.pi * waves * along + phase)
    else:
        mix = (along + 0.7) / 1.4
    shade = 80 * (_smooth_noise(numbers, side) - 0.5)
    pixels = low + (high - low) * mix[..., None] + shade[..., None]
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _smooth_noise(numbers: Iterator[float], side: int) -> np.ndarray:
    """Values around 0..1, [side, side]: a coarse random grid, enlarged smoothly."""
    cells = 3 + int(8 * next(numbers))
    grid = np.array([next(numbers) for _ in range(cells * cells)], dtype=np.float32).reshape(cells, cells)
    return np.asarray(Image.fromarray(grid).resize((side, side), Image.Resampling.BICUBIC))
