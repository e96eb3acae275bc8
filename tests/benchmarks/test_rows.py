"""Reads rows of every version, of damaged files and of several machines, and compares two results."""

import json
from pathlib import Path

import pytest

from benchmarks.__main__ import main as benchmarks
from benchmarks.comparison import ratio_with_range
from benchmarks.rows import images_per_s, machine_of, read
from crossbatch import InputError

XEON = {"cpu": "Xeon", "cores": 2, "threads": 2, "gpus": []}
H100 = {"cpu": "EPYC", "cores": 16, "threads": 16, "gpus": ["NVIDIA H100"]}


def row(case="a", p50=10.0, machine=XEON, **more) -> dict:
    return {
        "version": 2,
        "stage": "ema",
        "time": "2026-01-02T03:04:05Z",
        "effort": "full",
        "machine": machine,
        "versions": {"torch": "2.15"},
        "commit": "abc",
        "case": case,
        "p20": 0.9 * p50,
        "p50": p50,
        "p80": 1.2 * p50,
        "n": 5,
        "unit": "ms",
        "baseline": None,
        "ratio": None,
        "settings": {},
        "peak_mib": None,
        "clocks": None,
        **more,
    }


def write(path: Path, *rows: dict) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def old_row(**more) -> dict:
    """Return a row as version 1 wrote it."""
    new = row(**more)
    return {name: new[name] for name in new if name not in ("version", "time", "effort", "clocks", "peak_mib")}


def test_rows_of_version_1_read_as_today(tmp_path):
    file = write(tmp_path / "step.jsonl", old_row(stage="step", settings={"batch": 64}), row(case="b"))
    first, second = read(file).rows
    assert (first["effort"], first["time"], first["peak_mib"]) == ("full", None, None)
    assert second["time"] is not None
    assert images_per_s(first) == pytest.approx(64 / 0.010) and images_per_s(second) is None


def test_the_rows_in_this_repository_can_be_read():
    results = read(Path(__file__).parents[2] / "benchmarks" / "results")
    assert len(results.rows) >= 17 and not results.notes
    assert {"optimizer", "augment", "step"} <= {row["stage"] for row in results.rows}


@pytest.mark.parametrize("cut", [1, 10, 100])
def test_a_line_that_is_cut_off_is_left_out_and_said(tmp_path, cut):
    file = write(tmp_path / "ema.jsonl", row("a"), row("b"), row("c"))
    file.write_bytes(file.read_bytes()[: -1 - cut])
    results = read(file)
    assert [row["case"] for row in results.rows] == ["a", "b"]
    (note,) = results.notes
    assert note.startswith(f"{file}:3: cut off or damaged, left out")


def test_a_last_line_without_its_newline_is_whole(tmp_path):
    file = write(tmp_path / "ema.jsonl", row("a"), row("b"))
    file.write_bytes(file.read_bytes()[:-1])
    assert len(read(file).rows) == 2


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (json.dumps({**row(), "version": 3}), ["ema.jsonl:2", "version 3", "reads 1 to 2", "commit abc"]),
        (json.dumps({"loss": 3.0, "step": 1}), ["ema.jsonl:2", "not a row", "'stage'"]),
        ("[1, 2]", ["ema.jsonl:2", "not a row"]),
    ],
)
def test_other_lines_stop_with_where_and_what(tmp_path, line, words):
    file = write(tmp_path / "ema.jsonl", row())
    file.write_text(file.read_text() + line + "\n")
    with pytest.raises(InputError) as error:
        read(tmp_path)
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize("where", ["nowhere", "empty"])
def test_nothing_to_read(tmp_path, where):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="python -m benchmarks all"):
        read(tmp_path / where)


