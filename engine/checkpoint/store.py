"""One checkpoint on disk: DCP's plan and `.metadata`, the runs as plain bytes.

DCP would write every run with torch.save and read it with torch.load. That takes 1 ms of Python a run, for a ResNet-50 most
of a second in which training's own thread waits its turn; bytes take a tenth, and no more of them is read than is wanted.
DCP's reader also unpickles `.metadata`; the one here lets a pickle make the few classes that belong in it and nothing else,
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

from crossbatch.engine.checkpoint import directory as folders
from crossbatch.engine.checkpoint.directory import CONFIG, MANIFEST, Keep
from crossbatch.engine.checkpoint.pieces import LoadPieces, SavePieces, Staged
from crossbatch.engine.runtime.atomic_files import write_atomically
from crossbatch.engine.sharding import LocalShards

FORMAT = 2
METADATA = ".metadata"


class Unreadable(Exception):
    """A checkpoint that is incomplete, damaged or of another format; the message says which."""


@dataclass
class Manifest:
    """What `state.json` holds. `files` is filled in when it is written: name -> bytes and crc32."""

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
        return self.progress["step"]

    @property
    def num_bytes(self) -> int:
        return sum(file["bytes"] for file in self.files.values())


def write(
    folder: Path,
    staged: Staged,
    manifest: Manifest,
    config: dict[str, Any],
    keep: Keep,
    group: dist.ProcessGroup | None = None,
    token: str = "0",
) -> None:
    """Writes `folder`/step-N from the runs in host memory; all ranks of `group` call it, each with its own.

    Fails on all ranks if it fails on one, and leaves nothing behind but what was there before. `token`, the same on all ranks,
    tells this attempt's files from those of an interrupted one.

    Raises dcp.api.CheckpointException, or RuntimeError if a rank has gone.
    """
    aside = folder / f".{folders.name_of(manifest.step)}.{token}.tmp"
    sizes = {name: torch.Size(shape).numel() for name, shape in manifest.shapes.items()}
    writer = _Writer(aside, folder, manifest, config, keep)
    try:
        if group is None:
            _write_alone(writer, SavePieces(staged, sizes))
        else:
            dcp.save({}, storage_writer=writer, planner=SavePieces(staged, sizes), process_group=group)
    finally:
        if writer.is_coordinator:
            shutil.rmtree(aside, ignore_errors=True)


def _write_alone(writer: "_Writer", planner: SavePieces) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.save({}, storage_writer=writer, planner=planner, no_dist=True)


class _Writer(dcp.FileSystemWriter):
    """Adds to DCP's: checksums, our two JSON files, and the rename."""

    def __init__(self, aside: Path, folder: Path, manifest: Manifest, config: dict[str, Any], keep: Keep):
        super().__init__(aside)
        self.aside, self.folder, self.manifest, self.config, self.keep = aside, folder, manifest, config, keep
        self.is_coordinator = False

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        super().set_up_storage_writer(is_coordinator, *args, **kwargs)
        self.is_coordinator = is_coordinator

    def storage_meta(self) -> None:
        """DCP would note the path and a random number."""

    def write_data(self, plan: dcp.SavePlan, planner: dcp.SavePlanner) -> Future:
        """This rank's runs, one after the other, as they lie in memory; the last result describes the file."""
        name = f"{plan.storage_data.prefix.strip('_')}.bin"
        results, crc, size = [], 0, 0
        with (self.aside / name).open("wb") as file:
            for item in plan.items:
                run = planner.resolve_data(item)
                assert isinstance(run, torch.Tensor)
                data = _bytes(run)
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
        """On rank 0, when all have written."""
        self.manifest.files = {one_rank[-1].index.fqn: one_rank[-1].storage_data for one_rank in results}
        super().finish(metadata, [one_rank[:-1] for one_rank in results])
        write_atomically(self.aside / CONFIG, json.dumps(self.config, indent=2) + "\n")
        self.manifest.files |= {name: _describe(self.aside / name) for name in (METADATA, CONFIG)}
        write_atomically(self.aside / MANIFEST, _to_json(self.manifest))
        check_sizes(self.aside, self.manifest)
        folders.commit(self.aside, self.folder, self.manifest.step, self.keep)


def _to_json(manifest: Manifest) -> str:
    """One line a field; the last one is the checksum of the others."""
    fields = asdict(manifest)
    lines = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in fields.items()]
    return "{\n" + ",\n".join([*lines, f'"crc32": {_checksum(fields)}']) + "\n}\n"


def _checksum(fields: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(fields).encode())


def _describe(file: Path) -> dict[str, int]:
    crc, size = 0, 0
    with file.open("rb") as stream:
        while block := stream.read(2**24):
            crc, size = zlib.crc32(block, crc), size + len(block)
    return {"bytes": size, "crc32": crc}


# --- reading ---------------------------------------------------------------------------------------------------------


def read_manifest(checkpoint: Path) -> tuple[Manifest, dict[str, Any]]:
    """`state.json` and `config.json`, with the sizes of all files checked. Raises Unreadable."""
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
    """Raises Unreadable if a file is missing or cut off."""
    for name, described in manifest.files.items():
        try:
            size = (checkpoint / name).stat().st_size
        except OSError as error:
            raise Unreadable(f"incomplete: {name}: {error.strerror}; do all ranks see the same folder?") from None
        if size != described["bytes"]:
            raise Unreadable(f"damaged: {name} has {size} bytes instead of {described['bytes']}")


def check_contents(checkpoint: Path, manifest: Manifest, rank: int = 0, world_size: int = 1) -> None:
    """Raises Unreadable if a file's checksum is wrong; the ranks share the files."""
    for name in sorted(manifest.files)[rank::world_size]:
        try:
            found = _describe(checkpoint / name)
        except OSError as error:
            raise Unreadable(f"damaged: {name}: {error.strerror}") from None
        if found != manifest.files[name]:
            raise Unreadable(f"damaged: the checksum of {name} is wrong")


def fill(checkpoint: Path, held: Mapping[str, LocalShards]) -> None:
    """Reads what is in `held`, by name, into its memory. Raises Unreadable."""
    try:
        reader = _Reader(checkpoint)
        metadata = reader.read_metadata()
        reader.set_up_storage_reader(metadata, True)
        planner = LoadPieces(held, metadata)
        reader.read_data(planner.create_local_plan(), planner).wait()
    except (OSError, RuntimeError, KeyError, AssertionError, EOFError, pickle.UnpicklingError) as error:
        raise Unreadable(f"damaged: {error}") from None


def read(checkpoint: Path, prefix: str) -> dict[str, torch.Tensor]:
    """All tensors whose name starts with `prefix` ("parameters.", "buffers.", "optimizer.mu."), whole, without it.

    For one process; needs no process group. Raises Unreadable.
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
    """Reads what `_Writer` wrote."""

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
                run = target if target.is_cpu else torch.empty_like(target, device="cpu")
                files[name].seek(offset + item.storage_offsets[0] * run.element_size())
                if files[name].readinto(_bytes(run)) != run.nbytes:
                    raise Unreadable(f"damaged: {name} is too short")
                if run is not target:
                    target.copy_(run)
        done: Future = Future()
        done.set_result(None)
        return done


def _bytes(run: torch.Tensor) -> memoryview:
    """The memory of a 1-D tensor of the CPU."""
    return memoryview(run.detach().view(torch.uint8).numpy())  # pyright: ignore[reportArgumentType]


class _MetadataUnpickler(pickle.Unpickler):
    """Makes what DCP puts into `.metadata`, and nothing else."""

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
