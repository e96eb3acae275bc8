"""Applies colours, blur, solarize and flip to resized crops on a GPU, in four Triton kernels a view.

    mean gray at the moment of the contrast -> jitter and grayscale -> blur along rows -> blur along columns, solarize, flip

Every operation rounds to 8 bits as PIL does, HSV included (`h`, `s` and `v` are bytes there), so jitter and grayscale equal
those on PIL bit for bit. The blur is a Gaussian, which PIL approximates by a sum of three boxes. Each image has its own order
of jitter; a program works on pixels of one image only, so that the order is a scalar to branch on.
"""

from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

from crossbatch.data.augment.parameters import ViewAugmentation, ViewParameters

_BLOCK: Any = 1024  # pixels of a program


def colour_view(pixels: torch.Tensor, p: ViewParameters, augmentation: ViewAugmentation, out: torch.Tensor) -> None:
    """Fill `out` with one view of the crops `pixels` by their parameters `p`: both uint8 [m, H, W, 3], dense, on the GPU."""
    count, height, width = pixels.shape[:3]
    table = torch.from_numpy(_table(p, augmentation)).to(pixels.device, non_blocking=True)
    blocks = triton.cdiv(height * width, _BLOCK)
    means = torch.empty(count, device=pixels.device)
    jittered, blurred = torch.empty_like(out), torch.empty_like(out)
    _mean_gray[(count,)](pixels, table, means, height * width, _COLUMNS, _BLOCK)
    _jitter[(count, blocks)](pixels, table, means, jittered, height * width, _COLUMNS, _BLOCK)
    reach: Any = int(np.ceil(3 * augmentation.blur_sigma[1]))
    rows: Any
    for source, target, rows in ((jittered, blurred, True), (blurred, out, False)):
        _blur[(count, blocks)](source, table, target, height, width, _COLUMNS, reach, rows, _BLOCK)


# The columns of the table of parameters, fp32 [m, 13]; the kernels name them by number.
_COLUMNS: Any = 13


def _table(p: ViewParameters, augmentation: ViewAugmentation) -> np.ndarray:
    """Return the table of parameters, a row per image, with these columns:

    0-3 operations in order (-1: none), 4 brightness, 5 contrast, 6 saturation, 7 hue in 1/256 turns, 8 grayscale,
    9 sigma of the blur, 10 solarize from this value on (256: never), 11 flip, 12 whether there is a contrast.
    """
    order = np.where(p.jitter[:, None], p.jitter_order, -1)
    hue = (p.hue * 255).astype(np.int64) % 256
    threshold = np.where(p.solarize, augmentation.solarize_threshold, 256)
    columns = (
        *order.T, p.brightness, p.contrast, p.saturation, hue, p.grayscale, p.blur_sigma, threshold, p.flip, p.jitter,
    )  # fmt: skip
    return np.stack(columns, axis=1).astype(np.float32)


