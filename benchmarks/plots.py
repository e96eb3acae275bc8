"""Pictures of rows: bars of a stage's cases, the parts of a step, images/s over the chunk size, and scaling.

Each function takes rows and returns a matplotlib Figure, or None where the rows hold nothing for it. What was measured is drawn
in full, the baseline in grey; what was predicted is dashed and hollow.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.results import Row, images_per_s, short
from crossbatch.engine.runtime.timing import PARTS, WHOLE

OURS, BASELINE, INK = "#1f6f8b", "#b4b4b4", "#222222"
# Of Okabe and Ito (2008), which stay apart for who sees colours differently; the last, of "other", is grey.
COLOURS = ("#0072b2", "#56b4e9", "#009e73", "#e69f00", "#d55e00", "#cc79a7", "#7f7f00", "#f0e442")
REST = "#999999"
WIDTH, BAR, HEAD = 10.0, 0.34, 0.75  # inches: of a picture, of a bar, of the title and axis of a group of bars
_DPI = 110


def save(figure: Figure, path: Path) -> None:
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=_DPI)


def bars(rows: Sequence[Row]) -> Figure | None:
    """One panel for each baseline of a stage, its cases with p20 to p80 and how many times as fast (or small) they are."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if row["baseline"] is not None:
            groups.setdefault(f"{row['baseline']}|{row['effort']}|{row['unit']}", []).append(row)
    if not groups:
        return None
    heights = [HEAD + BAR * len(group) for group in groups.values()]
    figure = Figure(figsize=(WIDTH, sum(heights)), layout="constrained")
    panels = figure.subplots(len(groups), 1, height_ratios=heights, squeeze=False)[:, 0]
    for panel, group in zip(panels, groups.values(), strict=True):
        _bars_of(panel, group)
    return figure


def _bars_of(panel: Axes, group: list[Row]) -> None:
    title, labels = common_words([row["case"] for row in group])
    middles = [row["p50"] for row in group]
    spread = [[row["p50"] - row["p20"] for row in group], [row["p80"] - row["p50"] for row in group]]
    colours = [BASELINE if row["case"] == row["baseline"] else OURS for row in group]
    panel.barh(range(len(group)), middles, 0.7, color=colours, xerr=spread, error_kw={"ecolor": INK, "capsize": 2})
    for place, row in enumerate(group):
        ratio = "" if row["ratio"] is None or row["case"] == row["baseline"] else f"   {row['ratio']:.2f} x"
        panel.annotate(
            f"{short(row['p50'])} {row['unit']}{ratio}",
            (row["p80"], place),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
        )
    effort = "" if group[0]["effort"] == "full" else f" ({group[0]['effort']})"
    _dress(panel, f"{title or group[0]['stage']}{effort}", labels, max(row["p80"] for row in group))
    panel.set_xlabel(group[0]["unit"], fontsize=9)


