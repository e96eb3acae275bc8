"""Tests loader.py: the same batches from any position with any number of workers, and what happens when things break."""

import multiprocessing
import os
import platform
import resource
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchvision.datasets import FakeData

from crossbatch.data import workers as stream
from crossbatch.data.augment.parameters import draw_parameters, moco_v3_augmentations
from crossbatch.data.augment.pil import augment, evaluation_image
from crossbatch.data.decode import BrokenImage, encode_bmp
from crossbatch.data.loader import Batch, EvaluationLoader, SkipLimitExceeded, TrainLoader
from crossbatch.data.sampler import GlobalBatchSampler
from crossbatch.data.sources import open_source
from crossbatch.data.sources.shard_writer import write_shards
from crossbatch.data.sources.synthetic import Synthetic
from crossbatch.data.worker_batches import EvaluationDataset, WorkerBatch, split_for_workers
from tests.fake_cuda import FakeCuda, OnGpu

AUGMENTATIONS = moco_v3_augmentations(8, 0.2)


class Damaged(Synthetic):
    """Holds synthetic images, some of which raise as damaged files do."""

    def __init__(self, count: int, broken: dict[int, Exception], size: int = 12):
        super().__init__(count, size)
        self.broken = broken

    def open(self, index: int):
        if index in self.broken:
            raise self.broken[index]
        return super().open(index)


class Deadly(Synthetic):
    """Holds an image 40 that kills the process that opens it, as the kernel does when memory runs out."""

    def open(self, index: int):
        if index == 40:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().open(index)


class Private(Synthetic):
    """Opens its images only for whoever has the password."""

    def open(self, index: int):
        if os.environ.get("PASSWORD_OF_IMAGES") != "swordfish":
            raise OSError("who are you?")
        return super().open(index)


def assert_same(a: list[Batch], b: list[Batch]):
    assert len(a) == len(b)
    for one, other in zip(a, b, strict=True):
        assert np.array_equal(one.indices, other.indices) and torch.equal(one.views, other.views)
        assert one.labels is not None and other.labels is not None and torch.equal(one.labels, other.labels)
        assert one.skipped == other.skipped


def make(workers: int = 0, source=None, batch: int = 24, world_size: int = 1, rank: int = 0, **options) -> TrainLoader:
    source = source or Synthetic(100, 12)
    sampler = GlobalBatchSampler(5, len(source), batch, world_size, rank)
    options = {"backend": "torchvision", **options}
    return TrainLoader(source, sampler=sampler, augmentations=AUGMENTATIONS, seed=9, workers=workers, **options)


def children() -> set[int]:
    """Return this process's children, without the ranks that other tests share (`RankPool`)."""
    found = multiprocessing.active_children()
    return {process.pid for process in found if process.pid and not process.name.startswith("rank ")}


@pytest.fixture(scope="module")
def two_epochs() -> list[Batch]:
    """Return epochs 0 and 1 of `make()`, four batches each, read in this process."""
    reference = make()
    return [*reference.epoch(0), *reference.epoch(1)]


def test_a_batch_is_what_order_and_recipe_say(two_epochs):
    batch, source = two_epochs[6], Synthetic(100, 12)
    assert np.array_equal(batch.indices, GlobalBatchSampler(5, 100, 24).batch(1, 2)) and batch.indices.dtype == np.int64
    assert batch.views.shape == (2, 24, 3, 8, 8) and batch.views.dtype == torch.uint8 and batch.skipped == []
    for view in range(2):
        p = draw_parameters(AUGMENTATIONS[view], 9, 1, batch.indices, view, np.full(24, 12), np.full(24, 12))
        for row, index in enumerate(batch.indices):
            expected = augment(np.asarray(source.open(int(index))), p, row, 8)
            assert np.array_equal(batch.views[view, row].permute(1, 2, 0).numpy(), expected)


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_from_every_position(workers, two_epochs):
    resumed = make(workers)
    for epoch, start_step in [(0, 0), (0, 3), (1, 1), (1, 4)]:
        assert_same(list(resumed.epoch(epoch, start_step)), two_epochs[4 * epoch + start_step : 4 * epoch + 4])
    resumed.close()


