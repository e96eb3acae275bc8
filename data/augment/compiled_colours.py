"""Applies colours, blur, solarize and flip to a crop in one compiled pass, to the bit as PIL does: what the CPU backends use.

Numba compiles `_view` once, for the CPU that it meets, and keeps the result on disk: in `__pycache__` beside this file, else in
the user's cache folder (NUMBA_CACHE_DIR names another). No compiler is needed. Where numba cannot be imported,
`opencv.opencv_colour` takes its place: up to eight calls of OpenCV, which round differently and blur by a true Gaussian.

The arithmetic is that of PIL 13, in the order of its operations and in fp32 where PIL has a float: ImageEnhance's blends
(Blend.c), HSV in bytes (Convert.c), and its GaussianBlur, three box blurs a direction in 24-bit fixed point (BoxBlur.c). Loops
run over planes of one colour, so that LLVM vectorises them; a result is cast back to int32 or uint32 at once, because numba
makes an int64 of a sum or product, and that halves the lanes. `python -m benchmarks data` measures them beside OpenCV's calls.
"""

import math
from typing import Any

import numba
import numpy as np
from numba import float32, int32, uint8, uint32, uint64

from crossbatch.data.augment.parameters import ViewParameters

_BLURS = 3  # box blurs in a direction, which together are nearly a Gaussian


def colour(pixels: np.ndarray, p: ViewParameters, row: int, solarize_threshold: int = 128) -> np.ndarray:
    """Apply colours, blur, solarize and flip to a resized crop, in MoCo v3's order: uint8 [H, W, 3] -> [H, W, 3], dense."""
    order = p.jitter_order[row] if p.jitter[row] else np.empty(0, dtype=np.int64)
    factors = np.array((p.brightness[row], p.contrast[row], p.saturation[row]), dtype=np.float32)
    hue = int(p.hue[row] * 255) % 256
    radius, inside, edge = _box(float(p.blur_sigma[row]))
    threshold = solarize_threshold if p.solarize[row] else 256
    out = np.empty_like(pixels)
    _compiled_view(pixels, out, order, factors, hue, p.grayscale[row], radius, inside, edge, threshold, p.flip[row])
    return out


def _box(sigma: float) -> tuple[int, int, int]:
    """Return the box of a blur: its whole radius, and 2^24 x the weights of what is inside and of the pixels beside it.

    A sigma of 0 (no blur) has a radius of -1. P. Gwosdek et al., Theoretical foundations of Gaussian convolution by extended
    box filtering, 2011, give the formula; PIL computes it in fp32.
    """
    if sigma == 0:
        return -1, 0, 0
    one, variance = np.float32(1), np.float32(sigma) * np.float32(sigma) / np.float32(_BLURS)
    length = np.float32(math.sqrt(12.0 * float(variance) + 1.0))
    whole = np.float32(math.floor((float(length) - 1.0) / 2.0))
    part = (2 * whole + one) * (whole * (whole + one) - 3 * variance)
    part /= 6 * (variance - (whole + one) * (whole + one))
    radius = float(whole + part)
    inside = int(2**24 / (radius * 2 + 1))
    return int(radius), inside, (2**24 - (int(radius) * 2 + 1) * inside) // 2


_ONE, _TWO, _FOUR, _SIX = (np.float32(value) for value in (1, 2, 4, 6))
_BLACK: Any = np.float32(0)
_WHITE: Any = np.float32(255)
_part = numba.njit(nogil=True, error_model="numpy")  # of `_view`, compiled together with it


@_part
def _byte(value):
    """Cut a float off at 0 and 255 and drop its fraction."""
    return uint8(int32(min(max(value, _BLACK), _WHITE)))


@_part
def _blend_with_value(plane, value, factor):
    for i in range(plane.size):
        plane[i] = _byte(value + factor * (float32(plane[i]) - value))


