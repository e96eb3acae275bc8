"""What all tests share: one pool of ranks for the multi-process ones."""

import os

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # Triton 3.9 warns where the default decides
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two cores; ranks and workers bring their own parallelism

import contextlib
import gc
import importlib
import importlib.metadata
import multiprocessing
import signal
import socket
import traceback
from multiprocessing import forkserver

import pytest
import torch

from tests.jobs import IMPORTED_ONCE, Nursery


def pytest_configure(config):
    """Kernels are interpreted, but for the tests that are about a GPU. Must be set before triton is imported.

    Signals do what they do in a terminal: a shell starts a job in the background with SIGINT ignored, nohup with SIGHUP.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    gc.disable()  # until all is imported
    _preload_everything()
    compiled = config.option.markexpr.startswith("gpu")
    os.environ.setdefault("TRITON_INTERPRET", "0" if compiled else "1")
    if os.environ["TRITON_INTERPRET"] == "1" and _triton_version().startswith("3.6."):
        _mend_triton_36()
    if not hasattr(config, "workerinput") and not config.option.collectonly:
        # Once and kept on disk, or every process of the tests that makes views would compile them at the same time.
        with contextlib.suppress(ImportError):
            importlib.import_module("crossbatch.data.augment.compiled_colours")


def _preload_everything():
    """Let whatever starts this process's fork server first start one that has imported what ranks need.

    There is one server only. Started by a loader for its workers, it would have imported what these need, and every rank of
    every pool would take 5 s to import the rest.
    """
    preload = forkserver.set_forkserver_preload
    forkserver.set_forkserver_preload = lambda modules: preload([*IMPORTED_ONCE, *modules])


def _triton_version() -> str:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return ""


def _mend_triton_36():
    """Let a loop in the interpreter end at a number; numpy 2.4 refuses how Triton 3.6 does it (triton issue 9171)."""
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor

    def patch_and_mend(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch_and_mend


def pytest_report_header():
    interpreted = os.environ["TRITON_INTERPRET"] == "1"
    return f"Triton kernels: {'interpreted on the CPU; `pytest -m gpu` compiles them' if interpreted else 'compiled'}"


# Long files: whichever process got one of them last would go on alone for a minute or two.
FIRST = ("test_learning.py", "test_kernels.py", "test_many_ranks.py", "test_compiled.py", "test_equivalence.py")


def pytest_collection_modifyitems(items):
    """Let long files come first, and skip what needs a GPU where there is none, or where kernels are interpreted.

    Interpreted, such a test would show nothing.
    """
    items.sort(key=lambda item: item.path.name not in FIRST)
    reason = None
    if not torch.cuda.is_available():
        reason = "needs an NVIDIA GPU"
    elif os.environ["TRITON_INTERPRET"] == "1":
        reason = "Triton kernels are interpreted in this run: python -m pytest -m gpu"
    for item in items:
        if reason is not None and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=reason))


def pytest_collection_finish():
    """Collect garbage from here on, but for what is imported."""
    gc.enable()
    gc.freeze()


@pytest.fixture(autouse=True)
def handlers_of_signals():
    """Take back what a run in this process leaves when it ends with an error: there, the process ends, too."""
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
    before = [(number, signal.getsignal(number)) for number in numbers]
    yield
    for number, handler in before:
        signal.signal(number, handler)


@pytest.fixture
def no_figures(monkeypatch):
    """Let evaluations draw nothing, which takes longer than all the rest of a small one."""
    for module in ("evaluation.evaluation", "tasks.finetune"):
        monkeypatch.setattr(f"crossbatch.engine.{module}.save_figures", lambda *_: None)


class RankPool:
    """World-size processes joined by gloo; `run` calls a module-level function on every rank and returns the results."""

    def __init__(self, world_size: int):
        self.world_size, self.is_open = world_size, True
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([*IMPORTED_ONCE])  # once, not in every rank
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self._pipes, self._processes = [], []
        for rank in range(world_size):
            here, there = context.Pipe()
            environment = {
                "RANK": rank,
                "LOCAL_RANK": rank,
                "WORLD_SIZE": world_size,
                "LOCAL_WORLD_SIZE": world_size,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            }
            # Not daemons: data loader workers are their children.
            process = context.Process(target=_rank_main, name=f"rank {rank}", args=(there, environment))
            process.start()
            self._pipes.append(here)
            self._processes.append(process)
        self._answers("the start", within_s=600)  # on a busy machine the imports alone take minutes

    def run(self, function, *args) -> list:
        for pipe in self._pipes:
            pipe.send((function, args))
        return self._answers(str(function), within_s=120)

    def _answers(self, question: str, within_s: float) -> list:
        results = []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(within_s):
                self.close()  # a late answer would be taken for that of the next question
                raise TimeoutError(f"rank {rank} of {self.world_size} did not answer {question} in {within_s} s")
            results.append(pipe.recv())
        failed = [text for ok, text in results if not ok]
        if failed:
            raise AssertionError("\n".join(failed))
        return [value for _, value in results]

    def close(self, wait_s: float = 0):
        """End the ranks; those that do not end by themselves within `wait_s`, as they do to save their coverage, are killed."""
        self.is_open = False
        for pipe in self._pipes if wait_s else ():
            with contextlib.suppress(OSError):
                pipe.send(None)
        for process in self._processes:
            process.join(wait_s)
            process.kill()
            process.join()


def _rank_main(pipe, environment: dict):
    signal.pthread_sigmask(signal.SIG_SETMASK, ())  # a server that loaders have started is deaf to signals
    import torch

    from crossbatch.engine.runtime.distributed import process_group
    from crossbatch.engine.runtime.world import world_from_environment

    gc.freeze()  # what is imported stays; DeepSpeed's stage 3 collects garbage for every model
    os.environ.update({name: str(value) for name, value in environment.items()})
    torch.set_num_threads(1)
    with process_group(world_from_environment(), "cpu"):
        pipe.send((True, None))
        while (question := pipe.recv()) is not None:
            function, args = question
            try:
                pipe.send((True, function(*args)))
            except BaseException:
                pipe.send((False, traceback.format_exc()))


@pytest.fixture(scope="session")
def pools():
    """`pools(n)` is a pool of n gloo ranks: `.run(function, *args)` -> [result of rank 0, result of rank 1, ...]."""
    open_pools: dict[int, RankPool] = {}

    def get(world_size: int) -> RankPool:
        if world_size not in open_pools or not open_pools[world_size].is_open:
            open_pools[world_size] = RankPool(world_size)
        return open_pools[world_size]

    yield get
    for pool in open_pools.values():
        pool.close(wait_s=10)


@pytest.fixture(scope="session")
def threads():
    """`threads(n)` is a world of n ranks in this process, each a thread, with the `run` of a pool; see tests/threads.py."""
    from tests.threads import ThreadRanks

    return ThreadRanks


@pytest.fixture(scope="session")
def nursery():
    """Starts the processes of runs that tests stop, kill or cut off from each other."""
    nursery = Nursery()
    yield nursery
    nursery.close()


@pytest.fixture(scope="session")
def one_rank(pools):
    """For what must run in a process group but not in pytest's process."""
    return pools(1)


@pytest.fixture(scope="session")
def two_ranks(pools):
    return pools(2)


@pytest.fixture(scope="session")
def tiny_runs(two_ranks, tmp_path_factory):
    """`tiny_runs("resnet")` or `("vit")`: a run of two steps at 16 px, sharded over two ranks by FSDP2."""
    from tests.small_runs import ADAMW, LARS, RESNET, VIT, fsdp, run

    settings = {"resnet": [*RESNET, *LARS, *fsdp(3)], "vit": [*VIT, *ADAMW, *fsdp(1)]}
    folders = {}

    def get(name: str):
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp("runs") / name
            assert two_ranks.run(run, settings[name], str(folders[name]), 2) == ["", ""]
        return folders[name]

    return get
