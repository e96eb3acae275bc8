"""Writes and reads one checkpoint: slices as plain bytes, and `.metadata`, which says where each of them is.

`.metadata` is that of torch.distributed.checkpoint (DCP). Its writer and reader are not used: they take 1 ms of Python a slice,
for a ResNet-50 most of a second in which the thread of training has to wait, and unpickle whatever is in `.metadata`. The
reader here lets a pickle make the few classes that belong in it and nothing else, so nothing in a checkpoint can run code.
DCP knows a tensor as a box and a rank's part of it as a smaller box. ZeRO cuts through the middle of rows, so the box here is
the flattened tensor, and a part of it is a slice. Every file has a checksum (CRC-32, 1.8 GB/s on a core).
"""

import contextlib
import functools
import json
import os
import pickle
import shutil
import zlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import metadata as dcp

from crossbatch.engine.checkpoint.directory import CONFIG, MANIFEST, Keep, commit, name_of
from crossbatch.engine.checkpoint.slices import Slices
from crossbatch.engine.runtime.atomic_files import replace_atomically, write_atomically
from crossbatch.engine.sharding import FlatSlice, LocalShards

FORMAT = 2
METADATA = ".metadata"
_CLASSES = ("Metadata", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata", "MetadataIndex")
_IN_METADATA = {dcp.__name__: (*_CLASSES, "_MEM_FORMAT_ENCODING")}  # by module, besides dtypes and layouts
_IN_METADATA |= {"torch": ("Size",), "torch.serialization": ("_get_layout",)}

T = TypeVar("T")


class Unreadable(Exception):
    """Says that a checkpoint is incomplete, damaged or of another format."""


@dataclass
class Manifest:
    """Holds the fields of `state.json`. `files` is filled in when the checkpoint is written: name -> bytes and crc32."""

    progress: dict[str, Any]  # of the step: `step`, `updates`, ...
    shapes: dict[str, list[int]]  # of every tensor, by name
    images: int  # of the training set
    steps_per_epoch: int
    skipped_images: int
    world_size: int
    versions: dict[str, str]
    files: dict[str, dict[str, int]] = field(default_factory=dict)
    format: int = FORMAT
    images_checksum: int | None = None  # of their names and labels; None where nobody has counted it, as in an import

    @property
    def step(self) -> int:
        """Return the number of steps done."""
        return self.progress["step"]

    @property
    def num_bytes(self) -> int:
        """Return the size of all files but `state.json`."""
        return sum(file["bytes"] for file in self.files.values())


class SliceInFile(NamedTuple):
    """Locates a slice of a flattened tensor in a file, `offset` bytes from its start."""

    name: str
    start: int
    length: int
    dtype: torch.dtype
    file: str
    offset: int


def write(
    directory: Path,
    staged: Slices,
    manifest: Manifest,
    config: dict[str, Any],
    keep: Keep,
    group: dist.ProcessGroup | None = None,
    token: str = "0",
) -> None:
    """Write a checkpoint, `directory`/step-N; every rank of `group` calls it. A failure fails on all and leaves nothing.

    Args:
        directory: `checkpoints/` of the run.
        staged: this rank's slices, in host memory.
        manifest: `files` is filled in on rank 0.
        config: the resolved configuration, with `world_size`.
        keep: which checkpoints stay in `directory`.
        group: a gloo group of the ranks that write; None for one process.
        token: a text, the same on all ranks, that tells the files of this attempt from those of an interrupted one.

    Raises:
        RuntimeError: if a rank cannot write (the message names it and the reason), or if a rank has gone.
    """
    rank = 0 if group is None else dist.get_rank(group)
    aside = directory / f".{name_of(manifest.step)}.{token}.tmp"

    def finish() -> None:
        if rank == 0:
            slices = [found for _, found_slices in written for found in found_slices]
            manifest.files = {f"{number}.bin": described for number, (described, _) in enumerate(written)}
            write_description(aside, slices, manifest, config)
            commit(aside, directory, manifest.step, keep)

    try:
        written = _on_all(lambda: _write_slices(aside / f"{rank}.bin", staged), group)
        _on_all(finish, group)
    finally:
        if rank == 0:
            shutil.rmtree(aside, ignore_errors=True)


def write_description(folder: Path, slices: list[SliceInFile], manifest: Manifest, config: dict[str, Any]) -> None:
    """Write .metadata, config.json and state.json beside the files of slices in `folder`, which `manifest.files` describes."""
    with replace_atomically(folder / METADATA) as temporary:
        temporary.write_bytes(pickle.dumps(describe_slices(slices, manifest.shapes)))
    write_atomically(folder / CONFIG, json.dumps(config, indent=2) + "\n")
    manifest.files |= {name: describe_file(folder / name) for name in (METADATA, CONFIG)}
    write_atomically(folder / MANIFEST, _to_json(manifest))
    check_sizes(folder, manifest)


def _on_all(function: Callable[[], T], group: dist.ProcessGroup | None) -> list[T]:
    """Call `function` on every rank and return all results; if it fails on any rank, raise RuntimeError on all of them."""
    result, error = None, None
    try:
        result = function()
    except Exception as raised:
        error = f"{type(raised).__name__}: {raised}"
    outcomes: list[Any] = [(result, error)]
    if group is not None:
        outcomes *= dist.get_world_size(group)
        dist.all_gather_object(outcomes, (result, error), group)
    errors = [f"rank {rank}: {error}" for rank, (_, error) in enumerate(outcomes) if error]
    if errors:
        raise RuntimeError("; ".join(errors))
    return [result for result, _ in outcomes]


def _write_slices(path: Path, staged: Slices) -> tuple[dict[str, int], list[SliceInFile]]:
    """Write slices one after the other, as they are in memory; return size and checksum of the file, and what is where."""
    path.parent.mkdir(parents=True, exist_ok=True)
    slices, crc, size = [], 0, 0
    with path.open("wb") as file:
        for (name, start), values in staged.items():
            data = _bytes(values)
            file.write(data)
            slices.append(SliceInFile(name, start, values.numel(), values.dtype, path.name, size))
            crc, size = zlib.crc32(data, crc), size + len(data)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": size, "crc32": crc}, slices


def describe_slices(slices: list[SliceInFile], shapes: Mapping[str, list[int]]) -> dcp.Metadata:
    """Return the content of `.metadata`, after asserting that every element of every tensor is in exactly one slice."""
    tensors: dict[str, Any] = {}
    places, ends = {}, {}
    for name, start, length, dtype, file, offset in sorted(slices, key=lambda found: (found.name, found.start)):
        end = ends.setdefault(name, 0)
        assert start == end, f"{name}: elements {min(start, end)} to {max(start, end)} are held by no rank or by two"
        ends[name] = start + length
        if name not in tensors:
            size = torch.Size([torch.Size(shapes[name]).numel()])
            tensors[name] = dcp.TensorStorageMetadata(dcp.TensorProperties(dtype), size, [])
        tensors[name].chunks.append(dcp.ChunkStorageMetadata(torch.Size([start]), torch.Size([length])))
        places[dcp.MetadataIndex(name, (start,))] = (file, offset)
    for name, shape in shapes.items():
        assert ends.get(name, 0) == torch.Size(shape).numel(), f"{name}: the last elements are held by no rank"
    return dcp.Metadata(tensors, storage_data=places)


def _to_json(manifest: Manifest) -> str:
    """Return the text of `state.json`: one line a field, the last one being the checksum of the others."""
    fields = asdict(manifest)
    lines = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in fields.items()]
    return "{\n" + ",\n".join([*lines, f'"crc32": {_checksum(fields)}']) + "\n}\n"


