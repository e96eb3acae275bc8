"""Copies of the state in host memory: who keeps them, when they are used, and when there are none."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from crossbatch.engine.checkpoint import memory, read
from crossbatch.engine.checkpoint.memory import Part, buddies, folder_of, read_attempts, run_of, share_on_node
from crossbatch.engine.checkpoint.recovery import needed_parts
from tests.jobs import metrics
from tests.small_runs import ADAMW, LARS, VIT, fsdp, name_of, parameters, run, zero

EVERY_STEP = [
    *VIT,
    *ADAMW,
    *zero(1),
    "crossbatch.checkpoint.memory_every_steps=1",
    "crossbatch.checkpoint.every_steps=100",
]


@pytest.mark.parametrize(
    ("leaders", "expected"),
    [
        ([0], [None]),
        ([0, 0, 0], [None, None, None]),
        ([0, 1, 2], [1, 2, 0]),
        ([0, 0, 2, 2], [2, 3, 0, 1]),
        ([0, 0, 0, 3], [3, 3, 3, 0]),
    ],
)
def test_a_second_copy_is_on_the_next_node(leaders, expected):
    assert buddies(leaders) == expected


@pytest.mark.parametrize("leaders", [[0, 0, 2, 2], [0, 0, 0, 3], [0, 1, 2, 3]])
def test_the_ranks_of_a_node_have_all_shares(leaders):
    """Also where each rank counts as a node, because it sees one GPU only and has LOCAL_RANK 0."""
    found = [share_on_node(leaders, rank) for rank in range(4)]
    for leader in set(leaders):
        of_node = [share for share, its in zip(found, leaders, strict=True) if its == leader]
        assert of_node == [(number, len(of_node)) for number in range(len(of_node))]


def test_what_a_gpu_holds_comes_first_and_is_staged():
    """So that it goes to the host in one piece; random states and counts are on the host already."""
    on_cpu = torch.arange(6, dtype=torch.int64)
    with FakeTensorMode():
        on_gpu = torch.empty(7, device="cuda")
    part = Part("rank0", {("random", 0): on_cpu, ("weight", 0): on_gpu})
    assert [place.name for place in part.places] == ["weight", "random"]
    assert (part.staged_bytes, part.num_bytes) == (64, 128)
    assert Part("rank0", {("random", 0): on_cpu}).staged_bytes == 0


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        (["rank0", "node0of1"], ["rank0", "rank1", "node0of1"]),
        (["node0of2", "node1of2", "rank1"], ["rank0", "rank1", "node0of2", "node1of2"]),
        (["node1of3", "node0of1", "node2of3"], ["rank0", "rank1", "node0of1"]),  # nodes of three ranks and of one
        (["node1of3", "node0of3", "node0of2"], ["rank0", "rank1", "node0of2", "node1of2"]),
        ([], ["rank0", "rank1", "node0of1"]),
    ],
)
def test_what_a_whole_state_needs(parts, expected):
    assert needed_parts(parts, 2) == expected


def forget_nothing():
    return lambda self: None


def seeing_one_gpu():
    """Two tasks on a node, each with a GPU of its own."""
    from crossbatch.engine.runtime.world import World, world_from_environment

    found = world_from_environment()
    return lambda: World(found.rank, found.size, 0, 2)


def test_ranks_that_see_one_gpu_each_go_on_from_memory(two_ranks, tmp_path):
    out = tmp_path / "run"
    patches = [
        ("crossbatch.engine.checkpoint.memory.MemoryCopies.forget", forget_nothing),
        ("tests.small_runs.world_from_environment", seeing_one_gpu),
    ]
    assert two_ranks.run(run, EVERY_STEP, str(out), 3, "auto", (), patches) == ["", ""]
    (attempt,) = read_attempts(out)
    folder = folder_of(attempt)
    try:
        found = two_ranks.run(recover_with, str(out), run_of(folder)["fingerprint"], 2)
        assert [step for _, step, _ in found] == [3, 3], found
        assert {file.name.partition("-")[0] for file in folder.glob("node*")} == {"node0of1"}
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def nodes_of_two_and_one():
    """Three ranks, the last one alone on its node."""
    from crossbatch.engine.runtime.world import World, world_from_environment

    rank = world_from_environment().rank
    return lambda: World(rank, 3, rank % 2, 1 if rank == 2 else 2)


def test_nodes_of_different_sizes_go_on_from_memory(pools, tmp_path):
    """Each has other shares of what every rank holds; either node's are enough."""
    out = tmp_path / "run"
    patches = [
        ("crossbatch.engine.checkpoint.memory.MemoryCopies.forget", forget_nothing),
        ("tests.small_runs.world_from_environment", nodes_of_two_and_one),
    ]
    three_ranks = pools(3)
    assert three_ranks.run(run, [*EVERY_STEP, "train_batch_size=6"], str(out), 3, "auto", (), patches) == [""] * 3
    (attempt,) = read_attempts(out)
    folder = folder_of(attempt)
    try:
        shares_of = {node: sorted(folder.glob(f"node*of{node}-by*-*.json")) for node in (1, 2)}
        assert shares_of[1] and shares_of[2]
        sent = [json.loads(file.read_text()) for file in folder.glob("rank0-by2-*.json")]  # rank 0 writes the lines
        assert 3 in [counts["line"]["step"] for counts in sent]
        for lost in (1, 2):
            kept = {file: file.read_text() for file in shares_of[lost]}
            for file in kept:
                file.unlink()
            found = three_ranks.run(recover_with, str(out), run_of(folder)["fingerprint"], 2)
            assert {step for _, step, _ in found} == {3}, found
            ours, saved = read(found[0][0], "parameters."), parameters(out)
            assert ours.keys() == saved.keys() and all(ours[name].equal(saved[name]) for name in saved)
            for file, text in kept.items():
                file.write_text(text)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def recover_with(out: str, fingerprint: str, newer_than: int):
    """On a rank of a pool."""
    from crossbatch.engine.checkpoint.recovery import recover
    from crossbatch.engine.runtime.world import world_from_environment

    found = recover(Path(out), fingerprint, newer_than, world_from_environment(), 60)
    return found.checkpoint, found.step, found.note


