"""python -m benchmarks report [DIR] [--output DIR] [--machine NAME]

Writes the rows of one machine as tables and pictures: report.md with PNGs beside it, and report.html, one file with the same
that loads nothing else. Of a case that was measured several times, the last row counts. Rows of several machines are refused
until --machine names one.
"""

import argparse
import ast
import base64
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from markdown_it import MarkdownIt  # comes with rich
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.rows import Results, StoredRow, machine_of, read
from benchmarks.tables import COLUMNS, cells, escaped, markdown, of_rows, short
from crossbatch import InputError

RESULTS = Path(__file__).parent / "results"
OUTCOMES = "outcomes.json"  # beside the rows, where `python -m benchmarks.gpu` wrote them: how each part ended
LEGEND = (
    "The baseline is what one would use otherwise, measured in the same run, in turns. A ratio above 1 means that the case is "
    "so many times as fast as the baseline, or as small. Figures are percentiles 20, 50 and 80 of n samples. Peak: memory in "
    "use at most during a call, of the GPU's allocator, or resident in the process."
)
OURS, BASELINE, INK = "#1f6f8b", "#b4b4b4", "#222222"


def main(arguments: list[str]) -> None:
    """Write the report of a command line and print where it is."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", metavar="DIR", type=Path, nargs="?", default=RESULTS, help="default: %(default)s")
    parser.add_argument("--output", metavar="DIR", type=Path, help="where to write (default: DIR/report)")
    parser.add_argument("--machine", metavar="NAME", help="of several: the number or a part of the name of one")
    given = parser.parse_args(arguments)
    results = read(given.results).of_machine(given.machine)
    folder = given.results if given.results.is_dir() else given.results.parent
    outcomes = json.loads((folder / OUTCOMES).read_text()) if (folder / OUTCOMES).exists() else {}
    output = given.output or folder / "report"
    try:
        write(results, outcomes, output)
    except OSError as error:
        raise InputError(f"--output: {output} cannot be written: {error.strerror}; choose another folder") from None
    print(*results.notes, output / "report.md", output / "report.html", sep="\n")


def write(results: Results, outcomes: dict[str, str], output: Path) -> None:
    """Write report.md, a PNG for each stage, and report.html into a folder. Raises OSError."""
    output.mkdir(parents=True, exist_ok=True)
    stages: dict[str, list[StoredRow]] = {}
    for row in results.latest().values():
        stages.setdefault(row["stage"], []).append(row)
    text = "\n\n".join(_paragraphs(stages, results.notes, outcomes)) + "\n"
    (output / "report.md").write_text(text, encoding="utf-8")
    page = MarkdownIt("commonmark", {"html": False}).enable("table").render(text)
    for stage, rows in stages.items():
        file = output / f"{stage}.png"
        figure = bars(rows)
        FigureCanvasAgg(figure)
        figure.savefig(file, dpi=110)
        data = base64.b64encode(file.read_bytes()).decode()
        page = page.replace(f'src="{file.name}"', f'src="data:image/png;base64,{data}"')
    (output / "report.html").write_text(_PAGE.replace("BODY", page), encoding="utf-8")


# --- text and tables ------------------------------------------------------------------------------------------------


def _paragraphs(stages: dict[str, list[StoredRow]], notes: Sequence[str], outcomes: dict[str, str]) -> Iterable[str]:
    """Yield the report in Markdown, from top to bottom."""
    rows = [row for rows in stages.values() for row in rows]
    yield "# Benchmarks"
    yield machine_of(rows[0])
    yield markdown(("", f"{len(rows)} rows"), _origin(rows))
    yield from (f"Note: {escaped(note)}" for note in notes)
    if outcomes:
        yield "## How the parts ended"
        yield markdown(("part", "outcome"), outcomes.items())
    yield "## Ratio to the baseline of each stage"
    yield LEGEND
    yield markdown(("stage", "unit", "cases", "lowest", "highest"), _ratios(stages))
    for stage, rows in stages.items():
        yield f"## {stage}"
        yield _what(stage)
        yield f"![{stage}: bars of the cases]({stage}.png)"
        yield markdown(*of_rows(rows))


def _origin(rows: list[StoredRow]) -> list[tuple[str, str]]:
    """Return what the rows say about where they come from, several values where they differ."""
    facts = {
        "commits": [row["commit"] for row in rows],
        "measured": [row["time"][:10] if row["time"] else "before rows had a time" for row in rows],
        "threads": [row["machine"].get("threads") for row in rows],
    }
    for package in dict.fromkeys(name for row in rows for name in row["versions"]):
        facts[package] = [row["versions"].get(package) for row in rows]
    lines = [(name, ", ".join(sorted({str(v) for v in values if v is not None}))) for name, values in facts.items()]
    return [line for line in lines if line[1]]


def _ratios(stages: dict[str, list[StoredRow]]) -> Iterable[tuple[str, ...]]:
    """Yield the worst and the best case of each stage and unit."""
    for stage, rows in stages.items():
        for unit in dict.fromkeys(row["unit"] for row in rows):
            cases = [r for r in rows if r["unit"] == unit and r["ratio"] is not None and r["case"] != r["baseline"]]
            if cases:
                ends = (choose(cases, key=lambda row: row["ratio"]) for choose in (min, max))
                yield stage, unit, str(len(cases)), *(f"{row['ratio']:.2f} ({row['case']})" for row in ends)


def _what(stage: str) -> str:
    """Return the first paragraph of the stage's module; rows of a stage that is no longer there have none."""
    here = Path(__file__).parent
    for file in (here / "stages" / f"{stage}.py", here / stage / "__init__.py"):
        if file.exists():
            text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
            return " ".join(text.split("\n\n")[0].split())
    return ""