def test_a_file_that_cannot_be_read_is_one_message(tmp_path, capsys):
    (tmp_path / "ema.jsonl").mkdir()
    assert benchmarks(["report", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and "ema.jsonl: cannot be read: Is a directory" in said and said.count("\n") == 1


def test_machines_are_not_mixed(tmp_path):
    write(tmp_path / "ema.jsonl", row("a"), row("b", machine=H100), row("a", machine=H100))
    results = read(tmp_path)
    with pytest.raises(InputError) as error:
        results.of_machine(None)
    for words in ("Xeon, 2 cores, no GPU (1 rows)", "EPYC, 16 cores, 1 x NVIDIA H100 (2 rows)", "--machine: not given"):
        assert words in str(error.value)
    for wanted in ("h100", "EPYC, 16"):
        assert [row["case"] for row in results.of_machine(wanted).rows] == ["b", "a"]
    assert len(results.of_machine("no gpu").rows) == 1
    for wanted in ("V100", "cores"):
        with pytest.raises(InputError, match=f"given {wanted}"):
            results.of_machine(wanted)
    assert machine_of(row(machine={**H100, "gpus": ["A", "A", "B"]})) == "EPYC, 16 cores, 2 x A + 1 x B"


def test_threads_do_not_make_another_machine(tmp_path):
    write(tmp_path / "ema.jsonl", row("a"), row("b", machine={**XEON, "threads": 1}))
    assert len(read(tmp_path).of_machine(None).rows) == 2


def test_the_last_row_of_a_case_counts_and_quick_ones_stay_apart(tmp_path):
    rows = [row("a", 1.0), row("b", 2.0), row("a", 3.0), row("a", 9.0, effort="quick")]
    latest = read(write(tmp_path / "ema.jsonl", *rows)).latest()
    found = [(r["case"], r["p50"], r["effort"]) for r in latest.values()]
    assert found == [("a", 3.0, "full"), ("b", 2.0, "full"), ("a", 9.0, "quick")]


def test_compare_with_the_range_of_both_spreads(tmp_path, capsys):
    before = write(tmp_path / "before" / "ema.jsonl", row("a", 30.0), row("b", 10.0), row("gone"))
    after = write(tmp_path / "after" / "ema.jsonl", row("a", 10.0), row("b", 11.0), row("new"))
    ratio, low, high = ratio_with_range(row("a", 30.0), row("a", 10.0))
    assert (ratio, low, high) == pytest.approx((3.0, 0.9 * 30 / (1.2 * 10), 1.2 * 30 / (0.9 * 10)))
    assert ratio_with_range(row(p50=2.0, unit="images/s"), row(p50=6.0, unit="images/s"))[0] == pytest.approx(3.0)
    assert benchmarks(["compare", str(before.parent), str(after)]) == 0
    printed = capsys.readouterr().out
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in printed.splitlines()]
    assert ["ema", "a", "30", "10", "ms", "3.00", "2.25 to 4.00", "faster"] in cells
    assert ["ema", "b", "10", "11", "ms", "0.91", "0.68 to 1.21", ""] in cells
    assert "only in BEFORE: 1 cases, such as ema: gone" in printed and "only in AFTER: 1 cases" in printed


def test_compare_what_was_learned(tmp_path, capsys):
    """More is better, and what was measured beside the accuracy does not make another case."""
    rows = []
    for knn in (40.0, 80.0):
        measured = {"linear, %": knn + 4, "images": 10 * int(knn), "curve": [[1.0, knn]], "seed": 0}
        rows.append({**row("short", knn, unit="% k-NN", settings=measured), "stage": "learning"})
    before, after = (write(tmp_path / f"{name}.jsonl", one) for name, one in zip(("a", "b"), rows, strict=True))
    assert benchmarks(["compare", str(before), str(after)]) == 0
    assert "2.00" in (printed := capsys.readouterr().out) and "better" in printed and "other settings" not in printed


def test_compare_refuses_other_machines_and_other_sizes(tmp_path, capsys):
    here, there = write(tmp_path / "a.jsonl", row()), write(tmp_path / "b.jsonl", row(machine=H100))
    assert benchmarks(["compare", str(here), str(there)]) == 2
    assert "Xeon" in (said := capsys.readouterr().err) and "H100" in said
    larger = write(tmp_path / "c.jsonl", row(settings={"images": 2, "config": {"a": 1}}), row("b"))
    smaller = write(tmp_path / "d.jsonl", row(settings={"images": 1, "config": {}}), row("b"))
    assert benchmarks(["compare", str(larger), str(smaller)]) == 0
    assert "measured with other settings: 1 cases, such as ema: a" in capsys.readouterr().out
    assert benchmarks(["compare", str(here), str(write(tmp_path / "e.jsonl", row("other")))]) == 2
    assert "no case in common" in capsys.readouterr().err
