"""The report of made-up rows: every stage with its ratio, the pictures that belong to it, one page that loads nothing else."""

import base64
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from benchmarks import plots
from benchmarks.__main__ import main as benchmarks

XEON = {"cpu": "Xeon", "cores": 2, "threads": 2, "gpus": []}


def row(stage: str, case: str, p50: float, baseline: str | None = None, ratio: float | None = None, **more) -> dict:
    facts = {"unit": "ms", "settings": {}, "peak_mib": 100.0, "effort": "full", "commit": "abc", **more}
    return {
        "version": 2,
        "time": "2026-01-02T03:04:05Z",
        "machine": XEON,
        "versions": {"torch": "2.15"},
        "clocks": {"cpu_mhz": 2000},
        "stage": stage,
        "case": case,
        **{"p20": 0.9 * p50, "p50": p50, "p80": 1.1 * p50, "n": 5},
        "baseline": baseline,
        "ratio": ratio,
        **facts,
    }


@pytest.fixture
def results(tmp_path) -> Path:
    rows = [row("ema", "ours", 2.0, "loop", 5.0), row("ema", "loop", 10.0, "loop", 1.0)]
    rows += [row("ema", "old & <odd> | name", 3.0)]
    for chunk, ms in ((8, 20.0), (32, 60.0)):
        base = f"timm's, {chunk} images"
        settings = {"images": chunk, "chunk": chunk, "tflop_per_s": 3.0, "mfu": "unknown" if chunk == 8 else 0.375}
        rows.append(row("backbone", f"ours, {chunk} images", ms, base, 1.5, settings=settings))
        rows.append(row("backbone", base, 1.5 * ms, base, 1.0, settings=settings))
    parts = {"backward": 0.6, "optimizer": 0.37, "other": 0.03, "step": 1.0}
    for part, share in parts.items():
        facts = {"part": part, "of": "ViT, 1 chunk", "share": share}
        rows.append(row("step", f"ViT, 1 chunk: {part}", 100 * share, settings=facts))
    (tmp_path / "all.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_report_has_every_stage_its_ratio_and_its_pictures(results, tmp_path):
    assert benchmarks(["report", str(results), "--output", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "report.md").read_text()
    for heading in ("## ema", "## backbone", "## step", "# Benchmarks"):
        assert heading in text
    assert "Xeon, 2 cores, no GPU" in text and "CPU 2000 MHz" in text and "| commits | abc |" in text
    assert "| ema | ms | 1 | 5.00 (ours) |" in text
    assert "| backbone | ms | 2 | 1.50 (ours, 8 images) | 1.50 (ours, 8 images) |" in text
    assert (
        "| ours, 8 images | 18 | 20 | 22 | ms | 5 | 1.50 | 100 | 400 | 3 | unknown | abc |" in text
    )  # 8 images in 20 ms
    assert "| 37.5 % |" in text and "60.0 %" in text and "old & <odd> \\| name" in text
    pictures = set(re.findall(r"\]\((.*?\.png)\)", text))
    assert pictures == {"ema.png", "backbone.png", "step-parts.png", "throughput.png"}
    for name in pictures:
        with Image.open(tmp_path / "out" / name) as image:
            assert image.width > 600 and np.asarray(image.convert("L")).std() > 10


def test_the_page_holds_its_pictures_and_loads_nothing(results, tmp_path):
    benchmarks(["report", str(results), "--output", str(tmp_path / "out")])
    page = (tmp_path / "out" / "report.html").read_text()
    sources = re.findall(r'src="(.*?)"', page)
    assert len(sources) == 4 and all(source.startswith("data:image/png;base64,") for source in sources)
    inside = {base64.b64decode(source.partition(",")[2]) for source in sources}
    assert inside == {file.read_bytes() for file in (tmp_path / "out").glob("*.png")}
    assert not re.search(r"(href|url\(|@import|<script|<link)", page)
    assert "old &amp; &lt;odd&gt; | name" in page and "<odd>" not in page


def test_how_the_parts_of_bench_gpu_ended_is_told(results):
    (results / "outcomes.json").write_text(json.dumps({"tests": "failed with exit code 1", "ema": "done in 3 s"}))
    assert benchmarks(["report", str(results)]) == 0
    assert "| tests | failed with exit code 1 |" in (results / "report" / "report.md").read_text()


def test_mixed_machines_are_refused_and_one_can_be_named(results, capsys):
    other = row("ema", "ours", 1.0, "loop", 3.0, machine={**XEON, "gpus": ["NVIDIA H100"]})
    (results / "gpu.jsonl").write_text(json.dumps(other) + "\n")
    assert benchmarks(["report", str(results)]) == 2
    assert "1 x NVIDIA H100 (1 rows)" in capsys.readouterr().err
    assert not (results / "report").exists()
    assert benchmarks(["report", str(results), "--machine", "H100"]) == 0
    assert "3.00" in (results / "report" / "report.md").read_text()


def test_a_cut_line_is_told_on_the_terminal_and_in_the_report(results, capsys):
    file = results / "all.jsonl"
    file.write_bytes(file.read_bytes()[:-30])
    assert benchmarks(["report", str(results)]) == 0
    assert "all.jsonl:11: cut off or damaged" in capsys.readouterr().out
    assert "cut off or damaged" in (results / "report" / "report.md").read_text()


def test_a_folder_that_cannot_be_written(results, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert benchmarks(["report", str(results), "--output", str(tmp_path / "file" / "in")]) == 2
    assert "--output" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("cases", "title", "labels"),
    [
        (["ours, heads, n 64", "plain torch, heads, n 64"], "heads, n 64", ["ours", "plain torch"]),
        (["R50, 96 px, 1 chunk", "R50, 96 px, 8 chunks, again"], "R50, 96 px", ["1 chunk", "8 chunks, again"]),
        (["LARS", "loop"], "", ["LARS", "loop"]),
        (["a, b", "a, b"], "a", ["b", "b"]),
        (["alone, n 4"], "", ["alone, n 4"]),
    ],
)
def test_common_words_become_the_title(cases, title, labels):
    assert plots.common_words(cases) == (title, labels)


def test_predicted_scaling_is_drawn_apart_and_relative_to_what_was_measured():
    def study(ranks: int, rate: float, **more) -> dict:
        return row(
            "scaling", f"{ranks} {more}", rate, unit="images/s", settings={"ranks": ranks, "mode": "weak", **more}
        )

    rows = [study(1, 100.0), study(2, 180.0), study(4, 320.0), study(2, 190.0, predicted=True)]
    figure: Any = plots.scaling(rows)
    assert figure is not None
    rates, efficiencies = ({line.get_label(): line for line in panel.get_lines()} for panel in figure.axes)
    measured, predicted = efficiencies["weak, measured"], efficiencies["weak, predicted"]
    assert [*zip(measured.get_xdata(), measured.get_ydata(), strict=False)] == [
        (1, 100),
        (2, 90),
        (4, 80),
    ]  # 320 of 400
    assert [*zip(predicted.get_xdata(), predicted.get_ydata(), strict=False)] == [(1, 100), (2, 95)]
    assert [*rates["weak, predicted"].get_ydata()] == [100, 190]
    assert (measured.get_linestyle(), predicted.get_linestyle()) == ("-", "--")
    assert predicted.get_markerfacecolor() == "none" and measured.get_markerfacecolor() != "none"
    assert plots.scaling([]) is None and plots.scaling([study(1, 100.0)]) is None


def test_throughput_draws_a_baseline_dotted_in_the_colour_of_ours(results):
    rows = [json.loads(line) for line in (results / "all.jsonl").read_text().splitlines()]
    figure: Any = plots.throughput(rows)
    assert figure is not None
    ours, plain = figure.axes[0].get_lines()
    assert [*zip(ours.get_xdata(), ours.get_ydata(), strict=False)] == [(8, 400), (32, pytest.approx(32 / 0.06))]
    assert (ours.get_linestyle(), plain.get_linestyle()) == ("-", ":")
    assert ours.get_color() == plain.get_color()


def test_parts_of_a_step_are_stacked_to_the_whole(results):
    rows = [json.loads(line) for line in (results / "all.jsonl").read_text().splitlines()]
    figure: Any = plots.parts(rows)
    assert figure is not None
    bars = sorted((bar.get_x(), bar.get_width()) for bar in figure.axes[0].patches)
    assert [start for start, _ in bars] == pytest.approx([0, 60, 97]) and sum(
        width for _, width in bars
    ) == pytest.approx(100)
