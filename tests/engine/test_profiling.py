"""`--profile N`: what it writes, that training is the same with it, how its table is made; that waiting for data shows."""

import json
import re
import sys
import time
from unittest import mock

import numpy as np
import pytest

from crossbatch import InputError
from crossbatch.engine.config import Device, load_config, resolve
from crossbatch.engine.runtime.profiling import steps_needed, table
from crossbatch.engine.runtime.world import world_from_environment
from tests.small_runs import BASE, LARS, RESNET, losses, pretrainer, zero

SLOW_S = 0.1


def profiled(out: str, steps: int, profile: int, slow: bool = False) -> str:
    """One run on this rank of a pool, in two chunks; `slow`: its images take SLOW_S a batch."""

    from crossbatch.data import TrainLoader

    world = world_from_environment()
    overrides = [*RESNET, *LARS, *zero(1), f"train_micro_batch_size_per_gpu={6 // world.size}"]
    run = resolve(load_config(None, [*BASE, *overrides]), world.size, Device("cpu"))
    prompt = TrainLoader._batch

    def late(*arguments):
        time.sleep(SLOW_S)
        return prompt(*arguments)

    with mock.patch.object(TrainLoader, "_batch", late if slow else prompt):
        try:
            pretrainer(run, out, "none", steps, profile_steps=profile).train()
        except InputError as error:
            return str(error)
    return ""


@pytest.mark.long
def test_a_profiled_run_trains_the_same_and_leaves_table_and_traces(tmp_path, two_ranks):
    two_ranks.run(profiled, str(tmp_path / "plain"), 8, 0)
    assert two_ranks.run(profiled, str(tmp_path / "run"), steps_needed(2), 2) == ["", ""]
    assert losses(tmp_path / "run") == losses(tmp_path / "plain")
    facts = json.loads((tmp_path / "run/profile/stages.json").read_text())
    assert (facts["steps"], facts["train_batch_size"]) == (2, 12)
    rows = facts["ms"]
    assert next(iter(rows)) == "data wait" and list(rows)[-2:] == ["between steps", "iteration"]
    assert {"online and momentum features", "second pass", "backward", "optimizer", "other"} < set(rows)
    parts = [row for name, row in rows.items() if name != "iteration"]
    assert sum(row["share"] for row in parts) == pytest.approx(1, abs=1e-9)
    assert facts["images_per_s"] == pytest.approx(12 / rows["iteration"]["p50"] * 1000)
    text = (tmp_path / "run/profile/stages.md").read_text()
    assert re.search(r"\| second pass \| [\d.]+ \| [\d.]+ \| [\d.]+ \| [\d.]+ % \|", text)
    for rank in (0, 1):
        (trace,) = (tmp_path / "run/profile").glob(f"rank{rank}.*.pt.trace.json")
        events = json.loads(trace.read_text())["traceEvents"]
        names = [event.get("name") for event in events if event.get("ph") == "X"]
        assert names.count("step") == 2 and names.count("second pass") == 2  # of two chunks, one a step
        assert {"ProfilerStep#6", "ProfilerStep#7", "online and momentum features", "moving average"} <= set(names)
        # The momentum encoder runs in threads of its own.
        assert len({event["tid"] for event in events if event.get("name") == "aten::conv2d"}) > 1


def test_too_many_steps_to_profile_are_refused(tmp_path, one_rank):
    (message,) = one_rank.run(profiled, str(tmp_path / "run"), 9, 3)
    assert "--profile: given 3, which takes 10 steps" in message and "9 left" in message


def test_too_few_steps_asked_for_are_refused_before_anything_is_written(tmp_path, monkeypatch):
    from crossbatch.launch import pretrain

    out = tmp_path / "run"
    given = ["--deepspeed_config", "ds_configs/quickstart.json", "--out", str(out), "--profile", "2", "--steps", "7"]
    monkeypatch.setattr(sys, "argv", ["pretrain.py", *given])
    with pytest.raises(InputError, match="--profile: given 2, which takes 8 steps"):
        pretrain.main()
    assert not out.exists()


@pytest.mark.long
def test_waiting_for_data_is_what_the_loader_takes(tmp_path, one_rank):
    """Each batch takes SLOW_S before it is there, and no worker prepares it meanwhile."""
    one_rank.run(profiled, str(tmp_path / "slow"), 8, 2, True)
    one_rank.run(profiled, str(tmp_path / "prompt"), 2, 0)
    slow, prompt = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("slow", "prompt")
    )
    for line in slow:
        assert 1000 * SLOW_S <= line["data_wait_ms"] < line["step_ms"]
        assert line["data_wait_ms"] + sum(line["stage_ms"].values()) < line["step_ms"]
    assert min(line["data_wait_ms"] for line in prompt) < 1000 * SLOW_S
    assert slow[0]["stage_ms"].keys() == prompt[0]["stage_ms"].keys()
    assert {"host_to_device", "batch_wide_part", "second_pass"} < slow[0]["stage_ms"].keys()
    waited = json.loads((tmp_path / "slow/profile/stages.json").read_text())["ms"]["data wait"]
    assert waited["p20"] >= 1000 * SLOW_S


def test_table_by_hand():
    steps = [
        {"data wait": 1.0, "backward": 4.0, "between steps": 0.0, "iteration": 5.0},
        {"data wait": 3.0, "backward": 6.0, "second pass": 1.0, "between steps": 5.0, "iteration": 15.0},
    ]
    rows = table(steps)
    assert list(rows) == ["data wait", "backward", "between steps", "second pass", "iteration"]
    assert rows["second pass"]["share"] == pytest.approx(1 / 20) and rows["iteration"]["share"] == 1
    for name, values in {"data wait": [1, 3], "second pass": [0, 1]}.items():
        want = np.percentile(values, (20, 50, 80))
        assert [rows[name][p] for p in ("p20", "p50", "p80")] == pytest.approx(list(want))


def test_the_flag(monkeypatch, capsys):
    from crossbatch.launch import pretrain

    for given, profile in (([], 0), (["--profile", "5"], 5)):
        monkeypatch.setattr(sys, "argv", ["pretrain.py", *given])
        assert pretrain.parse_arguments().profile == profile
    monkeypatch.setattr(sys, "argv", ["pretrain.py", "--profile", "0"])
    with pytest.raises(SystemExit):
        pretrain.parse_arguments()
    assert "given 0; allowed: a whole number >= 1" in capsys.readouterr().err
