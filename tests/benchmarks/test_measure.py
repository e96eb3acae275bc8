"""Checks rows of calls with a known time and memory, the files that they are appended to, and the command line of stages."""

import json
import mmap
import multiprocessing
import os
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch

from benchmarks import measure, processes
from benchmarks.__main__ import chosen, measure_here
from benchmarks.__main__ import main as benchmarks
from benchmarks.measure import append, block_ms, call_ms, compare, machine, peak_mib, stored, summarise, take_turns
from benchmarks.rows import VERSION, Row, cells
from benchmarks.stages import STAGES, Effort
from crossbatch import InputError


def test_percentiles_and_ratio_by_hand():
    slow, fast = [10.0, 30.0, 20.0, 40.0, 50.0], [1.0, 2.0, 4.0]
    rows = {row.case: row for row in summarise({"plain": slow, "ours": fast}, {"n": 4})}
    # Linear between order statistics: p20 of five values lies at 0.2 * 4 = place 0.8, of three at 0.4.
    assert rows["plain"].p20 == pytest.approx(10 + 0.8 * 10)
    assert (rows["plain"].p50, rows["plain"].n, rows["plain"].ratio) == (30.0, 5, 1.0)
    assert rows["plain"].p80 == pytest.approx(40 + 0.2 * 10)
    assert rows["ours"].p20 == pytest.approx(1 + 0.4)
    assert (rows["ours"].p50, rows["ours"].ratio, rows["ours"].baseline) == (2.0, 15.0, "plain")


def test_compare_times_in_turns_after_a_warm_up_and_sees_memory():
    calls = []

    def sleep() -> None:
        calls.append("sleep")
        time.sleep(0.004)

    def allocate() -> None:
        calls.append("allocate")
        with mmap.mmap(-1, 40 << 20) as memory:  # whatever malloc keeps in this process
            for _ in range(40):
                memory.write(b"1" * (1 << 20))

    rows = compare({"a": sleep, "b": allocate}, {}, Effort.QUICK)
    assert calls == ["sleep"] * 2 + ["allocate"] * 2 + ["sleep", "allocate"] * rows[0].n
    assert rows[0].n >= 2 and 4 <= rows[0].p20 < 40 and rows[1].baseline == "a"
    assert rows[0].peak_mib is not None and rows[1].peak_mib is not None
    assert rows[1].peak_mib - rows[0].peak_mib == pytest.approx(40, abs=8)
    assert peak_mib(allocate) == pytest.approx(40, abs=8)