# --- pictures -------------------------------------------------------------------------------------------------------


def bars(rows: Sequence[StoredRow]) -> Figure:
    """Draw the cases of a stage: one panel for each baseline (or step taken apart), with p20 to p80 and the ratios.

    The baseline is grey; what was predicted, not measured, is hollow.
    """
    panels: dict[tuple, list[StoredRow]] = {}
    for row in rows:
        key = row["baseline"] or row["settings"].get("of"), row["effort"], row["unit"]
        panels.setdefault(key, []).append(row)
    heights = [0.75 + 0.34 * len(panel) for panel in panels.values()]  # inches
    figure = Figure(figsize=(10, sum(heights)), layout="constrained")
    axes = figure.subplots(len(panels), 1, height_ratios=heights, squeeze=False)[:, 0]
    for ax, panel in zip(axes, panels.values(), strict=True):
        _bars_of(ax, panel)
    return figure


def _bars_of(ax: Axes, rows: list[StoredRow]) -> None:
    spread = [[row["p50"] - row["p20"] for row in rows], [row["p80"] - row["p50"] for row in rows]]
    colours = [BASELINE if row["case"] == row["baseline"] else OURS for row in rows]
    faces = ["none" if row["settings"].get("predicted") else c for row, c in zip(rows, colours, strict=True)]
    places, error_style = range(len(rows)), {"ecolor": INK, "capsize": 2}
    ax.barh(
        places, [row["p50"] for row in rows], 0.7, color=faces, edgecolor=colours, xerr=spread, error_kw=error_style
    )
    for place, row in enumerate(rows):
        text = f"  {short(row['p50'])} {row['unit']}   {cells(row)[COLUMNS.index('ratio')]}"
        ax.text(row["p80"], place, text, va="center", fontsize=9)
    effort = "" if rows[0]["effort"] == "full" else f" ({rows[0]['effort']})"
    ax.set_title(f"{rows[0]['stage']}, {rows[0]['unit']}{effort}", loc="left", fontsize=11)
    ax.set_yticks(places, [row["case"] for row in rows], fontsize=9)
    ax.invert_yaxis()
    ax.set_xlim(0, 1.3 * max(row["p80"] for row in rows) or 1)  # room for the annotation of the longest bar
    ax.tick_params(axis="x", labelsize=8)
    ax.spines[["top", "right"]].set_visible(False)


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>crossbatch benchmarks</title><style>
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff; margin: 0 }
main { max-width: 66rem; margin: 2rem auto; padding: 0 1rem }
h1, h2 { line-height: 1.2; margin: 2.2rem 0 .6rem } h1 { margin-top: 0 }
img { max-width: 100%; height: auto; display: block; margin: 1rem 0 }
table { border-collapse: collapse; font-size: .85rem; margin: 1rem 0; display: block; overflow-x: auto }
th, td { text-align: left; padding: .25rem .7rem .25rem 0; border-bottom: 1px solid #ddd; vertical-align: top }
th { border-bottom: 2px solid #888 } td[style] { font-variant-numeric: tabular-nums; white-space: nowrap }
</style></head><body><main>
BODY</main></body></html>
"""
