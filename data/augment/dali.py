"""Decodes, crops and resizes with NVIDIA DALI: on a GPU (with its JPEG decoder where it has one), or in DALI's CPU threads.

    keys -> read (threads) -> draw_parameters -> DALI: decode once, the crops of all views -> colours -> WorkerBatch

DALI draws nothing: the crops come from `draw_parameters`, so the same images get the same crops as with the other backends. The
colours follow in `triton_colours` on a GPU and by `opencv.colour` on a CPU. DALI has operators for them, but its hue and
saturation are a matrix in YIQ, not HSV, and its CPU operators take longer than OpenCV's.

A file that DALI might read differently from PIL (`decode.jpeg_size`) reaches it as a BMP that PIL decoded. If DALI refuses a
file all the same, the worker batch is repeated with all its images taken that way. So the same images are broken, and replaced
by the same others, as with every backend.

A thread of the loader runs this ahead of the training; on a GPU the views are in device memory.
"""

import functools
import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from nvidia import dali as _dali
from PIL import Image

from crossbatch.data.augment.opencv import colour
from crossbatch.data.augment.parameters import (
    ViewAugmentation,
    ViewParameters,
    draw_parameters,
    height_width,
    reduced,
    reductions,
)
from crossbatch.data.decode import BrokenImage, Encoded, decode_pixels, encode_bmp, jpeg_size
from crossbatch.data.sources import Source
from crossbatch.data.sources.subset import read_ahead
from crossbatch.data.worker_batches import BrokenFile, WorkerBatch, open_encoded, open_or_replace

dali: Any = _dali  # its type hints do not know its constants

MAX_IMAGES = 128  # that DALI works on at once
_READ_AHEAD = 4  # worker batches that are read ahead
_DECODED_AHEAD = 2  # worker batches in DALI
_HARDWARE_SHARE = 0.7  # of the JPEGs, on GPUs with a decoder for them; CPU and SMs do the others meanwhile


@dataclass
class _Job:
    """Carries a worker batch through DALI; `images` is empty if one could be neither read nor replaced."""

    epoch: int
    asked: np.ndarray  # int64 [m], as the sampler gave them: the keys of the random numbers
    read: np.ndarray  # int64 [m], of `images`
    images: list[Encoded]
    broken: list[BrokenFile]
    parameters: list[ViewParameters]  # one per view


