"""Ranks that are started again find each other, and not those that died."""

import os
import threading
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from crossbatch import InputError
from crossbatch.engine.runtime.distributed import World, process_group, unused, world_from_environment


def meet(store: dist.Store, size: int) -> list[dist.Store]:
    """What `unused` gives to each of `size` ranks."""
    found: dict[int, dist.Store] = {}

    def rank_main(rank: int) -> None:
        found[rank] = unused(store, World(rank, size, rank, size))

    threads = [threading.Thread(target=rank_main, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return [found[rank] for rank in range(size)]


def test_a_second_attempt_shares_a_part_of_the_store_that_the_first_has_not_touched():
    store = dist.HashStore()
    first = meet(store, 3)
    first[0].set("address", "of one that died")
    assert first[2].get("address") == b"of one that died"
    store.set("asks/1", "one that died before it was told")
    second = meet(store, 3)
    assert not any(part.check(["address"]) for part in second)
    second[1].set("address", "new")
    assert second[0].get("address") == second[2].get("address") == b"new"


def test_processes_that_do_not_know_of_each_other_are_refused(monkeypatch):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "16")  # as srun sets it
    monkeypatch.delenv("RANK", raising=False)
    with (
        pytest.raises(InputError, match="was started 16 times, each as a run of its own; start torchrun"),
        process_group(world_from_environment(), "cpu"),
    ):
        pass
    assert not dist.is_initialized()


def test_one_rank_waits_for_nobody():
    assert not unused(dist.HashStore(), World(0, 1, 0, 1)).check(["anything"])


@pytest.mark.parametrize("deterministic", [False, True])
def test_cudnn_times_its_algorithms_from_the_start_unless_the_run_is_deterministic(monkeypatch, deterministic):
    seen = []
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", deterministic)
    with (
        mock.patch.dict(os.environ),
        mock.patch.object(torch.cuda, "set_device"),
        mock.patch.object(torch, "are_deterministic_algorithms_enabled", lambda: deterministic),
        mock.patch.object(dist, "init_process_group", lambda *_, **__: seen.append(torch.backends.cudnn.benchmark)),
        mock.patch.object(dist, "destroy_process_group"),
        process_group(World(0, 1, 0, 1), "cuda") as device,
    ):
        seen.append(torch.backends.cudnn.benchmark)
    assert device.type == "cuda" and seen == [not deterministic] * 2
