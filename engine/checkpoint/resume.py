"""Chooses the checkpoint that a run continues from, and fills the backend from it."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from crossbatch import InputError
from crossbatch.engine.checkpoint.changes import differences, is_allowed
from crossbatch.engine.checkpoint.directory import CONFIG
from crossbatch.engine.checkpoint.slices import local_state, random_state
from crossbatch.engine.checkpoint.store import Manifest, Unreadable, check_contents, fill, read_manifest
from crossbatch.engine.config import Config
from crossbatch.engine.runtime.distributed import on_every_rank
from crossbatch.engine.sharding import Backend, LocalShards


@dataclass(frozen=True)
class Resumed:
    """Names the checkpoint that a run continues from, and the newer ones that had to be passed over."""

    checkpoint: Path
    manifest: Manifest
    config: dict[str, Any]  # the resolved configuration that was saved
    passed_over: list[str]  # one line for each, with the reason


def resume(
    candidates: list[Path],
    backend: Backend,
    config: dict[str, Any],
    images: int,
    allowed: Iterable[str] = (),
    schema: type = Config,
    images_checksum: int | None = None,
) -> Resumed | None:
    """Fill `backend` from the first of `candidates` that can be read; every rank must call it.

    Args:
        candidates: checkpoints in the order in which to try them. Without any, the run starts anew and None is returned.
        backend: the sharded network and its optimizer.
        config: the resolved configuration of this run, with `world_size`.
        images: the number of images in the training set.
        allowed: keys that may differ (--allow-change).
        schema: the class of `config`.
        images_checksum: of the names and labels of these images; None does not compare them.

    Raises:
        InputError: if there are candidates but none can be read, or if the first readable one belongs to another run.
    """
    passed_over: list[str] = []
    for checkpoint in candidates:
        opened, errors = on_every_rank(partial(_open, checkpoint), Unreadable)
        if opened is not None and not errors:
            manifest, saved = opened
            changed = differences(saved, config, allowed, schema)
            if not is_allowed("crossbatch.data.path", allowed):
                changed += _other_images(manifest, images, images_checksum)
            _check_same_run(checkpoint, changed)
            held = local_state(backend)
            _check_same_tensors(checkpoint, manifest, held)
            _, errors = on_every_rank(partial(fill, checkpoint, held), Unreadable)
            if not errors:
                backend.sync_master_weights(manifest.progress["updates"])
                _restore_random_state(checkpoint, manifest)
                return Resumed(checkpoint, manifest, saved, passed_over)
        passed_over.append(f"passed over {checkpoint}: {errors[0]}")
    if candidates:
        reasons = "; ".join(passed_over)
        raise InputError(f"--resume: no checkpoint can be read ({reasons}); start anew with another --out")
    return None


def _other_images(manifest: Manifest, images: int, images_checksum: int | None) -> list[str]:
    """Return in words how the training images differ from those of the checkpoint, as an index means an image."""
    key = "crossbatch.data.path"
    if manifest.images != images:
        return [f"{key}: held {manifest.images} images, holds {images}"]
    if None not in (manifest.images_checksum, images_checksum) and manifest.images_checksum != images_checksum:
        return [f"{key}: holds as many images, {images}, but others, or in another order or other classes"]
    return []


def _open(checkpoint: Path) -> tuple[Manifest, dict[str, Any]]:
    """Return manifest and configuration; the ranks divide the files of the checkpoint and check them."""
    manifest, config = read_manifest(checkpoint)
    check_contents(checkpoint, manifest, dist.get_rank(), dist.get_world_size())
    return manifest, config


def _restore_random_state(checkpoint: Path, manifest: Manifest) -> None:
    """Restore the random generators of this rank, if as many ranks wrote the checkpoint."""
    states = random_state()
    if all(manifest.shapes.get(name) == list(state.shape) for name, state in states.items()):
        fill(checkpoint, states)
        torch.set_rng_state(states["random.cpu"].slices[0].local)
        if "random.cuda" in states:
            torch.cuda.set_rng_state(states["random.cuda"].slices[0].local)


def _check_same_run(checkpoint: Path, changed: list[str]) -> None:
    if changed:
        keys = " ".join(f"--allow-change {difference.split(':')[0]}" for difference in changed)
        raise InputError(
            f"--resume {checkpoint}: the configuration changed in a way that changes the run: {'; '.join(changed)}. "
            f"Go back to {checkpoint / CONFIG}, choose another --out, or accept it with {keys}"
        )


def _check_same_tensors(checkpoint: Path, manifest: Manifest, held: dict[str, LocalShards]) -> None:
    theirs = {name: shape for name, shape in manifest.shapes.items() if not name.startswith("random.")}
    missing, unexpected = sorted(held.keys() - theirs.keys()), sorted(theirs.keys() - held.keys())
    wrong = sorted(name for name in held.keys() & theirs.keys() if list(held[name].shape) != theirs[name])
    if missing or unexpected or wrong:
        raise InputError(
            f"--resume {checkpoint}: it belongs to another model or optimizer ({len(missing)} missing {missing[:2]}, "
            f"{len(unexpected)} unexpected {unexpected[:2]}, {len(wrong)} of another shape {wrong[:2]}); "
            f"resume with the configuration in {checkpoint / CONFIG}"
        )
