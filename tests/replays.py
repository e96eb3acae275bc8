"""Faults for runs on the ranks of a pool, and their replay: what tests of replay share.

A fault is a function that returns what takes the place of another one; `partial` sends it to the ranks.

A fault is put where a cluster has it: into the views on their way to the network, into a file of the data set, into a
checkpoint, or into a weight in memory between two steps. The run shows it; a replay elsewhere has to find it.
"""

import contextlib
import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image

from crossbatch import InputError
from crossbatch.data import GlobalBatchSampler, TrainLoader, moco_v3_augmentations, open_source
from crossbatch.data.augment.parameters import normalize
from crossbatch.engine import checkpoint
from crossbatch.engine.checkpoint import store
from crossbatch.engine.checkpoint.directory import MANIFEST
from crossbatch.engine.checkpoint.slices import local_state, shares
from crossbatch.engine.runtime.world import world_from_environment
from crossbatch.engine.train_state import TrainState

NORMALIZE, TRAIN_ON = "crossbatch.engine.step.normalize", "crossbatch.engine.train_state.TrainState.train_on"
MARK = 7.0  # of a row that `breaks_on` is to find: larger than any pixel, and no jump


def replay(command: str, patches: tuple = ()) -> str:
    """Run the command line of a replay on this rank of a pool; returns the message it stopped with."""
    from crossbatch.engine.replay.rebuild import RecordedRun
    from crossbatch.launch import replay as launcher

    words = shlex.split(command)
    argv = ["replay.py", *words[words.index("--run") :]]
    with mock.patch.object(sys, "argv", argv):
        arguments = launcher.parse_arguments()
    try:
        run = RecordedRun.open(arguments.run, "--run")
        where = arguments, world_from_environment(), torch.device("cpu")
        with contextlib.ExitStack() as stack:
            stack.enter_context(mock.patch("builtins.print"))
            for target, factory in patches:
                stack.enter_context(mock.patch(target, factory()))
            if arguments.compare is not None:
                launcher.compare(run, RecordedRun.open(arguments.compare, "--compare"), *where)
            else:
                launcher.replay(run, *where)
    except InputError as error:
        return str(error)
    return ""


def replay_printing(command: str) -> str:
    """Run the command line of a replay; returns what it prints."""
    with mock.patch("builtins.print") as printed:
        assert replay(command, ((("builtins.print"), lambda: printed),)) == ""
    return "\n".join(str(call.args[0]) for call in printed.call_args_list)


def verdict(out: Path, step: int) -> dict:
    return json.loads((out / "replay" / f"step-{step}" / "verdict.json").read_text())


# --- images -----------------------------------------------------------------------------------------------------------


def nan_in_views_of(target: torch.Tensor, pixel: tuple[int, int, int], value: float = float("nan")):
    """Put a NaN into one pixel of an image's views in one step, as broken memory on the way to the device would.

    The image is known by its pixels, so it is met on any rank and in any chunk. `target` is its view, uint8 [3, H, W].
    """

    def poisoned(views, *arguments, **more):
        found = normalize(views, *arguments, **more)
        rows = (views == target).flatten(1).all(1).nonzero().flatten().tolist()
        for row in rows:
            found[(row, *pixel)] = value
        return found

    return poisoned


def breaks_on():
    """Make the second block of a ViT give infinite values for an image whose first pixel is MARK."""
    from crossbatch.models.vit import ViT

    forward = ViT.forward

    def broken(network, images):
        marked = images[:, 0, 0, 0] == MARK
        images = images.clone()
        images[marked, 0, 0, 0] = 0

        def overflow(module, arguments, output):
            return torch.where(marked[:, None, None], output * 1e38 * 10, output)

        handle = network.blocks[1].mlp.fc1.register_forward_hook(overflow, prepend=True)
        try:
            return forward(network, images)
        finally:
            handle.remove()

    return broken


def divided_by_contrast(eps: float):
    """Divide each view by its contrast, too, with an eps that is too small: a black frame becomes huge, or not finite."""

    def normalised(views, *arguments, **more):
        contrast = (views.amax((2, 3)) - views.amin((2, 3))).float() / 255
        return normalize(views, *arguments, **more) / (contrast[..., None, None] + eps)

    return normalised


def write_images(folder: Path, count: int, flat: dict[int, int]) -> None:
    """Write `count` images of noise in two classes; those in `flat` have one gray level, as a covered camera's have."""
    chance = np.random.default_rng(7)
    for index in range(count):
        pixels = chance.integers(0, 256, (20, 20, 3), dtype=np.uint8)
        if index in flat:
            pixels[:] = flat[index]
        path = folder / "train" / f"class{index * 2 // count}" / f"{index:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)