class DaliPipeline:
    """Iterates over the worker batches of `keys`, as `WorkerPool` does: each key is (epoch, at most MAX_IMAGES image indices).

    `threads` read files, and as many are DALI's own. The views, uint8 [v, m, 3, H, W], are made on `device`.
    """

    def __init__(
        self,
        source: Source,
        augmentations: Sequence[ViewAugmentation],
        seed: int,
        keys: Iterator[tuple[int, np.ndarray]],
        threads: int,
        device: torch.device,
        scaled_decode: bool = True,
    ):
        self._scaled_decode = scaled_decode
        self.source, self.augmentations, self.seed, self.device = source, augmentations, seed, device
        self._threads = max(1, threads)
        self._pool = ThreadPoolExecutor(self._threads)
        self._keys = keys
        self._reading: deque[tuple[int, np.ndarray, list[Future]]] = deque()
        self._jobs: deque[_Job] = deque()
        self._pipeline: Any = self._build()

    def __iter__(self) -> Iterator[WorkerBatch]:
        return self

    def __next__(self) -> WorkerBatch:
        while len(self._jobs) < _DECODED_AHEAD:
            self._jobs.append(self._next_job())
            self._schedule(self._jobs[-1])
        crops = self._crops()
        job = self._jobs.popleft()
        if crops is None:
            return WorkerBatch(None, job.read, job.broken)
        views = self._coloured(crops, job)
        self._pipeline.release_outputs()
        return WorkerBatch(views, job.read, job.broken)

    def close(self) -> None:
        """Stop the threads."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._jobs.clear()
        self._reading.clear()
        self._pipeline = None

    def _next_job(self) -> _Job:
        while len(self._reading) < _READ_AHEAD:
            epoch, indices = next(self._keys)
            opener = functools.partial(encoded, self.source)
            read_ahead(self.source, indices)
            futures = [self._pool.submit(open_or_replace, self.source, int(index), opener) for index in indices]
            self._reading.append((epoch, indices, futures))
        epoch, indices, futures = self._reading.popleft()
        return self._job(epoch, indices, [future.result() for future in futures])

    def _job(
        self,
        epoch: int,
        asked: np.ndarray,
        opened: list[tuple[tuple[int, Encoded] | None, list[BrokenFile]]],
        by_pil: bool = False,
    ) -> _Job:
        """Draw the parameters of the images that `open_or_replace` found for the indices `asked`.

        Large JPEGs, or with `by_pil` all, are decoded here, DALI gets their pixels: it has no decoder at a reduced resolution.
        """
        broken = [one for _, some in opened for one in some]
        found = [image for image, _ in opened if image is not None]
        if len(found) < len(asked):
            return _Job(epoch, asked, asked[:0], [], broken, [])
        read, images = np.array([index for index, _ in found], dtype=np.int64), [image for _, image in found]
        heights, widths = np.array([(image.height, image.width) for image in images], dtype=np.int64).T
        parameters = [
            draw_parameters(augmentation, self.seed, epoch, asked, view, heights, widths)
            for view, augmentation in enumerate(self.augmentations)
        ]
        reduction = np.ones(len(images), dtype=np.int64)
        if self._scaled_decode:
            jpegs = np.array([jpeg_size(image.data) is not None for image in images])
            size = self.augmentations[0].image_size
            reduction = np.where(jpegs, reductions(parameters, heights, widths, size), 1)
            parameters = [reduced(p, reduction) for p in parameters]
        rows = np.arange(len(images)) if by_pil else np.flatnonzero(reduction > 1)
        futures = {row: self._pool.submit(_as_bmp, images[row], int(reduction[row]), by_pil) for row in rows.tolist()}
        try:
            for row, future in futures.items():
                images[row] = images[row]._replace(data=future.result())
        except BrokenImage:  # so late; the second time, it is found while files are opened
            assert not by_pil
            return self._job_by_pil(epoch, asked)
        return _Job(epoch, asked, read, images, broken, parameters)

    def _job_by_pil(self, epoch: int, asked: np.ndarray) -> _Job:
        opener = functools.partial(encoded, self.source, by_pil=True)
        return self._job(
            epoch, asked, [open_or_replace(self.source, int(index), opener) for index in asked], by_pil=True
        )

    def _schedule(self, job: _Job) -> None:
        if not job.images:
            return
        self._pipeline.feed_input("encoded", [np.frombuffer(image.data, dtype=np.uint8) for image in job.images])
        starts = np.array([(p.crop_top, p.crop_left) for p in job.parameters])  # [v, 2, m]
        ends = starts + np.array([(p.crop_height, p.crop_width) for p in job.parameters])
        first, last = starts.min(axis=0), ends.max(axis=0)  # of what any view needs; the rest is not decoded
        self._pipeline.feed_input("first", first.T.astype(np.int32, order="C"))
        self._pipeline.feed_input("last", last.T.astype(np.int32, order="C"))
        for view, (start, end) in enumerate(zip(starts - first, ends - first, strict=True)):
            self._pipeline.feed_input(f"start{view}", start.T.astype(np.float32, order="C"))
            self._pipeline.feed_input(f"end{view}", end.T.astype(np.float32, order="C"))
        self._pipeline.schedule_run()

    def _crops(self) -> Any:
        """Return DALI's crops for the first job, or None if it has no images.

        A pipeline that raised cannot be used again: a new one takes over the jobs, and PIL decodes the first one's images.
        """
        if not self._jobs[0].images:
            return None
        try:
            return self._pipeline.share_outputs()
        except (RuntimeError, IndexError):
            self._pipeline = self._build()
            self._jobs[0] = self._job_by_pil(self._jobs[0].epoch, self._jobs[0].asked)
            for job in self._jobs:
                self._schedule(job)
            return self._pipeline.share_outputs() if self._jobs[0].images else None

    def _coloured(self, crops: Any, job: _Job) -> torch.Tensor:
        shape = len(self.augmentations), len(job.images), *height_width(self.augmentations[0].image_size), 3
        views = torch.empty(shape, dtype=torch.uint8, device=self.device)
        for view, (out, p, augmentation) in enumerate(zip(views, job.parameters, self.augmentations, strict=True)):
            crop = crops[view].as_tensor()
            if self.device.type == "cuda":
                from crossbatch.data.augment.triton_colours import colour_view  # Triton may be missing without a GPU

                colour_view(torch.from_dlpack(crop), p, augmentation, out)
                torch.cuda.current_stream().synchronize()  # DALI may now overwrite `crop`
            else:
                rows, threshold = range(len(job.images)), itertools.repeat(augmentation.solarize_threshold)
                coloured = self._pool.map(colour, np.asarray(crop), itertools.repeat(p), rows, threshold)
                for row, pixels in zip(out, coloured, strict=True):
                    row.copy_(torch.from_numpy(pixels))
        return views.permute(0, 1, 4, 2, 3)

    def _build(self) -> Any:
        gpu, number = self.device.type == "cuda", self.device.index
        if gpu and number is None:
            number = torch.cuda.current_device()
        pipeline = _graph(
            len(self.augmentations),
            height_width(self.augmentations[0].image_size),
            "mixed" if gpu else "cpu",
            batch_size=MAX_IMAGES,
            num_threads=self._threads,
            device_id=number if gpu else None,
            prefetch_queue_depth=1,  # we schedule ahead ourselves
        )
        pipeline.build()
        return pipeline


@dali.pipeline_def
def _graph(num_views: int, size: tuple[int, int], device: str):
    """Take encoded files, what to decode of them, and crops in that (pixels, rows first); return each view's resized crops."""
    image = dali.fn.decoders.image_slice(
        dali.fn.external_source(name="encoded", dtype=dali.types.UINT8, ndim=1),
        start=dali.fn.external_source(name="first", dtype=dali.types.INT32, ndim=1),
        end=dali.fn.external_source(name="last", dtype=dali.types.INT32, ndim=1),
        axis_names="HW",
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
            size=size,
            interp_type=dali.types.INTERP_LINEAR,
            antialias=True,
        )
        for view in range(num_views)
    )


def encoded(source: Source, index: int, by_pil: bool = False) -> Encoded:
    """Return image `index` for DALI. Raises OSError, as `source.open` does.

    The result holds the file itself if it is an ordinary JPEG (which PIL must be able to decode, if `by_pil`), else a BMP of
    what PIL decodes, or of what a source without `has_files` opens.
    """
    opened = open_encoded(source, index, check=by_pil)
    if isinstance(opened, Encoded):
        return opened
    return Encoded(encode_bmp(Image.fromarray(opened)), *opened.shape[:2])


def _as_bmp(image: Encoded, reduction: int, by_pil: bool) -> bytes:
    """Return a JPEG decoded at 1 / `reduction`, as a BMP; any other file as it is. Raises BrokenImage."""
    if jpeg_size(image.data) is None:
        return image.data
    return encode_bmp(Image.fromarray(decode_pixels(image.data, reduction, by_pil)))