def busy(seconds: float) -> None:
    """Use the CPU for so many seconds of its own clock, in this process."""
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def test_cpu_time_stands_beside_wall_time_and_counts_other_processes():
    """A call that sleeps costs nothing; one in a worker that lived before costs as much as in this process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        pool.submit(busy, 0).result()
        cases = {"here": lambda: busy(0.05), "sleep": lambda: time.sleep(0.05)}
        cases["there"] = lambda: pool.submit(busy, 0.05).result()
        here, sleep, there = summarise(take_turns(cases, 0, 2, call_ms), {})
    assert here.cpu_ms == pytest.approx(50, rel=0.2) and there.cpu_ms == pytest.approx(50, rel=0.3)
    assert sleep.cpu_ms is not None and sleep.cpu_ms < 20 and sleep.p50 >= 50
    assert here.cpu_ratio == 1 and sleep.cpu_ratio is not None and sleep.cpu_ratio > 2.5
    assert (
        cells(stored("ema", sleep))["CPU ratio"].endswith(" x")
        and cells(stored("ema", here))["CPU ratio"] == "baseline"
    )
    assert summarise({"counted": [3.0]}, {}, "MiB")[0].cpu_ms is None


def test_short_calls_are_timed_in_blocks_and_given_per_call():
    rows = compare({"short": lambda: None, "long": lambda: time.sleep(3e-3)}, {}, Effort.QUICK)
    assert 0 < rows[0].p50 < 1 and 3 <= rows[1].p50 < 20, rows
    calls = []
    assert 0.2 <= block_ms(lambda: (calls.append(0), time.sleep(2e-4))) < 2 and len(calls) > 20


def test_short_calls_on_a_gpu_are_timed_in_blocks_between_events(monkeypatch):
    """A GPU of one queue, on which each call takes 3 ms; the host does not wait for it."""
    queue_ms = [0.0]

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = queue_ms[0]

        def synchronize(self):
            pass

        def elapsed_time(self, end):
            return end.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    calls = []

    def call():
        calls.append(0)
        queue_ms[0] += 3

    assert measure.events_ms(call) == 3 and len(calls) == 20


def test_an_optional_case_that_fails_is_left_out_and_its_neighbours_say_so(capsys):
    def fails():
        raise torch.OutOfMemoryError("no room\nfor it")

    cases = {"plain": fails, "tuned": lambda: time.sleep(1e-3), "ours": lambda: time.sleep(1e-3)}
    rows = compare(cases, {"n": 1}, Effort.QUICK, optional=["plain"])
    assert [(row.case, row.baseline) for row in rows] == [("tuned", "tuned"), ("ours", "tuned")]
    assert rows[1].settings == {"n": 1, "left_out": {"plain": "OutOfMemoryError: no room"}}
    assert "left out: plain: OutOfMemoryError: no room" in capsys.readouterr().out
    with pytest.raises(torch.OutOfMemoryError):
        compare(cases, {}, Effort.QUICK)


def test_a_ratio_of_nothing_is_left_out():
    ratios = [row.ratio for row in summarise({"base": [4.0], "none": [0.0], "some": [2.0]}, {}, "MiB")]
    assert ratios == [1.0, None, 2.0]


def test_rows_are_appended_also_behind_a_line_that_was_cut_off(tmp_path):
    path = tmp_path / "new" / "ema.jsonl"
    append(path, "ema", [Row.of_one("a", 1.0, "ms", {})], Effort.QUICK)
    path.write_bytes(path.read_bytes() + b'{"stage": "em')
    append(path, "ema", [Row.of_one("b", 2.0, "ms", {})])
    first, cut, last = path.read_text().splitlines()
    assert cut == '{"stage": "em'
    first, last = json.loads(first), json.loads(last)
    assert (first["case"], first["effort"], first["version"]) == ("a", "quick", VERSION)
    assert (last["stage"], last["case"], last["effort"]) == ("ema", "b", "full")
    assert first["machine"] == machine() and first["versions"]["torch"] and first["time"].endswith("Z")


def test_the_commit_of_a_copy_without_git_comes_from_the_environment(monkeypatch):
    monkeypatch.setattr(measure, "_output", lambda *command: None)
    monkeypatch.setenv("CROSSBATCH_COMMIT", "1234abc")
    assert measure.origin.__wrapped__()["commit"] == "1234abc"


def test_unknown_stages_are_named_with_the_nearest(tmp_path, capsys):
    with pytest.raises(InputError, match=r"given bakbone; allowed: all, step, .*; did you mean backbone"):
        chosen(["ema", "bakbone"])
    assert benchmarks(["optimiser"]) == 2
    assert "did you mean optimizer?" in capsys.readouterr().err
    assert chosen(["ema", "all"]) == list(STAGES) and chosen(["ema", "step", "ema"]) == ["ema", "step"]
    assert benchmarks(["decode", "--images", str(tmp_path / "nowhere")]) == 2
    assert "--images: no such folder" in capsys.readouterr().err


def test_a_stage_in_this_process_writes_and_prints_its_rows(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    measure_here("transfer", Effort.QUICK, tmp_path)
    assert torch.backends.cudnn.benchmark  # for the baselines, too
    rows = [json.loads(line) for line in (tmp_path / "transfer.jsonl").read_text().splitlines()]
    assert [row["case"] for row in rows] == ["fp32, normalised before", "uint8, normalised after"]
    assert all(row["p20"] <= row["p50"] <= row["p80"] and row["peak_mib"] > 0 for row in rows)
    assert rows[1]["ratio"] == pytest.approx(rows[0]["p50"] / rows[1]["p50"])
    assert "uint8, normalised after" in capsys.readouterr().out


def test_one_stage_that_fails_does_not_stop_the_next(monkeypatch, tmp_path, capsys):
    commands = []

    def run(command, limit_s):
        commands.append(command)
        return processes.Ended(*((1, "failed with exit code 1 after 3 s") if "ema" in command else (0, "done in 2 s")))

    monkeypatch.setattr(processes, "run", run)
    assert benchmarks(["ema", "step", "--quick", "--out", str(tmp_path)]) == 1
    assert [command[-1] for command in commands] == ["ema", "step"]
    assert all({"--quick", "--in-process", "--out", str(tmp_path)} <= set(command) for command in commands)
    assert "ema: failed with exit code 1 after 3 s\nstep: done in 2 s\n" in capsys.readouterr().out


def test_processes_fail_and_are_stopped_with_all_that_they_started(tmp_path):
    python = [sys.executable, "-S", "-c"]
    with (tmp_path / "text").open("wb") as output:
        assert processes.run([*python, "print(1)"], output=output).words.startswith("done in")
    assert (tmp_path / "text").read_text() == "1\n"
    assert processes.run([*python, "raise SystemExit(4)"]).code == 4
    ended = processes.run(["sh", "-c", "sleep 600.0625; :"], 1.0)
    assert ended.code is None and ended.words.startswith("stopped at its limit after 1")
    deadline = time.monotonic() + 20  # a process that is killed takes a moment to go
    while left := [file for file in Path("/proc").glob("[0-9]*/cmdline") if b"600.0625" in _read(file)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError:  # of a process that has just ended
        return b""


@pytest.mark.long
def test_a_stage_runs_in_a_process_of_its_own(tmp_path):
    """Start it by the command line of a user."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-m", "benchmarks", "transfer", "--quick", "--out", "rows"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "transfer: done in" in done.stdout and "next: python -m benchmarks report rows" in done.stdout
    assert len((tmp_path / "rows" / "transfer.jsonl").read_text().splitlines()) == 2
