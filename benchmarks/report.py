"""python -m benchmarks report [DIR] [--output DIR] [--machine NAME]

Rows of one machine as tables and pictures: report.md with PNGs beside it, and report.html, one file with the same and nothing
else to load. Of a case that was measured several times, the last row counts. Rows of several machines are refused until
--machine names one.
"""

import argparse
import ast
import base64
import html
import json
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure
from rich.console import Console

from benchmarks import plots
from benchmarks.results import Results, Row, by_stage, images_per_s, machine_of, read, short
from crossbatch import InputError

RESULTS = Path(__file__).parent / "results"
OUTCOMES = "outcomes.json"  # beside the rows, where `python -m benchmarks.gpu` wrote them: how each part ended
COLUMNS = ("case", "p20", "p50", "p80", "unit", "n", "ratio", "peak MiB", "images/s", "TFLOP/s", "MFU")
COLUMNS += ("effort", "commit")


@dataclass
class Heading:
    text: str
    level: int = 2


@dataclass
class Text:
    text: str


@dataclass
class Table:
    columns: tuple[str, ...]
    lines: list[tuple[str, ...]]


@dataclass
class Picture:
    name: str  # of the PNG
    title: str
    figure: Figure


Block = Heading | Text | Table | Picture


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", metavar="DIR", type=Path, nargs="?", default=RESULTS, help="default: %(default)s")
    parser.add_argument("--output", metavar="DIR", type=Path, help="where to write (default: DIR/report)")
    parser.add_argument("--machine", metavar="NAME", help="of several: the number or a part of the name of one")
    given = parser.parse_args(arguments)
    results = read(given.results).of_machine(given.machine)
    output = given.output or (given.results if given.results.is_dir() else given.results.parent) / "report"
    write(blocks_of(results, _outcomes(given.results)), output)
    console = Console(highlight=False)
    for note in results.notes:
        console.print(note, markup=False, soft_wrap=True)
    for name in ("report.md", "report.html"):
        console.print(str(output / name), markup=False, soft_wrap=True)


def blocks_of(results: Results, outcomes: dict[str, str]) -> list[Block]:
    """The report, from top to bottom."""
    rows = results.latest()
    blocks: list[Block] = [Heading("Benchmarks", 1), Text(machine_of(rows[0])), *_origin(rows)]
    blocks += [Text(f"Note: {note}") for note in results.notes]
    if outcomes:
        blocks += [Heading("How the parts ended"), Table(("part", "outcome"), list(outcomes.items()))]
    stages = by_stage(rows)
    blocks += [Heading("Ratio to the baseline of each stage"), Text(_LEGEND), _ratios(stages)]
    for name, figure in (("throughput", plots.throughput(rows)), ("scaling", plots.scaling(stages.get("scaling", [])))):
        if figure is not None:
            blocks += [Heading(_TITLES[name]), Picture(f"{name}.png", _TITLES[name], figure)]
    for stage, measured in stages.items():
        blocks += _stage(stage, measured)
    return blocks


_LEGEND = (
    "The baseline is what one would use otherwise, measured in the same run, in turns. A ratio above 1 means that the case is "
    "so many times as fast as the baseline, or as small. Figures are percentiles 20, 50 and 80 of n calls. Peak: memory in use "
    "at most during a call, of the GPU's allocator, or resident in the process."
)
_TITLES = {"throughput": "Throughput over the chunk size", "scaling": "Scaling, measured and predicted"}


def _origin(rows: list[Row]) -> list[Block]:
    """Everything that the rows say about where they come from; several values where they differ."""
    facts = {
        "commits": [row["commit"] for row in rows],
        "measured": [row["time"][:10] if row["time"] else "before rows had a time" for row in rows],
        "threads": [row["machine"].get("threads") for row in rows],
        "clocks": [_clocks(row) for row in rows if row["clocks"]],
    }
    for package in dict.fromkeys(name for row in rows for name in row["versions"]):
        facts[package] = [row["versions"].get(package) for row in rows]
    lines = [
        (name, ", ".join(sorted({str(value) for value in values if value is not None})))
        for name, values in facts.items()
    ]
    return [Table(("", f"{len(rows)} rows"), [line for line in lines if line[1]])]


def _clocks(row: Row) -> str:
    clocks = row["clocks"]
    known = [gpu for gpu in clocks.get("gpus", []) if gpu["sm_mhz"] and gpu["max_sm_mhz"]]
    gpus = [f"GPU {gpu['sm_mhz']:.0f} of {gpu['max_sm_mhz']:.0f} MHz" for gpu in known]
    return "; ".join([*gpus, *([f"CPU {clocks['cpu_mhz']} MHz"] if "cpu_mhz" in clocks else [])])


def _ratios(stages: dict[str, list[Row]]) -> Table:
    """For each stage and unit, from the worst case to the best."""
    lines = []
    for stage, rows in stages.items():
        for unit in dict.fromkeys(row["unit"] for row in rows):
            cases = [r for r in rows if r["unit"] == unit and r["ratio"] is not None and r["case"] != r["baseline"]]
            if cases:
                worst, best = (choose(cases, key=lambda row: row["ratio"]) for choose in (min, max))
                ends = [f"{row['ratio']:.2f} ({row['case']})" for row in ([worst] if worst is best else [worst, best])]
                baselines = dict.fromkeys(plots.common_words([r["case"], r["baseline"]])[1][1] for r in cases)
                lines.append((stage, unit, str(len(cases)), *(ends * 2)[:2], "; ".join(baselines)))
    return Table(("stage", "unit", "cases", "lowest", "highest", "baseline"), lines)


