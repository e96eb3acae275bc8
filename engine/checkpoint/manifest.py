"""`state.json`: what a checkpoint says about itself, and whether its files are as it says.

Every file has a checksum (CRC-32, 1.8 GB/s on a core), and so have the fields of `state.json`.
"""

import json
import zlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from crossbatch.engine.checkpoint.directory import CONFIG, MANIFEST

FORMAT = 3
READABLE_FORMATS = (2, FORMAT)


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

    def to_json(self) -> str:
        """Return the text of `state.json`: one line a field, the last one being the checksum of the others."""
        fields = asdict(self)
        lines = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in fields.items()]
        return "{\n" + ",\n".join([*lines, f'"crc32": {_checksum(fields)}']) + "\n}\n"


def read_manifest(checkpoint: Path) -> tuple[Manifest, dict[str, Any]]:
    """Return `state.json` and `config.json`, with the sizes of all files checked. Raises Unreadable."""
    try:
        fields = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        config = json.loads((checkpoint / CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise Unreadable(f"incomplete: {Path(error.filename).name} is missing") from None
    except (OSError, ValueError) as error:
        raise Unreadable(f"damaged: {error}") from None
    if not isinstance(fields, dict) or fields.get("format") not in READABLE_FORMATS:
        raise Unreadable(f"of another format than {' and '.join(map(str, READABLE_FORMATS))}")
    if fields.pop("crc32", None) != _checksum(fields):
        raise Unreadable(f"damaged: the checksum in {MANIFEST} is wrong")
    manifest = Manifest(**fields)
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
            found = describe(checkpoint / name)
        except OSError as error:
            raise Unreadable(f"damaged: {name}: {error.strerror}") from None
        if found != manifest.files[name]:
            raise Unreadable(f"damaged: the checksum of {name} is wrong")


def describe(file: Path) -> dict[str, int]:
    """Return the size and the checksum of a file, as `Manifest.files` holds them."""
    crc, size = 0, 0
    with file.open("rb") as stream:
        while block := stream.read(2**24):
            crc, size = zlib.crc32(block, crc), size + len(block)
    return {"bytes": size, "crc32": crc}


def _checksum(fields: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(fields).encode())
