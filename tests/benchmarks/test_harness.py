"""What a row says of calls whose time and memory are known, how rows are added to a file, stages in processes of their own."""

import json
import mmap
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.__main__ import chosen
from benchmarks.__main__ import main as benchmarks
from benchmarks.harness import VERSION, Effort, Row, append, compare, machine, over, peak_mib, summarise
from benchmarks.stages import STAGES, measure
from crossbatch import InputError


def test_percentiles_and_ratio_by_hand():
    slow, fast = [10.0, 30.0, 20.0, 40.0, 50.0], [1.0, 2.0, 4.0]
    rows = {row.case: row for row in summarise({"ours": fast, "plain": slow}, "plain", {"n": 4})}
    # Linear between order statistics: p20 of five values lies at 0.2 * 4 = place 0.8, of three at 0.4.
    assert rows["plain"].p20 == pytest.approx(10 + 0.8 * 10)
    assert (rows["plain"].p50, rows["plain"].n, rows["plain"].ratio) == (30.0, 5, 1.0)
    assert rows["plain"].p80 == pytest.approx(40 + 0.2 * 10)
    assert rows["ours"].p20 == pytest.approx(1 + 0.4)
    assert (rows["ours"].p50, rows["ours"].ratio) == (2.0, 15.0)


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

    rows = compare({"a": sleep, "b": allocate}, "a", {}, seconds=0, warmup=2, rounds=3)
    assert calls == ["sleep"] * 2 + ["allocate"] * 2 + ["sleep", "allocate"] * 3
    assert rows[0].n == 3 and 4 <= rows[0].p20 < 40
    assert rows[0].peak_mib is not None and rows[1].peak_mib is not None
    assert rows[1].peak_mib - rows[0].peak_mib == pytest.approx(40, abs=8)
    assert peak_mib(allocate) == pytest.approx(40, abs=8)


def test_a_ratio_of_nothing_is_left_out():
    ratios = [row.ratio for row in over({"none": 0.0, "some": 2.0, "base": 4.0}, "base", "MiB", {})]
    assert ratios == [None, 2.0, 1.0]


def test_rows_are_added_also_behind_a_line_that_was_cut_off(tmp_path):
    path = tmp_path / "new" / "ema.jsonl"
    append(path, "ema", [Row.of_one("a", 1.0, "ms", {})], Effort.QUICK)
    path.write_bytes(path.read_bytes() + b'{"stage": "em')
    append(path, "ema", [Row.of_one("b", 2.0, "ms", {})])
    first, cut, last = path.read_text().splitlines()
    assert cut == '{"stage": "em'
    first, last = json.loads(first), json.loads(last)
    assert (first["case"], first["effort"], first["version"], last["case"], last["effort"]) == (
        "a",
        "quick",
        VERSION,
        "b",
        "full",
    )
    assert first["machine"] == machine() and first["versions"]["torch"] and first["time"].endswith("Z")


def test_unknown_stages_are_named_with_the_nearest(capsys):
    with pytest.raises(InputError, match=r"given bakbone; allowed: all, decode, .*; did you mean backbone"):
        chosen(["ema", "bakbone"])
    assert benchmarks(["optimiser"]) == 2
    assert "did you mean optimizer?" in capsys.readouterr().err
    assert chosen(["ema", "all"]) == list(STAGES) and chosen(["ema", "step", "ema"]) == ["ema", "step"]


def test_a_stage_in_this_process_writes_and_prints_its_rows(tmp_path, capsys):
    measure("transfer", Effort.QUICK, tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "transfer.jsonl").read_text().splitlines()]
    assert [row["case"] for row in rows] == ["fp32, normalised before", "uint8, normalised after"]
    assert all(row["p20"] <= row["p50"] <= row["p80"] and row["peak_mib"] > 0 for row in rows)
    assert rows[1]["ratio"] == pytest.approx(rows[0]["p50"] / rows[1]["p50"])
    assert "uint8, normalised after" in capsys.readouterr().out


def test_processes_of_stages_fail_and_are_stopped_alone(tmp_path):
    """In a new interpreter, whose server of processes imports little."""
    script = """
import subprocess, time
from benchmarks import stages
if __name__ == "__main__":
    stages.IMPORTED_ONCE = ("benchmarks.stages",)
    print(stages.run_alone(time.sleep, (0.1,)))
    print(stages.run_alone(int, ("on purpose",)))
    print(stages.run_alone(subprocess.call, (["sleep", "600.0625"],), 2.0))
"""
    (tmp_path / "script.py").write_text(script)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, str(tmp_path / "script.py")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=100)
    outcomes = done.stdout.splitlines()
    assert len(outcomes) == 3, done.stdout + done.stderr
    assert outcomes[0].startswith("done in") and outcomes[1] == "failed with exit code 1"
    assert "ValueError" in done.stderr and "on purpose" in done.stderr
    assert outcomes[2] == "stopped after 2 s, its limit; the rows until then are kept"
    left = [file for file in Path("/proc").glob("[0-9]*/cmdline") if b"600.0625" in _read(file)]
    assert left == [], "what a stage starts ends with it"


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError:  # of a process that has just ended
        return b""
