"""Writes the features of all images of a source to one file, in parts, so that an interrupted command goes on where it was.

    features.npy      fp32 [N, C], one row for each image that can be read
    features.csv      index, path of each of these rows
    features.parquet  index, path, feature, in place of these two
    .features.npy.parts/   source.json and part-00000000.npz (indices, features), until the file is written

A part holds the images whose indices follow one another in the source, whatever the number of ranks, so that each try may have
another one.

Shapes: N images, C features.
"""

import csv
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import Progress

from crossbatch import InputError, RunStopped
from crossbatch.data import Source, describe_source, has_evaluation_split, open_source
from crossbatch.engine.config import user_input
from crossbatch.engine.config.evaluation import EmbedConfig
from crossbatch.engine.config.schema import PathConfig
from crossbatch.engine.datasets import check_loaders, checksum, log_skipped_images, open_on_all_ranks, remote_options
from crossbatch.engine.evaluation.features import EvalLoaderConfig, FrozenBackbone, extract, gathered
from crossbatch.engine.pretrained.load import load_configured
from crossbatch.engine.runtime.atomic_files import replace_atomically, write_atomically
from crossbatch.engine.runtime.distributed import on_all_ranks, on_main
from crossbatch.engine.runtime.output import console
from crossbatch.engine.runtime.world import World
from crossbatch.models.collective import GroupCollective

PART = 8192  # images; a part is lost with an interruption, and at its end the loaders run dry
SOURCE = "source.json"  # in the folder of parts: what they are of