# --- weights ----------------------------------------------------------------------------------------------------------


def slices_of(folder: Path, name: str) -> list[tuple[int, int, str, int]]:
    """Where the parts of a tensor are in a checkpoint: first element, elements, file, offset."""
    metadata: Any = store._read_metadata(folder)
    sizes = {chunk.offsets[0]: chunk.sizes[0] for chunk in metadata.state_dict_metadata[name].chunks}
    places = [(place.offset[0], *where) for place, where in metadata.storage_data.items() if place.fqn == name]
    return [(start, sizes[start], file, offset) for start, file, offset in places]


def writer(folder: Path, name: str, element: int) -> int:
    """The rank whose file holds an element."""
    files = [file for start, size, file, _ in slices_of(folder, name) if 0 <= element - start < size]
    return int(files[0].removesuffix(".bin"))


def edit_checkpoint(folder: Path, name: str, change: Callable[[torch.Tensor], object]) -> None:
    """Let `change` alter the flattened tensor `name` of a checkpoint in place; its checksums are made to fit."""
    manifest, _ = store.read_manifest(folder)
    tensor = checkpoint.read(folder, name)[""].flatten()
    change(tensor)
    for start, size, file, offset in slices_of(folder, name):
        with (folder / file).open("r+b") as stream:
            stream.seek(offset)
            stream.write(tensor[start : start + size].numpy().tobytes())
    manifest.files = {file: store.describe_file(folder / file) for file in manifest.files}
    (folder / MANIFEST).write_text(store._to_json(manifest))


class flips_a_bit:
    """Flips a bit of a weight in the memory of one rank before step `step`, in what that rank writes into checkpoints.

    The place is drawn by `seed` among the larger trained weights, and written to `told`. It is where this rank both makes the
    update and writes the checkpoint, or, of the replicated weights of norms, where rank 0 writes.
    """

    def __init__(self, rank: int, step: int, bit: int, seed: int, told: str, writes_it: bool = True):
        self.rank, self.step, self.bit, self.seed, self.told, self.writes_it = rank, step, bit, seed, told, writes_it

    def __call__(self):
        train_on = TrainState.train_on

        def flipped(state, batch):
            world, backend = world_from_environment(), state.step.backend
            if state.step.progress.step == self.step - 1 and not Path(self.told).exists():
                if world.rank == self.rank:
                    self.flip(backend, world)
                backend.sync_master_weights(state.step.progress.updates)
            return train_on(state, batch)

        return flipped

    def flip(self, backend, world) -> None:
        written = shares(local_state(backend), world.rank if self.writes_it else 0, world.size)
        held = {name: next(iter(state.values())) for name, state in backend.local_optimizer_state().items()}
        places = []
        for (name, start), values in written.items():
            for part in held[name[11:]].slices if name[11:] in held and name.startswith("parameters.") else ():
                first, last = max(start, part.start), min(start + len(values), part.start + part.local.numel())
                if first < last and name.endswith("weight") and (self.writes_it or "norm" in name):
                    places.append((name, first, values[first - start : last - start]))
        chance = np.random.default_rng(self.seed)
        name, first, values = places[chance.integers(len(places))]
        large = (values.abs() >= 0.5 * values.abs().max()).nonzero().flatten().tolist()
        at = large[chance.integers(len(large))]
        bits = values[at : at + 1].numpy().view(np.uint32)
        bits ^= np.uint32(1 << self.bit)
        Path(self.told).write_text(json.dumps([name, first + at]))


# --- the batch that a run had ----------------------------------------------------------------------------------------


def keeps_views(folder: str):
    """Save the views of every batch of every rank to a folder, by step and rank."""
    train_on = TrainState.train_on

    def kept(state, batch):
        step, rank = state.step.progress.step + 1, world_from_environment().rank
        torch.save((batch.views.clone(), batch.indices), f"{folder}/{step}-{rank}.pt")
        return train_on(state, batch)

    return kept


def view_of(path: str, epoch: int, step: int, position: int, view: int) -> tuple[int, torch.Tensor]:
    """The index of the image at a position of a global batch of `BASE`, and one of its views."""
    source = open_source(path)
    sampler = GlobalBatchSampler(0, len(source), 12)
    loader = TrainLoader(
        source, sampler=sampler, augmentations=moco_v3_augmentations(16), seed=0, backend="torchvision"
    )
    batch = next(loader.epoch(epoch, step))
    return int(batch.indices[position]), batch.views[view, position].clone()
