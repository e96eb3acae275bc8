"""Keeps the last steps in host memory, so that a run which has lost a rank or a node repeats a step instead of an hour.

torchrun ends all ranks when one dies, and starts them again, so what shall survive lies outside of the processes: in files of
/dev/shm. After every step each rank copies two parts there: the slices that only it holds, and its share of what every rank
holds, so that the ranks of a node together have all of that. A thread sends the first part to a rank of another node, while the
next step is computed; the second needs no sending, as each node has its own. A run that starts again takes the newest step of
which every slice is in the memory of some node, if that is newer than its last checkpoint.

    OUT/memory.json           the attempts at this run that may have copies; the last one writes
    /dev/shm/crossbatch-ID/   of one attempt (one life of all its ranks)
      run-by1.json            to which run directory it belongs, and the fingerprint of configuration and code; by rank 1
      rank3-by1.json          of the slices of rank 3 that rank 1 keeps (3 and 1 differ in what another node has sent): where
                              each slice is, the configuration, and what else does not change
      rank3-by1-0.bin         the slices after some step
      rank3-by1-0.json        counts of that step, and its line of metrics; it is there if and only if the slices are complete
      rank3-by1-1.bin ...     the slices after another step; rank 3 itself keeps three
      node1of2-by3.json ...   the same of what every rank holds: the second of two shares, kept by rank 3
      recovered-0/            a checkpoint made of such files, as a later attempt reads it; it is there until that has copies

Nobody writes over a step before the next one is safe on all nodes: at the end of a transfer the threads wait for each other,
and the next transfer begins when its thread has ended. A rank makes its own copy first, in the third of its files, so that a
rank that dies while a step is on its way to other nodes costs nobody that step. What a rank cannot copy or keep is told to the
others at the end of a transfer, and all give up together; files that have been written stay, as the run may still need them.
"""

import contextlib
import json
import os
import shutil
import threading
import time
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from crossbatch.engine.checkpoint.slices import Slices, local_state, random_state, shares
from crossbatch.engine.checkpoint.store import SliceInFile
from crossbatch.engine.run_log import Log
from crossbatch.engine.runtime.atomic_files import write_atomically
from crossbatch.engine.runtime.distributed import cpu_group, on_every_rank, on_main, shared_token
from crossbatch.engine.runtime.world import World

if TYPE_CHECKING:
    from crossbatch.engine.train_state import TrainState

MEMORY = Path("/dev/shm")
ATTEMPTS = "memory.json"
CHECK_EVERY = 100  # copies: then it is checked that the memory is still where it was
OWN_SLOTS = 3  # the copy that is made, the one that is sent, and the one before, which every node has
SHARE_OF_FREE = 0.5  # of /dev/shm, which holds the batches of data workers, too
COUNTS_BYTES = 8192  # of the message with a step's counts and its line of metrics
ALIGNMENT = 64  # bytes, between slices


class Slot:
    """Holds the slices of a part after one step, in a file of /dev/shm that is mapped into this process."""

    def __init__(self, folder: Path, name: str, num_bytes: int, pin: bool = False):
        self.counts_file, file = folder / f"{name}.json", folder / f"{name}.bin"
        self.values = allocate(file, num_bytes)
        if pin:
            _pin(self.values)
            weakref.finalize(self, _unpin, self.values.data_ptr()).atexit = False

    def invalidate(self) -> None:
        """Mark the slices as incomplete while they are written."""
        self.counts_file.unlink(missing_ok=True)

    def complete(self, counts: dict[str, Any]) -> None:
        """Mark the slices as complete; they are those after the step in `counts`."""
        write_atomically(self.counts_file, json.dumps(counts))


