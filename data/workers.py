"""Connects the trainer and its worker processes: torch's DataLoader, with what it leaves open decided.

Decided here is how worker processes start, how they end (also after a failure), and what the trainer sees when one dies.
"""

import collections
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch.utils.data import DataLoader

from crossbatch.data.worker_batches import WorkerBatch


class WorkerPool:
    """Iterates over `dataset[key]` for each key, in order, computed by `workers` processes (0: in this one)."""

    def __init__(self, dataset: Any, keys: Any, workers: int, prefetch: int):
        self._workers = workers
        loader = DataLoader(
            dataset,
            batch_size=None,
            sampler=keys,
            num_workers=workers,
            collate_fn=_unchanged,
            worker_init_fn=_start_worker,
            prefetch_factor=prefetch if workers else None,
            multiprocessing_context=start_method() if workers else None,
            # By default DataLoader takes a number from torch's global random stream, which a resumed run would miss.
            generator=torch.Generator(),
        )
        cv2 = sys.modules.get("cv2")
        threads = cv2.getNumThreads() if cv2 else 0
        if cv2:  # a forked child would wait for ever for its parent's threads, when it ends them
            cv2.setNumThreads(1)
        self._iterator = iter(loader)
        if cv2:
            cv2.setNumThreads(threads)

    def __iter__(self) -> Iterator[WorkerBatch]:
        return self

    def __next__(self) -> WorkerBatch:
        try:
            return next(self._iterator)
        except (OSError, EOFError) as error:
            if not self._workers:
                raise
            # A worker died while it handed over its result, which shows as a broken connection. The kernel reports the
            # death a moment later, and torch raises a RuntimeError that says so from its signal handler, in here.
            time.sleep(1)
            raise RuntimeError(f"a data worker died or failed: {error!r}") from error

    def close(self) -> None:
        """Stop the workers now.

        Deleting DataLoader's iterator does it too, but while an exception is handled its traceback keeps the iterator
        alive, and that is just when a run is closed.
        """
        shut_down = getattr(self._iterator, "_shutdown_workers", None)  # none with workers=0
        if shut_down is not None:
            shut_down()


def prefetched(items: Iterator[Any], device: torch.device) -> Generator[Any, None, None]:
    """Yield what `items` yields, computed in a thread two items ahead; an error comes out where the item would.

    With a GPU as `device` the thread has a CUDA stream of its own there, so that nothing waits for what it launches. A process
    that ends without `close` waits for the item that the thread works on: if it did not, the thread would take the process down
    ("terminate called"), and with it the exit code.
    """
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def compute() -> Any:
        with torch.cuda.stream(stream):  # does nothing for None
            return next(items)

    thread = ThreadPoolExecutor(1, thread_name_prefix="batches")
    try:
        ready = collections.deque(thread.submit(compute) for _ in range(2))
        while True:
            item = ready.popleft().result()
            ready.append(thread.submit(compute))
            yield item
    finally:
        thread.shutdown(cancel_futures=True)


def start_method() -> str:
    """Return fork where that is safe: workers start in 40 ms and share the source's memory. Else forkserver: 3 to 6 s, once.

    A forked child has the locks of all its parent's threads but none of the threads. CUDA's, NCCL's and gloo's can be
    held at that moment (torch's DistributedDataParallel page warns of the deadlock), and from Python 3.12 on forking
    any process with threads warns.
    """
    communicating = torch.distributed.is_available() and torch.distributed.is_initialized()
    threads = torch.cuda.is_initialized() or communicating or "nvidia.dali" in sys.modules
    if threads or sys.version_info >= (3, 12):
        # Preloaded, torch and OpenCV are imported once, in the server, and not again in every worker.
        modules = ["crossbatch.data.worker_batches", "crossbatch.data.augment.opencv"]
        multiprocessing.get_context("forkserver").set_forkserver_preload(modules)
        return "forkserver"
    return "fork"


def _start_worker(worker_id: int) -> None:
    """Set up a worker process: one thread, and signals left to the trainer.

    The workers are the parallelism, so each has one thread (OpenCV has its own). Interrupts are left to the trainer, and so
    is a SIGTERM that the trainer did not send: a preempted job gets it in every process at once, and workers that died
    of it would fail the step that the trainer still wants to save.
    """
    torch.set_num_threads(1)
    if "cv2" in sys.modules:  # if this worker needs it: its dataset names the functions of the backend
        sys.modules["cv2"].setNumThreads(1)
    for left_to_the_trainer in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(left_to_the_trainer, signal.SIG_IGN)
    if hasattr(signal, "sigtimedwait"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # in the thread started here, too
    threading.Thread(target=_end_with, args=(multiprocessing.parent_process(),), daemon=True).start()


def _end_with(trainer: Any) -> None:
    """End this worker at a SIGTERM from the trainer, or when the trainer has ended in any way, SIGKILL included.

    DataLoader's workers watch their parent process, but under forkserver that is the server, which lives for as long as its
    workers do. And a trainer that fails without closing its loader terminates its workers at exit and waits for them.
    """
    while trainer.is_alive():
        if not hasattr(signal, "sigtimedwait"):
            trainer.join()
        elif (received := signal.sigtimedwait({signal.SIGTERM}, 1)) is not None and received.si_pid == trainer.pid:
            break
    os._exit(0)


def _unchanged(batch: Any) -> Any:
    """Return a worker batch as it is; DataLoader would convert its arrays to tensors."""
    return batch
