"""Writes what a replay found: views as PNG, loss terms, statistics of layers and images, and the verdict.

OUT/
  verdict.json     what went wrong first, and where
  loss.json        loss, its terms and rates, as recorded and replayed; terms by rank
  images.jsonl     a line for every image of the step: what it is, who had it, its terms, its largest input
  layers.jsonl     a line for every layer in the order of computation: output, gradient, weights, updates
  views/           rank-R/position-P-image-I-view-V.png, and -normalised.npy, the tensor that the network saw
"""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from PIL import Image

from crossbatch.engine.replay.probe import INPUT, Moments, Values
from crossbatch.engine.replay.rebuild import Rebuilt
from crossbatch.engine.replay.verdict import Verdict
from crossbatch.engine.run_log import finite_or_none
from crossbatch.engine.runtime.atomic_files import write_atomically
from crossbatch.models import NUM_VIEWS, MoCo
from crossbatch.models.loss import loss_terms_by_image


def loss_terms(rebuilt: Rebuilt) -> dict[str, np.ndarray]:
    """Return every loss term for each image of the global batch; all ranks of the replay call it."""
    model, record = rebuilt.state.step.backend.model, rebuilt.record
    assert isinstance(model, MoCo) and record.queries is not None and record.keys is not None
    streams = len(record.queries) // (NUM_VIEWS * rebuilt.views.shape[1])
    device = rebuilt.task.device
    queries, keys = (t.to(device).unflatten(0, (NUM_VIEWS, streams, -1)) for t in (record.queries, record.keys))
    terms = loss_terms_by_image(queries, keys, model.batchformer_loss, model.temperature, model.collective)
    mine = {name: term.cpu().numpy() for name, term in terms.items()}
    everyone: list[dict[str, np.ndarray]] = [mine] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return {name: np.concatenate([one[name] for one in everyone]) for name in mine}


def write_views(rebuilt: Rebuilt, positions: Collection[int], normalised: Collection[int], out: Path) -> None:
    """Write the views of the images at these positions of the global batch; each rank of the replay writes those it has.

    A PNG holds the uint8 view exactly if it has one or three channels; else a .npy does. Where a position is in `normalised`,
    another .npy holds the fp32 tensor that the network saw.
    """
    for position in positions:
        local = position - rebuilt.first
        if not 0 <= local < rebuilt.views.shape[1]:
            continue  # another rank of the replay has it
        rank, place = rebuilt.place(position)
        folder = out / "views" / f"rank-{rank}"
        folder.mkdir(parents=True, exist_ok=True)
        for view, pixels in enumerate(rebuilt.views[:, local].permute(0, 2, 3, 1).numpy(), start=1):
            stem = f"position-{place:04d}-image-{rebuilt.indices[position]}-view-{view}"
            if pixels.shape[2] in (1, 3):
                Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(folder / f"{stem}.png")
            else:
                np.save(folder / f"{stem}.npy", pixels)
            if position in normalised and rebuilt.record.inputs is not None:
                np.save(folder / f"{stem}-normalised.npy", rebuilt.record.inputs[view - 1, local].numpy())


