"""Checkpoints that fit any world size, stage and backend, and that a crash at any moment cannot spoil.

    checkpoints/
      step-00001200/
        0.bin ...      the tensors, one file per rank that wrote it
        .metadata      which run of which tensor lies where in them (torch.distributed.checkpoint)
        config.json    the resolved configuration
        state.json     progress, shapes, versions, and size and checksum of every file
      latest           the name of the newest one

Every tensor is stored flattened, in runs. A rank writes the runs that it holds, or an equal share of what all ranks hold, and
reads whichever runs it needs of whoever wrote them: so nothing is gathered, and nothing in a file knows about ranks, ZeRO
or FSDP2.

    folder   where checkpoints lie, which are kept, and the order of file operations that makes a save safe
    pieces   runs of tensors <-> torch.distributed.checkpoint
    store    one checkpoint, written and read
    saver    saving in the background while training goes on
    resume   which checkpoint a run continues from, and whether it may
    changes  what of a configuration a run may change when it is resumed
"""

from crossbatch.engine.checkpoint.changes import check_allowed
from crossbatch.engine.checkpoint.directory import Keep, candidates, clean, create_run_directory, find
from crossbatch.engine.checkpoint.pieces import local_state, random_state
from crossbatch.engine.checkpoint.resume import Resumed, resume
from crossbatch.engine.checkpoint.store import Manifest, Unreadable, read, read_manifest, write
from crossbatch.engine.checkpoint.writer import AsyncCheckpointWriter, Outcome

__all__ = [
    "AsyncCheckpointWriter",
    "Keep",
    "Manifest",
    "Outcome",
    "Resumed",
    "Unreadable",
    "candidates",
    "check_allowed",
    "clean",
    "create_run_directory",
    "find",
    "local_state",
    "random_state",
    "read",
    "read_manifest",
    "resume",
    "write",
]
