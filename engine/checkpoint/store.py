"""Reading and writing of one checkpoint: DCP's plan and `.metadata`, and the slices as plain bytes.

DCP would write every slice with torch.save and read it with torch.load. That takes 1 ms of Python a slice, for a ResNet-50
most of a second in which the thread of training has to wait. Plain bytes take a tenth, and only what is wanted is read.
DCP's reader also unpickles `.metadata`. The reader here lets a pickle make the few classes that belong in it and nothing else,
so nothing in a checkpoint can run code. Every file has a checksum (CRC-32, 1.8 GB/s on a core).
"""

import contextlib
import json
import os
import pickle
import shutil
import warnings
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import metadata as dcp_metadata
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from crossbatch.engine.checkpoint.directory import CONFIG, MANIFEST, Keep, commit, name_of
from crossbatch.engine.checkpoint.slices import SliceLoadPlanner, Slices, SliceSavePlanner
from crossbatch.engine.runtime.atomic_files import write_atomically
from crossbatch.engine.sharding import LocalShards

FORMAT = 2
METADATA = ".metadata"


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

    @property
    def step(self) -> int:
        """Return the number of steps done."""
        return self.progress["step"]

    @property
    def num_bytes(self) -> int:
        """Return the size of all files but `state.json`."""
        return sum(file["bytes"] for file in self.files.values())


def write(
    directory: Path,
    staged: Slices,
    manifest: Manifest,
    config: dict[str, Any],
    keep: Keep,
    group: dist.ProcessGroup | None = None,
    token: str = "0",
) -> None:
    """Write `directory`/step-N; every rank of `group` calls it. If it fails on one rank, it fails on all and leaves nothing.

    Args:
        directory: `checkpoints/` of the run.
        staged: this rank's slices, in host memory.
        manifest: `files` is filled in on rank 0.
        config: the resolved configuration, with `world_size`.
        keep: which checkpoints stay in `directory`.
        group: a gloo group; None for one process.
        token: a text, the same on all ranks, that tells the files of this attempt from those of an interrupted one.

    Raises:
        dcp.api.CheckpointException: if a rank cannot write.
        RuntimeError: if a rank has gone.
    """
    aside = directory / f".{name_of(manifest.step)}.{token}.tmp"
    sizes = {name: torch.Size(shape).numel() for name, shape in manifest.shapes.items()}
    writer = _Writer(aside, directory, manifest, config, keep)
    try:
        if group is None:
            _write_alone(writer, SliceSavePlanner(staged, sizes))
        else:
            dcp.save({}, storage_writer=writer, planner=SliceSavePlanner(staged, sizes), process_group=group)
    finally:
        if writer.is_coordinator:
            shutil.rmtree(aside, ignore_errors=True)


def _write_alone(writer: "_Writer", planner: SliceSavePlanner) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.save({}, storage_writer=writer, planner=planner, no_dist=True)


class _Writer(dcp.FileSystemWriter):
    """Adds checksums, our two JSON files and the rename to DCP's writer."""

    def __init__(self, aside: Path, directory: Path, manifest: Manifest, config: dict[str, Any], keep: Keep):
        super().__init__(aside)
        self.aside, self.directory, self.manifest, self.config, self.keep = aside, directory, manifest, config, keep
        self.is_coordinator = False

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        super().set_up_storage_writer(is_coordinator, *args, **kwargs)
        self.is_coordinator = is_coordinator

    def storage_meta(self) -> None:
        """Store nothing, where DCP would note the path and a random number."""

    def write_data(self, plan: dcp.SavePlan, planner: dcp.SavePlanner) -> Future:
        """Write this rank's slices one after the other, as they are in memory; the last result describes the file."""
        name = f"{plan.storage_data.prefix.strip('_')}.bin"
        results, crc, size = [], 0, 0
        with (self.aside / name).open("wb") as file:
            for item in plan.items:
                values = planner.resolve_data(item)
                assert isinstance(values, torch.Tensor)
                data = _bytes(values)
                file.write(data)
                results.append(WriteResult(item.index, len(data), (name, size)))
                crc, size = zlib.crc32(data, crc), size + len(data)
            file.flush()
            os.fsync(file.fileno())
        results.append(WriteResult(MetadataIndex(name), 0, {"bytes": size, "crc32": crc}))
        done: Future = Future()
        done.set_result(results)
        return done

    def finish(self, metadata: dcp.Metadata, results: list[list[WriteResult]]) -> None:
        """Complete the checkpoint and give it its name; rank 0 calls it when all ranks have written."""
        self.manifest.files = {one_rank[-1].index.fqn: one_rank[-1].storage_data for one_rank in results}
        super().finish(metadata, [one_rank[:-1] for one_rank in results])
        write_atomically(self.aside / CONFIG, json.dumps(self.config, indent=2) + "\n")
        self.manifest.files |= {name: _describe(self.aside / name) for name in (METADATA, CONFIG)}
        write_atomically(self.aside / MANIFEST, _to_json(self.manifest))
        check_sizes(self.aside, self.manifest)
        commit(self.aside, self.directory, self.manifest.step, self.keep)


