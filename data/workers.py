"""Connects the trainer and its worker processes by torch's DataLoader, and decides what DataLoader leaves open.

Decided here is how worker processes start, how they end (also after a failure), and what the trainer sees when one dies.
"""

import contextlib
import ctypes
import functools
import io
import math
import multiprocessing
import os
import pickle
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing import forkserver, resource_tracker
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader
from torch.utils.data._utils import signal_handling

from crossbatch.data.decode import ImagesLost
from crossbatch.data.worker_batches import WorkerBatch

Item = TypeVar("Item")

WAIT_S = 300.0  # for the next images, before they are given up
AHEAD = 2  # worker batches that each worker makes ahead, at least

_SHARED_FROM = 2**16  # bytes of an array; smaller ones are not worth a file descriptor
_SHARED_MEMORY = Path("/dev/shm")
_LONGEST_FOLDER = 60  # bytes; the path of a socket has 107 at most, and its name 40
_CHECK_S = 0.5  # between two looks at the workers
_CLOSE_S = 5.0  # for what is under way when a loader is closed; as often torch looks at its workers

_given_up: list[Future] = []  # what threads may still wait for

# Says whether somebody has asked for the run to end, so that it should not wait for images any more.
asked_to_stop: list[Callable[[], bool]] = []


class WaitInterrupted(BaseException):
    """Raised by a loader that waits for images when one of `asked_to_stop` says so."""


def is_stuck() -> bool:
    """Return whether a thread waits for images that were given up, so that this process cannot end in the usual way."""
    return any(not future.done() for future in _given_up)


def await_images(
    future: Future[Item],
    wait_s: float,
    check: Callable[[], None] = lambda: None,
    describe: Callable[[], str] = lambda: "",
) -> Item:
    """Return the result of `future`, on which another thread works, while this one stays free to take in signals.

    Args:
        wait_s: how long to wait at most.
        check: is called twice a second, and raises if it is in vain to wait on.
        describe: says what is waited for, for the message.

    Raises ImagesLost when the time is up, and WaitInterrupted.
    """
    end = time.monotonic() + wait_s
    try:
        while not futures.wait([future], timeout=_CHECK_S).done:
            check()
            if any(asked() for asked in asked_to_stop):
                raise WaitInterrupted
            if time.monotonic() >= end:
                raise ImagesLost(
                    f"no images{describe()} came for {wait_s:g} s; look whether the disk answers, or the server, and whether "
                    f"there is a named pipe among the files"
                )
    except BaseException:  # a signal, too
        _given_up.append(future)
        raise
    return future.result()


def check_workers(num_bytes: int, who: str) -> None:
    """Raise ValueError if worker processes cannot pass their images on.

    Args:
        num_bytes: most bytes of images that are in shared memory at a time.
        who: names the workers at the start of the message.
    """
    folder = tempfile.gettempdir()
    if len(os.fsencode(folder)) > _LONGEST_FOLDER:
        raise ValueError(
            f"{who} talk to the trainer by sockets in the folder for temporary files, but the path of {folder} is too long for "
            f"that; set TMPDIR to a path of at most {_LONGEST_FOLDER} bytes, such as /tmp"
        )
    if not _SHARED_MEMORY.is_dir():
        return  # macOS
    disk = shutil.disk_usage(_SHARED_MEMORY)
    if num_bytes > disk.free:
        raise ValueError(
            f"{who} hold up to {_mib(num_bytes)} of images in {_SHARED_MEMORY}, where {_mib(disk.free)} of {_mib(disk.total)} "
            f"are free; use fewer workers, or start docker with --shm-size={-(-num_bytes // 2**30) + 1}g"
        )


def _mib(num_bytes: int) -> str:
    return f"{-(-num_bytes // 2**20)} MiB"


