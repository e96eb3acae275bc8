"""What a run does when numbers, data, disk or a checkpoint fail (processes that die are in launch/test_faults.py)."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from crossbatch import RunStopped
from crossbatch.engine import checkpoint
from crossbatch.engine.config import WatchConfig
from crossbatch.engine.runtime.nonfinite import Backup, LossMonitor
from crossbatch.engine.runtime.world import world_from_environment
from tests.small_runs import ADAMW, LARS, RESNET, VIT, fsdp, losses, run, zero


def told(out: Path) -> str:
    return Path(f"{out}.told").read_text()


def state(out: Path, step: int) -> dict:
    folder = out / "checkpoints" / f"step-{step:08d}"
    return checkpoint.read(folder, "parameters.") | checkpoint.read(folder, "buffers.")


def equal(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(tensor.equal(other[name]) for name, tensor in one.items())


# --- not finite --------------------------------------------------------------------------------------------------------


class poisoned_from:
    """Makes the loss NaN on rank 1 (or the only one) from step `first` on, for `count` steps."""

    def __init__(self, first: int, count: int = 10**9):
        self.first, self.count = first, count

    def __call__(self):
        from crossbatch.models import MoCo

        contrast, guilty = MoCo.contrast, world_from_environment().size - 1

        def poisoned(model, online, momentum, step, seed):
            if world_from_environment().rank == guilty and self.first <= step < self.first + self.count:
                online = online * math.nan
            return contrast(model, online, momentum, step, seed)

        return poisoned


CONTRAST = "crossbatch.models.MoCo.contrast"


@pytest.mark.parametrize(
    ("model", "backend"),
    [(VIT, fsdp(3)), pytest.param(RESNET, zero(1), marks=pytest.mark.slow)],
    ids=["vit-fsdp3", "resnet-zero1"],
)
def test_steps_that_are_not_finite_change_nothing_and_end_the_run_with_the_state_before_them(
    tmp_path, pools, model, backend
):
    settings = [*model, *LARS, *backend, "crossbatch.watch.max_nonfinite_steps=3"]
    stopped = pools(2).run(run, settings, str(tmp_path), 12, "auto", (), ((CONTRAST, poisoned_from(5)),))
    for message in stopped:
        assert message.startswith(
            "RunStopped: 3 steps in a row were skipped: non-finite on rank 1: features, loss, loss term q1o_k2o "
        )
        assert "step 5, before them, is saved" in message
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text  # which are not JSON
    lines = [json.loads(line) for line in text.splitlines()]
    assert [line["loss"] is None for line in lines] == [False] * 5 + [True] * 2
    pools(2).run(run, settings, str(tmp_path / "want"), 5)
    assert equal(state(tmp_path, 5), state(tmp_path / "want", 5))
    assert checkpoint.candidates(tmp_path, "auto")[0].name == "step-00000005"
    assert pools(2).run(run, settings, str(tmp_path), 7) == ["", ""]  # what was wrong has been repaired
    pools(2).run(run, settings, str(tmp_path / "want"), 7)
    assert losses(tmp_path) == losses(tmp_path / "want")


def test_two_bad_steps_are_survived_and_rates_are_those_of_the_step(tmp_path, one_rank):
    """A skipped step moves neither the schedule nor the average: its rate comes again, and it has no momentum."""
    settings = [*VIT, *LARS, "crossbatch.watch.max_nonfinite_steps=3", "crossbatch.momentum.cosine=true"]
    assert one_rank.run(run, settings, str(tmp_path), 6, "auto", (), ((CONTRAST, poisoned_from(2, 2)),)) == [""]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["skipped_steps"] for line in lines] == [0, 0, 1, 2, 2, 2]
    peak, updates_before = 0.05 * 12 / 256, [0, 1, 2, 2, 2, 3]  # the first of five epochs, four steps long, is warm-up
    assert [line["lr"] for line in lines] == pytest.approx([peak * updates / 4 for updates in updates_before])
    momenta = [1 - 0.1 * (1 + math.cos(math.pi * updates / 20)) / 2 for updates in (1, 2, 3, 4)]
    assert [line["momentum"] for line in lines] == pytest.approx([*momenta[:2], None, None, *momenta[2:]])


def test_statistics_come_back_in_a_launch_for_each_dtype(monkeypatch):
    statistics = [torch.randn(5), torch.tensor(3), torch.randn(2, 4).T, torch.tensor(7), torch.tensor([math.nan])]
    want, calls, copy = [tensor.clone() for tensor in statistics], [], torch._foreach_copy_
    monkeypatch.setattr(torch, "_foreach_copy_", lambda *lists: calls.append(lists) or copy(*lists))
    backup = Backup(statistics)
    backup.take()
    for tensor in statistics:
        tensor.fill_(9)
    backup.restore()
    for tensor, before in zip(statistics, want, strict=True):
        torch.testing.assert_close(tensor, before, rtol=0, atol=0, equal_nan=True)
    assert len(calls) == 4 and all(len({x.dtype for x in one}) == 1 for lists in calls for one in lists)


# --- alarms ------------------------------------------------------------------------------------------------------------


def test_a_jump_of_the_loss_is_told():
    alarms = LossMonitor(WatchConfig())
    quiet = [5 + 0.01 * (step % 3) for step in range(40)]
    assert [alarms.check(loss, 0.5) for loss in quiet] == [[]] * 40
    (text,) = alarms.check(6.0, 0.5)
    assert text.startswith("loss jumped to 6, ")
    assert alarms.check(5.0, 0.5) == []
    assert LossMonitor(WatchConfig(spike_sigmas=0)).check(1e9, 0.5) == []


def test_collapse_is_told_once():
    alarms = LossMonitor(WatchConfig())
    told = [alarms.check(5.0, deviation) for deviation in (0.5, 0.2, 0.04, 0.03, 0.2, 0.01)]
    assert [len(texts) for texts in told] == [0, 0, 1, 0, 0, 1]
    assert "feature_std fell to 0.04" in told[2][0] and "collapse" in told[2][0]
    told = [alarms.check(5.0, 0.5, rank) for rank in (20.0, 1.2, None, 1.1, 9.0, 1.0)]
    assert [len(texts) for texts in told] == [0, 1, 0, 0, 0, 1]  # most lines have no rank
    assert "effective_rank fell to 1.2" in told[1][0] and "along a line only (collapse)" in told[1][0]
    assert LossMonitor(WatchConfig(collapse_rank=0)).check(5.0, 0.5, 1.0) == []


# --- data and disk -----------------------------------------------------------------------------------------------------


def no_data_on_rank_1_at_step_3():
    """For TrainData.batches."""
    from crossbatch.engine.datasets import TrainData

    batches = TrainData.batches

    def failing(data, first_step):
        for number, batch in enumerate(batches(data, first_step)):
            if number == 3 and world_from_environment().rank == 1:
                raise RunStopped("data: 16 images in a row were broken")
            yield batch

    return failing


def test_a_rank_without_data_lets_all_save_before_it_stops(tmp_path, pools):
    patches = (("crossbatch.engine.datasets.TrainData.batches", no_data_on_rank_1_at_step_3),)
    stopped = pools(2).run(run, [*VIT, *LARS, *zero(1)], str(tmp_path), 8, "auto", (), patches)
    assert stopped == [
        "RunStopped: rank 1 could not load its next batch; step 3 is saved",
        "RunStopped: data: 16 images in a row were broken; step 3 is saved",
    ]
    assert checkpoint.candidates(tmp_path, "auto")[0].name == "step-00000003"


class folder_vanishes_at:
    """For CheckpointSchedule.boundary: somebody deletes checkpoints/ at a step."""

    def __init__(self, step: int, folder: Path):
        self.step, self.folder = step, folder

    def __call__(self):
        from crossbatch.engine.checkpoint.schedule import CheckpointSchedule

        boundary = CheckpointSchedule.boundary

        def deleting(saves, step, any_busy):
            boundary(saves, step, any_busy)
            if step == self.step:
                shutil.rmtree(self.folder, ignore_errors=True)

        return deleting


def test_a_run_whose_checkpoints_are_deleted_goes_on_and_saves_again(tmp_path, one_rank):
    patches = (
        (
            "crossbatch.engine.checkpoint.schedule.CheckpointSchedule.boundary",
            folder_vanishes_at(4, tmp_path / "checkpoints"),
        ),
    )
    assert one_rank.run(run, [*VIT, *LARS], str(tmp_path), 8, "auto", (), patches) == [""]
    newest, before, *_ = [path.name for path in checkpoint.candidates(tmp_path, "auto")]
    assert newest == "step-00000008" and before > "step-00000004"  # of step 6, or later on a slow disk
    assert state(tmp_path, 8)


def slow_disk():
    """For store.write: a save takes longer than the steps until the next."""
    import time

    from crossbatch.engine.checkpoint import async_writer

    write = async_writer.write

    def slowly(*arguments):
        time.sleep(2)
        write(*arguments)

    return slowly


def test_a_slow_disk_delays_saves_and_not_training(tmp_path, pools):
    patches = (("crossbatch.engine.checkpoint.async_writer.write", slow_disk),)
    settings = [*VIT, *LARS, *zero(1), "crossbatch.checkpoint.keep=9"]
    assert pools(2).run(run, settings, str(tmp_path), 8, "auto", (), patches) == ["", ""]
    saved = [path.name for path in checkpoint.candidates(tmp_path, "auto")]
    assert saved[0] == "step-00000008" and len(saved) < 4
    assert "the disk is slow" in told(tmp_path)


# --- resuming ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory, pools):
    """A run of 4 steps on two ranks, with checkpoints of steps 2 and 4."""
    out = tmp_path_factory.mktemp("finished")
    assert pools(2).run(run, [*VIT, *ADAMW, *zero(1)], str(out), 4) == ["", ""]
    return out


@pytest.fixture
def copied(tmp_path, finished):
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture(scope="module")
def six_losses(tmp_path_factory, pools):
    """Of a run like `finished` that nothing has cut."""
    out = tmp_path_factory.mktemp("want")
    assert pools(2).run(run, [*VIT, *ADAMW, *zero(1)], str(out), 6) == ["", ""]
    return losses(out)


@pytest.mark.parametrize("damage", ["state.json", "0.bin"])
def test_a_damaged_checkpoint_is_passed_over_on_all_ranks(copied, six_losses, pools, damage):
    """The second file is checked by rank 1 only."""
    file = copied / "checkpoints" / "step-00000004" / damage
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert pools(2).run(run, [*VIT, *ADAMW, *zero(1)], str(copied), 6) == ["", ""]
    assert "warning: passed over" in told(copied) and "step-00000004: rank" in told(copied)
    assert "damaged: " in told(copied) and "step-00000002 at step 2" in told(copied)
    assert losses(copied) == six_losses


def test_a_run_whose_checkpoints_are_all_damaged_is_not_started_anew(copied, pools):
    for folder in (copied / "checkpoints").glob("step-*"):
        (folder / ".metadata").unlink()
    for message in pools(2).run(run, [*VIT, *ADAMW, *zero(1)], str(copied), 6):
        assert message.startswith("InputError: --resume: no checkpoint can be read")
        assert "step-00000002: " in message and "step-00000004: " in message


def test_another_configuration_is_refused_unless_it_is_allowed(copied, pools):
    changed = [*VIT, *ADAMW, *zero(1), "crossbatch.momentum.base=0.95"]
    for message in pools(2).run(run, changed, str(copied), 6):
        assert message.startswith("InputError")
        assert "crossbatch.momentum.base: was 0.9, is 0.95" in message
        assert "--allow-change crossbatch.momentum.base" in message
    assert pools(2).run(run, changed, str(copied), 6, "auto", ("crossbatch.momentum.base",)) == ["", ""]
    fewer = [*VIT, *ADAMW, *zero(1), "crossbatch.data.path=synthetic://40?size=20&classes=4"]
    assert "held 48 images, holds 40" in pools(2).run(run, fewer, str(copied), 8)[0]


def test_a_checkpoint_of_another_model_is_refused(copied, pools):
    other = [*RESNET, *ADAMW, *zero(1)]
    (message, _) = pools(2).run(run, other, str(copied), 6, "auto", ("crossbatch", "optimizer"))
    assert "belongs to another model or optimizer" in message


def test_a_step_can_be_resumed_into_another_run(copied, pools):
    """`--resume DIR/checkpoints/step-2 --out NEW`: the old run stays as it is."""
    chosen, out = copied / "checkpoints" / "step-00000002", copied.parent / "new"
    before = sorted(path.name for path in copied.rglob("*"))
    assert pools(2).run(run, [*VIT, *ADAMW, *zero(1)], str(out), 4, str(chosen)) == ["", ""]
    assert losses(out) == losses(copied)[2:]
    assert sorted(path.name for path in copied.rglob("*")) == before
