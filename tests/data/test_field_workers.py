"""Waits for images: a full /dev/shm, a dead worker, a disk that does not answer, and what is checked before the start."""

import itertools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import namedtuple
from concurrent import futures
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

import pytest
import torch
from PIL import Image
from torchvision.transforms import functional

from crossbatch.data import ImagesLost, TrainLoader, WaitInterrupted, check_workers, workers
from crossbatch.data.augment.pil import evaluation_image
from crossbatch.data.sources.synthetic import Synthetic
from crossbatch.data.worker_batches import WorkerBatch

ON_A_SMALL_SHM = """
import sys
from crossbatch.data import ImagesLost, TrainLoader, workers
from crossbatch.data.sources.synthetic import Synthetic
workers.start_method = lambda: sys.argv[1]
if __name__ == "__main__":
    with TrainLoader(Synthetic(256, 8), 128, 64, workers=2, wait_s=60) as loader:
        try:
            for batch in loader.epoch(0):
                pass
        except ImagesLost as error:
            print(error)
"""


@pytest.mark.long
@pytest.mark.parametrize("method", ["fork", pytest.param("forkserver", marks=pytest.mark.slow)])
def test_field_a_full_shared_memory(tmp_path, method):
    """A worker batch of 64 images takes 1.5 MiB, and 2 MiB are there."""
    if not shutil.which("unshare"):
        pytest.skip("needs unshare, for a /dev/shm of its own")
    (tmp_path / "script.py").write_text(ON_A_SMALL_SHM)
    command = 'mount -t tmpfs -o size=2m tmpfs /dev/shm || exit 77; exec "$@"'
    script = [sys.executable, str(tmp_path / "script.py"), method]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", command, "sh", *script],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    if "unshare" in done.stderr or done.returncode == 77:
        pytest.skip(f"needs the right to mount in a namespace of its own: {done.stderr.strip()}")
    said = "/dev/shm is full; start docker with a larger --shm-size, or use fewer workers\n"
    assert (done.stdout, done.returncode) == (said, 0), done.stderr


Disk = namedtuple("Disk", "total used free")


def test_field_shared_memory_is_checked_before_the_start(monkeypatch):
    """Docker's 64 MiB, and the batch of the issue: 4 workers, 256 images of 224 px in two views."""
    loader = TrainLoader(Synthetic(512, 8), 256, 224, workers=4, backend="torchvision")
    assert loader.shared_bytes == 4 * 3 * 64 * 2 * 3 * 224**2
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Disk(2**26, 0, 2**26))
    with pytest.raises(
        ValueError, match=r"hold up to 221 MiB of images in /dev/shm, where 64 MiB of 64 MiB are free"
    ) as told:
        check_workers(loader.shared_bytes, "the data workers of this node")
    assert "use fewer workers, or start docker with --shm-size=2g" in str(told.value)
    check_workers(2**26, "")