class WorkerPool:
    """Iterates over `dataset[key]` for each key, in order, until `close`.

    Args:
        dataset: makes an item of a key; `dataset.describe(key)` names it.
        workers: processes that make items; 0: a thread of this one.
        prefetch: items that each worker makes ahead.
        wait_s: how long to wait for an item at most.
    """

    def __init__(self, dataset: Any, keys: Iterable[Any], workers: int, prefetch: int, wait_s: float = WAIT_S):
        self._dataset, self._workers, self._keys, self._wait_s = dataset, workers, _Keys(keys), wait_s
        method = start_method() if workers else None
        self._loader = DataLoader(
            _Shared(dataset) if method == "forkserver" else dataset,  # pyright: ignore[reportArgumentType]
            batch_size=None,
            sampler=self._keys,
            num_workers=workers,
            collate_fn=_in_shared_memory
            if workers
            else lambda batch: batch,  # DataLoader would make tensors of its arrays
            worker_init_fn=functools.partial(_start_worker, dict(os.environ)),
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
        try:
            self._iterator: Any = iter(self._loader)
        except RuntimeError as error:
            raise _lost(error) from error
        finally:
            if cv2:
                cv2.setNumThreads(threads)
        if workers:
            # torch would raise the death of a worker from a signal handler, in the middle of an update, too.
            signal_handling._remove_worker_pids(id(self._iterator))
            self._iterator._worker_pids_set = False
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="images")
        self._asking = threading.Lock()  # for the next item, which must not begin after `close` has
        self._next: Future[Any] = Future()
        self._next.cancel()

    def restart(self, keys: Iterable[Any]) -> None:
        """Iterate over `dataset[key]` for each of other keys, in the same processes; the keys before must be done."""
        self._keys.now = keys
        self._iterator = iter(self._loader)

    def __iter__(self) -> Iterator[WorkerBatch]:
        return self

    def __next__(self) -> WorkerBatch:
        with self._asking:
            self._next = self._thread.submit(next, self._iterator, None)
        try:
            item = await_images(self._next, self._wait_s, self._check_workers, self._describe)
        except (OSError, EOFError, RuntimeError) as error:
            if not self._workers or isinstance(error, ImagesLost):
                raise
            # A worker died while it handed over its result, which shows as a broken connection a moment before its death.
            time.sleep(1)
            self._check_workers()
            raise _lost(error) from error
        if item is None:
            raise StopIteration
        if isinstance(item, ImagesLost):
            raise item
        if self._keys.given:
            self._keys.given.popleft()
        return item

    def close(self) -> None:
        """Stop the workers now; those that do not answer are ended.

        Deleting DataLoader's iterator stops workers too, but while an exception is handled its traceback keeps the iterator
        alive, and that is just when a run is closed.
        """
        with self._asking:  # a thread that asks later would wait for ever for workers that were stopped
            self._thread.shutdown(wait=False, cancel_futures=True)
        workers = getattr(self._iterator, "_workers", [])  # none with workers=0
        if self._is_waiting(0.0 if self._next in _given_up else _CLOSE_S):
            for worker in workers:
                worker.terminate()
            if self._is_waiting(_CLOSE_S + _CHECK_S):
                _given_up.append(self._next)
        if workers:
            self._iterator._shutdown_workers()
        if any(worker.is_alive() for worker in workers):  # not even SIGKILL ends one that waits for a dead disk
            _given_up.append(Future())

    def _is_waiting(self, wait_s: float) -> bool:
        """Return whether the thread still waits for an item after some seconds."""
        return not self._next.done() and bool(futures.wait([self._next], wait_s).not_done)

    def _check_workers(self) -> None:
        """Raise ImagesLost if a worker has died."""
        for worker in getattr(self._iterator, "_workers", []):
            if worker.is_alive():
                continue
            if worker.exitcode == -signal.SIGBUS:
                raise ImagesLost(_FULL)
            why = f"ended with exit code {worker.exitcode}"
            if worker.exitcode == -signal.SIGKILL:
                why = "was killed, as the kernel does when memory runs out"
            raise ImagesLost(
                f"data worker {worker.pid} {why}; use fewer workers than {self._workers}, or give the job more memory"
            )

    def _describe(self) -> str:
        """Return from which image on the next item is made."""
        return f" from {self._dataset.describe(self._keys.given[0])} on" if self._keys.given else ""


_FULL = f"{_SHARED_MEMORY} is full; start docker with a larger --shm-size, or use fewer workers"