def test_a_copy_is_a_checkpoint_and_used_only_by_its_run_if_it_is_newer(two_ranks, tmp_path):
    out = tmp_path / "run"
    stays = [("crossbatch.engine.checkpoint.memory.MemoryCopies.forget", forget_nothing)]
    assert two_ranks.run(run, EVERY_STEP, str(out), 3, "auto", (), stays) == ["", ""]
    (attempt,) = read_attempts(out)
    folder = folder_of(attempt)
    try:
        fingerprint = run_of(folder)["fingerprint"]
        for other in ((fingerprint, 3), ("of another run", 0)):
            assert two_ranks.run(recover_with, str(out), *other) == [(None, 0, "")] * 2
        found = two_ranks.run(recover_with, str(out), fingerprint, 2)
        assert found[0] == found[1] and found[0][1] == 3
        ours, saved = read(found[0][0], "parameters."), parameters(out)
        assert ours.keys() == saved.keys() and all(ours[name].equal(saved[name]) for name in saved)
        for file, lost in (
            ("node1of2-by*-*.json", "no node has these shares of what every rank held: node1of2"),
            ("rank1-*-*.json", "no node has the slices of rank 1"),
        ):
            for copy in folder.glob(file):
                copy.unlink()
            told = f"warning: step 3 in memory is lost: {lost}"
            assert two_ranks.run(recover_with, str(out), fingerprint, 2) == [(None, 0, told)] * 2
        (out / "memory.json").write_text(json.dumps({"attempts": ["another"]}))
        two_ranks.run(recover_with, str(out), fingerprint, 2)
        assert not folder.exists()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def nothing():
    return 0.0


def test_a_run_without_room_says_so_once_and_goes_on(two_ranks, tmp_path):
    out = tmp_path / "run"
    full = [("crossbatch.engine.checkpoint.memory.SHARE_OF_FREE", nothing)]
    assert two_ranks.run(run, EVERY_STEP, str(out), 3, "auto", (), full) == ["", ""]
    told = Path(f"{out}.told").read_text()
    assert told.count("no copies in host memory, a restart goes on from the last checkpoint: rank 0: copies need ") == 1
    assert parameters(out) and not (out / "memory.json").exists()


def rank_1_without_room():
    from crossbatch.engine.checkpoint import memory
    from crossbatch.engine.runtime.world import world_from_environment

    complete = memory._complete
    full = world_from_environment().rank == 1

    def replacement(slots, counts):
        return "OSError: No space left on device" if full and counts["step"] == 2 else complete(slots, counts)

    return replacement


def test_what_fails_on_one_rank_is_told_to_all_which_go_on_without_copies(two_ranks, tmp_path):
    """Or the others would wait for that rank in the next transfer."""
    out = tmp_path / "run"
    patches = [("crossbatch.engine.checkpoint.memory._complete", rank_1_without_room)]
    assert two_ranks.run(run, EVERY_STEP, str(out), 5, "auto", (), patches) == ["", ""]
    told = Path(f"{out}.told").read_text()
    assert told.count("no more copies in host memory") == 1 and "another rank could not keep its copy" in told
    assert [line["step"] for line in metrics(out)] == [1, 2, 3, 4, 5]