def test_field_a_long_tmpdir_is_refused(monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", f"/tmp/{'x' * 150}")
    with pytest.raises(ValueError, match="set TMPDIR to a path of at most 60 bytes, such as /tmp"):
        check_workers(1, "the data workers of this node")


class Slow:
    """A dataset whose item k is ready when `go` is set; `describe` as the real ones."""

    def __init__(self):
        self.go = threading.Event()

    def describe(self, key: int) -> str:
        return f"image {key}"

    def __getitem__(self, key: int) -> WorkerBatch:
        self.go.wait()
        return WorkerBatch(torch.zeros(1), torch.zeros(1).numpy(), [])


@pytest.fixture
def pool():
    """In a thread of this process, and with a limit."""
    pool: Any = workers.WorkerPool(Slow(), range(3), 0, 2, wait_s=0.1)
    yield pool
    pool._dataset.go.set()
    pool.close()
    workers._given_up.clear()


def test_field_a_wait_has_a_limit_and_names_the_image(pool):
    with pytest.raises(ImagesLost, match=r"no images from image 0 on came for 0\.1 s; look whether the disk answers"):
        next(pool)
    assert workers.is_stuck()  # the process has to leave without that thread
    pool._dataset.go.set()
    pool._next.result(timeout=10)
    assert not workers.is_stuck()


def test_field_a_wait_ends_when_somebody_asks_to_stop(pool, monkeypatch):
    pool._wait_s = 60
    monkeypatch.setattr(workers, "asked_to_stop", [lambda: True])
    with pytest.raises(WaitInterrupted):
        next(pool)


def test_field_a_signal_is_taken_in_while_images_do_not_come(pool):
    """Also in the way of a command that has no handler of its own: as KeyboardInterrupt."""
    pool._wait_s = 60
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        next(pool)


@pytest.mark.long
def test_field_a_prefetched_batch_has_a_limit_too():
    """As with DALI, whose threads read."""
    go = threading.Event()
    item: Any = go.wait
    batches = workers.prefetched(iter([item]), lambda wait: wait(), torch.device("cpu"), wait_s=0.1)
    with pytest.raises(ImagesLost, match=r"came for 0\.1 s"):
        next(batches)
    go.set()
    assert all(future.result(timeout=10) is not None for future in workers._given_up if not future.cancelled())
    workers._given_up.clear()


class Steady(Slow):
    """A dataset whose items take 20 ms each."""

    def __getitem__(self, key: int) -> WorkerBatch:
        time.sleep(0.02)
        return WorkerBatch(torch.zeros(1), torch.zeros(1).numpy(), [])


def test_field_a_pool_that_is_closed_asks_its_workers_for_nothing_more(monkeypatch):
    """A thread that went on would wait for ever for workers that were stopped, and the process could not end."""
    monkeypatch.setattr(workers, "start_method", lambda: "fork")
    pool: Any = workers.WorkerPool(Steady(), itertools.count(), 1, 2, wait_s=60)
    items, meanwhile = [], []

    def read() -> None:
        with suppress(ImagesLost, RuntimeError):
            items.extend(pool)

    def shut_down(stop=pool._iterator._shutdown_workers) -> None:
        before = len(items)
        time.sleep(0.5)
        meanwhile.append(len(items) - before)
        stop()

    monkeypatch.setattr(pool._iterator, "_shutdown_workers", shut_down)
    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    while len(items) < 3:
        time.sleep(0.01)
    pool.close()
    assert meanwhile[0] <= 1  # the item that was under way
    reader.join(20)
    assert not reader.is_alive()
    assert futures.wait([pool._next], 20).done


def test_field_closing_waits_for_the_batch_that_a_thread_is_at():
    begun, ended = [], []

    def slow():
        for number in itertools.count():
            begun.append(number)
            time.sleep(0.2)
            ended.append(number)
            yield number

    batches = workers.prefetched(slow(), lambda item: item, torch.device("cpu"))
    assert next(batches) == 0
    while len(begun) == 1:
        time.sleep(0.01)
    batches.close()
    assert begun == ended
    assert not workers.is_stuck()


@pytest.mark.parametrize(
    ("number", "said"),
    [pytest.param(signal.SIGKILL, "was killed", marks=pytest.mark.slow), (signal.SIGBUS, "/dev/shm is full")],
)
def test_field_a_worker_that_dies_is_named_and_the_others_end(monkeypatch, number, said):
    monkeypatch.setattr(workers, "start_method", lambda: "fork")
    pool: Any = workers.WorkerPool(Slow(), range(9), 2, 2, wait_s=60)
    processes = list(pool._iterator._workers)
    handler = signal.getsignal(signal.SIGCHLD)
    os.kill(processes[1].pid, number)
    end = time.monotonic() + 10
    while processes[1].is_alive():  # and no signal handler of torch raises here, as it could in the middle of an update
        assert time.monotonic() < end
        time.sleep(0.01)
    with pytest.raises(ImagesLost, match=said):
        next(pool)
    began = time.monotonic()
    pool.close()
    assert not any(process.is_alive() for process in processes) and time.monotonic() - began < 40
    assert not workers.is_stuck() or isinstance(workers._given_up[-1], Future)
    workers._given_up.clear()
    signal.signal(signal.SIGCHLD, handler)


@pytest.mark.parametrize("size", [(1, 30000), (30000, 1), (3, 4000)])
def test_field_a_long_and_narrow_image_is_evaluated(monkeypatch, size):
    """1 x 30000 would be resized to 256 x 7.7 million pixels, which takes half a minute and gigabytes."""
    resize = functional.resize

    def small(image, to, *how):
        assert to[0] * to[1] <= 16 * 256**2
        return resize(image, to, *how)

    monkeypatch.setattr(functional, "resize", small)
    view = evaluation_image(Image.new("RGB", size, (200, 10, 30)), 224)
    assert view.shape == (3, 224, 224) and view.float().mean((1, 2)).tolist() == [200, 10, 30]
