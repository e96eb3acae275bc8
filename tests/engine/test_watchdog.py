"""Whose fault it is that a run stands still (with processes that die: launch/test_faults.py)."""

import time

import pytest

from crossbatch import RunStopped
from crossbatch.engine.runtime.watchdog import PHASES, RankStatus, Watchdog
from crossbatch.engine.runtime.world import World, world_from_environment

DATA, TRAINING = PHASES.index("waiting for data"), PHASES.index("training")


def suspect_among(*ranks: RankStatus) -> str:
    """Seen from rank 0, with a timeout of 30 beats and 10 for silence."""
    watchdog = Watchdog(World(0, len(ranks), 0, 1), 30)
    watchdog._ranks = list(ranks)
    return watchdog._suspect(silent_beats=10, still_beats=30)


def test_a_silent_rank_is_named():
    found = suspect_among(
        RankStatus(5, (3, TRAINING)), RankStatus(9, (3, TRAINING)), RankStatus(9, (3, TRAINING), silent_beats=12)
    )
    assert found == "rank 2 is gone or does not answer (12 s without a sign)"


def test_the_one_that_the_others_wait_for_is_named():
    waiting = RankStatus(5, (3, TRAINING), still_beats=31)
    slow = RankStatus(5, (3, DATA), still_beats=35)
    assert suspect_among(waiting, slow, waiting) == (
        "rank 1 keeps the others waiting: waiting for data after step 3 for 35 s"
    )
    assert suspect_among(slow, waiting)  # also if it is this one


def test_nobody_is_to_blame_while_time_is_left_or_all_do_the_same():
    waiting, slow = RankStatus(5, (3, TRAINING), still_beats=12), RankStatus(5, (3, DATA), still_beats=35)
    assert suspect_among(waiting, slow) == ""
    stuck = RankStatus(5, (3, TRAINING), still_beats=500)  # a long step
    assert suspect_among(stuck, stuck) == ""


def test_all_gpus_in_one_step_wait_for_messages_that_do_not_come():
    watchdog = Watchdog(World(0, 2, 0, 1), 30)
    watchdog._ranks = [RankStatus(5, (3, TRAINING), still_beats=31), RankStatus(5, (3, TRAINING), still_beats=40)]
    assert watchdog._all_stuck(30) == ""  # on CPUs: a long step
    watchdog._on_gpus = True
    assert watchdog._all_stuck(30) == (
        "rank 0 and all others stand still: training after step 3 for 31 s; look at the network"
    )
    assert watchdog._all_stuck(32) == ""
    watchdog._ranks[1].at = (3, DATA)
    assert watchdog._all_stuck(30) == ""
    watchdog._ranks[0].at = (3, DATA)
    assert watchdog._all_stuck(30) == "" and watchdog._all_stuck(5)


def test_beats_count_only_while_nothing_changes():
    rank = RankStatus()
    for count, at in ((1, DATA), (2, DATA), (2, DATA), (2, TRAINING)):
        rank.update(count, 7, at)
    assert (rank.silent_beats, rank.still_beats) == (2, 0)


def one_rank_stops(seconds: float) -> str:
    """Rank 1 leaves with a message while rank 0 waits for it in a collective that fails."""
    world = world_from_environment()
    try:
        with Watchdog(world, 30) as watchdog:
            watchdog.set_phase(3, "training")
            if world.rank == 1:
                raise RunStopped("16 broken images in a row")
            time.sleep(seconds)
            raise RuntimeError("gloo: connection closed by peer")
    except RunStopped as stopped:
        return str(stopped)
    return "nothing"


@pytest.mark.parametrize("seconds", [0.0, pytest.param(3.0, marks=pytest.mark.slow)])
def test_a_rank_that_stops_tells_the_others_why(two_ranks, seconds):
    first, second = two_ranks.run(one_rank_stops, seconds)
    assert second == "16 broken images in a row"
    assert first.startswith("rank 1 stopped: 16 broken images in a row; the last checkpoint is good")
