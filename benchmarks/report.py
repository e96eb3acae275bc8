"""Writes the rows of one machine as tables and pictures: `python -m benchmarks report [DIR]`

It makes report.md with PNGs beside it, and report.html, one file with the same that loads nothing else. If a case was measured
several times, its last row counts. Rows of several machines are refused until --machine names one.
"""

import ast
import base64
import json
import re
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

from markdown_it import MarkdownIt  # comes with rich
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks import parser_of
from benchmarks.learning import SOONER
from benchmarks.rows import Results, StoredRow, cells, machine_of, read, short, table
from crossbatch import InputError

HERE = Path(__file__).parent
OUTCOMES = "outcomes*.json"  # beside the rows, where `python -m benchmarks.gpu` wrote them: how each part ended
LEGEND = (
    "The baseline is what one would use otherwise, measured in the same run, in turns. A ratio above 1 means that the case is "
    "so many times as fast as the baseline, or as small. Figures are percentiles 20, 50 and 80 of n samples. CPU ms: user and "
    "system time of all processes of a call, its median; where others use the cores, trust this ratio. Peak: memory in use at "
    "most during a call, of the GPU's allocator, or resident in the process. Bandwidth: the time that the bytes moved "
    "would take at the speed of a large copy, as a share of the time taken. Convolutions: likewise the time of the backbone's "
    "convolutions and linear layers, one by one (benchmarks/limits.py)."
)
OVER_SEEDS = ("linear, %", "images/s", "busy cores", SOONER)  # of the stage "learning"
OURS, BASELINE = "#1f6f8b", "#b4b4b4"


def main(arguments: list[str]) -> None:
    """Write the report of a command line and print where it is."""
    parser = parser_of("python -m benchmarks report", __doc__)
    parser.add_argument(
        "results", metavar="DIR", type=Path, nargs="?", default=HERE / "results", help="default: %(default)s"
    )
    parser.add_argument("--output", metavar="DIR", type=Path, help="where to write (default: DIR/report)")
    parser.add_argument("--machine", metavar="NAME", help="a part of the name of one, if there are several")
    given = parser.parse_args(arguments)
    results = read(given.results).of_machine(given.machine)
    folder = given.results if given.results.is_dir() else given.results.parent
    outcomes = {
        part: how for file in sorted(folder.glob(OUTCOMES)) for part, how in json.loads(file.read_text()).items()
    }
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
        bars(rows).savefig(file, dpi=110)
        data = base64.b64encode(file.read_bytes()).decode()
        page = page.replace(f'src="{file.name}"', f'src="data:image/png;base64,{data}"')
    (output / "report.html").write_text(_PAGE.replace("BODY", page), encoding="utf-8")


# --- text and tables ------------------------------------------------------------------------------------------------


def _paragraphs(stages: dict[str, list[StoredRow]], notes: Sequence[str], outcomes: dict[str, str]) -> Iterable[str]:
    """Yield the report in Markdown, from top to bottom."""
    rows = [row for rows in stages.values() for row in rows]
    yield "# Benchmarks"
    yield machine_of(rows[0])
    yield _markdown(("", f"{len(rows)} rows"), _origin(rows))
    yield from (f"Note: {_escaped(note)}" for note in notes)
    if outcomes:
        yield "## How the parts ended"
        yield _markdown(("part", "outcome"), outcomes.items())
    yield "## Ratio to the baseline of each stage"
    yield LEGEND
    yield _markdown(("stage", "unit", "cases", "lowest", "highest"), _ratios(stages))
    if predicted := list(_predictions(stages)):
        yield "## Predicted and measured"
        yield "`engine.planning` said so for this GPU before anything was measured."
        yield _markdown(("case", "predicted", "measured", "unit", "measured / predicted"), predicted)
    for stage, rows in stages.items():
        yield f"## {stage}"
        yield _first_paragraph(stage)
        yield f"![{stage}: bars of the cases]({stage}.png)"
        if seeds := list(_over_seeds(rows)):
            yield "Mean and standard deviation over the seeds:"
            yield _markdown(("case", "seeds", rows[0]["unit"], *OVER_SEEDS), seeds)
        yield _markdown(*table(rows))
        left_out = {case: why for row in rows for case, why in row["settings"].get("left_out", {}).items()}
        yield from (_escaped(f"Left out: {case}: {why}") for case, why in left_out.items())


def _origin(rows: list[StoredRow]) -> Iterable[tuple[str, str]]:
    """Yield what the rows say about where they come from, several values where they differ."""
    facts: dict[str, set[str]] = {}
    for row in rows:
        days = row["time"] and row["time"][:10]
        found = {"commits": row["commit"], "measured": days, "threads": row["machine"].get("threads")}
        for name, value in (found | row["versions"]).items():
            facts.setdefault(name, set()).update([] if value is None else [str(value)])
    yield from ((name, ", ".join(sorted(values))) for name, values in facts.items() if values)


