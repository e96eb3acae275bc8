"""Worlds of many ranks in this process: every rank is a thread with a process group of its own.

For what calls torch.distributed, and is to be seen at more ranks than a machine could start as processes. torch's local
tensors (torch.distributed._local_tensor) do not serve: they run the program once for all ranks, and ours branches by rank (the
rows of a group, uneven shards, two encoders in lockstep).

Only one rank runs at any time: it runs until a collective waits for others, and hands over there. So every test takes the same
path each time, each rank has its own random numbers, and ranks that would wait for each other forever fail at once. The
operations themselves are those of torch's threaded process group, which torch tests FSDP2 with.
"""

import contextvars
import threading
import traceback
from collections.abc import Callable
from dataclasses import fields
from datetime import timedelta
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import _set_thread_isolation_mode  # pyright: ignore[reportAttributeAccessIssue]
from torch.testing._internal.distributed import multi_threaded_pg as threaded

from crossbatch.engine.runtime.distributed import _leave
from crossbatch.engine.runtime.world import World

_ranks: contextvars.ContextVar["_Ranks"] = contextvars.ContextVar("ranks")  # of this thread
_world: contextvars.ContextVar[threaded.WorldData] = contextvars.ContextVar("world")


class _ContextWorld(threaded.ThreadLocalWorld):
    """Holds torch's tables of groups for each rank, and for the threads that a rank starts in its context (lockstep)."""

    def _get_world(self) -> threaded.WorldData:
        try:
            return _world.get()
        except LookupError:
            return _outside


if not hasattr(_ContextWorld, "comms"):  # torch 2.11 reads it, but does not give it to threads
    setattr(_ContextWorld, "comms", [])  # noqa: B010


def _empty_tables() -> threaded.WorldData:
    """Return tables without any group; torch 2.11 has one less than 2.14."""
    names = [field.name for field in fields(threaded.WorldData)]
    empty: dict[str, Any] = {"default_pg": None, "group_count": 0, "comms": []}
    return threaded.WorldData(**{name: empty.get(name, {}) for name in names})


_outside = _empty_tables()


class _Ranks:
    """Lets one rank run at a time, and knows whether any still can."""

    def __init__(self, size: int):
        self.baton = threading.Lock()
        self.running, self.failed = size, False
        self.meetings: set[_Meeting] = set()

    def fail(self) -> None:
        self.failed = True
        for meeting in self.meetings:
            meeting.condition.notify_all()

    def ended(self) -> None:
        """Count a rank that runs no more; if all others wait, nobody will ever come to them."""
        self.running -= 1
        if self.running == 0 and self.meetings:
            self.fail()


class _Meeting:
    """Waits for all ranks of a group to call a collective; takes the place of the `Collective` of torch's threaded group."""

    def __init__(self, size: int, collective: Any, _: object):
        self.size, self.collective, self.data, self.done = size, collective, [None] * size, False
        self.came = 0
        self.ranks = _ranks.get()
        self.condition = threading.Condition(self.ranks.baton)
        self.ranks.meetings.add(self)

    def join(self, rank: int, data: Any) -> Any:
        self.data[rank], self.came = data, self.came + 1
        if self.came == self.size:
            self.collective.work(self.data)
            self.done = True
            self.ranks.running += self.size - 1
            self.ranks.meetings.discard(self)
            self.condition.notify_all()
        else:
            random_state = torch.get_rng_state()
            self.ranks.ended()
            self.condition.wait_for(lambda: self.done or self.ranks.failed)
            torch.set_rng_state(random_state)
            if not self.done:
                raise _Abandoned
        return threaded.ret_work(data)


class _Abandoned(BaseException):
    """Ends a rank that waits for one that has failed, or that calls no such collective."""


class _AllGather(threaded.AllGather):
    """Copies to each rank at once what all have given; torch's takes W * W copies."""

    @torch.no_grad()
    def work(self, data: Any) -> None:
        sources = [given[0].detach() for _, given in data]
        for (destinations,), _ in data:
            torch._foreach_copy_([d.detach() for d in destinations], sources)


class ThreadRanks:
    """Runs functions on `world_size` ranks, as `RankPool` does; arguments and results are shared, not copied."""

    def __init__(self, world_size: int):
        self.world_size = world_size

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Call `function` on every rank; return the results of rank 0, rank 1 and so on."""
        ranks, results, errors = _Ranks(self.world_size), [None] * self.world_size, []
        store = dist.HashStore()
        random_state = torch.get_rng_state()

        def be(rank: int) -> None:
            _ranks.set(ranks)
            _world.set(_empty_tables())
            with ranks.baton:
                try:
                    if not ranks.failed:
                        torch.set_rng_state(random_state)
                        dist.init_process_group("ranks", rank=rank, world_size=self.world_size, store=store)
                        results[rank] = function(*args)
                        _leave()
                except _Abandoned:
                    errors.append((1, f"rank {rank} of {self.world_size} was left waiting in a collective"))
                except BaseException:
                    errors.append((0, f"rank {rank} of {self.world_size}: {traceback.format_exc()}"))
                    ranks.fail()
                finally:
                    ranks.ended()

        threads = [
            threading.Thread(target=contextvars.Context().run, args=(be, rank), daemon=True)
            for rank in range(self.world_size)
        ]
        _set_thread_isolation_mode(True)
        try:
            with (
                mock.patch.object(dist.distributed_c10d, "_world", _ContextWorld()),
                mock.patch.multiple(threaded, Collective=_Meeting, AllGather=_AllGather),
                mock.patch.dict(threaded.ProcessLocalGroup._cur_coll_on_pgs, clear=True),
            ):
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
        finally:
            _set_thread_isolation_mode(False)
            torch.set_rng_state(random_state)
        if errors:
            raise AssertionError(min(errors)[1])
        return results


def this_rank() -> World:
    """Return which rank this thread is, where a process would ask its environment."""
    return World(dist.get_rank(), dist.get_world_size(), dist.get_rank(), dist.get_world_size())


def _make_group(_: dist.Store, rank: int, size: int, timeout: timedelta) -> threaded.ProcessLocalGroup:
    return threaded.ProcessLocalGroup(rank, size)


dist.Backend.register_backend("ranks", _make_group, devices=["cpu"])