class Part:
    """Is a part of this rank's state: `slices`, as views of its memory, which are copied to the same place after every step.

    What a GPU holds comes first: it is gathered in `staging`, in its memory, and goes from there to the host in one piece.
    """

    def __init__(self, name: str, slices: Slices):
        self.name, self.slices = name, dict(sorted(slices.items(), key=lambda item: not item[1].is_cuda))
        self.places, self.num_bytes = place(self.slices, "")
        on_gpu = {key: values for key, values in self.slices.items() if values.is_cuda}
        self.staged_bytes = place(on_gpu, "")[1] if on_gpu else 0
        self.slots: list[Slot] = []
        self.staging: torch.Tensor | None = None

    def pairs(self, slot: Slot) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield where each slice is copied for `slot`, and the slice."""
        for found, values in zip(self.places, self.slices.values(), strict=True):
            target = self.staging if values.is_cuda else slot.values
            assert target is not None
            yield target[found.offset :][: values.nbytes].view(values.dtype), values


def _pin(values: torch.Tensor) -> None:
    """Let GPUs copy to `values` beside other work. Raises OSError."""
    runtime: Any = torch.cuda.cudart()
    error = int(runtime.cudaHostRegister(values.data_ptr(), values.nbytes, 0))
    if error:
        with contextlib.suppress(RuntimeError, AssertionError):
            torch.ones(1, device="cuda").add_(1)  # this launch takes the error along, which the next one would report
        raise OSError(f"{values.nbytes / 2**20:.0f} MiB of {MEMORY} cannot be pinned (CUDA error {error})")


def _unpin(address: int) -> None:
    runtime: Any = torch.cuda.cudart()
    runtime.cudaHostUnregister(address)


def allocate(file: Path, num_bytes: int) -> torch.Tensor:
    """Create a file in /dev/shm and return it as a mapped uint8 tensor. Raises OSError if there is not enough room."""
    with file.open("wb") as stream:
        os.posix_fallocate(stream.fileno(), 0, num_bytes)  # or a write without room would kill the process
    return torch.from_file(str(file), shared=True, size=num_bytes, dtype=torch.uint8)


def place(slices: Slices, file: str) -> tuple[list[SliceInFile], int]:
    """Return where each slice goes in `file`, and the size of the file in bytes."""
    places, offset = [], 0
    for (name, start), values in slices.items():
        places.append(SliceInFile(name, start, values.numel(), values.dtype, file, offset))
        offset += -(-values.nbytes // ALIGNMENT) * ALIGNMENT
    return places, max(offset, ALIGNMENT)


def buddies(leaders: list[int]) -> list[int | None]:
    """Return for each rank the rank on the next node that keeps its second copy; None for all if there is only one node.

    `leaders` holds for each rank the first rank on its node.
    """
    nodes = {leader: [rank for rank, its in enumerate(leaders) if its == leader] for leader in sorted(set(leaders))}
    if len(nodes) == 1:
        return [None] * len(leaders)
    order = [*nodes]
    after = dict(zip(order, [*order[1:], order[0]], strict=True))
    found: list[int | None] = []
    for rank, leader in enumerate(leaders):
        keepers = nodes[after[leader]]
        found.append(keepers[nodes[leader].index(rank) % len(keepers)])
    return found


def share_on_node(leaders: list[int], rank: int) -> tuple[int, int]:
    """Return which share of what every rank holds `rank` keeps, and how many shares its node has; `leaders` as above.

    LOCAL_RANK and LOCAL_WORLD_SIZE do not say it: a rank that sees one GPU only is number 0 beside others.
    """
    ranks = [other for other, leader in enumerate(leaders) if leader == leaders[rank]]
    return ranks.index(rank), len(ranks)


class MemoryCopies:
    """Keeps copies of a run's state in host memory while it trains; all ranks make the same calls.

    Args:
        state: what is kept.
        world: this rank among the others.
        out: the run directory.
        fingerprint: of configuration and code; copies with another one are not used.
        every_steps: number of steps between two copies.
        timeout_s: how long another rank may keep a transfer waiting.
        log: is told once what is kept where, or why nothing is.
        recovered: whether the run goes on from copies of an earlier attempt, and not from a checkpoint.
    """

    def __init__(
        self,
        state: "TrainState",
        world: World,
        out: Path,
        fingerprint: str,
        every_steps: int,
        timeout_s: float,
        log: Log,
        recovered: bool,
    ):
        self.state, self.world, self.out, self.log = state, world, out, log
        self.fingerprint, self.every_steps, self.recovered = fingerprint, every_steps, recovered
        self.attempt = shared_token()
        self.folder = folder_of(self.attempt)
        self._older: list[str] = on_main(lambda: read_attempts(out))
        self._group = cpu_group(timeout_s)
        self._leaders: list[Any] = [None] * world.size  # of each rank: the first rank on its node
        dist.all_gather_object(self._leaders, world.rank - world.local_rank)
        self._parts: list[Part] = []  # what is sent, and what each node has
        self._device: torch.device | None = None  # a GPU that holds the state
        self._copies: list[list[tuple[list[torch.Tensor], list[torch.Tensor]]]] = []  # of each slot: targets and values
        self._others: list[list[Slot]] = []  # for each rank that sends its slices here
        self._buddy: int | None = None
        self._senders: list[int] = []
        self._thread: threading.Thread | None = None
        self._error = ""
        self._stream: torch.cuda.Stream | None = None
        self._copied: torch.cuda.Event | None = None
        self._num_safe = 0
        self.num_copies, self.seconds = 0, 0.0  # seconds for which training waited, all in all
        self.num_bytes, self.sent_bytes = 0, 0  # of a copy of this rank, and what of it another node gets

    def after(self, step: int, line: dict[str, Any] | None) -> None:
        """Copy the state after `step`, if that is due, and let a thread send it to another node.

        `line` is that step's line of metrics, if it has one: it is kept, in case that rank 0 dies before it is written.
        """
        if not self.every_steps or step % self.every_steps:
            return
        start = time.perf_counter()
        if not self._parts and not self._prepare():
            self.every_steps = 0
            return
        start = start if self.num_copies else time.perf_counter()  # without making room, once
        number = self.num_copies % OWN_SLOTS
        own = [part.slots[number] for part in self._parts]
        counts = {"step": step, "world_size": self.world.size, "line": line, **self.state.counts()}
        failure = _told(lambda: [slot.invalidate() for slot in own])
        copied = None if failure else self._copy(number)
        whole = not failure
        if whole and copied is None:
            failure = _complete(own, counts)
        self._wait()  # behind the copy: a rank that has died meanwhile shall not cost this step
        if self._error:
            if copied is not None and not _told(partial(_wait_for, copied)):
                _complete(own, counts)
            self._give_up()
            return
        others = [slots[self.num_copies % 2] for slots in self._others]

        def work() -> None:
            failed, sent = failure, counts if whole else None
            try:
                if copied is not None:
                    failed = _told(partial(_wait_for, copied))
                    sent = None if failed else counts
                    failed = failed or _complete(own, counts)
                self._exchange(own[0], others, sent, failed)
                self._forget_older()
            except Exception as error:
                self._error = f"{type(error).__name__}: {error}"

        self._thread = threading.Thread(target=work, name=f"memory copy of step {step}", daemon=True)
        self._thread.start()
        self.num_copies += 1
        self.seconds += time.perf_counter() - start

    def _give_up(self) -> None:
        """Make no more copies; those that were made stay, for a restart."""
        self.log.warn(
            "no more copies in host memory, a restart goes on from the last one, or from a later checkpoint: "
            + self._error
        )
        self.every_steps, self._parts, self._others, self._copies = 0, [], [], []

    def forget(self) -> None:
        """Delete all copies, also those of earlier attempts, once the run is saved and goes no further."""
        self._wait()
        if self.world.is_main:
            (self.out / ATTEMPTS).unlink(missing_ok=True)
        self._delete([*self._older, self.attempt])
        self.recovered = False

    def close(self) -> None:
        """Wait for the last copy, and leave the process group of the threads; all ranks call it."""
        self._wait()
        dist.destroy_process_group(self._group)

    def _current_parts(self) -> list[Part]:
        """Return the parts of this rank's state, which stays where it is in memory; to name all of it takes 10 ms."""
        world, held = self.world, local_state(self.state.step.backend) | random_state()
        only_here = {name: tensor for name, tensor in held.items() if not tensor.replicated}
        everywhere = {name: tensor for name, tensor in held.items() if tensor.replicated}
        number, count = share_on_node(self._leaders, world.rank)
        return [
            Part(f"rank{world.rank}", shares(only_here, world.rank, world.size)),
            Part(f"node{number}of{count}", shares(everywhere, number, count)),
        ]

    def _prepare(self) -> bool:
        """Make room for three steps of this rank and two of each rank that sends here; return whether all ranks have room."""
        parts = self._current_parts()
        sent = parts[0]
        _, manifest, config, _ = self.state.snapshot()
        description = {
            "manifest": {name: value for name, value in asdict(manifest).items() if name not in ("files", "progress")},
            "config": config,
        }

        def describe(part: Part) -> str:
            slices = [[*found[:3], str(found.dtype).removeprefix("torch."), found.offset] for found in part.places]
            return json.dumps({**description, "bytes": part.num_bytes, "slices": slices})

        text = torch.frombuffer(bytearray(describe(sent).encode()), dtype=torch.uint8)
        everyone: list[Any] = [None] * self.world.size
        free = shutil.disk_usage(MEMORY).free  # measured before the ranks meet here, as after that they take some of it
        dist.all_gather_object(everyone, (sent.num_bytes, len(text)))
        keepers = buddies(self._leaders)
        self._buddy = keepers[self.world.rank]
        self._senders = [rank for rank, keeper in enumerate(keepers) if keeper == self.world.rank]
        texts = [text, *(torch.empty(everyone[rank][1], dtype=torch.uint8) for rank in self._senders)]
        self._send_and_receive(texts)

        senders_bytes = [everyone[rank][0] for rank in self._senders]
        self.num_bytes, self.sent_bytes = sum(part.num_bytes for part in parts), sent.num_bytes

        def make_room() -> None:
            per_rank = OWN_SLOTS * self.num_bytes + 2 * sum(senders_bytes)
            needed = per_rank * self.world.local_size
            if needed > SHARE_OF_FREE * free:
                raise OSError(
                    f"copies need {needed / 2**20:.0f} MiB in {MEMORY}, and {free / 2**20:.0f} MiB are free; allowed: half of "
                    f"what is free; make it larger (docker: --shm-size)"
                )
            self.folder.mkdir(mode=0o700, exist_ok=True)
            run = {"out": str(self.out.resolve()), "fingerprint": self.fingerprint}
            write_atomically(self.folder / f"run-by{self.world.rank}.json", json.dumps(run))
            slots = partial(Slot, self.folder, pin=self._device is not None)
            for part in parts:
                name = f"{part.name}-by{self.world.rank}"
                part.slots = [slots(f"{name}-{number}", part.num_bytes) for number in range(OWN_SLOTS)]
                if part.staged_bytes:
                    part.staging = torch.empty(part.staged_bytes, dtype=torch.uint8, device=self._device)
                write_atomically(self.folder / f"{name}.json", describe(part))
            for rank, num_bytes, text in zip(self._senders, senders_bytes, texts[1:], strict=True):
                name = f"rank{rank}-by{self.world.rank}"
                self._others.append([slots(f"{name}-{number}", num_bytes) for number in range(2)])
                write_atomically(self.folder / f"{name}.json", text.numpy().tobytes().decode())

        self._device = next(
            (values.device for part in parts for values in part.slices.values() if values.is_cuda), None
        )
        _, errors = on_every_rank(make_room, (OSError, RuntimeError))  # the latter from torch: no memory, no mapping
        if not errors:
            names = [*self._older, self.attempt]
            _, errors = on_every_rank(lambda: write_attempts(self.out, names) if self.world.is_main else None, OSError)
        if errors:
            self.log.warn(f"no copies in host memory, a restart goes on from the last checkpoint: {errors[0]}")
            self._others.clear()
            self._delete([self.attempt])
            return False
        self._parts = parts
        self._plan_copies()
        if self._buddy is None:
            second = "no second one, as there is one node only"
        else:
            second = f"{sent.num_bytes / 1e6:.3g} MB of it are sent to another node, the rest each node has"
        self.log.note(
            f"copies in {self.folder}: {self.num_bytes / 1e6:.3g} MB a rank after every {self.every_steps} steps, {second}"
        )
        return True

    def _plan_copies(self) -> None:
        """Prepare for each slot what `_copy` copies, by dtype and device: _foreach_copy_ would copy mixed ones one by one."""
        if self._device is not None:
            self._stream = torch.cuda.Stream(self._device)
        for slot in range(OWN_SLOTS):
            alike: dict[Any, tuple[list[torch.Tensor], list[torch.Tensor]]] = defaultdict(lambda: ([], []))
            for part in self._parts:
                for target, values in part.pairs(part.slots[slot]):
                    alike[values.dtype, values.device][0].append(target)
                    alike[values.dtype, values.device][1].append(values)
            self._copies.append([*alike.values()])

    def _wait(self) -> None:
        """Return when the last copy is safe on all nodes, or has failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _copy(self, slot: int) -> torch.cuda.Event | None:
        """Copy this rank's parts into their slots of this number; return the event of the GPU that tells when that is done.

        On a GPU one launch gathers them in tensors of their own, so that the next step need not wait for the way to the host.
        """
        if self.num_copies % CHECK_EVERY == CHECK_EVERY - 1:
            for part, now in zip(self._parts, self._current_parts(), strict=True):
                for key, values in part.slices.items():
                    assert key[0].startswith("random.") or values.data_ptr() == now.slices[key].data_ptr(), (
                        f"{key[0]} has moved, and copies in memory are out of date"
                    )
        for key, values in shares(random_state(), self.world.rank, self.world.size).items():
            self._parts[0].slices[key].copy_(values)  # torch returns another tensor each time
        if self._device is None or self._stream is None:
            self._gather(slot)
            return None
        compute = torch.cuda.current_stream(self._device)
        if self._copied is not None:
            compute.wait_event(self._copied)
        self._gather(slot)
        self._stream.wait_stream(compute)
        with torch.cuda.stream(self._stream):
            for part in self._parts:
                if part.staging is not None:
                    part.slots[slot].values[: part.staged_bytes].copy_(part.staging, non_blocking=True)
        self._copied = torch.cuda.Event()
        self._copied.record(self._stream)
        return self._copied

    def _gather(self, slot: int) -> None:
        for targets, values in self._copies[slot]:
            torch._foreach_copy_(targets, values)

    def _exchange(self, own: Slot, others: list[Slot], counts: dict[str, Any] | None, failure: str) -> None:
        """Send this rank's slices to its buddy and keep those that come; return when all ranks have done so.

        Slices without `counts` are not those of a step; nobody keeps them. Raises RuntimeError on all ranks where one has a
        `failure`, or cannot keep what came. A rank that fails keeps what others sent all the same.
        """
        refused = [_told(slot.invalidate) for slot in others]
        texts = [torch.zeros(COUNTS_BYTES, dtype=torch.uint8) for _ in (own, *others)]
        if counts is not None:
            text = json.dumps(counts).encode()
            if len(text) > COUNTS_BYTES:
                text = json.dumps({**counts, "line": None}).encode()
            texts[0][: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        self._send_and_receive(texts)
        values = [
            torch.empty_like(slot.values) if no else slot.values for slot, no in zip(others, refused, strict=True)
        ]
        self._send_and_receive([own.values, *values])
        for slot, text, no in zip(others, texts[1:], refused, strict=True):
            told = text.numpy().tobytes().rstrip(b"\0")
            failure = no or (_complete([slot], json.loads(told)) if told else "") or failure
        failed = torch.tensor(int(bool(failure)))
        dist.all_reduce(failed, group=self._group)
        if failed:
            raise RuntimeError(failure or "another rank could not keep its copy")

    def _send_and_receive(self, values: list[torch.Tensor]) -> None:
        """Send the first of `values` to the buddy, and receive the others, one from each sender."""
        works = [] if self._buddy is None else [dist.isend(values[0], self._buddy, self._group)]
        works += [dist.irecv(theirs, rank, self._group) for theirs, rank in zip(values[1:], self._senders, strict=True)]
        for work in works:
            assert work is not None
            work.wait()

    def _forget_older(self) -> None:
        """Let nobody go on from an earlier attempt any more, once this one has a copy; delete its files a copy later."""
        self._num_safe += 1
        if self._num_safe == 1 and self.world.is_main:
            with contextlib.suppress(OSError):  # a full disk: older attempts stay in the list, and are older
                write_attempts(self.out, [self.attempt])
        if self._num_safe == 2:
            self._delete(self._older)
            self._older = []

    def _delete(self, attempts: Iterable[str]) -> None:
        if self.world.local_rank == 0:
            for attempt in attempts:
                shutil.rmtree(folder_of(attempt), ignore_errors=True)


def _complete(slots: list[Slot], counts: dict[str, Any]) -> str:
    """Mark slots as complete; return what went wrong, "" for nothing."""
    return _told(lambda: [slot.complete(counts) for slot in slots])


def _wait_for(copied: torch.cuda.Event) -> None:
    torch.cuda.set_device(copied.device)  # a new thread is on GPU 0
    copied.synchronize()


def _told(work: Callable[[], object]) -> str:
    """Do `work` and return the error of a file or of a GPU as text, "" for none."""
    try:
        work()
    except (OSError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def folder_of(attempt: str) -> Path:
    """Return where each node keeps the copies of an attempt."""
    return MEMORY / f"crossbatch-{attempt}"


def run_of(folder: Path) -> dict[str, str]:
    """Return "out" and "fingerprint" of the run to which the copies in `folder` belong; {} where nothing says so."""
    for file in folder.glob("run-by*.json"):
        with contextlib.suppress(OSError, ValueError):
            return json.loads(file.read_text())
    return {}


def read_attempts(out: Path) -> list[str]:
    """Return the attempts at the run `out` that may have copies, the last one at the end."""
    try:
        return [str(attempt) for attempt in json.loads((out / ATTEMPTS).read_text(encoding="utf-8"))["attempts"]]
    except (OSError, ValueError, LookupError, TypeError):
        return []


def write_attempts(out: Path, attempts: list[str]) -> None:
    """Write the attempts that may have copies to the run directory `out`, for `read_attempts`."""
    write_atomically(out / ATTEMPTS, json.dumps({"attempts": attempts}) + "\n")
