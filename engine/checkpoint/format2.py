"""Reading of format 2, in which torch.distributed.checkpoint described plain bytes in `.metadata`.

That file is a pickle. The reader lets it make the few classes that belong in it and nothing else, so it cannot run code.
"""

import mmap
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import metadata as dcp_metadata

_IN_METADATA = {
    dcp_metadata: (
        *("Metadata", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata", "MetadataIndex"),
        "_MEM_FORMAT_ENCODING",
    ),
    torch: ("Size",),
    torch.serialization: ("_get_layout",),
}


def read_slices(checkpoint: Path) -> Iterator[tuple[str, int, int, torch.Tensor]]:
    """Yield name, first element, length and lazily read values of every slice. Raises UnpicklingError or OSError."""
    with (checkpoint / ".metadata").open("rb") as stream:
        metadata = _MetadataUnpickler(stream).load()
    files: dict[str, mmap.mmap] = {}
    for name, tensor in metadata.state_dict_metadata.items():
        for chunk in tensor.chunks:
            (start,), (length,) = chunk.offsets, chunk.sizes
            file, offset = metadata.storage_data[dcp_metadata.MetadataIndex(name, chunk.offsets)]
            if file not in files:
                with (checkpoint / file).open("rb") as stream:
                    files[file] = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
            dtype = tensor.properties.dtype
            yield name, start, length, torch.frombuffer(files[file], dtype=dtype, count=length, offset=offset)


class _MetadataUnpickler(pickle.Unpickler):
    """Makes what belongs in `.metadata`, and refuses anything else."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        for module, names in _IN_METADATA.items():
            if module.__name__ == module_name and global_name in names:
                return getattr(module, global_name)
        if module_name == "torch" and isinstance(getattr(torch, global_name, None), (torch.dtype, torch.layout)):
            return getattr(torch, global_name)
        raise pickle.UnpicklingError(f".metadata asks for {module_name}.{global_name}, which does not belong in it")