def _checksum(fields: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(fields).encode())


def describe_file(file: Path) -> dict[str, int]:
    """Return the size and the checksum of a file, as `Manifest.files` holds them."""
    crc, size = 0, 0
    with file.open("rb") as stream:
        while block := stream.read(2**24):
            crc, size = zlib.crc32(block, crc), size + len(block)
    return {"bytes": size, "crc32": crc}


# --- reading ---------------------------------------------------------------------------------------------------------


def read_manifest(checkpoint: Path) -> tuple[Manifest, dict[str, Any]]:
    """Return `state.json` and `config.json`, with the sizes of all files checked. Raises Unreadable."""
    try:
        raw = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        config = json.loads((checkpoint / CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise Unreadable(f"incomplete: {Path(error.filename).name} is missing") from None
    except (OSError, ValueError) as error:
        raise Unreadable(f"damaged: {error}") from None
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise Unreadable(f"of another format than {FORMAT}")
    if raw.pop("crc32", None) != _checksum(raw):
        raise Unreadable(f"damaged: the checksum in {MANIFEST} is wrong")
    manifest = Manifest(**raw)
    check_sizes(checkpoint, manifest)
    return manifest, config


def check_sizes(checkpoint: Path, manifest: Manifest) -> None:
    """Raise Unreadable if a file is missing or has another size."""
    for name, described in manifest.files.items():
        try:
            size = (checkpoint / name).stat().st_size
        except OSError as error:
            raise Unreadable(f"incomplete: {name}: {error.strerror}; do all ranks see the same directory?") from None
        if size != described["bytes"]:
            raise Unreadable(f"damaged: {name} has {size} bytes instead of {described['bytes']}")


def check_contents(checkpoint: Path, manifest: Manifest, rank: int = 0, world_size: int = 1) -> None:
    """Raise Unreadable if the checksum of a file is wrong. The ranks divide the files among themselves."""
    for name in sorted(manifest.files)[rank::world_size]:
        try:
            found = describe_file(checkpoint / name)
        except OSError as error:
            raise Unreadable(f"damaged: {name}: {error.strerror}") from None
        if found != manifest.files[name]:
            raise Unreadable(f"damaged: the checksum of {name} is wrong")


def fill(checkpoint: Path, held: Mapping[str, LocalShards]) -> None:
    """Copy values from the checkpoint into the memory of `held`, by name. Raises Unreadable."""
    try:
        metadata = _read_metadata(checkpoint)
        with contextlib.ExitStack() as stack:
            open_file = functools.cache(lambda name: stack.enter_context((checkpoint / name).open("rb")))
            for name, tensor in held.items():
                for wanted in tensor.slices:
                    _fill_slice(wanted, name, metadata, open_file)
    except (OSError, KeyError) as error:
        raise Unreadable(f"damaged: {error}") from None


def _fill_slice(wanted: FlatSlice, name: str, metadata: Any, open_file: Callable[[str], Any]) -> None:
    """Read from every stored slice of the tensor `name` what overlaps with the wanted one."""
    stored, end = metadata.state_dict_metadata[name], wanted.start + wanted.local.numel()
    if wanted.local.dtype != stored.properties.dtype:
        raise Unreadable(f"damaged: {name} is in {stored.properties.dtype}")
    for chunk in stored.chunks:
        first, last = max(wanted.start, chunk.offsets[0]), min(end, chunk.offsets[0] + chunk.sizes[0])
        if first < last:
            file_name, offset = metadata.storage_data[dcp.MetadataIndex(name, chunk.offsets)]
            target = wanted.local[first - wanted.start : last - wanted.start]
            values = target if target.is_cpu else torch.empty_like(target, device="cpu")
            file = open_file(file_name)
            file.seek(offset + (first - chunk.offsets[0]) * values.element_size())
            if file.readinto(_bytes(values)) != values.nbytes:
                raise Unreadable(f"damaged: {file_name} is too short")
            if values is not target:
                target.copy_(values)


def read(checkpoint: Path, prefix: str) -> dict[str, torch.Tensor]:
    """Return whole tensors of a checkpoint, for one process; needs no process group.

    Args:
        checkpoint: the directory of one checkpoint.
        prefix: the beginning of the names of the tensors that are wanted ("parameters.", "buffers.", "optimizer.mu.").
            It is cut off from the names that are returned.

    Raises:
        Unreadable: if anything in the checkpoint is damaged.
    """
    manifest, _ = read_manifest(checkpoint)
    check_contents(checkpoint, manifest)
    stored: Any = _read_metadata(checkpoint).state_dict_metadata
    tensors = {
        name: torch.empty(shape, dtype=stored[name].properties.dtype)
        for name, shape in manifest.shapes.items()
        if name.startswith(prefix)
    }
    fill(checkpoint, {name: LocalShards.whole(tensor) for name, tensor in tensors.items()})
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


def writer_of(checkpoint: Path, name: str, element: int) -> int | None:
    """Return the rank that wrote an element of the flattened tensor `name`; None if the checkpoint lacks it."""
    metadata: Any = _read_metadata(checkpoint)
    for chunk in metadata.state_dict_metadata[name].chunks if name in metadata.state_dict_metadata else ():
        if chunk.offsets[0] <= element < chunk.offsets[0] + chunk.sizes[0]:
            return int(metadata.storage_data[dcp.MetadataIndex(name, chunk.offsets)][0].removesuffix(".bin"))
    return None


def _bytes(values: torch.Tensor) -> memoryview:
    """Return the memory of a 1-D CPU tensor."""
    return memoryview(values.detach().view(torch.uint8).numpy())  # pyright: ignore[reportArgumentType]


def _read_metadata(checkpoint: Path) -> dcp.Metadata:
    try:
        with (checkpoint / METADATA).open("rb") as file:
            return _MetadataUnpickler(file).load()
    except (OSError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise Unreadable(f"damaged: {METADATA}: {error}") from None


class _MetadataUnpickler(pickle.Unpickler):
    """Makes what belongs in `.metadata`, and refuses anything else."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        constant = getattr(torch, global_name, None) if module_name == "torch" else None
        if isinstance(constant, (torch.dtype, torch.layout)) or global_name in _IN_METADATA.get(module_name, ()):
            return super().find_class(module_name, global_name)
        raise pickle.UnpicklingError(f".metadata asks for {module_name}.{global_name}, which does not belong in it")