def nodes_of_one():
    """Two ranks, each alone on its node."""
    from crossbatch.engine.runtime.world import World, world_from_environment

    rank = world_from_environment().rank
    return lambda: World(rank, 2, 0, 1)


def with_an_event():
    """Copies as on a GPU, which tells by an event when a copy is done."""
    from crossbatch.engine.checkpoint.memory import MemoryCopies

    copy = MemoryCopies._copy
    return lambda self, slot: copy(self, slot) or object()


def failing_on_rank_1():
    """The GPU of rank 1 fails while its second copy is under way."""
    from crossbatch.engine.runtime.world import world_from_environment

    waited = [] if world_from_environment().rank == 1 else None

    def replacement(copied):
        if waited is not None:
            waited.append(copied)
            if len(waited) == 2:
                raise RuntimeError("CUDA error: an illegal memory access was encountered")

    return replacement


def test_what_a_failed_gpu_has_copied_is_nobodys_and_the_rest_is_kept(two_ranks, tmp_path):
    out = tmp_path / "run"
    patches = [
        ("tests.small_runs.world_from_environment", nodes_of_one),
        ("crossbatch.engine.checkpoint.memory.MemoryCopies._copy", with_an_event),
        ("crossbatch.engine.checkpoint.memory._wait_for", failing_on_rank_1),
        ("crossbatch.engine.checkpoint.memory.MemoryCopies.forget", forget_nothing),
    ]
    assert two_ranks.run(run, EVERY_STEP, str(out), 4, "auto", (), patches) == ["", ""]
    (attempt,) = read_attempts(out)
    folder = folder_of(attempt)
    try:
        kept = {
            name: sorted(json.loads(file.read_text())["step"] for file in folder.glob(f"{name}-?.json"))
            for name in ("rank0-by0", "rank0-by1", "rank1-by0", "rank1-by1")
        }
        # Rank 1 has completed its copy of step 3 before it heard of the failure; rank 0's of step 2 was kept.
        assert kept["rank1-by0"] == [1] and kept["rank0-by1"] == [1, 2], kept
        assert 2 not in kept["rank1-by1"] and {1, 2} <= set(kept["rank0-by0"]), kept
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def dying_before_line_3():
    from crossbatch import RunStopped
    from crossbatch.engine.run_log import RunLog

    record = RunLog.record

    def replacement(self, values):
        if values["step"] == 3:
            raise RunStopped("died")
        record(self, values)

    return replacement


def test_the_line_of_a_copied_step_is_written_after_the_death_of_its_writer(one_rank, tmp_path):
    patches = [("crossbatch.engine.run_log.RunLog.record", dying_before_line_3)]
    assert one_rank.run(run, EVERY_STEP, str(tmp_path / "dies"), 5, "auto", (), patches) == ["RunStopped: died"]
    assert [line["step"] for line in metrics(tmp_path / "dies")] == [1, 2]
    for out in ("dies", "lives"):
        assert one_rank.run(run, EVERY_STEP, str(tmp_path / out), 5) == [""]
    assert "resumed /dev/shm/" in Path(f"{tmp_path / 'dies'}.told").read_text()
    assert metrics(tmp_path / "dies") == metrics(tmp_path / "lives")


def test_memory_that_cannot_be_pinned_is_an_error_with_its_size(monkeypatch):
    monkeypatch.setattr(torch.cuda, "cudart", lambda: SimpleNamespace(cudaHostRegister=lambda *_: 2))
    with pytest.raises(OSError, match=r"4 MiB of /dev/shm cannot be pinned \(CUDA error 2\)"):
        memory._pin(torch.empty(2**20))


@pytest.mark.parametrize("backend", [pytest.param(zero(2), marks=pytest.mark.slow), fsdp(3)], ids=name_of)
def test_copies_change_no_bit(two_ranks, tmp_path, backend):
    for out, every in (("without", 0), ("with", 1)):
        settings = [*VIT, *LARS, *backend, f"crossbatch.checkpoint.memory_every_steps={every}"]
        assert two_ranks.run(run, settings, str(tmp_path / out), 4) == ["", ""]
    ours, theirs = parameters(tmp_path / "with"), parameters(tmp_path / "without")
    assert all(ours[name].equal(theirs[name]) for name in theirs)
    assert metrics(tmp_path / "with") == metrics(tmp_path / "without")