@triton.jit
def _mean_gray(pixels, table, means, num_pixels, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """Store the rounded mean gray of each image at the moment of its contrast adjustment."""
    image = tl.program_id(0)
    row = table + image * COLUMNS
    total = tl.zeros([BLOCK], tl.float32)
    if tl.load(row + 12) != 0:
        for start in range(0, num_pixels, BLOCK):
            offsets = start + tl.arange(0, BLOCK)
            inside = offsets < num_pixels
            r, g, b = _load(pixels, image, offsets, inside, num_pixels)
            before = 1
            for slot in range(4):
                operation = tl.load(row + slot)
                if operation == 1:
                    before = 0
                if before == 1:
                    r, g, b = _adjust(r, g, b, operation, row, 0.0)
            total += tl.where(inside, _gray(r, g, b), 0.0)
    tl.store(means + image, tl.floor(tl.sum(total) / num_pixels + 0.5))


@triton.jit
def _jitter(pixels, table, means, out, num_pixels, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    image = tl.program_id(0)
    row = table + image * COLUMNS
    offsets = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < num_pixels
    r, g, b = _load(pixels, image, offsets, inside, num_pixels)
    mean = tl.load(means + image)
    for slot in range(4):
        r, g, b = _adjust(r, g, b, tl.load(row + slot), row, mean)
    if tl.load(row + 8) != 0:
        r = _gray(r, g, b)
        g = r
        b = r
    _store(out, image, offsets, inside, num_pixels, r, g, b)


@triton.jit
def _blur(
    pixels,
    table,
    out,
    height,
    width,
    COLUMNS: tl.constexpr,
    REACH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Blur by a Gaussian along rows (ROWS) or columns, edges repeated; the second pass also solarizes and flips."""
    image = tl.program_id(0)
    row = table + image * COLUMNS
    num_pixels = height * width
    offsets = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < num_pixels
    y, x = offsets // width, offsets % width
    sigma = tl.load(row + 9)
    if sigma > 0:
        r = tl.zeros([BLOCK], tl.float32)
        g = tl.zeros([BLOCK], tl.float32)
        b = tl.zeros([BLOCK], tl.float32)
        weights = 0.0
        for step in range(-REACH, REACH + 1):
            weight = tl.exp(-step * step / (2 * sigma * sigma))
            if ROWS:
                there = y * width + tl.minimum(tl.maximum(x + step, 0), width - 1)
            else:
                there = tl.minimum(tl.maximum(y + step, 0), height - 1) * width + x
            r_there, g_there, b_there = _load(pixels, image, there, inside, num_pixels)
            r += weight * r_there
            g += weight * g_there
            b += weight * b_there
            weights += weight
        r = tl.floor(r / weights + 0.5)
        g = tl.floor(g / weights + 0.5)
        b = tl.floor(b / weights + 0.5)
    else:
        r, g, b = _load(pixels, image, offsets, inside, num_pixels)
    if not ROWS:
        threshold = tl.load(row + 10)
        r = tl.where(r < threshold, r, 255 - r)
        g = tl.where(g < threshold, g, 255 - g)
        b = tl.where(b < threshold, b, 255 - b)
        if tl.load(row + 11) != 0:
            offsets = y * width + (width - 1 - x)
    _store(out, image, offsets, inside, num_pixels, r, g, b)


@triton.jit
def _adjust(r, g, b, operation, row, mean):
    """Blend with black (brightness), the mean gray (contrast) or each pixel's gray (saturation), or turn the hue in HSV."""
    if operation == 3:
        r, g, b = _turn(r, g, b, tl.load(row + 7))
    elif operation >= 0:
        factor = tl.load(row + 4 + operation.to(tl.int32))
        other = tl.where(operation == 0, 0.0, tl.where(operation == 1, mean, _gray(r, g, b)))
        r, g, b = _blend(other, r, factor), _blend(other, g, factor), _blend(other, b, factor)
    return r, g, b


@triton.jit
def _blend(other, value, factor):
    return tl.floor(tl.minimum(tl.maximum(other + factor * (value - other), 0.0), 255.0))


@triton.jit
def _gray(r, g, b):
    """Return the ITU-R 601-2 luma in 16-bit fixed point, as PIL does."""
    return tl.floor((19595.0 * r + 38470.0 * g + 7471.0 * b + 32768.0) / 65536.0)


@triton.jit
def _turn(r, g, b, hue):
    """Turn the hue through HSV with bytes for h, s and v (a circle has 255 steps, as in PIL)."""
    high, low = tl.maximum(tl.maximum(r, g), b), tl.minimum(tl.minimum(r, g), b)
    chroma = tl.maximum(high - low, 1.0)
    # div_rn: the quotients land on whole numbers, which plain division on a GPU may miss by a bit.
    red, green, blue = tl.div_rn(high - r, chroma), tl.div_rn(high - g, chroma), tl.div_rn(high - b, chroma)
    h = tl.where(r == high, blue - green, tl.where(g == high, 2 + red - blue, 4 + green - red))
    h = tl.div_rn(h, 6.0) + 1
    h = tl.where(high > low, tl.floor((h - tl.floor(h)) * 255), 0.0) + hue
    h = tl.div_rn(tl.where(h >= 256, h - 256, h) * 6, 255.0)
    s = tl.div_rn(tl.floor(tl.div_rn(high - low, tl.maximum(high, 1.0)) * 255), 255.0)
    sector = tl.floor(h)
    part = h - sector
    p = tl.floor(high * (1 - s) + 0.5)
    q = tl.floor(high * (1 - s * part) + 0.5)
    t = tl.floor(high * (1 - s * (1 - part)) + 0.5)
    sector = tl.where(sector == 6, 0.0, sector)
    red = tl.where((sector == 0) | (sector == 5), high, tl.where(sector == 1, q, tl.where(sector == 4, t, p)))
    green = tl.where((sector == 1) | (sector == 2), high, tl.where(sector == 0, t, tl.where(sector == 3, q, p)))
    blue = tl.where((sector == 3) | (sector == 4), high, tl.where(sector == 2, t, tl.where(sector == 5, q, p)))
    return red, green, blue


@triton.jit
def _load(pixels, image, offsets, inside, num_pixels):
    """Load the three channels of some pixels of an image, 0..255 in fp32."""
    at = pixels + 3 * (image * num_pixels + offsets)
    r = tl.load(at, inside, 0).to(tl.float32)
    g = tl.load(at + 1, inside, 0).to(tl.float32)
    b = tl.load(at + 2, inside, 0).to(tl.float32)
    return r, g, b


@triton.jit
def _store(pixels, image, offsets, inside, num_pixels, r, g, b):
    at = pixels + 3 * (image * num_pixels + offsets)
    tl.store(at, r.to(tl.uint8), inside)
    tl.store(at + 1, g.to(tl.uint8), inside)
    tl.store(at + 2, b.to(tl.uint8), inside)