def test_workers_live_across_epochs_and_end_with_close(two_epochs):
    with_workers = make(2)
    batches = list(with_workers.epoch(0))
    first = children()
    batches += with_workers.epoch(1)
    assert len(first) >= 2 and children() == first
    assert_same(batches, two_epochs)
    with_workers.close()
    assert not children()


def test_an_abandoned_epoch_can_be_taken_up_again(two_epochs):
    twice = make()
    next(twice.epoch(0))
    assert_same(list(twice.epoch(0, 1)), two_epochs[1:4])
    assert_same([next(twice.epoch(0, 1)), *twice.epoch(0, 2)], two_epochs[1:4])


def test_ranks_read_the_global_batch_between_them(two_epochs):
    left, right = (list(make(world_size=2, rank=rank).epoch(0)) for rank in range(2))
    for whole, a, b in zip(two_epochs[:4], left, right, strict=True):
        assert torch.equal(whole.views, torch.cat([a.views, b.views], dim=1))


@pytest.mark.parametrize(("images", "workers"), [(1, 0), (64, 0), (65, 0), (256, 8), (4096, 16), (24, 8), (100, 3)])
def test_worker_batches(images, workers):
    indices = np.arange(images)
    parts = split_for_workers(indices, workers)
    assert np.array_equal(np.concatenate(parts), indices)
    assert max(len(part) for part in parts) <= 64
    assert len(parts) >= min(max(workers, 1), images // 8)  # no worker idles unless worker batches would get tiny


def test_the_global_random_stream_is_left_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    next(make().epoch(0))
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_images_are_replaced_by_the_next(workers):
    broken = {7: OSError("disk"), 8: BrokenImage("truncated"), 99: FileNotFoundError("gone")}
    whole, damaged = Synthetic(100, 12), make(workers, Damaged(100, broken), batch=50, max_skipped_fraction=0.1)
    seen, skipped = {}, []
    for step, batch in enumerate(damaged.epoch(0)):
        skipped += batch.skipped
        for row, index in enumerate(damaged.sampler.batch(0, step)):
            seen[int(index)] = (batch, row)
    damaged.close()
    assert sorted(skipped) == sorted(whole.name(index) for index in (7, 8, 8, 99))  # 7 meets 8 on the way to 9
    assert damaged.images_skipped == 4 and damaged.images_read == 100
    for index, replacement in ((7, 9), (8, 9), (99, 0), (20, 20)):
        batch, row = seen[index]
        assert batch.indices[row] == replacement and batch.indices.dtype == np.int64
        side = np.array([12])
        p = draw_parameters(AUGMENTATIONS[0], 9, 0, np.array([index]), 0, side, side)  # its own augmentation
        expected = augment(np.asarray(whole.open(replacement)), p, 0, 8)
        assert np.array_equal(batch.views[0, row].permute(1, 2, 0).numpy(), expected), index


def test_too_many_broken_images_stop_the_run():
    damaged = make(
        0, Damaged(100, {index: OSError(f"cut at {index}") for index in (3, 50, 70)}), max_skipped_fraction=0.01
    )
    with pytest.raises(
        SkipLimitExceeded,
        match=r"[23] of 96 images were broken.*the 1 that max_skipped_fraction .=0.01. allows.*cut at",
    ):
        for epoch in range(2):
            list(damaged.epoch(epoch))


def test_the_limit_waits_for_an_epoch():
    """Two broken images in the first batch of 24 are too many at 2 %; in the epoch of 96 they are not."""
    first = [int(index) for index in GlobalBatchSampler(5, 100, 24).batch(0, 0)[:2]]
    damaged = make(0, Damaged(100, dict.fromkeys(first, OSError("cut"))), max_skipped_fraction=0.02)
    batches = list(damaged.epoch(0))
    assert len(batches) == 4 and batches[0].skipped == [Synthetic(100).name(index) for index in first]


def test_one_broken_image_does_not_stop_a_small_run_unless_none_may_be():
    damaged = make(0, Damaged(24, {3: OSError("cut")}))
    for epoch in range(6):
        list(damaged.epoch(epoch))
    assert damaged.images_skipped == 6
    with pytest.raises(SkipLimitExceeded, match="1 of 24 images were broken, more than the 0"):
        list(make(0, Damaged(24, {3: OSError("cut")}), max_skipped_fraction=0.0).epoch(0))


def test_a_run_of_broken_images_stops_the_run():
    damaged = make(0, Damaged(100, dict.fromkeys(range(100), OSError("gone"))))
    with pytest.raises(SkipLimitExceeded, match=r"no readable image.*gone"):
        next(damaged.epoch(0))


@pytest.mark.parametrize("error", [ZeroDivisionError(), ValueError("of the program")])
def test_a_programming_error_is_not_a_broken_image(error):
    with pytest.raises(type(error)):
        next(make(0, Damaged(24, {3: error})).epoch(0))
    with pytest.raises(type(error)):
        source = Damaged(4, {3: error})
        list(EvaluationLoader(EvaluationDataset([source], 16), batch_size=2, workers=0).read(source, np.arange(4)))


def test_a_dying_worker_is_an_error_not_a_hang():
    dying, start = make(2, Deadly(100, 12)), time.monotonic()
    try:
        for epoch in range(3):
            list(dying.epoch(epoch))
    except RuntimeError as error:
        assert "worker" in str(error) and time.monotonic() - start < 20
        dying.close()  # while the traceback still holds the iterator
        assert not children()
    else:
        pytest.fail("the death of a worker went unnoticed")


class Hungry:
    """Tells how many pages a worker is given by the kernel while it uses 40 MB, a photograph, four times."""

    def __getitem__(self, key: int) -> WorkerBatch:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(4):
            np.ones(40 * 2**20, dtype=np.uint8)
        return WorkerBatch(None, np.array([resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before]), [])


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told to keep freed memory")
def test_a_worker_keeps_the_memory_of_an_image_for_the_next():
    pool = stream.WorkerPool(Hungry(), iter(range(2)), 1, 1)
    try:
        first, second = (int(batch.indices[0]) for batch in pool)
    finally:
        pool.close()
    assert second < first / 4


def send_as_another_process(signals: list[int]):
    for number in signals:
        subprocess.run(["kill", f"-{number}", *map(str, children())], check=True)


def test_workers_survive_the_signals_of_a_preemption(two_epochs):
    preempted = make(2)
    batches = preempted.epoch(0)
    got = [next(batches)]
    send_as_another_process([signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
    assert_same(got + list(batches), two_epochs[:4])
    preempted.close()


UNCLOSED = """
from crossbatch.data import *

source = open_source("synthetic://64?size=12", "train")
loader = TrainLoader(source, batch_size=16, image_size=8, workers=2)
for batch in loader.epoch(0):
    raise ZeroDivisionError
"""


@pytest.mark.long
def test_a_trainer_that_fails_without_closing_ends_all_the_same():
    failed = subprocess.run([sys.executable, "-c", UNCLOSED], timeout=40, capture_output=True, text=True)
    assert failed.returncode == 1 and failed.stderr.endswith("ZeroDivisionError\n")


KILLED = """
import multiprocessing, os, signal
from crossbatch.data import *
from crossbatch.data import workers as stream

if __name__ == "__main__":
    stream.start_method = lambda: "{method}"
    source = open_source("synthetic://64?size=12", "train")
    loader = TrainLoader(source, batch_size=16, image_size=8, workers=1)
    next(loader.epoch(0))
    print(*(process.pid for process in multiprocessing.active_children()), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.long
@pytest.mark.parametrize("method", [pytest.param("fork", marks=pytest.mark.slow), "forkserver"])
def test_no_worker_outlives_a_killed_trainer(tmp_path, method):
    script = tmp_path / "trainer.py"  # forkserver imports the main module again
    script.write_text(KILLED.format(method=method))
    killed = subprocess.run([sys.executable, str(script)], timeout=60, stdout=subprocess.PIPE, text=True)
    assert killed.returncode == -signal.SIGKILL
    workers, deadline = [int(pid) for pid in killed.stdout.split()], time.monotonic() + 20
    assert workers
    while time.monotonic() < deadline and any(alive(pid) for pid in workers):
        time.sleep(0.1)
    assert not any(alive(pid) for pid in workers)


def alive(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


AFTER_OPENCV = """
import cv2, numpy
from crossbatch.data import *

cv2.setNumThreads(2)
cv2.GaussianBlur(numpy.zeros((2000, 2000, 3), numpy.uint8), (31, 31), 5)  # starts OpenCV's threads
source = open_source("synthetic://64?size=12", "train")
loader = TrainLoader(source, batch_size=16, image_size=8, workers=2, backend="opencv")
next(loader.epoch(0))
loader.close()
print(cv2.getNumThreads())
"""


@pytest.mark.long
def test_workers_of_a_trainer_that_uses_opencv():
    done = subprocess.run([sys.executable, "-c", AFTER_OPENCV], timeout=60, stdout=subprocess.PIPE, text=True)
    assert (done.returncode, done.stdout) == (0, "2\n")


def test_forkserver_workers_give_the_same(two_epochs, monkeypatch):
    monkeypatch.setattr(stream, "start_method", lambda: "forkserver")
    served = make(1)
    assert_same([next(served.epoch(0))], two_epochs[:1])
    served.close()
    monkeypatch.setenv("PASSWORD_OF_IMAGES", "swordfish")  # while the server runs that starts the workers
    served = make(1, Private(100, 12))
    assert_same([next(served.epoch(0))], two_epochs[:1])
    served.close()


@pytest.fixture
def cuda(monkeypatch) -> FakeCuda:
    return FakeCuda(monkeypatch)


def test_batches_reach_a_gpu_on_a_stream_of_their_own(two_epochs, cuda):
    """The thread is on this rank's GPU, a copy waits for no step, and a step for the copy of its own batch alone."""
    loader, batches = make(1, device="cuda:3"), []
    for step, batch in enumerate(loader.epoch(0)):
        assert [f"to GPU {number}" in cuda.compute.seen for number in range(4)] == [
            number <= step for number in range(4)
        ]
        assert (batch.views.data_ptr(), "compute") in OnGpu.recorded
        cuda.launch(f"step {step}")
        batches.append(batch)
    loader.close()
    for number in range(4):
        assert not any(name.startswith("step") for name in cuda.launched[f"to GPU {number}"])
    assert cuda.devices == {"batches_0": torch.device("cuda:3")}
    assert_same(batches, two_epochs[:4])


def test_a_step_waits_for_what_made_its_batch(cuda):
    """As DALI does, whose kernels make a batch on the GPU."""

    def decoded() -> Iterator[int]:
        for number in range(9):
            cuda.launch(f"decode {number}")
            yield number

    batches = stream.prefetched(decoded(), lambda batch: batch, torch.device("cuda:1"))
    for number in range(4):
        assert next(batches) == number and f"decode {number}" in cuda.compute.seen
        cuda.launch(f"step {number}")
    batches.close()
    assert not any(name.startswith("step") for number in range(4) for name in cuda.launched[f"decode {number}"])


def test_without_workers_the_step_copies(two_epochs, cuda):
    batch = next(make(0, device="cuda").epoch(0))
    assert batch.views.is_cuda and cuda.devices == {} and list(cuda.launched) == ["to GPU 0"]
    assert_same([batch], two_epochs[:1])


def test_fork_only_where_nothing_communicates(monkeypatch):
    monkeypatch.setattr(stream.sys, "version_info", (3, 11))
    monkeypatch.delitem(stream.sys.modules, "nvidia.dali", raising=False)
    # Not whatever other tests have read remotely in this process.
    threads = [thread for thread in threading.enumerate() if thread.name != "fsspecIO"]
    monkeypatch.setattr(stream.threading, "enumerate", lambda: threads)
    assert stream.start_method() == "fork"
    threads.append(threading.Thread(name="fsspecIO"))
    assert stream.start_method() == "forkserver"
    threads.pop()
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    assert stream.start_method() == "forkserver"


def test_bad_positions_and_recipes():
    with pytest.raises(ValueError, match="start_step"):
        next(make().epoch(0, 5))
    with pytest.raises(ValueError, match="share one image_size"):
        TrainLoader(Synthetic(10), 5, augmentations=(AUGMENTATIONS[0], moco_v3_augmentations(16, 0.2)[1]))
    for wrong in (0, 11):
        with pytest.raises(ValueError, match=rf"`batch_size` \(={wrong}\) must be in \[1, 10\], the number of images"):
            TrainLoader(Synthetic(10), wrong)
    for wrong in ({}, {"batch_size": 5, "sampler": GlobalBatchSampler(0, 10, 5)}):
        with pytest.raises(ValueError, match="exactly one of `batch_size` and `sampler`"):
            TrainLoader(Synthetic(10), **wrong)
    with pytest.raises(ValueError, match="`image_size` or `augmentations`, not both"):
        TrainLoader(Synthetic(10), 5, 8, augmentations=AUGMENTATIONS)


# ---- in somebody else's loop ----


def test_three_lines_are_a_loader():
    """They give MoCo v3's two views, labels and the order of seed 0; the context manager ends the workers."""
    source = open_source("synthetic://100?size=12")
    with TrainLoader(source, batch_size=24, image_size=8, workers=2) as loader:
        batches = list(loader.epoch(1))
        assert children()
    assert not children() and len(batches) == loader.steps_per_epoch == 4
    explicit = TrainLoader(
        source,
        sampler=GlobalBatchSampler(0, 100, 24),
        augmentations=moco_v3_augmentations(8),
        backend="opencv",
    )
    assert_same(batches, list(explicit.epoch(1)))
    for batch in batches:
        assert batch.labels is not None and batch.labels.dtype == torch.int64
        assert batch.labels.tolist() == [index % 10 for index in batch.indices]


def test_images_without_labels_have_none(tmp_path):
    write_shards(Synthetic(12, 8), tmp_path / "labelled/train", 12)
    (tmp_path / "bare/train").mkdir(parents=True)
    shards = tmp_path / "labelled/train/train-000000.tar", tmp_path / "bare/train/x.tar"
    with tarfile.open(shards[0]) as whole, tarfile.open(shards[1], "w") as bare:
        for member in whole:
            if member.name.endswith(".png"):
                bare.addfile(member, whole.extractfile(member))
    for path, has_labels in ((tmp_path / "labelled", True), (tmp_path / "bare", False)):
        batch = next(TrainLoader(open_source(path), 6, 8).epoch(0))
        assert (batch.labels is not None) is has_labels and batch.views.shape == (2, 6, 3, 8, 8)


def batches_on_this_rank() -> list:
    loader = TrainLoader(Synthetic(40, 12), batch_size=8, image_size=8)
    return [batch.indices.tolist() for batch in loader.epoch(2)]


def test_ranks_are_those_of_torch_distributed(threads):
    first, second = threads(2).run(batches_on_this_rank)
    assert [a + b for a, b in zip(first, second, strict=True)] == batches_on_this_rank()


def test_a_batch_that_the_ranks_cannot_share(monkeypatch):
    monkeypatch.setattr("crossbatch.data.loader._world_size_and_rank", lambda: (3, 0))
    with pytest.raises(ValueError, match=r"`batch_size` \(=8\) must be divisible by the number of ranks \(=3\)"):
        next(TrainLoader(Synthetic(40, 12), batch_size=8, image_size=8).epoch(0))


def test_ranks_that_change_are_noticed(monkeypatch):
    loader = TrainLoader(Synthetic(40, 12), batch_size=8, image_size=8)
    next(loader.epoch(0))
    monkeypatch.setattr("crossbatch.data.loader._world_size_and_rank", lambda: (2, 1))
    with pytest.raises(RuntimeError, match=r"the ranks of torch\.distributed have changed"):
        next(loader.epoch(0))


def test_an_import_loads_no_backend():
    heavy = "cv2", "nvidia.dali", "triton", "torchvision", "scipy", "crossbatch.engine", "crossbatch.models"
    code = f"import sys, crossbatch.data; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], check=True, timeout=60, stdout=subprocess.PIPE, text=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_loader(workers):
    """The second source is another one, and the same workers read both, time after time."""
    source, other = Damaged(30, {4: OSError("cut")}, size=20), Synthetic(9, 18, split=1)
    indices, pids = np.array([9, 4, 2, 25, 11]), []
    with EvaluationLoader(EvaluationDataset([source, other], 16), batch_size=2, workers=workers) as evaluation:
        for _ in range(2):
            got = list(evaluation.read(source, indices))
            assert [kept.tolist() for _, kept in got] == [[9], [2, 25], [11]]
            assert [name.split(" (")[0] for name in evaluation.skipped] == [source.name(4)]
            got += evaluation.read(other, np.arange(3))
            assert [kept.tolist() for _, kept in got[3:]] == [[0, 1], [2]] and evaluation.skipped == []
            for number, (images, kept) in enumerate(got):
                assert images.dtype == torch.uint8 and images.shape == (len(kept), 3, 16, 16)
                for image, index in zip(images, kept, strict=True):
                    assert torch.equal(image, evaluation_image((source, other)[number > 2].open(int(index)), 16))
            pids.append(children())
        assert pids[0] == pids[1] and len(pids[0]) >= workers
        next(evaluation.read(source, indices))  # abandoned
        assert [kept.tolist() for _, kept in evaluation.read(other, np.arange(1))] == [[0]]
    assert not children()


def test_evaluation_without_a_readable_image():
    source = Damaged(4, dict.fromkeys(range(4), OSError("gone")))
    with pytest.raises(SkipLimitExceeded, match="no evaluation image could be read, of 4"):
        list(EvaluationLoader(EvaluationDataset([source], 16), batch_size=2, workers=0).read(source, np.arange(4)))


class Noted:
    """A dataset that writes key k into its large array, and returns how many keys it has seen written."""

    def __init__(self):
        self.large, self.small = np.zeros(2**16, dtype=np.uint8), np.arange(3)

    def __getitem__(self, key: int) -> tuple[int, list[int]]:
        self.large[key] = 1
        return int(self.large.sum()), self.small.tolist()


def test_workers_of_a_server_hold_large_arrays_once(monkeypatch):
    monkeypatch.setattr(stream, "start_method", lambda: "forkserver")
    dataset = Noted()
    pool: Any = stream.WorkerPool(dataset, range(4), 2, 2)
    assert [small for _, small in pool] == [[0, 1, 2]] * 4
    pool.restart(range(2))
    assert [seen for seen, _ in pool] == [4, 4]  # what the other worker wrote, too
    pool.close()
    assert dataset.large.sum() == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"image_size": 0}, "image_size"),
        ({"augmentations": []}, "empty"),
        ({"workers": -1}, r"`workers` \(=-1\) must be at least 0"),
        ({"max_skipped_fraction": 2}, r"`max_skipped_fraction` \(=2\) must be in \[0, 1\]"),
        ({"backend": "pil"}, "one of auto, dali, opencv, torchvision"),
    ],
)
def test_arguments_that_cannot_be_are_refused(arguments, said):
    with pytest.raises(ValueError, match=said):
        TrainLoader(Synthetic(32, 16, 2), batch_size=16, **arguments)