def _to_json(manifest: Manifest) -> str:
    """Return the text of `state.json`: one line a field, the last one being the checksum of the others."""
    fields = asdict(manifest)
    lines = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in fields.items()]
    return "{\n" + ",\n".join([*lines, f'"crc32": {_checksum(fields)}']) + "\n}\n"


def _checksum(fields: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(fields).encode())


def _describe(file: Path) -> dict[str, int]:
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
            found = _describe(checkpoint / name)
        except OSError as error:
            raise Unreadable(f"damaged: {name}: {error.strerror}") from None
        if found != manifest.files[name]:
            raise Unreadable(f"damaged: the checksum of {name} is wrong")


def fill(checkpoint: Path, held: Mapping[str, LocalShards]) -> None:
    """Copy values from the checkpoint into the memory of `held`, by name. Raises Unreadable."""
    try:
        reader = _Reader(checkpoint)
        metadata = reader.read_metadata()
        reader.set_up_storage_reader(metadata, True)
        planner = SliceLoadPlanner(held, metadata)
        reader.read_data(planner.create_local_plan(), planner).wait()
    except (OSError, RuntimeError, KeyError, AssertionError, EOFError, pickle.UnpicklingError) as error:
        raise Unreadable(f"damaged: {error}") from None


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
    stored = _Reader(checkpoint).read_metadata().state_dict_metadata
    tensors = {
        name: torch.empty(shape, dtype=stored[name].properties.dtype)  # pyright: ignore[reportAttributeAccessIssue]
        for name, shape in manifest.shapes.items()
        if name.startswith(prefix)
    }
    fill(checkpoint, {name: LocalShards.whole(tensor) for name, tensor in tensors.items()})
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


class _Reader(dcp.FileSystemReader):
    """Reads what `_Writer` wrote, and only the bytes that are wanted."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> dcp.Metadata:
        try:
            with (Path(self.path) / METADATA).open("rb") as file:
                return _MetadataUnpickler(file).load()
        except (OSError, EOFError, ValueError, pickle.UnpicklingError) as error:
            raise Unreadable(f"damaged: {METADATA}: {error}") from None

    def read_data(self, plan: dcp.LoadPlan, planner: dcp.LoadPlanner) -> Future:
        with contextlib.ExitStack() as stack:
            files = {}
            for item in plan.items:
                name, offset = self.storage_data[item.storage_index]
                if name not in files:
                    files[name] = stack.enter_context((Path(self.path) / name).open("rb"))
                target = planner.resolve_tensor(item)
                values = target if target.is_cpu else torch.empty_like(target, device="cpu")
                files[name].seek(offset + item.storage_offsets[0] * values.element_size())
                if files[name].readinto(_bytes(values)) != values.nbytes:
                    raise Unreadable(f"damaged: {name} is too short")
                if values is not target:
                    target.copy_(values)
        done: Future = Future()
        done.set_result(None)
        return done


def _bytes(values: torch.Tensor) -> memoryview:
    """Return the memory of a 1-D CPU tensor."""
    return memoryview(values.detach().view(torch.uint8).numpy())  # pyright: ignore[reportArgumentType]


class _MetadataUnpickler(pickle.Unpickler):
    """Makes what DCP puts into `.metadata`, and refuses anything else."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        for module, names in _IN_METADATA.items():
            if module.__name__ == module_name and global_name in names:
                return getattr(module, global_name)
        if module_name == "torch" and isinstance(getattr(torch, global_name, None), (torch.dtype, torch.layout)):
            return getattr(torch, global_name)
        raise pickle.UnpicklingError(f".metadata asks for {module_name}.{global_name}, which does not belong in it")


_IN_METADATA = {
    dcp_metadata: (
        *("Metadata", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata", "MetadataIndex"),
        "_MEM_FORMAT_ENCODING",
    ),
    torch: ("Size",),
    torch.serialization: ("_get_layout",),
}