def _ratios(stages: dict[str, list[StoredRow]]) -> Iterable[tuple[str, ...]]:
    """Yield the worst and the best case of each stage and unit."""
    for stage, rows in stages.items():
        for unit in dict.fromkeys(row["unit"] for row in rows):
            cases = [r for r in rows if r["unit"] == unit and r["ratio"] is not None and r["case"] != r["baseline"]]
            if cases:
                ends = (choose(cases, key=lambda row: row["ratio"]) for choose in (min, max))
                yield stage, unit, str(len(cases)), *(f"{row['ratio']:.2f} ({row['case']})" for row in ends)


def _over_seeds(rows: list[StoredRow]) -> Iterable[tuple[str, ...]]:
    """Yield a line for each case that was run with several seeds: how many, and the mean of each figure."""
    cases: dict[str, list[StoredRow]] = {}
    for row in rows:
        seed, effort = row["settings"].get("seed"), "" if row["effort"] == "full" else f" ({row['effort']})"
        if seed is not None:
            cases.setdefault(row["case"].replace(f", seed {seed},", ",") + effort, []).append(row)
    for case, runs in cases.items():
        if len(runs) > 1:
            found = [
                [run["p50"] for run in runs],
                *([run["settings"].get(name) for run in runs] for name in OVER_SEEDS),
            ]
            yield case, str(len(runs)), *map(_mean, found)


def _mean(values: Sequence[float | None]) -> str:
    """Return mean and standard deviation as text, "" if one of the values is missing."""
    known = [value for value in values if value is not None]
    return f"{statistics.mean(known):.4g} ± {statistics.stdev(known):.2g}" if len(known) == len(values) else ""


def _predictions(stages: dict[str, list[StoredRow]]) -> Iterable[tuple[str, ...]]:
    """Yield every prediction beside what was then measured."""
    for rows in stages.values():
        measured = {(row["case"], row["effort"]): row["p50"] for row in rows}
        for row in rows:
            case, said = row["settings"].get("prediction_of"), row["p50"]
            if case is not None:
                found = measured.get((case, row["effort"]))
                figures = ("not measured", "") if found is None else (short(found), f"{found / said:.2f}")
                yield case, short(said), figures[0], row["unit"], figures[1]


def _first_paragraph(stage: str) -> str:
    """Return what the stage's module says of it; rows of a stage that is no longer there have none."""
    for file in (HERE / "stages" / f"{stage}.py", HERE / stage / "__init__.py"):
        if file.exists():
            text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
            return " ".join(text.split("\n\n")[0].split())
    return ""


def _markdown(columns: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table; all columns but the first are aligned to the right."""
    marks = ["---", *["---:"] * (len(columns) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (columns, marks, *(map(_escaped, line) for line in lines)))


def _escaped(text: str) -> str:
    """Escape what has a meaning in a Markdown table."""
    return re.sub(r"([|*<`])", r"\\\1", text)


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
        _draw(ax, panel)
    return figure


def _draw(ax: Axes, rows: list[StoredRow]) -> None:
    for place, row in enumerate(rows):
        colour = BASELINE if row["case"] == row["baseline"] else OURS
        face = "none" if row["settings"].get("predicted") else colour
        spread = [[row["p50"] - row["p20"]], [row["p80"] - row["p50"]]]
        ax.barh(place, row["p50"], 0.7, color=face, edgecolor=colour, xerr=spread, error_kw={"capsize": 2})
        text = f"  {short(row['p50'])} {row['unit']}   {cells(row)['ratio']}"
        ax.text(row["p80"], place, text, va="center", fontsize=9)
    effort = "" if rows[0]["effort"] == "full" else f" ({rows[0]['effort']})"
    ax.set_title(f"{rows[0]['stage']}, {rows[0]['unit']}{effort}", loc="left", fontsize=11)
    ax.set_yticks(range(len(rows)), [row["case"] for row in rows], fontsize=9)
    ax.invert_yaxis()
    ax.set_xlim(0, 1.3 * max(row["p80"] for row in rows) or 1)  # leaves space for the text of the longest bar
    ax.spines[["top", "right"]].set_visible(False)


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>crossbatch benchmarks</title><style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 66rem; margin: 2rem auto; padding: 0 1rem }
img { max-width: 100% } table { border-collapse: collapse; font-size: .85rem; display: block; overflow-x: auto }
th, td { padding: .25rem .7rem .25rem 0; border-bottom: 1px solid #ddd }
</style></head><body>
BODY</body></html>
"""
