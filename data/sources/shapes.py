"""Writes small labelled drawings: a data set that can be made anywhere in seconds and still says something about a method.

A drawing holds three or four copies of one of eight figures, each in random colour, size, place and rotation, on a random
textured background. Neither colour nor texture nor place says anything about the class, so comparing raw pixels does little
better than chance (measured in tests/data/test_shapes.py), and a k-NN score that rises above it during pretraining comes from
learned features. Colours are muted, backgrounds alike and figures several on purpose: what two crops of a drawing share is then
above all the figure, and a contrastive method finds it within minutes. Vivid colours or a background of its own would give
each drawing away: with those, six epochs gained 16 points of k-NN accuracy; without them, 30.
"""

import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from crossbatch.data import counter

_OVERSAMPLING = 3  # drawn at three times the side, then shrunk: antialiasing
_NUMBERS = 300  # random numbers set aside per image; a drawing uses at most 250
_MANIFEST = "shapes.json"

Points = list[tuple[float, float]]  # outline in the unit disc


def _disc(x: float = 0, y: float = 0, radius: float = 1, corners: int = 32) -> Points:
    angles = [2 * math.pi * k / corners for k in range(corners)]
    return [(x + radius * math.cos(angle), y + radius * math.sin(angle)) for angle in angles]


def _box(x: float, y: float, width: float, height: float) -> Points:
    left, right, top, bottom = x - width / 2, x + width / 2, y - height / 2, y + height / 2
    return [(left, top), (right, top), (right, bottom), (left, bottom)]


_STAR = [_disc(radius=(1.0, 0.4)[k % 2], corners=10)[k] for k in range(10)]
_CROSS = [(0.95, 0.28), (0.28, 0.28), (0.28, 0.95), (-0.28, 0.95), (-0.28, 0.28), (-0.95, 0.28)]

# Outlines in the unit disc: the first in one colour, those on top of it in a second one.
SHAPES: dict[str, list[Points]] = {
    "checkered": [
        _box(0, 0, 1.4, 1.4),
        *(_box(0.46 * i, 0.46 * j, 0.46, 0.46) for i in (-1, 0, 1) for j in (-1, 0, 1) if (i + j) % 2),
    ],
    "cross": [_CROSS + [(-x, -y) for x, y in _CROSS]],
    "disc": [_disc()],
    "dotted": [_disc(), *(_disc(0.55 * x, 0.55 * y, 0.22) for x, y in _disc(corners=5))],
    "star": [_STAR],
    "striped": [_disc(), *(_box(0, y, 2 * math.sqrt(1 - y * y) - 0.15, 0.24) for y in (-0.6, 0.0, 0.6))],
    "target": [_disc(), _disc(radius=0.65)],
    "triangle": [_disc(corners=3)],
}


