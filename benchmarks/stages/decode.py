"""Measures decoding, JPEG bytes in memory -> RGB pixels, by DALI beside PIL, which a torchvision loader uses.

Both have equally many threads; a call decodes a batch. Decoding bounds what a loader can feed, so it is measured alone.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.measure import compare
from benchmarks.rows import Row
from benchmarks.stages import Effort
from benchmarks.stages.plain_data import image_folder
from crossbatch.data import open_source
from crossbatch.data.augment.backends import has_dali
from crossbatch.data.decode import decode


def run(effort: Effort, images: Path | None = None) -> Iterator[Row]:
    """Yield a row for each decoder, of the images in `images` or of generated ones."""
    with image_folder(images, effort.pick(16, 32, 32)) as root:
        source = open_source(root, "train")
        files = [source.read(index) for index in range(min(len(source), 64))]
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(threads)
    cases: dict[str, Callable[[], object]] = {f"PIL, {threads} threads": lambda: list(pool.map(decode, files))}
    for device in ["cpu", *(["mixed"] if torch.cuda.is_available() else [])] if has_dali() else []:
        cases[f"DALI, {device}, {threads} threads"] = _dali(files, device, threads)
    settings = {"images": len(files), "bytes": sum(map(len, files)), "folder": "given" if images else "generated"}
    yield from compare(cases, settings, effort, resident=True)


def _dali(files: list[bytes], device: str, threads: int) -> Callable[[], None]:
    """Return a call that decodes all files in one DALI batch; "mixed" is its name for decoding on the GPU."""
    from crossbatch.data.augment.dali import dali

    @dali.pipeline_def(num_threads=threads, device_id=0 if device == "mixed" else None, prefetch_queue_depth=1)
    def graph():
        data = dali.fn.external_source(name="encoded", dtype=dali.types.UINT8, ndim=1)
        return dali.fn.decoders.image(data, device=device, output_type=dali.types.RGB, adjust_orientation=False)

    pipeline: Any = graph(batch_size=len(files))
    pipeline.build()
    arrays = [np.frombuffer(file, dtype=np.uint8) for file in files]

    def call() -> None:
        pipeline.feed_input("encoded", arrays)
        pipeline.schedule_run()
        pipeline.share_outputs()
        pipeline.release_outputs()

    return call