@_part
def _blend(plane, other, factor):
    for i in range(plane.size):
        value = float32(other[i])
        plane[i] = _byte(value + factor * (float32(plane[i]) - value))


@_part
def _gray(red, green, blue, gray):
    """Fill `gray` with the ITU-R 601-2 luma in 16-bit fixed point."""
    for i in range(gray.size):
        luma = int32(19595) * int32(red[i]) + int32(38470) * int32(green[i]) + int32(7471) * int32(blue[i])
        gray[i] = uint8((luma + int32(32768)) >> int32(16))


@_part
def _over_255(value):
    """Divide an integer below 2^16 by 255 and drop the fraction."""
    return int32(uint32(value * int32(0x8081)) >> uint32(23))


@_part
def _turn(red, green, blue, hue):
    """Turn the hue through HSV with bytes for h, s and v: a circle has 255 steps.

    PIL computes in doubles, partly. Floats and integers give the same bytes here, at half the time: for h and s, all pairs of
    chroma and saturation were compared, for the colours that come out, all triples of v, s and h.
    """
    for i in range(red.size):
        r, g, b = float32(red[i]), float32(green[i]), float32(blue[i])
        high, low = max(max(r, g), b), min(min(r, g), b)
        chroma = high - low
        beside = (high - (r + g + b - high - low)) / max(chroma, _ONE)  # of the middle one, from the high one down
        whole = _BLACK if r == high else _TWO if g == high else _FOUR
        before = b if r == high else r if g == high else g
        sixths = whole + _ONE - beside if before == low else whole - _ONE + beside
        h = sixths / _SIX
        h = h + _ONE if sixths < _BLACK else h
        turned = int32(((int32(h * _WHITE) if chroma > _BLACK else int32(0)) + hue) & int32(255))
        v, s = int32(high), int32(chroma / max(high, _ONE) * _WHITE)
        sector = _over_255(int32(6) * turned)
        part = int32(int32(6) * turned - int32(255) * sector)
        rising = int32(part if sector & int32(1) else int32(255) - part)
        vs = int32(v * s)
        p = int32(v - _over_255(vs + int32(127)))
        between = int32(v - int32(uint32(vs * rising + int32(255 * 255 // 2)) // uint32(255 * 255)))
        k = int32(0) if sector == int32(6) else sector
        red[i] = uint8(v if (k == 0) | (k == 5) else (between if (k == 1) | (k == 4) else p))
        green[i] = uint8(v if (k == 1) | (k == 2) else (between if (k == 0) | (k == 3) else p))
        blue[i] = uint8(v if (k == 3) | (k == 4) else (between if (k == 2) | (k == 5) else p))


@_part
def _box_blur(source, target, step, radius, inside, edge):
    """Blur flat pixels along lines of neighbours `step` apart; (radius + 1) x step pixels at both ends of `target` stay."""
    reach = (radius + 1) * step
    n = source.size - 2 * reach
    out, middle = target[reach : reach + n], source[reach : reach + n]
    left, right = source[:n], source[2 * reach :]
    half = int32(1 << 23)
    if radius == 0:  # a sigma up to 1.41; the next is up to 2.45
        odd = int32(-((int32(1 << 24) - inside) & int32(1)))  # inside + 2 * edge is 2^24 or one less: then -1, a mask
        for i in range(n):
            pixel = int32(middle[i])
            change = int32(int32(left[i]) + int32(right[i]) - int32(2) * pixel)
            total = int32(int32(pixel << int32(24)) + int32(change * edge) + half - int32(pixel & odd))
            out[i] = uint8(uint32(total) >> uint32(24))
    elif radius == 1:
        before, after = source[step : step + n], source[3 * step : 3 * step + n]
        for i in range(n):
            total = (int32(before[i]) + int32(middle[i]) + int32(after[i])) * inside
            total += (int32(left[i]) + int32(right[i])) * edge
            out[i] = uint8(uint32(total + half) >> uint32(24))
    else:
        for i in range(n):
            total = (int32(left[i]) + int32(right[i])) * edge
            for k in range(step, 2 * reach, step):
                total += int32(source[i + k]) * inside
            out[i] = uint8(uint32(total + half) >> uint32(24))


@_part
def _blur(plane, radius, inside, edge):
    """Blur a plane along its lines, then along its columns; edges are repeated."""
    height, width = plane.shape
    reach = radius + 1
    now = np.zeros((height + 2 * reach, width + 2 * reach), dtype=np.uint8)
    then = np.zeros_like(now)
    now[reach : reach + height, reach : reach + width] = plane
    for step in (1, width + 2 * reach):
        for _ in range(_BLURS):
            for k in range(reach):
                if step == 1:
                    now[:, k], now[:, width + reach + k] = now[:, reach], now[:, width + reach - 1]
                else:
                    now[k], now[height + reach + k] = now[reach], now[height + reach - 1]
            _box_blur(now.reshape(-1), then.reshape(-1), step, radius, inside, edge)
            now, then = then, now
    plane[:] = now[reach : reach + height, reach : reach + width]


@_part
def _mirror(lines, mirrored):
    """Fill `mirrored` with each of `lines`, [n, width], from right to left."""
    width = lines.shape[1]
    for y in range(lines.shape[0]):
        for x in range(width):
            mirrored[y, x] = lines[y, uint64(width - 1 - x)]  # unsigned: numba need not look for negative ones


@_part
def _pack(red, green, blue, pixels):
    for i in range(red.size):
        pixels[3 * i], pixels[3 * i + 1], pixels[3 * i + 2] = red[i], green[i], blue[i]


def _view(pixels, out, order, factors, hue, grayscale, radius, inside, edge, threshold, flip):
    height, width, _ = pixels.shape
    planes, gray = np.empty((3, height, width), dtype=np.uint8), np.empty(height * width, dtype=np.uint8)
    flat, packed, done = planes.reshape(3, -1), pixels.reshape(-1), out.reshape(-1)
    red, green, blue = flat[0], flat[1], flat[2]
    for i in range(gray.size):
        red[i], green[i], blue[i] = packed[3 * i], packed[3 * i + 1], packed[3 * i + 2]
    for operation in order:  # numbered as in ViewParameters.jitter_order
        if operation == 3:
            _turn(red, green, blue, hue)
            continue
        if operation > 0:
            _gray(red, green, blue, gray)
        value = float32(np.int64(gray.sum() / gray.size + 0.5)) if operation == 1 else float32(0)
        for channel in range(3):
            if operation == 2:
                _blend(flat[channel], gray, factors[operation])
            else:
                _blend_with_value(flat[channel], value, factors[operation])
    channels = 1 if grayscale else 3
    if grayscale:
        _gray(red, green, blue, gray)
        red[:] = gray
    for channel in range(channels):
        plane = flat[channel]
        if radius >= 0:
            _blur(planes[channel], radius, inside, edge)
        if threshold < 256:
            for i in range(plane.size):
                plane[i] = plane[i] if plane[i] < threshold else uint8(255) - plane[i]
    if flip:
        mirrored = np.empty_like(planes)
        _mirror(planes.reshape(-1, width)[: channels * height], mirrored.reshape(-1, width))
        flat = mirrored.reshape(3, -1)
    _pack(flat[0], flat[channels // 2], flat[channels - 1], done)


_PACKED = numba.types.Array(uint8, 3, "C", readonly=True)
_SIGNATURE = (
    _PACKED, uint8[:, :, ::1], numba.int64[::1], float32[::1], int32, numba.boolean,
    int32, int32, int32, int32, numba.boolean,
)  # fmt: skip
try:
    _compiled_view = numba.njit(_SIGNATURE, nogil=True, error_model="numpy", cache=True)(_view)
except RuntimeError:  # no folder for the result can be written
    _compiled_view = numba.njit(_SIGNATURE, nogil=True, error_model="numpy")(_view)
