"""Decoding, crop and resize by NVIDIA DALI: on a GPU (with its JPEG decoder where it has one), or in DALI's CPU threads.

    keys -> read (threads) -> parameters (recipe.draw) -> DALI: decode once, the crops -> colours -> Piece

DALI draws nothing: the windows come from the recipe, like everything else, so the same images get the same crops as from the
other backends. The colours follow in colour_cuda.py on a GPU, as in opencv_backend.py on a CPU. DALI has operators for
them, but its hue and saturation are a matrix in YIQ, not HSV, and its CPU operators take longer than OpenCV's.

What DALI may not read as PIL does (see jpeg.py) reaches it as a BMP that PIL decoded; and if DALI refuses a file all the same,
the piece is repeated with all its images taken that way. So the same images are broken, and replaced by the same others, as
with every backend.

Pieces are prepared by a thread that the trainer does not wait for (loader.py); on a GPU they are views in device memory.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from nvidia import dali as _dali

from crossbatch.data.augment.opencv import colour
from crossbatch.data.augment.parameters import ViewAugmentation, ViewParameters, draw
from crossbatch.data.decode import decode, encode_bmp
from crossbatch.data.jpeg import jpeg_size
from crossbatch.data.pieces import Broken, Piece, open_or_replace
from crossbatch.data.sources import Source

dali: Any = _dali  # whose type hints do not know its constants

MAX_PIECE = 128  # images that DALI works on at once
_READ_AHEAD = 4  # pieces whose files are read
_DECODED_AHEAD = 2  # pieces in DALI
_HARDWARE_SHARE = 0.7  # of the JPEGs, on GPUs with a decoder for them; CPU and SMs share the others meanwhile


@dataclass
class Encoded:
    """A file that DALI reads as PIL does, and its size in pixels."""

    data: bytes
    height: int
    width: int


@dataclass
class _Job:
    """A piece on its way through DALI; `images` is empty if nothing could be read."""

    epoch: int
    asked: np.ndarray  # int64 [m], as the order gave them: the keys of the augmentation
    read: np.ndarray  # int64 [m], of `images`
    images: list[Encoded]
    broken: list[Broken]
    parameters: list[ViewParameters]  # one per view


class DaliPieces:
    """The pieces of `keys`, each (epoch, at most MAX_PIECE image indices), in order; an iterator as `stream.WorkerPool`.

    Args:
        source: the images.
        recipes: one per view.
        seed: of the augmentation.
        threads: that read files, and those of DALI.
        device: where the views come into being: uint8 [v, m, 3, H, W], stored channels last.
    """

    def __init__(
        self,
        source: Source,
        recipes: Sequence[ViewAugmentation],
        seed: int,
        keys: Any,
        threads: int,
        device: torch.device,
    ):
        self.source, self.recipes, self.seed, self.device = source, recipes, seed, device
        self._threads = max(1, threads)
        self._pool = ThreadPoolExecutor(self._threads)
        self._keys: Iterator[tuple[int, np.ndarray]] = iter(keys)
        self._reading: deque[tuple[int, np.ndarray, list[Future]]] = deque()
        self._jobs: deque[_Job] = deque()
        self._pipeline: Any = self._build()
        self._colour = _gpu_colours() if device.type == "cuda" else self._colour_on_cpu

    def __iter__(self) -> Iterator[Piece]:
        return self

    def __next__(self) -> Piece:
        while len(self._jobs) < _DECODED_AHEAD and (job := self._next_job()) is not None:
            self._jobs.append(job)
            self._schedule(job)
        if not self._jobs:
            raise StopIteration
        piece = self._finished(self._jobs[0])
        self._jobs.popleft()
        return piece

    def close(self):
        """Stops the threads."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._jobs.clear()
        self._reading.clear()
        self._pipeline = None

    def _next_job(self) -> _Job | None:
        while len(self._reading) < _READ_AHEAD and (key := next(self._keys, None)) is not None:
            epoch, indices = key
            futures = [self._pool.submit(open_or_replace, self.source, int(index), encoded) for index in indices]
            self._reading.append((epoch, indices, futures))
        if not self._reading:
            return None
        epoch, indices, futures = self._reading.popleft()
        return self._job(epoch, indices, [future.result() for future in futures])

    def _job(
        self, epoch: int, asked: np.ndarray, opened: list[tuple[tuple[int, Encoded] | None, list[Broken]]]
    ) -> _Job:
        broken = [one for _, some in opened for one in some]
        found = [image for image, _ in opened if image is not None]
        if len(found) < len(asked):
            return _Job(epoch, asked, asked[:0], [], broken, [])
        read, images = np.array([index for index, _ in found], dtype=np.int64), [image for _, image in found]
        heights, widths = np.array([(image.height, image.width) for image in images], dtype=np.int64).T
        parameters = [
            draw(recipe, self.seed, epoch, asked, view, heights, widths) for view, recipe in enumerate(self.recipes)
        ]
        return _Job(epoch, asked, read, images, broken, parameters)

    def _schedule(self, job: _Job) -> None:
        if not job.images:
            return
        self._pipeline.feed_input("encoded", [np.frombuffer(image.data, dtype=np.uint8) for image in job.images])
        for view, p in enumerate(job.parameters):
            start = np.stack((p.crop_top, p.crop_left), axis=1)
            end = start + np.stack((p.crop_height, p.crop_width), axis=1)
            self._pipeline.feed_input(f"start{view}", start.astype(np.float32))
            self._pipeline.feed_input(f"end{view}", end.astype(np.float32))
        self._pipeline.schedule_run()

    def _finished(self, job: _Job) -> Piece:
        if not job.images:
            return Piece(None, job.read, job.broken)
        try:
            crops = self._pipeline.share_outputs()
        except (RuntimeError, IndexError):
            job = self._start_again()
            if not job.images:
                return Piece(None, job.read, job.broken)
            crops = self._pipeline.share_outputs()
        views = self._coloured([crops[view].as_tensor() for view in range(len(self.recipes))], job)
        self._pipeline.release_outputs()
        return Piece(views, job.read, job.broken)

    def _start_again(self) -> _Job:
        """A pipeline that raised is of no more use: a new one takes over its jobs, the first of them as PIL decodes it."""
        self._pipeline = self._build()
        first = self._jobs[0]
        opened = [open_or_replace(self.source, int(index), encoded_by_pil) for index in first.asked]
        self._jobs[0] = self._job(first.epoch, first.asked, opened)
        for job in self._jobs:
            self._schedule(job)
        return self._jobs[0]

    def _coloured(self, crops: list[Any], job: _Job) -> torch.Tensor:
        size = self.recipes[0].image_size
        views = torch.empty((len(self.recipes), len(job.images), size, size, 3), dtype=torch.uint8, device=self.device)
        for out, crop, p, recipe in zip(views, crops, job.parameters, self.recipes, strict=True):
            self._colour(crop, p, recipe, out)
        return views.permute(0, 1, 4, 2, 3)

    def _colour_on_cpu(self, crop: Any, p: ViewParameters, recipe: ViewAugmentation, out: torch.Tensor) -> None:
        pixels = np.asarray(crop)

        def row(i: int) -> None:
            out[i] = torch.from_numpy(colour(pixels[i], p, i, recipe.solarize_threshold))

        list(self._pool.map(row, range(len(pixels))))

    def _build(self) -> Any:
        gpu = self.device.type == "cuda"
        pipeline = _graph(
            len(self.recipes),
            self.recipes[0].image_size,
            "mixed" if gpu else "cpu",
            batch_size=MAX_PIECE,
            num_threads=self._threads,
            device_id=(self.device.index or 0) if gpu else None,
            prefetch_queue_depth=1,  # we schedule ahead ourselves
        )
        pipeline.build()
        return pipeline


