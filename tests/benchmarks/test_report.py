"""Checks the report of made-up rows: every stage with its ratio, its pictures, and one page that loads nothing else."""

import base64
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from benchmarks import report
from benchmarks.__main__ import main as benchmarks

XEON = {"cpu": "Xeon", "cores": 2, "threads": 2, "gpus": []}


def row(stage: str, case: str, p50: float, baseline: str | None = None, ratio: float | None = None, **more) -> dict:
    facts = {"unit": "ms", "settings": {}, "peak_mib": 100.0, "effort": "full", "commit": "abc", **more}
    return {
        "version": 2,
        "time": "2026-01-02T03:04:05Z",
        "machine": XEON,
        "versions": {"torch": "2.15"},
        "clocks": None,
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
    assert "Xeon, 2 cores, no GPU" in text and "| commits | abc |" in text
    assert "| ema | ms | 1 | 5.00 (ours) | 5.00 (ours) |" in text
    assert "| backbone | ms | 2 | 1.50 (ours, 8 images) | 1.50 (ours, 8 images) |" in text
    eight_in_20_ms = "| ours, 8 images | 18 | 20 | 22 | ms | 5 | 1.50 x | 100 | 400 | 3 | unknown | abc |"
    assert eight_in_20_ms in text and "| 37.5 % |" in text and "60.0 %" in text and "old & \\<odd> \\| name" in text
    pictures = set(re.findall(r"\]\((.*?\.png)\)", text))
    assert pictures == {"ema.png", "backbone.png", "step.png"}
    for name in pictures:
        with Image.open(tmp_path / "out" / name) as image:
            assert image.width > 600 and np.asarray(image.convert("L")).std() > 10


def test_the_page_holds_its_pictures_and_loads_nothing(results, tmp_path):
    benchmarks(["report", str(results), "--output", str(tmp_path / "out")])
    page = (tmp_path / "out" / "report.html").read_text()
    sources = re.findall(r'src="(.*?)"', page)
    assert len(sources) == 3 and all(source.startswith("data:image/png;base64,") for source in sources)
    inside = {base64.b64decode(source.partition(",")[2]) for source in sources}
    assert inside == {file.read_bytes() for file in (tmp_path / "out").glob("*.png")}
    assert not re.search(r"(href|url\(|@import|<script|<link)", page)
    assert "old &amp; &lt;odd&gt; | name" in page and "<odd>" not in page


def test_predictions_stand_beside_what_was_measured_and_what_is_missing_is_named(results):
    settings = {"predicted": True, "of": "engine.planning"}
    rows = [row("step", "1 chunk: predicted", 20.0, settings=settings | {"prediction_of": "1 chunk"})]
    rows += [row("step", "8 chunks: predicted", 30.0, settings=settings | {"prediction_of": "8 chunks"})]
    shares = {"of_bandwidth": 0.5, "of_convolutions": 0.25, "left_out": {"plain": "OutOfMemoryError: no room"}}
    rows += [row("step", "1 chunk", 25.0, settings=shares)]
    (results / "step.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert benchmarks(["report", str(results)]) == 0
    text = (results / "report" / "report.md").read_text()
    assert "| 1 chunk | 20 | 25 | ms | 1.25 |\n| 8 chunks | 30 | not measured | ms |  |" in text
    assert "| 50.0 % | 25.0 % |" in text and "Left out: plain: OutOfMemoryError: no room" in text


def test_how_the_parts_of_bench_gpu_ended_is_told(results):
    (results / "outcomes-1.json").write_text(json.dumps({"tests-rest": "failed with exit code 1"}))
    (results / "outcomes-2.json").write_text(json.dumps({"ema": "done in 3 s"}))
    assert benchmarks(["report", str(results)]) == 0
    text = (results / "report" / "report.md").read_text()
    assert "| tests-rest | failed with exit code 1 |\n| ema | done in 3 s |" in text


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


def test_a_picture_draws_each_baseline_and_step_apart_and_predictions_hollow():
    measured = [row("ema", "ours", 2.0, "loop", 5.0), row("ema", "loop", 10.0, "loop", 1.0)]
    parts = [row("ema", part, ms, settings={"of": "step", "share": ms / 4}) for part, ms in (("x", 3.0), ("y", 1.0))]
    predicted = row("ema", "guess", 7.0, settings={"predicted": True, "of": "scaling"})
    figure: Any = report.bars([*measured, *parts, predicted])
    drawn = [[bar.get_width() for bar in axes.patches] for axes in figure.axes]
    assert drawn == [[2.0, 10.0], [3.0, 1.0], [7.0]]
    texts = [[text.get_text().split("   ") for text in axes.texts] for axes in figure.axes]
    assert texts[0] == [["  2 ms", "5.00 x"], ["  10 ms", "baseline"]] and texts[1][0] == ["  3 ms", "75.0 %"]
    ours, loop = figure.axes[0].patches
    assert ours.get_facecolor() != loop.get_facecolor() and ours.get_facecolor()[3] == 1
    assert figure.axes[2].patches[0].get_facecolor()[3] == 0


def test_cases_of_several_seeds_have_a_mean_and_a_standard_deviation(tmp_path):
    facts = {"images/s": 100.0, "busy cores": 1.5, "minutes to the best peer's k-NN": None}
    rows = [
        row(
            "learning",
            f"crossbatch, seed {seed}, 2 epochs",
            knn,
            unit="% k-NN",
            settings={"seed": seed, "linear, %": knn + 1, **facts},
        )
        for seed, knn in enumerate((40.0, 41.0, 42.0))
    ]
    rows.append(row("learning", "plain, seed 0, 2 epochs", 39.0, unit="% k-NN", settings={"seed": 0, **facts}))
    (tmp_path / "learning.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert benchmarks(["report", str(tmp_path), "--output", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| crossbatch, 2 epochs | 3 | 41 ± 1 | 42 ± 1 | 100 ± 0 | 1.5 ± 0 |  |" in text
    assert "| plain, 2 epochs |" not in text