class Wrapped:
    """Makes a map-style data set a source, as docs/data.md does."""

    has_labels = True

    def __init__(self, dataset, labels, class_names):
        self.dataset, self.labels, self.class_names = dataset, np.asarray(labels, dtype=np.int64), class_names

    def __len__(self):
        return len(self.labels)

    def name(self, index):
        return f"image {index}"

    def open(self, index):
        return self.dataset[index][0].convert("RGB")

    def read(self, index):
        return encode_bmp(self.open(index))


def test_a_data_set_of_torchvision_that_is_wrapped():
    dataset = FakeData(12, (3, 20, 20))
    with TrainLoader(Wrapped(dataset, range(12), ["x"] * 12), batch_size=4, image_size=8, workers=1) as loader:
        batches = list(loader.epoch(0))
    assert sorted(label for batch in batches if batch.labels is not None for label in batch.labels.tolist()) == [
        *range(12)
    ]


@pytest.mark.parametrize("source", ["synthetic://100", FakeData(4), None])
def test_what_is_no_source_is_refused(source):
    with pytest.raises(
        TypeError, match=rf"`source` is a {type(source).__name__}; it must be a Source: give open_source"
    ):
        TrainLoader(source, batch_size=4)


SERVERS = """
import multiprocessing.forkserver, multiprocessing.resource_tracker
from crossbatch.data.workers import _start_servers
_start_servers()
servers = multiprocessing.forkserver._forkserver._forkserver_pid, multiprocessing.resource_tracker._resource_tracker._pid
print(*servers, flush=True)
input()
"""


@pytest.mark.long
def test_a_signal_to_the_process_group_leaves_what_starts_workers():
    process = subprocess.Popen(
        [sys.executable, "-c", SERVERS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    servers = [int(text) for text in process.stdout.readline().split()]
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        for server in servers:
            os.kill(server, number)
    time.sleep(0.5)
    states = [Path(f"/proc/{server}/stat").read_text().rpartition(")")[2].split()[0] for server in servers]
    assert len(states) == 2 and "Z" not in states
    process.communicate("\n", timeout=20)
