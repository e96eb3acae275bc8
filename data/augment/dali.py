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

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from nvidia import dali as _dali

from crossbatch.data.augment.opencv import colour
from crossbatch.data.augment.parameters import ViewAugmentation, ViewParameters, draw_parameters
from crossbatch.data.decode import decode, encode_bmp, jpeg_size
from crossbatch.data.sources import Source
from crossbatch.data.worker_batches import BrokenFile, WorkerBatch, open_or_replace

dali: Any = _dali  # whose type hints do not know its constants

MAX_IMAGES = 128  # that DALI works on at once
_READ_AHEAD = 4  # worker batches that are read ahead
_DECODED_AHEAD = 2  # worker batches in DALI
_HARDWARE_SHARE = 0.7  # of the JPEGs, on GPUs with a decoder for them; CPU and SMs share the others meanwhile


@dataclass
class Encoded:
    """Holds an image file that DALI reads as PIL does, and its size in pixels."""

    data: bytes
    height: int
    width: int


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
    """Iterates over the worker batches of `keys`, each (epoch, at most MAX_IMAGES image indices), as `WorkerPool` does.

    Args:
        source: the images.
        augmentations: one per view.
        seed: the seed of the augmentation.
        threads: number of threads that read files, and of DALI's own.
        device: where the views are made: uint8 [v, m, 3, H, W], stored channels last.
    """

    def __init__(
        self,
        source: Source,
        augmentations: Sequence[ViewAugmentation],
        seed: int,
        keys: Any,
        threads: int,
        device: torch.device,
    ):
        self.source, self.augmentations, self.seed, self.device = source, augmentations, seed, device
        self._threads = max(1, threads)
        self._pool = ThreadPoolExecutor(self._threads)
        self._keys: Iterator[tuple[int, np.ndarray]] = iter(keys)
        self._reading: deque[tuple[int, np.ndarray, list[Future]]] = deque()
        self._jobs: deque[_Job] = deque()
        self._pipeline: Any = self._build()
        self._colour = _gpu_colours() if device.type == "cuda" else self._colour_on_cpu

    def __iter__(self) -> Iterator[WorkerBatch]:
        return self

    def __next__(self) -> WorkerBatch:
        while len(self._jobs) < _DECODED_AHEAD and (job := self._next_job()) is not None:
            self._jobs.append(job)
            self._schedule(job)
        if not self._jobs:
            raise StopIteration
        batch = self._finished(self._jobs[0])
        self._jobs.popleft()
        return batch

    def close(self) -> None:
        """Stop the threads."""
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
        self, epoch: int, asked: np.ndarray, opened: list[tuple[tuple[int, Encoded] | None, list[BrokenFile]]]
    ) -> _Job:
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

    def _finished(self, job: _Job) -> WorkerBatch:
        if not job.images:
            return WorkerBatch(None, job.read, job.broken)
        try:
            crops = self._pipeline.share_outputs()
        except (RuntimeError, IndexError):
            job = self._start_again()
            if not job.images:
                return WorkerBatch(None, job.read, job.broken)
            crops = self._pipeline.share_outputs()
        views = self._coloured([crops[view].as_tensor() for view in range(len(self.augmentations))], job)
        self._pipeline.release_outputs()
        return WorkerBatch(views, job.read, job.broken)

    def _start_again(self) -> _Job:
        """Let a new pipeline take over the jobs, as one that raised is of no more use; PIL decodes the first job for it."""
        self._pipeline = self._build()
        first = self._jobs[0]
        opened = [open_or_replace(self.source, int(index), encoded_by_pil) for index in first.asked]
        self._jobs[0] = self._job(first.epoch, first.asked, opened)
        for job in self._jobs:
            self._schedule(job)
        return self._jobs[0]

    def _coloured(self, crops: list[Any], job: _Job) -> torch.Tensor:
        size = self.augmentations[0].image_size
        views = torch.empty(
            (len(self.augmentations), len(job.images), size, size, 3), dtype=torch.uint8, device=self.device
        )
        for out, crop, p, augmentation in zip(views, crops, job.parameters, self.augmentations, strict=True):
            self._colour(crop, p, augmentation, out)
        return views.permute(0, 1, 4, 2, 3)

    def _colour_on_cpu(self, crop: Any, p: ViewParameters, augmentation: ViewAugmentation, out: torch.Tensor) -> None:
        pixels = np.asarray(crop)

        def row(i: int) -> None:
            out[i] = torch.from_numpy(colour(pixels[i], p, i, augmentation.solarize_threshold))

        list(self._pool.map(row, range(len(pixels))))

    def _build(self) -> Any:
        gpu = self.device.type == "cuda"
        pipeline = _graph(
            len(self.augmentations),
            self.augmentations[0].image_size,
            "mixed" if gpu else "cpu",
            batch_size=MAX_IMAGES,
            num_threads=self._threads,
            device_id=(self.device.index or 0) if gpu else None,
            prefetch_queue_depth=1,  # we schedule ahead ourselves
        )
        pipeline.build()
        return pipeline


@dali.pipeline_def
def _graph(num_views: int, image_size: int, device: str):
    """Take encoded files and crops (top, left, bottom, right, in pixels) and return the resized crops of each view."""
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
    from crossbatch.data.augment.triton_colours import colour_view  # here: Triton may be missing where there is no GPU

    def colours(crop: Any, p: ViewParameters, augmentation: ViewAugmentation, out: torch.Tensor) -> None:
        colour_view(torch.from_dlpack(crop), p, augmentation, out)
        torch.cuda.current_stream().synchronize()  # DALI may now overwrite `crop`

    return colours


def encoded(source: Source, index: int) -> Encoded:
    """Return image `index` for DALI: its file, if that is an ordinary JPEG. Raises OSError, as `source.open` does."""
    data = source.read(index)
    size = jpeg_size(data)
    return _as_bmp(data) if size is None else Encoded(data, *size)


def encoded_by_pil(source: Source, index: int) -> Encoded:
    """Return image `index` as a BMP of what PIL decodes."""
    return _as_bmp(source.read(index))


def _as_bmp(data: bytes) -> Encoded:
    image = decode(data)
    return Encoded(encode_bmp(image), image.height, image.width)
