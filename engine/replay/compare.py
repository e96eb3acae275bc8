"""Finds where two runs part: the first step whose recorded numbers differ, then the first tensor in that step.

The step is found in metrics.jsonl, where both runs have a line for it, and in checkpoints of the same step. Both runs then make
it again on the same ranks, and their records are compared in the order of computation: images, weights, outputs, loss terms,
gradients, updates. Two tensors differ if they do by more than `tolerance` times the largest absolute value in them; outputs and
gradients are compared by the mean and the largest value of each image.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from crossbatch import InputError
from crossbatch.engine import checkpoint
from crossbatch.engine.checkpoint import Unreadable
from crossbatch.engine.nested import flatten
from crossbatch.engine.replay.rebuild import Rebuilt, RecordedRun, same_number


@dataclass(frozen=True)
class Difference:
    """Says how two runs differ in one place: `where` is a layer, batch, input or loss; `tensor` is what differs there."""

    where: str
    tensor: str
    text: str


@dataclass(frozen=True)
class Parting:
    """Says in which step the records of two runs first differ, and how.

    `in_checkpoints` are the parameters that differ between the runs' checkpoints of the step, if it shows there.
    """

    step: int
    text: str
    in_checkpoints: list[Difference]


def first_step_apart(run: RecordedRun, other: RecordedRun, tolerance: float) -> Parting | None:
    """Return where the records of two runs first differ; None if they never do.

    Raises InputError if no step is recorded in both.
    """
    steps = sorted(
        step for step in run.metrics.keys() & other.metrics.keys() if None not in (run.loss(step), other.loss(step))
    )
    saved = sorted(run.checkpoints.keys() & other.checkpoints.keys())
    if not steps and not saved:
        raise InputError(
            f"--compare {other.path}: no step is recorded in both runs, in metrics.jsonl or checkpoints/; allowed: a run with "
            f"steps of {run.path}"
        )
    partings = (Parting(step, text, []) for step in steps if (text := _metrics_apart(run, other, step, tolerance)))
    found = next(partings, None)
    for step in saved:
        if found is not None and step >= found.step:
            break
        apart = _checkpoints_apart(run.checkpoints[step], other.checkpoints[step], tolerance)
        if apart:
            return Parting(step, f"{apart[0].where}: {apart[0].tensor} in the checkpoints: {apart[0].text}", apart)
    return found


def _metrics_apart(run: RecordedRun, other: RecordedRun, step: int, tolerance: float) -> str | None:
    ours, theirs = (flatten(one.metrics[step], "/") for one in (run, other))
    for name in ("loss", *(name for name in ours if name.startswith("loss_terms/")), "grad_norm"):
        if name in ours and name in theirs:
            pair = [math.nan if lines[name] is None else float(lines[name]) for lines in (ours, theirs)]
            if not same_number(pair[0], pair[1], tolerance):
                return f"{name} {pair[0]:.9g} and {pair[1]:.9g}"
    return None


def _checkpoints_apart(ours: Path, theirs: Path, tolerance: float) -> list[Difference]:
    """Return the parameters that differ in two checkpoints; none if one of them cannot be read."""
    try:
        one, two = checkpoint.read(ours, "parameters."), checkpoint.read(theirs, "parameters.")
    except Unreadable:
        return []
    found = []
    for name, tensor in one.items():
        layer, _, weight = name.rpartition(".")
        text = tensors_apart(tensor, two[name], tolerance) if name in two else "only in one checkpoint"
        if text is not None:
            found.append(Difference(layer, f"weight {weight}", text))
    return found


def tensors_apart(one: torch.Tensor, two: torch.Tensor, tolerance: float) -> str | None:
    """Return how two tensors differ, or None if they agree within `tolerance` of their largest absolute value."""
    if one.shape != two.shape:
        return f"shapes {list(one.shape)} and {list(two.shape)}"
    one, two = one.double().flatten(), two.double().flatten()
    both = one.isfinite() & two.isfinite()
    unlike = one.isfinite() != two.isfinite()
    apart = torch.where(both, (one - two).abs(), torch.where(unlike, math.inf, 0.0))
    scale = torch.cat([one[both], two[both]]).abs().max() if both.any() else torch.ones(())
    if not len(one) or apart.max() <= tolerance * scale:
        return None
    at = int(apart.argmax())
    return f"element {at} is {one[at]:.9g} and {two[at]:.9g}, {float(apart[at] / scale):.3g} of the largest value"


def differences(one: Rebuilt, two: Rebuilt, tolerance: float) -> Iterator[Difference]:
    """Yield how the same step of two runs differs, in the order of computation."""
    if len(one.order) != len(two.order):
        yield Difference("batch", "images", f"{len(one.order)} and {len(two.order)} images")
        return
    for position in np.flatnonzero(one.indices != two.indices).tolist()[:1]:
        images = (
            f"image {one.indices[position]} ({one.names[position]}) and {two.indices[position]} ({two.names[position]})"
        )
        yield Difference("batch", "images", f"position {position} has {images}")
    if one.views.shape != two.views.shape:
        yield Difference("input", "views", f"views are {list(one.views.shape)} and {list(two.views.shape)}")
    else:
        other_views = (one.views != two.views).flatten(2).any(2).any(0).nonzero().flatten().tolist()
        for position in other_views[:1]:
            which = f"{len(other_views)} images have other views, the first one at position {position + one.first}"
            yield Difference("input", "views", which)
    layers = [layer.name for layer in one.record.in_order()]
    for name in [*layers, *(name for name in two.record.layers if name not in layers)]:
        ours, theirs = one.record.layers.get(name), two.record.layers.get(name)
        if ours is None or theirs is None:
            yield Difference(name, "layer", f"only in {(two if ours is None else one).run.path}")
            continue
        for weight in ours.parameters:
            if weight in two.state_before and (
                text := tensors_apart(one.state_before[weight], two.state_before[weight], tolerance)
            ):
                yield Difference(name, f"weight {weight.removeprefix(f'{name}.')}", f"before the step, {text}")
        yield from _of_values(one, name, "output", ours.output, theirs.output, tolerance)
    for term, value in one.result.suspects.items():
        if term in two.result.suspects:
            pair = float(value), float(two.result.suspects[term])
            if term.startswith("loss") and not same_number(pair[0], pair[1], tolerance):
                yield Difference("loss", term, f"{pair[0]:.9g} and {pair[1]:.9g}")
    for layer in sorted(one.record.layers.values(), key=lambda layer: layer.gradient.at):
        if layer.gradient.at >= 0 and layer.name in two.record.layers:
            theirs = two.record.layers[layer.name].gradient
            yield from _of_values(one, layer.name, "gradient", layer.gradient, theirs, tolerance)
    for name in one.record.weights:
        if name in two.record.weights:
            for part in ("gradient", "update"):
                pair = [getattr(record.weights[name], part) for record in (one.record, two.record)]
                largest = [math.nan if moments is None else moments.largest for moments in pair]
                if not same_number(largest[0], largest[1], tolerance):
                    text = f"at most {largest[0]:.9g} and {largest[1]:.9g}"
                    yield Difference(name.rpartition(".")[0], f"{part} of weight {name.rpartition('.')[2]}", text)


def _of_values(one: Rebuilt, name: str, tensor: str, ours: Any, theirs: Any, tolerance: float) -> Iterator[Difference]:
    for what in ("largest", "mean"):
        mine, others = getattr(ours, what), getattr(theirs, what)
        if mine is None or others is None:
            continue
        text = tensors_apart(mine, others, tolerance)
        if text:
            position = int(torch.nan_to_num((mine - others).abs(), math.inf, math.inf).argmax())
            of_image = f"image {one.indices[position]} ({one.names[position]})"
            yield Difference(name, tensor, f"{what} of {of_image} is {mine[position]:.9g} and {others[position]:.9g}")
            return
    if ours.largest is None and not same_number(ours.moments.largest, theirs.moments.largest, tolerance):
        yield Difference(name, tensor, f"at most {ours.moments.largest:.9g} and {theirs.moments.largest:.9g}")


def changed_keys(one: RecordedRun, two: RecordedRun, step: int) -> list[str]:
    """Return "key: A and B" for each key of the configuration in which two runs differ at `step`."""
    ours, theirs = (flatten(run.config_at(step), leaves=("backbone_args",)) for run in (one, two))
    return [
        f"{key}: {json.dumps(ours.get(key))} and {json.dumps(theirs.get(key))}"
        for key in sorted(ours.keys() | theirs.keys())
        if ours.get(key) != theirs.get(key)
    ]
