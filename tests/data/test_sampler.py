"""Tests sampler.py: every image once, the same global order on any number of ranks."""

import numpy as np
import pytest

from crossbatch.data.sampler import GlobalBatchSampler, evaluation_share


def epoch_of(epoch: int, size: int, batch: int, world_size: int, window: int = 0) -> np.ndarray:
    """Return the global order of an epoch, put together from all ranks."""
    ranks = [GlobalBatchSampler(3, size, batch, world_size, rank, window) for rank in range(world_size)]
    return np.concatenate([o.batch(epoch, step) for step in range(ranks[0].steps_per_epoch) for o in ranks])


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_image_at_most_once_and_all_but_the_remainder(world_size):
    order = epoch_of(0, 1003, 100, world_size)
    assert len(order) == len(set(order.tolist())) == 1000
    assert order.min() >= 0 and order.max() < 1003


def test_every_image_once_when_the_batch_divides_the_size():
    assert sorted(epoch_of(5, 96, 32, 2).tolist()) == list(range(96))


def test_the_global_order_does_not_depend_on_the_world_size():
    for epoch in (0, 1, 7):
        alone = epoch_of(epoch, 203, 20, 1)
        assert np.array_equal(alone, epoch_of(epoch, 203, 20, 2))
        assert np.array_equal(alone, epoch_of(epoch, 203, 20, 4))


def test_a_rank_reads_a_contiguous_run_of_the_global_batch():
    whole = GlobalBatchSampler(1, 50, 12).batch(2, 3)
    assert np.array_equal(GlobalBatchSampler(1, 50, 12, world_size=3, rank=1).batch(2, 3), whole[4:8])


def test_epochs_and_seeds_differ_and_return():
    order = GlobalBatchSampler(0, 500, 500)
    first = order.batch(0, 0)
    assert not np.array_equal(first, order.batch(1, 0))
    assert not np.array_equal(first, GlobalBatchSampler(1, 500, 500).batch(0, 0))
    assert np.array_equal(first, order.batch(0, 0))  # after the cache went to epoch 1
    assert not np.array_equal(np.sort(first), first)
    assert abs(np.corrcoef(first, np.arange(500))[0, 1]) < 0.2


def test_golden_order():
    """Changing this changes the data order of every run: checkpoints would not resume."""
    assert GlobalBatchSampler(3, 20, 4).batch(1, 2).tolist() == [9, 10, 15, 13]


def test_a_batch_may_be_written_to_without_touching_the_order():
    order = GlobalBatchSampler(0, 10, 5)
    order.batch(0, 0)[:] = -1
    assert order.batch(0, 0).min() >= 0


def test_numbers():
    order = GlobalBatchSampler(0, 1003, 100, world_size=4, rank=2)
    assert (order.steps_per_epoch, order.local_batch) == (10, 25)
    assert order.batch(0, 0).dtype == np.int64


def test_too_few_images():
    with pytest.raises(ValueError, match=r"`num_images` \(=63\) is smaller than `global_batch` \(=64\).*at most 63"):
        GlobalBatchSampler(0, 63, 64)


def test_ranks_that_cannot_share_equally():
    with pytest.raises(ValueError, match=r"`global_batch` \(=10\).*divisible by `world_size` \(=3\).*such as 12"):
        GlobalBatchSampler(0, 100, 10, world_size=3)


def test_positions_outside_the_epoch():
    for step in (-1, 10):
        with pytest.raises(ValueError, match="must be in"):
            GlobalBatchSampler(0, 100, 10).batch(0, step)
    with pytest.raises(ValueError, match="rank"):
        GlobalBatchSampler(0, 100, 10, world_size=2, rank=2)


@pytest.mark.parametrize(("size", "window"), [(1000, 100), (1003, 117), (997, 30), (40, 37), (20, 20)])
def test_a_shuffle_window_keeps_all_other_promises(size, window):
    for epoch in (0, 4):
        alone = epoch_of(epoch, size, 20, 1, window)
        assert len(alone) == len(set(alone.tolist())) == size // 20 * 20
        assert alone.min() >= 0 and alone.max() < size
        for world_size in (2, 4):
            assert np.array_equal(alone, epoch_of(epoch, size, 20, world_size, window))
    if size > window:
        assert not np.array_equal(epoch_of(0, size, 20, 1, window), epoch_of(1, size, 20, 1, window))


def test_a_window_reads_few_places_and_mixes_them():
    """A window of 1024 images holds 32 runs of 32 neighbours from all over, in no order; other runs meet in each epoch."""
    order = GlobalBatchSampler(0, 32_000, 1024, shuffle_window=1024)
    together = []
    for epoch in (0, 1):
        runs = order.batch(epoch, 3) // 32
        assert len(set(runs.tolist())) == 32 and all(count == 32 for count in np.bincount(runs) if count)
        assert runs.max() - runs.min() > 500
        assert np.abs(np.corrcoef(order.batch(epoch, 3), np.arange(1024))[0, 1]) < 0.15
        assert (np.diff(order.batch(epoch, 3)) == 1).mean() < 0.02
        together.append({frozenset(pair) for pair in zip(sorted(set(runs))[:-1], sorted(set(runs))[1:], strict=True)})
    assert len(together[0] & together[1]) < 5


def test_a_window_of_everything_is_none():
    assert np.array_equal(epoch_of(2, 500, 20, 1, window=500 + 22), epoch_of(2, 500, 20, 1))


def test_golden_order_with_a_window():
    """Changing this changes the data order of every run: checkpoints would not resume."""
    assert GlobalBatchSampler(3, 40, 9, shuffle_window=9).batch(1, 2).tolist() == [4, 0, 2, 1, 9, 10, 3, 11, 5]


def test_a_window_smaller_than_a_batch():
    with pytest.raises(
        ValueError, match=r"`shuffle_window` \(=16\) is smaller than `global_batch` \(=20\).*such as 80"
    ):
        GlobalBatchSampler(0, 100, 20, shuffle_window=16)


@pytest.mark.parametrize(("size", "world_size"), [(10, 3), (2, 4), (0, 2), (1001, 8)])
def test_evaluation_shares_cover_everything_once(size, world_size):
    shares = [evaluation_share(size, world_size, rank) for rank in range(world_size)]
    assert np.concatenate(shares).tolist() == list(range(size))
    lengths = [len(share) for share in shares]
    assert max(lengths) - min(lengths) <= 1