@dali.pipeline_def
def _graph(num_views: int, image_size: int, device: str):
    """Encoded files and windows (top, left, bottom, right, in pixels) in, the resized windows of each view out."""
    image = dali.fn.decoders.image(
        dali.fn.external_source(name="encoded", dtype=dali.types.UINT8, ndim=1),
        device=device,
        output_type=dali.types.RGB,
        adjust_orientation=False,
        hw_decoder_load=_HARDWARE_SHARE,
        jpeg_fancy_upsampling=True,  # as PIL's decoder does; a GPU's would take the nearest chroma value
    )
    return tuple(
        dali.fn.resize(
            image,
            roi_start=dali.fn.external_source(name=f"start{view}", dtype=dali.types.FLOAT, ndim=1),
            roi_end=dali.fn.external_source(name=f"end{view}", dtype=dali.types.FLOAT, ndim=1),
            size=(image_size, image_size),
            interp_type=dali.types.INTERP_LINEAR,
            antialias=True,
        )
        for view in range(num_views)
    )


def _gpu_colours() -> Callable[[Any, ViewParameters, ViewAugmentation, torch.Tensor], None]:
    from crossbatch.data.augment.triton_colours import (
        colour_view,  # not above: Triton may be missing where there is no GPU
    )

    def colours(crop: Any, p: ViewParameters, recipe: ViewAugmentation, out: torch.Tensor) -> None:
        colour_view(torch.from_dlpack(crop), p, recipe, out)
        torch.cuda.current_stream().synchronize()  # DALI may now overwrite `crop`

    return colours


def encoded(source: Source, index: int) -> Encoded:
    """Image `index` for DALI: its file, if that is an ordinary JPEG. Raises what `source.open` raises for a damaged one."""
    data = source.read(index)
    size = jpeg_size(data)
    return _as_bmp(data) if size is None else Encoded(data, *size)


def encoded_by_pil(source: Source, index: int) -> Encoded:
    """Image `index` as a BMP of what PIL sees in it."""
    return _as_bmp(source.read(index))


def _as_bmp(data: bytes) -> Encoded:
    image = decode(data)
    return Encoded(encode_bmp(image), image.height, image.width)
