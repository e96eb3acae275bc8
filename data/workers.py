"""The pipe between the trainer and its worker processes: torch's DataLoader, with what it leaves open settled.

How processes start, how they end (also when something failed), and what the trainer sees when one dies.
"""

import collections
import contextlib
import multiprocessing
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import cv2
import torch
from torch.utils.data import DataLoader

from crossbatch.data import pieces
from crossbatch.data.pieces import Piece


class WorkerPool:
    """`dataset[key]` for each key, in order, computed by `workers` processes (0: in this one)."""

    def __init__(self, dataset: Any, keys: Any, workers: int, prefetch: int):
        self._workers = workers
        loader = DataLoader(
            dataset,
            batch_size=None,
            sampler=keys,
            num_workers=workers,
            collate_fn=pieces.unchanged,
            worker_init_fn=pieces.start_worker,
            prefetch_factor=prefetch if workers else None,
            multiprocessing_context=start_method() if workers else None,
            # By default DataLoader takes a number from torch's global stream, which a resumed run would miss.
            generator=torch.Generator(),
        )
        with _without_threads_of_opencv():
            self._iterator = iter(loader)

    def __iter__(self) -> Iterator[Piece]:
        return self

    def __next__(self) -> Piece:
        try:
            return next(self._iterator)
        except (OSError, EOFError) as error:
            if self._workers:
                # A worker died while handing over a piece, which shows as a broken connection. The kernel reports the
                # death a moment later, and torch raises a RuntimeError that says so out of its signal handler, in here.
                time.sleep(1)
                raise RuntimeError(f"a data worker died or failed: {error!r}") from error
            raise

    def close(self):
        """Stop the workers now. Deleting DataLoader's iterator does it too, but while an exception is handled its
        traceback keeps the iterator alive, and that is just when a run is closed.
        """
        shut_down = getattr(self._iterator, "_shutdown_workers", None)  # none with workers=0
        if shut_down is not None:
            shut_down()


class Prefetcher:
    """What `items` yields, computed by a thread two items ahead of who asks; an error comes out where the item would.

    With a GPU as `device` the thread has a CUDA stream of its own there, so what it launches and waits for holds nobody up.
    A process that ends without `close` waits for the item that the thread works on: torn away, it would take the process
    down with it ("terminate called"), and its exit code.
    """

    def __init__(self, items: Iterator[Any], device: torch.device):
        self._items = items
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._ready = collections.deque(self._thread.submit(self._compute) for _ in range(2))

    def __iter__(self) -> "Prefetcher":
        return self

    def __next__(self) -> Any:
        item = self._ready.popleft().result()
        self._ready.append(self._thread.submit(self._compute))
        return item

    def close(self):
        """Ends the thread when the item that it works on is done."""
        self._thread.shutdown(cancel_futures=True)

    def _compute(self) -> Any:
        with torch.cuda.stream(self._stream):  # does nothing for None
            return next(self._items)


@contextlib.contextmanager
def _without_threads_of_opencv() -> Iterator[None]:
    """A forked child would wait for ever for the threads that its parent's OpenCV has, at the first thing that ends them."""
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        yield
    finally:
        cv2.setNumThreads(threads)


def start_method() -> str:
    """fork where that is safe: workers start in 40 ms and share the source's memory. Else forkserver: 3 to 6 s, once.

    A forked child has the locks of all its parent's threads but none of the threads. CUDA's, NCCL's and gloo's can be
    held at that moment (torch's DistributedDataParallel page warns of the deadlock), and from Python 3.12 on forking
    any process with threads warns.
    """
    communicating = torch.distributed.is_available() and torch.distributed.is_initialized()
    threads = torch.cuda.is_initialized() or communicating or "nvidia.dali" in sys.modules
    if threads or sys.version_info >= (3, 12):
        # Preloaded, torch is imported once, in the server, and not again in every worker.
        multiprocessing.get_context("forkserver").set_forkserver_preload(["crossbatch.data.pieces"])
        return "forkserver"
    return "fork"
