"""Connects the trainer and its worker processes by torch's DataLoader, and decides what DataLoader leaves open.

Decided here is how worker processes start, how they end (also after a failure), and what the trainer sees when one dies.
"""

import io
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing import forkserver, resource_tracker
from multiprocessing.reduction import ForkingPickler
from typing import Any, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader

from crossbatch.data.worker_batches import WorkerBatch

Item = TypeVar("Item")

_SHARED_FROM = 2**16  # bytes of an array; smaller ones are not worth a file descriptor


class WorkerPool:
    """Iterates over `dataset[key]` for each key, in order, computed by `workers` processes (0: in this one) until `close`."""

    def __init__(self, dataset: Any, keys: Iterable[Any], workers: int, prefetch: int):
        self._workers, self._keys = workers, _Keys(keys)
        method = start_method() if workers else None
        self._loader = DataLoader(
            _Shared(dataset) if method == "forkserver" else dataset,  # pyright: ignore[reportArgumentType]
            batch_size=None,
            sampler=self._keys,
            num_workers=workers,
            collate_fn=_unchanged,
            worker_init_fn=_start_worker,
            prefetch_factor=prefetch if workers else None,
            persistent_workers=workers > 0,
            multiprocessing_context=method,
            # By default DataLoader takes a number from torch's global random stream, which a resumed run would miss.
            generator=torch.Generator(),
        )
        cv2 = sys.modules.get("cv2")
        threads = cv2.getNumThreads() if cv2 else 0
        if cv2:  # a forked child would wait for ever for its parent's threads, when it ends them
            cv2.setNumThreads(1)
        self._iterator = iter(self._loader)
        if cv2:
            cv2.setNumThreads(threads)

    def restart(self, keys: Iterable[Any]) -> None:
        """Iterate over `dataset[key]` for each of other keys, in the same processes; the keys before must be done."""
        self._keys.now = keys
        self._iterator = iter(self._loader)

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


class _Shared:
    """Stands for a dataset that is sent to several workers, and sends its large arrays as shared memory.

    The names of ImageNet's images take 47 MB. Every worker had a copy of its own.
    """

    def __init__(self, dataset: Any):
        self._dataset = dataset
        self._arrays: list[torch.Tensor] = []

    def __reduce__(self) -> tuple:
        file, buffers = io.BytesIO(), []

        def is_small(buffer: pickle.PickleBuffer) -> bool:
            small = buffer.raw().nbytes < _SHARED_FROM
            if not small:
                buffers.append(buffer.raw())
            return small

        ForkingPickler(file, 5, True, is_small).dump(self._dataset)
        for buffer in buffers[len(self._arrays) :]:  # none for the second worker
            self._arrays.append(torch.empty(buffer.nbytes, dtype=torch.uint8).share_memory_())
            self._arrays[-1].numpy()[:] = np.frombuffer(buffer, dtype=np.uint8)
        return _open_shared, (file.getvalue(), self._arrays)


def _open_shared(pickled: bytes, arrays: list[torch.Tensor]) -> Any:
    """Return the dataset of a `_Shared`, in a worker."""
    return pickle.loads(pickled, buffers=[array.numpy() for array in arrays])


class _Keys:
    """Gives a DataLoader the keys of the next iteration as its sampler."""

    def __init__(self, keys: Iterable[Any]):
        self.now = keys

    def __iter__(self) -> Iterator[Any]:
        return iter(self.now)


def prefetched(
    items: Iterator[Item], bring: Callable[[Item], Item], device: torch.device
) -> Generator[Item, None, None]:
    """Yield `bring(item)` of each item, computed in a thread two items ahead; an error comes out where the item would.

    `bring` moves an item to `device`, one item ahead, so that host memory holds the second one. With a GPU the thread works on
    that GPU, on a CUDA stream of its own. The stream of whoever asks for an item waits for what was launched for it (its copy,
    DALI's kernels), and the process does not. Call record_stream on the tensors of an item: their memory belongs to the thread.

    A process that ends without `close` waits for the item that the thread works on: if it did not, the thread would take the
    process down ("terminate called"), and with it the exit code.
    """
    stream, start = None, {}
    if device.type == "cuda":
        stream = torch.cuda.Stream(device)
        # A new thread is on GPU 0, and the ranks of a node would all make a CUDA context there: 0.5 GB each.
        start = {"initializer": torch.cuda.set_device, "initargs": (stream.device,)}

    def compute() -> Item:
        with torch.cuda.stream(stream):  # does nothing for None
            return next(items)

    def deliver(computed: Future[Item]) -> tuple[Item, torch.cuda.Event | None]:
        with torch.cuda.stream(stream):
            item = bring(computed.result())
        if stream is None:
            return item, None
        ready = torch.cuda.Event()
        ready.record(stream)
        return item, ready

    thread = ThreadPoolExecutor(1, thread_name_prefix="batches", **start)
    try:
        delivered = thread.submit(deliver, thread.submit(compute))
        computed = thread.submit(compute)
        while True:
            item, ready = delivered.result()
            delivered, computed = thread.submit(deliver, computed), thread.submit(compute)
            if ready is not None:
                torch.cuda.current_stream(device).wait_event(ready)
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
        # Preloaded, these are imported and held once, by the server, and not by every worker again.
        modules = ["crossbatch.data.worker_batches", "crossbatch.data.augment.opencv", "torchvision.transforms"]
        multiprocessing.get_context("forkserver").set_forkserver_preload(modules)
        _start_servers()
        return "forkserver"
    return "fork"


def _start_servers() -> None:
    """Start multiprocessing's fork server and resource tracker deaf to the signals that a whole process group may get.

    They would die, and the workers with them, while the trainer still needs images for the step that it wants to save.
    """
    signals = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, signals)  # the tracker has unblocked two of them
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _start_worker(worker_id: int) -> None:
    """Set up a worker process: one thread, and signals left to the trainer.

    The workers are the parallelism, so each has one thread (OpenCV has its own). Interrupts are left to the trainer, and so
    is a SIGTERM that the trainer did not send: a preempted job gets it in every process at once, and workers that died
    of it would fail the step that the trainer still wants to save.
    """
    torch.set_num_threads(1)
    if "cv2" in sys.modules:  # if this worker needs it: its dataset names the functions of the backend
        sys.modules["cv2"].setNumThreads(1)
    for left_to_the_trainer in (signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
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
