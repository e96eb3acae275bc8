"""Watches one training step from outside: statistics of every layer's output and gradient, of weights and their updates.

The step is the trainer's own. Hooks on modules see what it computes, and the spans that it opens ("backward", "optimizer") say
what it is doing. Every event gets a number, so that what went wrong first can be told from what followed from it.

Shapes: V = views, n = images of this rank. A row of a layer's output belongs to one image: rows are view-major, and behind
BatchFormer also stream-major within a view, so row r belongs to image r % n.
"""

import contextlib
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from crossbatch.engine.step import TrainStep
from crossbatch.models import MoCo

INPUT = "input"  # the name under which the normalised views stand beside the layers


@dataclass
class Moments:
    """Holds statistics of the finite values of a tensor, and the number of the others; those of its parts can be added."""

    count: int = 0
    not_finite: int = 0
    smallest: float = math.inf
    greatest: float = -math.inf
    total: float = 0.0
    squares: float = 0.0

    @staticmethod
    def of(tensor: Tensor) -> "Moments":
        """Measure a tensor of any shape and floating dtype."""
        values = tensor.detach().flatten().double()
        finite = values[values.isfinite()]
        if not len(finite):
            return Moments(len(values), len(values))
        low, high = finite.aminmax()
        numbers = torch.stack([low, high, finite.sum(), finite.square().sum()]).tolist()
        return Moments(len(values), len(values) - len(finite), *numbers)

    def add(self, other: "Moments") -> None:
        """Add the statistics of another part of the tensor."""
        self.count, self.not_finite = self.count + other.count, self.not_finite + other.not_finite
        self.smallest, self.greatest = min(self.smallest, other.smallest), max(self.greatest, other.greatest)
        self.total, self.squares = self.total + other.total, self.squares + other.squares

    @property
    def largest(self) -> float:
        """Return the largest absolute value; infinite if a value is not finite."""
        return math.inf if self.not_finite else max(abs(self.smallest), abs(self.greatest)) if self.count else 0.0

    def to_json(self) -> dict[str, float | None]:
        """Return min, max, mean and standard deviation of the finite values, and the share of the others."""
        finite = self.count - self.not_finite
        if not finite:
            return {"min": None, "max": None, "mean": None, "std": None, "not_finite": float(self.count > 0)}
        mean = self.total / finite
        std = math.sqrt(max(self.squares / finite - mean * mean, 0.0)) if math.isfinite(self.squares) else None
        share = self.not_finite / self.count
        return {"min": self.smallest, "max": self.greatest, "mean": mean, "std": std, "not_finite": share}


@dataclass
class Values:
    """Holds what is known of one tensor of a layer: when it was complete, its moments, and what each image has in it.

    `largest` and `mean` are [n] per image: the largest absolute value (infinite if one is not finite), and the mean; None if
    the rows of the tensor are not images.
    """

    at: int = -1
    moments: Moments = field(default_factory=Moments)
    largest: Tensor | None = None
    mean: Tensor | None = None


@dataclass
class Layer:
    """Holds what a module of the network computed in a step; `began` is the number of the event of its first call."""

    name: str
    kind: str
    began: int
    output: Values = field(default_factory=Values)
    gradient: Values = field(default_factory=Values)
    parameters: list[str] = field(default_factory=list)  # that belong to it


@dataclass
class Weight:
    """Holds the statistics of a parameter before a step, of its gradient, and of what the step added to it."""

    before: Moments
    gradient: Moments | None = None
    update: Moments | None = None


@dataclass
class StepRecord:
    """Holds what the probe saw of one step; tensors are on the CPU."""

    layers: dict[str, Layer] = field(default_factory=dict)
    weights: dict[str, Weight] = field(default_factory=dict)
    inputs: Tensor | None = None  # the normalised views [V, n, C, H, W], if they were asked for
    queries: Tensor | None = None  # of this rank's images [V * S * n, D]
    keys: Tensor | None = None

    def in_order(self) -> list[Layer]:
        """Return the layers in the order in which their outputs were complete."""
        return sorted(self.layers.values(), key=lambda layer: max(layer.began, layer.output.at))


@contextlib.contextmanager
def watched(step: TrainStep, keep_inputs: bool = False) -> Iterator[StepRecord]:
    """Watch the one step that is made inside this context; the record is complete when it ends.

    `keep_inputs` also keeps the normalised views.
    """
    probe = _Probe(step, keep_inputs)
    model = step.backend.model
    handles = [model.register_forward_pre_hook(probe.before_model)]
    for name, module in model.named_modules():
        if name:
            handles.append(module.register_forward_pre_hook(partial(probe.before, name)))
            handles.append(module.register_forward_hook(partial(probe.after, name)))
    span, model_span = step.span, model.span
    step.span = model.span = probe.span
    try:
        yield probe.record
        probe.finish()
    finally:
        step.span, model.span = span, model_span
        for handle in handles:
            handle.remove()


