"""Finds what went wrong first in a step that was made again, and the image that brought it.

First means: in the order of computation. A weight counts where its layer begins, an output where it is complete, then come the
loss terms, gradients in the order of the backward pass, and updates. A value is wrong if it is not finite, or if it jumps: its
largest absolute value is more than `jump` times the largest one of the same tensor in the watched steps before. A gradient
must also be larger than most others were, because behind a norm that starts at zero gradients grow from nothing. A weight may
grow by what a step adds. Without a step before, views are compared with the others of the batch. A checkpoint on the way that
differs from what the steps give comes before all of that.

The image is found where images have not met yet. Up to the first norm over the batch, a row of a layer's output depends on
one image alone, so the rows that are wrong name the images. If all rows are wrong at once, the layers before are searched
backwards for rows that stand out from the others.
"""

import math
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch

from crossbatch.engine.replay.probe import INPUT, Moments, Values
from crossbatch.engine.replay.rebuild import Rebuilt, StateFault

GRADIENTS = ("gradient", "gradient of weight ")  # of outputs and of weights, with the beginning of their names
IMPLAUSIBLE = 1e4  # of a weight, where there is no step before to compare with

Kind = Literal["state", "not finite", "jump", "other images", "other machine", "none"]


@dataclass(frozen=True)
class Event:
    """Holds one tensor of a step, in the order of computation; `before` is its largest absolute value in earlier steps."""

    at: float
    layer: str
    tensor: str
    moments: Moments
    before: float | None
    values: Values | None = None

    def is_of(self, kind: str) -> bool:
        """Return whether the tensor is of `kind`, which is one of GRADIENTS."""
        return self.tensor == kind or (kind.endswith(" ") and self.tensor.startswith(kind))