def write_report(rebuilt: Rebuilt, verdict: Verdict, terms: dict[str, np.ndarray], out: Path) -> None:
    """Write all files of a replay except the views; only one rank calls it."""
    out.mkdir(parents=True, exist_ok=True)
    result, batch = rebuilt.result, len(rebuilt.indices)
    by_rank = [
        {
            "rank": rank,
            "terms": {
                name: _number(term[first : first + batch // rebuilt.ranks].mean()) for name, term in terms.items()
            },
        }
        for rank, first in enumerate(range(0, batch, batch // rebuilt.ranks))
    ]
    recorded = rebuilt.run.metrics.get(rebuilt.step, {})
    loss = {
        "step": rebuilt.step,
        "epoch": rebuilt.epoch,
        "loss": _number(rebuilt.losses[rebuilt.step]),
        "recorded_loss": recorded.get("loss"),
        "grad_norm": _number(result.grad_norm),
        "recorded_grad_norm": recorded.get("grad_norm"),
        **result.rates,
        "terms": {name: _number(term.mean()) for name, term in terms.items()},
        "by_rank": by_rank,
        "losses": {str(step): _number(value) for step, value in rebuilt.losses.items()},
        "parted_at": rebuilt.parted_at,
    }
    write_atomically(out / "loss.json", json.dumps(loss, indent=2) + "\n")
    inputs = rebuilt.record.layers[INPUT].output
    images = [
        {
            "position": position,
            "index": int(index),
            "name": rebuilt.names[position],
            "rank": rebuilt.place(position)[0],
            "position_in_rank": rebuilt.place(position)[1],
            "largest_input": None if inputs.largest is None else _number(float(inputs.largest[position])),
            "terms": {name: _number(term[position]) for name, term in terms.items()},
        }
        for position, index in enumerate(rebuilt.indices)
    ]
    write_atomically(out / "images.jsonl", "".join(json.dumps(line) + "\n" for line in images))
    layers = [_layer(rebuilt, name, order) for order, name in enumerate(x.name for x in rebuilt.record.in_order())]
    write_atomically(out / "layers.jsonl", "".join(json.dumps(line) + "\n" for line in layers))
    found = {
        "run": str(rebuilt.run.path),
        "step": rebuilt.step,
        **verdict.to_json(),
        "images": [images[position] for position in verdict.positions],
        "lines": verdict.lines,
    }
    write_atomically(out / "verdict.json", json.dumps(found, indent=2) + "\n")


def _layer(rebuilt: Rebuilt, name: str, order: int) -> dict[str, Any]:
    record, steps = rebuilt.record, rebuilt.before.values()
    layer = record.layers[name]

    def described(values: Values, tensor: str) -> dict[str, Any] | None:
        if values.at < 0:
            return None
        before = [getattr(step.layers[name], tensor).moments.largest for step in steps if name in step.layers]
        return {**values.moments.to_json(), "largest_before": _number(max(before)) if before else None}

    def moments(of: Moments | None) -> dict[str, float | None] | None:
        return None if of is None else of.to_json()

    weights = {
        weight.removeprefix(f"{name}."): {
            part: moments(getattr(record.weights[weight], part)) for part in ("before", "gradient", "update")
        }
        for weight in layer.parameters
    }
    return {
        "order": order,
        "name": name,
        "kind": layer.kind,
        "output": described(layer.output, "output"),
        "gradient": described(layer.gradient, "gradient"),
        "weights": weights,
    }


def describe(rebuilt: Rebuilt) -> list[str]:
    """Return lines that say what was replayed, from where, and how it agrees with what the run recorded."""
    step, run, cfg, result = rebuilt.step, rebuilt.run, rebuilt.task.cfg, rebuilt.result
    recorded = run.loss(step)
    said = "not recorded" if recorded is None else f"recorded {recorded:.6g}"
    lines = [
        f"{run.path}, step {step} (epoch {rebuilt.epoch}): made again from {rebuilt.origin}, on "
        f"{cfg.world_size} rank{'s' * (cfg.world_size > 1)}; the run had {rebuilt.ranks}",
        f"loss {rebuilt.losses[step]:.6g}, {said}; gradient norm {result.grad_norm:.6g}",
    ]
    if rebuilt.compared:
        same = "the same" if not rebuilt.state_faults else "other weights"
        lines.append(f"compared with checkpoints {', '.join(map(str, rebuilt.compared))} on the way: {same}")
    if not rebuilt.before:
        nearest = max((saved for saved in (0, *run.checkpoints) if saved < rebuilt.start), default=None)
        remedy = "" if nearest is None else f"; give --window {step - 1 - nearest} to start at {nearest}"
        lines.append(f"no step before it was replayed, so a jump cannot be told{remedy}")
    if rebuilt.changed_files:
        some = ", ".join(rebuilt.changed_files[:3])
        lines.append(
            f"warning: files of {len(rebuilt.changed_files)} images are newer than the run's record of their step: {some}; "
            f"only names, order and labels of images are compared"
        )
    return lines


def _number(value: Any) -> float | None:
    """Return a number for JSON, which has neither NaN nor infinity."""
    return finite_or_none(float(value))