class _Probe:
    """Fills a `StepRecord` from hooks."""

    def __init__(self, step: TrainStep, keep_inputs: bool):
        assert isinstance(step.backend.model, MoCo)
        self.step, self.model, self.keep_inputs = step, step.backend.model, keep_inputs
        self.record, self.scale = StepRecord(), step.progress.loss_scale
        self.events, self.spans = itertools.count(), [""]
        self.part, self.positions = "", torch.arange(0)  # of the images that the network is computing
        self.n = step.cfg.local_batch
        self.chunks = [chunk[0] for chunk in step.cut(torch.arange(self.n)[None])]
        self.passes = {"features": iter(self.chunks), "embed": iter(self.chunks)}
        self.before_step = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        self.record.weights = {name: Weight(Moments.of(p)) for name, p in self.before_step.items()}

    @contextlib.contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Take the place of the step's `span`: note what the step is doing, and measure gradients before the update."""
        if name == "optimizer":
            for parameter_name, parameter in self.model.named_parameters():
                if parameter.grad is not None:
                    self.record.weights[parameter_name].gradient = Moments.of(parameter.grad / self.scale)
        self.spans.append(name)
        try:
            yield
        finally:
            self.spans.pop()

    def before_model(self, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        """Note which images are computed from now on: a chunk, or all of this rank."""
        self.part = arguments[0]
        passes = self.passes.get(self.part)
        self.positions = torch.arange(self.n) if passes is None else next(passes)
        if self.part in ("features", "loss"):
            images = arguments[1].unflatten(0, (-1, len(self.positions)))
            layer = self.record.layers.setdefault(INPUT, Layer(INPUT, "views", next(self.events)))
            self.note(layer.output, images.flatten(0, 1), self.positions)
            if self.keep_inputs:
                if self.record.inputs is None:
                    self.record.inputs = torch.empty(len(images), self.n, *images.shape[2:])
                self.record.inputs[:, self.positions] = images.float().cpu()

    def before(self, name: str, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        """Note when a layer begins."""
        label = self.label(name)
        if label not in self.record.layers:
            self.record.layers[label] = Layer(label, type(module).__name__, next(self.events))

    def after(self, name: str, module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        """Note what a layer has computed, and ask for the gradient."""
        if not isinstance(output, Tensor) or not output.is_floating_point():
            return  # what a norm leaves to another one
        layer, positions = self.record.layers[self.label(name)], self.positions
        mixes = name.startswith("batchformer") or name.startswith("momentum.batchformer")

        def by_row(tensor: Tensor) -> Tensor:
            return tensor.flatten(0, 1) if mixes and tensor.dim() > 2 else tensor  # from [views or groups, images, C]

        # The second pass of a chunk, and what a backward pass computes again, repeat what was seen.
        if self.part != "embed" and "backward" not in self.spans:
            self.note(layer.output, by_row(output), positions)
            if name == "predictor":
                self.record.queries = output.detach().float().cpu()
            if name == "momentum.projector":
                self.record.keys = output.detach().float().cpu()
        if output.requires_grad:
            output.register_hook(lambda gradient: self.note(layer.gradient, by_row(gradient) / self.scale, positions))

    def label(self, name: str) -> str:
        """Return the name of a layer, followed by "(keys)" where a layer that both encoders share computes keys."""
        makes_keys = self.part in ("loss", "contrast") and not torch.is_grad_enabled()
        return f"{name} (keys)" if makes_keys and not name.startswith("momentum.") else name

    def note(self, values: Values, tensor: Tensor, positions: Tensor) -> None:
        """Add a tensor, or the part of one that belongs to the images at `positions`, to `values`."""
        tensor = tensor.detach()
        if values.at < 0:
            values.at = next(self.events)
        values.moments.add(Moments.of(tensor))
        if tensor.dim() < 2 or len(tensor) % len(positions):
            return
        rows = tensor.float().flatten(1)
        largest = rows.abs().nan_to_num(math.inf, math.inf).amax(1).view(-1, len(positions)).amax(0).cpu()
        mean = rows.mean(1).view(-1, len(positions)).mean(0).cpu()
        if values.largest is None or values.mean is None:
            values.largest, values.mean = torch.zeros(self.n), torch.zeros(self.n)
        values.largest[positions] = torch.maximum(values.largest[positions], largest)  # of a layer that is called twice
        values.mean[positions] = mean

    def finish(self) -> None:
        """Add what is known only after the step: updates, and which layer a parameter belongs to."""
        for name, parameter in self.model.named_parameters():
            self.record.weights[name].update = Moments.of(parameter.detach() - self.before_step[name])
            owner = name.rpartition(".")[0]
            while owner and owner not in self.record.layers:
                owner = owner.rpartition(".")[0]
            if owner:
                self.record.layers[owner].parameters.append(name)
        self.before_step = {}


def over_ranks(record: StepRecord) -> StepRecord:
    """Return the record of a step over the whole batch; every rank calls it. Inputs, queries and keys stay this rank's."""
    if dist.get_world_size() == 1:
        return record
    records: list[StepRecord] = [record] * dist.get_world_size()
    dist.all_gather_object(records, StepRecord(record.layers, record.weights))
    for name, layer in record.layers.items():
        for mine, theirs in (
            (layer.output, [other.layers[name].output for other in records]),
            (layer.gradient, [other.layers[name].gradient for other in records]),
        ):
            mine.moments = Moments()
            for part in theirs:
                mine.moments.add(part.moments)
            mine.largest = _together([part.largest for part in theirs])
            mine.mean = _together([part.mean for part in theirs])
    return record


def _together(parts: list[Tensor | None]) -> Tensor | None:
    return None if any(part is None for part in parts) else torch.cat([part for part in parts if part is not None])