@dataclass
class Verdict:
    """Says what went wrong first.

    Attributes:
        kind: "state": a checkpoint differs from what the steps before it give; "not finite" and "jump": of a value in the
            step; "other images" and "other machine": the run recorded another loss than the step gives; "none".
        layer: the layer, "input", or "loss".
        tensor: what of it: "output", "gradient", "weight NAME", the name of a loss term, ...
        positions: of the images that brought it, in the global batch; empty if it was none.
        rank: the rank of the run that had it; None if all had, or nobody can tell.
        lines: the verdict in words.
        state: the fault of a checkpoint.
    """

    kind: Kind
    layer: str | None = None
    tensor: str | None = None
    positions: list[int] = field(default_factory=list)
    rank: int | None = None
    lines: list[str] = field(default_factory=list)
    state: StateFault | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the verdict without its lines of text, as a dict for JSON."""
        found = {name: value for name, value in asdict(self).items() if name != "lines"}
        if self.state is not None:
            found["state"] |= {"bits": self.state.bits, "saved": str(self.state.saved)}
        return found


def judge(rebuilt: Rebuilt, jump: float) -> Verdict:
    """Return what went wrong first in `rebuilt`; `jump` is the factor from which a larger value counts as wrong."""
    parted = rebuilt.parted_at
    has_other_images = bool(rebuilt.changed_files) and parted is not None
    if not has_other_images and any(fault.step < rebuilt.step for fault in rebuilt.state_faults):
        return of_state(rebuilt.state_faults[0], rebuilt)
    events = sorted(_events(rebuilt), key=lambda event: event.at)
    floors = {
        kind: statistics.median(
            [event.before for event in events if event.is_of(kind) and event.before is not None] or [0.0]
        )
        for kind in GRADIENTS
    }
    for number, event in enumerate(events):
        kind = _kind(event, jump, max([0.0, *(floor for name, floor in floors.items() if event.is_of(name))]))
        if kind is not None:
            return _of_event(kind, event, events[:number], rebuilt, jump)
    if rebuilt.state_faults and not has_other_images:
        return of_state(rebuilt.state_faults[0], rebuilt)
    if parted is not None:
        lines = [
            f"replay makes step {parted} without a fault, with loss {rebuilt.losses[parted]:.6g}; the run recorded "
            f"{rebuilt.run.loss(parted):.6g}",
            "images have changed since, so this is not the step that the run made"
            if has_other_images
            else "what the run met is in neither data, code nor state: a fault of a machine, or of an image since replaced",
        ]
        return Verdict("other images" if has_other_images else "other machine", lines=lines)
    return Verdict("none", lines=["nothing is wrong: all values are finite, and none jumps"])


def _events(rebuilt: Rebuilt) -> Iterator[Event]:
    record, steps = rebuilt.record, list(rebuilt.before.values())

    def largest(of_step: list[Moments | None]) -> float | None:
        known = [moments.largest for moments in of_step if moments is not None]
        return max(known, default=None)

    end = max((max(layer.output.at, layer.gradient.at) for layer in record.layers.values()), default=0) + 1
    for name, layer in record.layers.items():
        seen = [step.layers[name] for step in steps if name in step.layers]
        for weight in layer.parameters:
            measured = record.weights[weight]
            inner = weight.removeprefix(f"{name}.")
            earlier = [step.weights[weight] for step in steps]
            # What steps add explains a weight; only something else than a step makes one jump.
            before = largest([one.before for one in earlier])
            if before is not None:
                before += largest([one.update for one in earlier]) or 0.0
            yield Event(layer.began - 0.5, name, f"weight {inner}", measured.before, before)
            for tensor, at, now, then in (
                ("gradient", end, measured.gradient, [one.gradient for one in earlier]),
                ("update", end + 1, measured.update, []),  # follows the schedule, so only whether it is finite counts
            ):
                if now is not None:
                    yield Event(at, name, f"{tensor} of weight {inner}", now, largest(list(then)))
        for tensor in ("output", "gradient"):
            values: Values = getattr(layer, tensor)
            if values.at >= 0:
                before = largest([getattr(one, tensor).moments for one in seen])
                yield Event(values.at, name, tensor, values.moments, before, values)
    after_layers = max(layer.output.at for layer in record.layers.values()) + 0.5
    for name, term in rebuilt.result.suspects.items():
        if name.startswith("loss"):
            yield Event(after_layers, "loss", name, Moments.of(term), None)


def _kind(event: Event, jump: float, floor: float) -> Literal["not finite", "jump"] | None:
    if event.moments.not_finite:
        return "not finite"
    if event.before is None:
        is_huge = event.tensor.startswith("weight ") and event.moments.largest > IMPLAUSIBLE
        return "jump" if is_huge or (event.layer == INPUT and _outstanding(event.values, jump)) else None
    # Where all was zero, as behind a norm whose weight starts at zero, any value would be a jump.
    jumps = 0 < event.before < math.inf and event.moments.largest > max(jump * event.before, floor)
    return "jump" if jumps else None


def _of_event(
    kind: Literal["not finite", "jump"], event: Event, before: list[Event], rebuilt: Rebuilt, jump: float
) -> Verdict:
    moments, where = event.moments, "input" if event.layer == INPUT else f"{event.layer}: {event.tensor}"
    if kind == "not finite":
        what = f"not finite ({moments.not_finite:,} of {moments.count:,} values)"
    elif event.before is None:
        why = "far more than in other images" if event.layer == INPUT else "which is implausible for a weight"
        what = f"up to {moments.largest:.3g}, {why}"
    else:
        what = (
            f"up to {moments.largest:.3g}, {moments.largest / event.before:.3g} times its largest value in steps before"
        )
    verdict = Verdict(
        kind, event.layer, event.tensor, lines=[f"first fault, in the order of computation: {where}, {what}"]
    )
    if event.tensor.startswith("weight "):
        verdict.lines.append("no image brought it: the weight was so before the step")
        return verdict
    positions, found_at = _images(event, before, jump)
    n = len(rebuilt.indices) // rebuilt.ranks
    ranks = {position // n for position in positions}
    if len(ranks) == 1:
        verdict.rank = ranks.pop()
    if len(positions) == n and n > 1 and verdict.rank is not None:
        verdict.lines.append(f"all images of rank {verdict.rank}, and no others: look at that rank, not at an image")
    elif positions:
        verdict.positions = positions
        verdict.lines += [describe_image(rebuilt, position) for position in positions[:8]]
        if len(positions) > 8:
            verdict.lines.append(f"and {len(positions) - 8} more images")
        how = (
            f"these rows of {found_at} are wrong, and the others are not"
            if found_at == where
            else (f"all rows are wrong there; in {found_at}, before, these stand out")
        )
        verdict.lines.append(f"found by image: {how}")
    else:
        verdict.lines.append("no single image stands out")
    return verdict


def _images(event: Event, before: list[Event], jump: float) -> tuple[list[int], str]:
    """Return the positions of the images that are wrong in `event` or stand out in what was computed before, and where."""
    largest = event.values.largest if event.values is not None else None
    if largest is not None:
        limit = torch.finfo(torch.float32).max if event.moments.not_finite else jump * (event.before or math.inf)
        wrong = (largest > limit).nonzero().flatten().tolist()
        if 0 < len(wrong) <= len(largest) // 2:
            return wrong, "input" if event.layer == INPUT else f"{event.layer}: {event.tensor}"
    for earlier in [event, *reversed(before)]:
        values = earlier.values
        if earlier.tensor != "output":
            continue
        outstanding = _outstanding(values, jump)
        if outstanding:
            return outstanding, "input" if earlier.layer == INPUT else f"{earlier.layer}: {earlier.tensor}"
    return [], ""


def _outstanding(values: Values | None, jump: float) -> list[int]:
    """Return the positions of the images that are larger than most of the batch by more than the factor `jump`."""
    if values is None or values.largest is None:
        return []
    found = (values.largest > jump * values.largest.median()).nonzero().flatten().tolist()
    return found if len(found) <= len(values.largest) // 2 else []


def describe_image(rebuilt: Rebuilt, position: int) -> str:
    """Return which image stands at `position` of the global batch."""
    rank, place = rebuilt.place(position)
    return f"image {rebuilt.indices[position]}, {rebuilt.names[position]}: rank {rank}, position {place} of its batch"


def of_state(fault: StateFault, rebuilt: Rebuilt) -> Verdict:
    """Return the verdict that a checkpoint is not what the steps before it give."""
    name = fault.name.partition(".")[2] if not fault.name.startswith("optimizer.") else fault.name.split(".", 2)[2]
    layer, _, tensor = name.rpartition(".")
    element = f"[{', '.join(map(str, fault.element))}]"
    bits = fault.bits
    bit = f" (bit {bits[0]} differs)" if len(bits) == 1 else ""
    start = max((step for step in (rebuilt.start, *rebuilt.compared) if step < fault.step), default=rebuilt.start)
    came_from = f"steps {start + 1} to {fault.step} from {'the seed' if start == 0 else f'checkpoint {start}'}"
    count, total = fault.elements
    who = "" if fault.rank is None else f", held by rank {fault.rank}"
    lines = [
        f"first fault: the state after step {fault.step} is not what the steps give: {fault.name}{element} is "
        f"{fault.saved:.6g} {fault.where} and {fault.replayed:.6g} after {came_from}{bit}{who}",
        f"{count:,} of its {total:,} elements differ by more than rounding can make; tensors of the state that differ: "
        f"{fault.tensors}",
        "no image brought it: something other than a step has changed memory or file"
        if fault.name.startswith("parameters.")
        else f"no weight differs: what went wrong in {came_from} has left its traces only there",
    ]
    return Verdict(
        "state",
        layer,
        f"weight {tensor}" if fault.name.startswith("parameters.") else fault.name,
        [],
        fault.rank,
        lines,
        fault,
    )