def _lost(error: Exception) -> Exception:
    """Return `error` as ImagesLost if torch raised it for want of shared memory or of open files; any other as it is."""
    text = str(error)
    if "shared memory" in text or ("torch_" in text and "No space left" in text):
        return ImagesLost(_FULL)
    if "Too many open files" in text:
        return ImagesLost("too many open files; raise the limit (ulimit -n), or use fewer workers")
    return error


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
    """Gives a DataLoader the keys of the next iteration as its sampler; `given` are those whose items have not come back."""

    def __init__(self, keys: Iterable[Any]):
        self.now = keys
        self.given: deque[Any] = deque()

    def __iter__(self) -> Iterator[Any]:
        self.given.clear()
        for key in self.now:
            self.given.append(key)
            yield key


def prefetched(
    items: Iterator[Item], bring: Callable[[Item], Item], device: torch.device, wait_s: float = math.inf
) -> Generator[Item, None, None]:
    """Yield `bring(item)` of each item, computed in a thread two items ahead; an error comes out where the item would.

    `bring` moves an item to `device`, one item ahead, so that host memory holds the second one. With a GPU the thread works on
    that GPU, on a CUDA stream of its own. The stream of whoever asks for an item waits for what was launched for it (its copy,
    DALI's kernels), and the process does not. Call record_stream on the tensors of an item: their memory belongs to the thread.

    ImagesLost is raised when an item has not come for `wait_s`.

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
    # In this order in the thread: `first` is computed and delivered, then `second` is computed.
    first = thread.submit(compute)
    delivered, second = thread.submit(deliver, first), thread.submit(compute)
    try:
        while True:
            item, ready = await_images(delivered, wait_s)
            first = second
            delivered, second = thread.submit(deliver, first), thread.submit(compute)
            if ready is not None:
                torch.cuda.current_stream(device).wait_event(ready)
            yield item
    finally:
        thread.shutdown(wait=False, cancel_futures=True)
        under_way: list[Future[Any]] = [future for future in (first, delivered, second) if not future.done()]
        _given_up.extend(futures.wait(under_way, _CLOSE_S).not_done)


def start_method() -> str:
    """Return fork where that is safe: workers start in 40 ms and share the source's memory. Else forkserver: 3 to 6 s, once.

    A forked child has the locks of all its parent's threads but none of the threads. CUDA's, NCCL's and gloo's can be
    held at that moment (torch's DistributedDataParallel page warns of the deadlock), and from Python 3.12 on forking
    any process with threads warns. fsspec's thread reads remote shards.
    """
    communicating = torch.distributed.is_available() and torch.distributed.is_initialized()
    threads = torch.cuda.is_initialized() or communicating or "nvidia.dali" in sys.modules
    threads |= any(thread.name == "fsspecIO" for thread in threading.enumerate())
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


def keep_freed_memory() -> None:
    """Let glibc reuse large freed blocks instead of returning them to the kernel after every operator.

    Otherwise each activation, and each image that a worker decodes, is mapped and page-faulted anew: a step of a ResNet-18 of
    width 16 on 256 images of 32 px then takes 2.15 s instead of 1.61 s on two cores.
    """
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)  # M_MMAP_MAX
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def _start_worker(environment: dict[str, str], worker_id: int) -> None:
    """Set up a worker process: the trainer's environment, one thread, and signals left to the trainer.

    Under forkserver a worker has the environment of the time at which the server started: credentials that a program has set
    since then would be missing.

    The workers are the parallelism, so each has one thread (OpenCV has its own). Interrupts are left to the trainer, and so
    is a SIGTERM that the trainer did not send: a preempted job gets it in every process at once, and workers that died
    of it would fail the step that the trainer still wants to save.
    """
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    keep_freed_memory()
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


def _in_shared_memory(batch: Any) -> Any:
    """Move the views of a worker batch to shared memory, or return what to raise in the trainer.

    Passing the batch on would do it, too, but in a thread, where an error gets lost.
    """
    try:
        if isinstance(views := getattr(batch, "views", None), torch.Tensor):
            views.share_memory_()
    except RuntimeError as error:
        lost = _lost(error)
        if isinstance(lost, ImagesLost):
            return lost
        raise
    return batch