def write_shapes(directory: str | Path, train: int, val: int, size: int, seed: int) -> None:
    """Write `train` + `val` JPEGs (quality 90, `size` px) as `<directory>/train/<class>/NNNNN.jpg` and `.../val/...`.

    The files are written into a sibling folder, which is renamed when it is complete, so that `directory` never holds half
    a data set. Does nothing if `directory` holds this very data set.

    Raises:
        ValueError: if `directory` holds anything else, or a split has fewer images than there are classes.
        OSError: if it cannot be written.
    """
    directory = Path(directory)
    settings = {"train": train, "val": val, "size": size, "seed": seed}
    if min(train, val) < len(SHAPES):
        raise ValueError(
            f"`train` (={train}) and `val` (={val}) must each be at least {len(SHAPES)}, one image per class"
        )
    if directory.is_file() or (directory.exists() and any(directory.iterdir())):
        manifest = directory / _MANIFEST
        if not manifest.is_file():
            raise ValueError(f"{directory} exists and was not written by shapes://; give another folder")
        written = json.loads(manifest.read_text())
        if written != settings:
            raise ValueError(
                f"{directory} holds shapes with {written}, but {settings} were asked for; remove it or give another folder"
            )
        return
    draft = directory.with_name(f"{directory.name}.writing-{os.getpid()}")
    try:
        for number, (split, count) in enumerate((("train", train), ("val", val))):
            for name in SHAPES:
                (draft / split / name).mkdir(parents=True, exist_ok=True)
            for index in range(count):
                name = list(SHAPES)[index % len(SHAPES)]
                image = draw_shape(name, size, seed, number, index)
                image.save(draft / split / name / f"{index:05d}.jpg", quality=90)
        (draft / _MANIFEST).write_text(json.dumps(settings))
        if not (directory / _MANIFEST).exists():  # else another process has finished first
            draft.rename(directory)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def draw_shape(name: str, size: int, seed: int, split: int, index: int) -> Image.Image:
    """Return the drawing of shape `name` that (seed, split, index) determine: RGB, `size` px."""
    numbers = iter(counter.uniform(counter.SHAPES_DRAWS + np.arange(_NUMBERS), seed, split, index).tolist())
    side = size * _OVERSAMPLING
    image = _background(numbers, size).resize((side, side), Image.Resampling.NEAREST)  # smooth already: 3x cheaper so
    pen = ImageDraw.Draw(image)
    centres: Points = []
    for _ in range(3 + int(2 * next(numbers))):
        radius = side * (0.19 + 0.08 * next(numbers))
        x, y = _free_place(centres, numbers, radius, side - radius)
        centres.append((x, y))
        angle = 2 * math.pi * next(numbers)
        c, s = radius * math.cos(angle), radius * math.sin(angle)
        first = _colour_unlike(image.getpixel((int(x), int(y))), numbers)
        second = _colour_unlike(first, numbers)
        for number, outline in enumerate(SHAPES[name]):
            corners = [(x + c * u - s * v, y + s * u + c * v) for u, v in outline]
            pen.polygon(corners, fill=second if number else first)
    return image.resize((size, size), Image.Resampling.BOX)


def _muted(numbers: Iterator[float], gray: float) -> list[float]:
    """Return a slightly tinted colour near `gray`; vivid colours would let a network tell the images apart at once."""
    return [gray + 40 * (next(numbers) - 0.5) for _ in range(3)]


def _colour_unlike(other, numbers: Iterator[float]) -> tuple[int, int, int]:
    """Return a muted colour that stands out from `other` by its brightness."""
    gray, distance = sum(other) / 3, 70 + 70 * next(numbers)
    level = gray - distance if gray > 127 else gray + distance
    r, g, b = (min(max(int(value), 0), 255) for value in _muted(numbers, level))
    return r, g, b


def _free_place(taken: Points, numbers: Iterator[float], low: float, high: float) -> tuple[float, float]:
    """Return the one of six random places that is furthest from those taken."""
    places = [(low + (high - low) * next(numbers), low + (high - low) * next(numbers)) for _ in range(6)]
    return max(places, key=lambda place: min((math.dist(place, other) for other in taken), default=0.0))


def _background(numbers: Iterator[float], side: int) -> Image.Image:
    """Return slightly tinted random grays that change smoothly from corner to corner, plus a finer smooth noise."""
    gray = 110 + 35 * next(numbers)
    muted = [_muted(numbers, gray + 60 * (next(numbers) - 0.5)) for _ in range(9)]
    colours = np.array(muted).clip(0, 255).astype(np.uint8).reshape(3, 3, 3)
    pixels = np.asarray(Image.fromarray(colours).resize((side, side), Image.Resampling.BICUBIC), dtype=np.float32)
    noise = 24 * (_smooth_noise(numbers, side) - 0.5)
    return Image.fromarray((pixels + noise[..., None]).clip(0, 255).astype(np.uint8))


def _smooth_noise(numbers: Iterator[float], side: int) -> np.ndarray:
    """Return values around 0..1, [side, side]: a coarse random grid, enlarged smoothly."""
    cells = 3 + int(8 * next(numbers))
    grid = np.array([next(numbers) for _ in range(cells * cells)], dtype=np.float32).reshape(cells, cells)
    return np.asarray(Image.fromarray(grid).resize((side, side), Image.Resampling.BICUBIC))