def parts_folder(output: Path) -> Path:
    """Return the folder that holds the parts of `output`. Raises InputError if `output` exists, or cannot be written."""
    parts = output.with_name(f".{output.name}.parts")
    for file in (output, *([output.with_suffix(".csv")] if output.suffix == ".npy" and not parts.exists() else [])):
        if file.exists():
            raise InputError(f"--output: {file} exists already; remove it or give another name")
    existing = next(folder for folder in output.absolute().parents if folder.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise InputError(f"--output {output}: {existing} is not a writable folder; choose another place")
    return parts


def embed(
    config: EmbedConfig,
    world: World,
    device: torch.device,
    workers: int,
    output: Path,
    folder: Path,
    split: str,
    part: int = PART,
) -> None:
    """Write the features of all images of a split to `output`; every rank of a process group calls it.

    Args:
        config, world, device, workers: as of `Evaluation`.
        output: the file, .npy or .parquet.
        folder: where the parts are kept, see `parts_folder`.
        split: "train" or "eval".
        part: number of images of a part.

    Raises:
        InputError: if weights or images cannot be opened, or `folder` holds parts of other images or weights.
        RunStopped: if images were lost, or the disk is full.
    """
    section, collective = config.crossbatch, GroupCollective()
    pretrained = on_all_ranks(lambda: load_configured(section.model, section.data.image_size))
    source = _open(section.data, split, folder)
    frozen = FrozenBackbone(pretrained.backbone, device, section.precision)
    images, channels = config.train_micro_batch_size_per_gpu, pretrained.channels
    reading = EvalLoaderConfig(pretrained.image_size, images, workers, device, channels=channels)
    check_loaders(world, reading.open(source))
    identity = {
        "backbone": frozen.fingerprint,
        "images": len(source),
        "checksum": checksum(source),
        "image_size": pretrained.image_size,
        "precision": section.precision,
        "part": part,
    }
    starts = range(0, len(source), part)
    left: list[int] = on_main(lambda: _parts_left(folder, identity, starts))
    if world.is_main:
        resumed = (
            f"; {len(starts) - len(left)} of {len(starts)} parts are there already" if len(left) < len(starts) else ""
        )
        print(f"loaded {pretrained}\nimages: {describe_source(source)}{resumed}", flush=True)
    named: set[str] = set()
    terminal = console(stderr=True)
    hidden = not (world.is_main and terminal.is_terminal)
    with Progress(console=terminal, disable=hidden) as bar, reading.open(source) as loader:
        task = bar.add_task("features", total=len(left))
        for start in left:
            indices = np.arange(start, min(start + part, len(source)))
            rows = extract(frozen, source, indices, reading, collective, loader=loader)
            log_skipped_images(rows.skipped, named)
            rows = gathered(rows, collective)
            order = torch.argsort(rows.indices_N)
            ordered = rows.indices_N[order].cpu().numpy(), rows.features_NC[order].cpu().numpy()
            _on_main_or_stop(lambda start=start, ordered=ordered: _write_part(folder, start, *ordered), output)
            bar.advance(task)
    _on_main_or_stop(lambda: _write_output(output, folder, starts, source), output)


def _open(data: PathConfig, split: str, cache: Path) -> Source:
    """Open the images on every rank, after rank 0 has prepared them; labels are not needed."""
    remote = remote_options(data)

    def opened(path: str | None, cache: Path) -> tuple[Source]:
        if path is None:
            raise InputError("crossbatch.data.path: not given; give it with --data DIR")
        with user_input("crossbatch.data.path"):
            if split == "eval" and not has_evaluation_split(path):
                raise InputError(f"crossbatch.data.path: {path} has no evaluation images; leave out --split eval")
            return (open_source(path, split, cache=cache, remote=remote),)

    return open_on_all_ranks(data.path, cache, opened, remote)[0]


def _parts_left(folder: Path, identity: dict[str, Any], starts: range) -> list[int]:
    """Return where the missing parts start. Raises InputError if those that are there are of other images or weights."""
    file = folder / SOURCE
    if not file.exists():
        write_atomically(file, json.dumps(identity))
    found = json.loads(file.read_text(encoding="utf-8"))
    differing = [name for name, value in identity.items() if found.get(name) != value]
    if differing:
        raise InputError(
            f"--output: {folder} holds features of another command (different: {', '.join(differing)}); remove it, "
            f"or give another name"
        )
    return [start for start in starts if not _part(folder, start).exists()]


def _part(folder: Path, start: int) -> Path:
    return folder / f"part-{start:08d}.npz"


def _write_part(folder: Path, start: int, indices: np.ndarray, features: np.ndarray) -> None:
    with replace_atomically(_part(folder, start)) as temporary, temporary.open("wb") as file:
        np.savez(file, indices=indices, features=features)


def _on_main_or_stop(write: Any, output: Path) -> None:
    """Call `write` on rank 0; RunStopped on all ranks if the disk refuses."""

    def reported() -> str:
        try:
            write()
        except OSError as error:
            return error.strerror or str(error)
        return ""

    failure = on_main(reported)
    if failure:
        raise RunStopped(
            f"{output} cannot be written: {failure}; make room, and repeat the command: it goes on where it was"
        )


def _write_output(output: Path, folder: Path, starts: range, source: Source) -> None:
    """Put the parts together, one in memory at a time, and remove them."""

    def parts() -> Iterator[tuple[np.ndarray, np.ndarray, list[str]]]:
        for start in starts:
            with np.load(_part(folder, start)) as part:
                yield part["indices"], part["features"], [source.name(int(index)) for index in part["indices"]]

    total = width = 0
    for indices, features, _ in parts():
        total, width = total + len(indices), features.shape[1]
    with replace_atomically(output) as temporary:
        if output.suffix == ".parquet":
            _write_parquet(temporary, parts())
        else:
            rows = np.lib.format.open_memmap(temporary, "w+", np.float32, (total, width))
            with replace_atomically(output.with_suffix(".csv")) as listing, listing.open("w", newline="") as file:
                table, done = csv.writer(file), 0
                table.writerow(("index", "path"))
                for indices, features, names in parts():
                    rows[done : done + len(indices)] = features
                    table.writerows(zip(indices.tolist(), names, strict=True))
                    done += len(indices)
            rows.flush()
    shutil.rmtree(folder, ignore_errors=True)
    left_out = f", {len(source) - total} broken images left out" if total < len(source) else ""
    print(f"{output}: {total} features of {width} numbers{left_out}", flush=True)


def _write_parquet(file: Path, parts: Iterator[tuple[np.ndarray, np.ndarray, list[str]]]) -> None:
    import pyarrow  # pyright: ignore[reportMissingImports]
    import pyarrow.parquet  # pyright: ignore[reportMissingImports]

    writer = None
    for indices, features, names in parts:
        flat = pyarrow.array(np.ascontiguousarray(features).reshape(-1))
        feature = pyarrow.FixedSizeListArray.from_arrays(flat, features.shape[1])
        table = pyarrow.table({"index": pyarrow.array(indices), "path": pyarrow.array(names), "feature": feature})
        writer = writer or pyarrow.parquet.ParquetWriter(file, table.schema)
        writer.write_table(table)
    assert writer is not None
    writer.close()