def parts(rows: Sequence[Row]) -> Figure | None:
    """A stacked bar for each step that was taken apart: the share of each part, and what is left over."""
    steps: dict[str, dict[str, float]] = {}
    times: dict[str, float] = {}
    for row in rows:
        part = row["settings"].get("part")
        if part == WHOLE:
            times[row["settings"]["of"]] = row["p50"]
        elif part is not None:
            steps.setdefault(row["settings"]["of"], {})[part] = row["settings"]["share"]
    if not steps:
        return None
    found = {part for shares in steps.values() for part in shares}
    colours = {part: colour for part, colour in zip(PARTS, (*COLOURS, REST), strict=True) if part in found}
    figure = Figure(figsize=(WIDTH, 1.5 + 0.62 * len(steps)), layout="constrained")
    panel = figure.subplots()
    left = [0.0] * len(steps)
    for name, colour in colours.items():
        shares = [100 * step.get(name, 0.0) for step in steps.values()]
        panel.barh(range(len(steps)), shares, 0.62, left=left, color=colour, label=name)
        for place, share in enumerate(shares):
            if share >= 4:
                text = {"ha": "center", "va": "center", "fontsize": 9, "color": "white" if _is_dark(colour) else INK}
                panel.annotate(f"{share:.0f}", (left[place] + share / 2, place), **text)
        left = [start + share for start, share in zip(left, shares, strict=True)]
    labels = [f"{name}\n{short(times[name])} ms" if name in times else name for name in steps]
    _dress(panel, "Parts of a training step, per cent of its time", labels, 100 / 1.02, room=1.02)
    figure.legend(loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    return figure


def throughput(rows: Sequence[Row]) -> Figure | None:
    """images/s over the images that the backbone sees at once; ours in full, the baselines dotted."""
    stages: dict[str, dict[str, dict[int, float]]] = {}
    baselines: dict[str, str] = {}  # line -> the line that it is beside
    for row in rows:
        rate, chunk = images_per_s(row), row["settings"].get("chunk")
        if rate is None or chunk is None or "checkpointed" in row["case"]:
            continue
        name, beside = (_line_of(case, row) for case in (row["case"], row["baseline"]))
        stages.setdefault(row["stage"], {}).setdefault(name, {})[chunk] = rate
        baselines[name] = beside
    if not any(len(points) > 1 for lines in stages.values() for points in lines.values()):
        return None
    figure = Figure(figsize=(WIDTH, 4.6), layout="constrained")
    for panel, (stage, lines) in zip(figure.subplots(1, len(stages), squeeze=False)[0], stages.items(), strict=True):
        pairs = list(dict.fromkeys(baselines[name] for name in lines))
        for name, points in lines.items():
            style = {"color": COLOURS[pairs.index(baselines[name]) % len(COLOURS)], "marker": "o", "label": name}
            panel.plot(*zip(*sorted(points.items()), strict=True), ":" if baselines[name] == name else "-", **style)
        _over_powers_of_two(panel, "images that the backbone sees at once", "images/s, two views each")
        panel.set_title(stage, loc="left", fontsize=11)
        panel.legend(frameon=False, fontsize=9)
    return figure


def _line_of(case: str, row: Row) -> str:
    """Cases that differ in the number of images or chunks belong to one line."""
    name = row["settings"].get("backbone") or case.split(", ")[0]
    name += ", plain torch" if case.endswith("plain torch") else ""
    return name if row["effort"] == "full" else f"{name} ({row['effort']})"


def scaling(rows: Sequence[Row]) -> Figure | None:
    """Rows of the stage "scaling": images/s over the number of ranks, and its share of linear scaling from the fewest measured.

    `settings` of a row say "ranks", "mode" (weak or strong) and, where it was not measured, "predicted".
    """
    lines: dict[tuple[str, bool], dict[int, float]] = {}
    for row in rows:
        facts = row["settings"]
        if "ranks" in facts and row["unit"] == "images/s":
            key = facts.get("mode", "weak"), bool(facts.get("predicted"))
            lines.setdefault(key, {})[facts["ranks"]] = row["p50"]
    if not any(len(points) > 1 for points in lines.values()):
        return None
    figure = Figure(figsize=(WIDTH, 4.6), layout="constrained")
    rates, efficiencies = figure.subplots(1, 2)
    modes = list(dict.fromkeys(mode for mode, _ in lines))
    for (mode, predicted), points in lines.items():
        measured = lines.get((mode, False), points)
        fewest = min(measured)
        points = {fewest: measured[fewest], **points}  # predictions start at what was measured
        colour = COLOURS[modes.index(mode) % len(COLOURS)]
        face = "none" if predicted else colour
        style = {"color": colour, "marker": "o", "markerfacecolor": face, "linestyle": "--" if predicted else "-"}
        label = f"{mode}, {'predicted' if predicted else 'measured'}"
        ranks = sorted(points)
        rates.plot(ranks, [points[rank] for rank in ranks], label=label, **style)
        one = measured[fewest] / fewest
        efficiencies.plot(ranks, [100 * points[rank] / (rank * one) for rank in ranks], label=label, **style)
    for panel, what in ((rates, "images/s, two views each"), (efficiencies, "per cent of linear scaling")):
        _over_powers_of_two(panel, "ranks", what)
    rates.legend(frameon=False, fontsize=9)
    return figure


def common_words(cases: Sequence[str]) -> tuple[str, list[str]]:
    """The pieces between commas that all cases begin or end with, and what distinguishes them.

    ["ours, heads, n 64", "plain, heads, n 64"] -> "heads, n 64", ["ours", "plain"].
    """
    pieces = [case.split(", ") for case in cases]
    shortest = min(map(len, pieces))
    before = after = 0
    if len(cases) > 1:
        while before < shortest - 1 and len({tuple(p[: before + 1]) for p in pieces}) == 1:
            before += 1
        while before + after < shortest - 1 and len({tuple(p[len(p) - after - 1 :]) for p in pieces}) == 1:
            after += 1
    title = pieces[0][:before] + pieces[0][len(pieces[0]) - after :]
    return ", ".join(title), [", ".join(p[before : len(p) - after]) for p in pieces]


def _dress(panel: Axes, title: str, labels: Sequence[str], most: float, room: float = 1.3) -> None:
    """A panel of horizontal bars, the first on top; `room` for what is written beside the longest."""
    panel.set_yticks(range(len(labels)), labels, fontsize=9)
    panel.invert_yaxis()
    panel.set_xlim(0, most * room or 1)
    panel.set_title(title, loc="left", fontsize=11)
    panel.tick_params(axis="x", labelsize=8)
    _open(panel)


def _over_powers_of_two(panel: Axes, x: str, y: str) -> None:
    """Lines over numbers that double, from zero up."""
    ticks = sorted({int(place) for line in panel.get_lines() for place in np.asarray(line.get_xdata())})
    panel.set_xscale("log", base=2)
    panel.set_xticks(ticks, [str(tick) for tick in ticks])
    panel.minorticks_off()
    panel.set_ylim(bottom=0)
    panel.set_xlabel(x)
    panel.set_ylabel(y)
    _open(panel)


def _open(panel: Axes) -> None:
    panel.spines[["top", "right"]].set_visible(False)


def _is_dark(colour: str) -> bool:
    red, green, blue = (int(colour[at : at + 2], 16) for at in (1, 3, 5))
    return 0.3 * red + 0.59 * green + 0.11 * blue < 140