def _stage(stage: str, rows: list[Row]) -> list[Block]:
    blocks: list[Block] = [Heading(stage), Text(_what(stage))]
    for name, figure in ((stage, plots.bars(rows)), (f"{stage}-parts", plots.parts(rows))):
        if figure is not None:
            blocks.append(Picture(f"{name}.png", f"{name}: bars of the cases", figure))
    used = [number for number, _ in enumerate(COLUMNS) if any(_cells(row)[number] for row in rows)]
    lines = [tuple(_cells(row)[number] for number in used) for row in rows]
    return [*blocks, Table(tuple(COLUMNS[number] for number in used), lines)]


def _cells(row: Row) -> tuple[str, ...]:
    ratio = "" if row["ratio"] is None else "baseline" if row["case"] == row["baseline"] else f"{row['ratio']:.2f}"
    share = row["settings"].get("share")
    if share is not None:
        ratio = f"{100 * share:.1f} %"
    rate, peak = images_per_s(row), row["peak_mib"]
    values = (short(row[name]) for name in ("p20", "p50", "p80"))
    flops, mfu = (row["settings"].get(name) for name in ("tflop_per_s", "mfu"))
    more = ["" if value is None else short(value) for value in (peak, rate, flops)]
    more.append(f"{100 * mfu:.1f} %" if isinstance(mfu, float) else mfu or "")
    effort = "" if row["effort"] == "full" else row["effort"]
    return row["case"], *values, row["unit"], str(row["n"]), ratio, *more, effort, row["commit"] or ""


def _what(stage: str) -> str:
    """The first paragraph of the stage's module or package; rows of a stage that is no longer there have none."""
    for file in (Path(__file__).with_name(f"{stage}.py"), Path(__file__).parent / stage / "__init__.py"):
        if file.exists():
            text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
            return " ".join(text.split("\n\n")[0].split())
    return ""


def _outcomes(path: Path) -> dict[str, str]:
    file = path / OUTCOMES
    return json.loads(file.read_text(encoding="utf-8")) if path.is_dir() and file.exists() else {}


# --- writing -------------------------------------------------------------------------------------------------------


def write(blocks: list[Block], output: Path) -> None:
    """report.md, its PNGs and report.html into a folder."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        for block in blocks:
            if isinstance(block, Picture):
                plots.save(block.figure, output / block.name)
        (output / "report.md").write_text("\n\n".join(map(markdown, blocks)) + "\n", encoding="utf-8")
        body = "\n".join(html_of(block, output) for block in blocks)
        (output / "report.html").write_text(_PAGE.format(body=body, style=_STYLE), encoding="utf-8")
    except OSError as error:
        raise InputError(f"--output: {output} cannot be written: {error.strerror}; choose another folder") from None


def markdown(block: Block) -> str:
    match block:
        case Heading(text, level):
            return f"{'#' * level} {text}"
        case Text(text):
            return text
        case Picture(name, title, _):
            return f"![{title}]({name})"
        case Table(columns, lines):
            rows = [columns, ("---",) * len(columns), *lines]
            return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)


def html_of(block: Block, folder: Path) -> str:
    """Pictures from `folder`, as data within the page."""
    match block:
        case Heading(text, level):
            return f"<h{level}>{html.escape(text)}</h{level}>"
        case Text(text):
            return f"<p>{html.escape(text)}</p>"
        case Picture(name, title, _):
            data = base64.b64encode((folder / name).read_bytes()).decode()
            return f'<img alt="{html.escape(title)}" src="data:image/png;base64,{data}">'
        case Table(columns, lines):
            head = "".join(f"<th>{html.escape(cell)}</th>" for cell in columns)
            body = "\n".join(_html_line(line) for line in lines)
            return f"<table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table>"


def _html_line(line: tuple[str, ...]) -> str:
    cells = (f'<td class="n">{html.escape(c)}</td>' if _is_number(c) else f"<td>{html.escape(c)}</td>" for c in line)
    return f"<tr>{''.join(cells)}</tr>"


def _is_number(text: str) -> bool:
    try:
        float(text.removesuffix(" %").replace(",", ""))
    except ValueError:
        return False
    return True


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>crossbatch benchmarks</title><style>{style}</style></head>
<body><main>
{body}
</main></body></html>
"""
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff; margin: 0 }
main { max-width: 66rem; margin: 2rem auto; padding: 0 1rem }
h1, h2 { line-height: 1.2; margin: 2.2rem 0 .6rem } h1 { margin-top: 0 }
img { max-width: 100%; height: auto; display: block; margin: 1rem 0 }
table { border-collapse: collapse; font-size: .85rem; margin: 1rem 0; display: block; overflow-x: auto }
th, td { text-align: left; padding: .25rem .7rem .25rem 0; border-bottom: 1px solid #ddd; vertical-align: top }
th { border-bottom: 2px solid #888; white-space: nowrap }
td.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
"""
