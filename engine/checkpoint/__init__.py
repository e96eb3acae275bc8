"""Saves checkpoints that load at any world size, stage and backend, and that a crash at any moment cannot spoil.

    checkpoints/
      step-00001200/
        0.bin ...      slices of the flattened tensors, one file per rank that wrote
        .metadata      which slice of which tensor is where in them (torch.distributed.checkpoint)
        config.json    the resolved configuration
        state.json     progress, shapes, versions, and the size and checksum of every file
      latest           the name of the newest checkpoint

Every tensor is stored flattened and cut into slices. A rank writes the slices that it holds, or an equal share of what all
ranks hold, and reads the slices that it needs from any file. So nothing is gathered, and nothing in a file depends on ranks,
ZeRO or FSDP2.

    directory     finds, keeps and drops checkpoints, and touches files in an order that makes a save safe
    slices        names the state of this rank, and decides which slices it writes
    store         writes and reads one checkpoint
    async_writer  saves in the background while training goes on
    schedule      decides when a run saves, and reports how each save ended
    resume        chooses the checkpoint that a run continues from, and fills the backend from it
    memory        keeps the last steps in host memory, at home and on another node
    recovery      finds the newest step that the nodes have in memory, and makes a checkpoint of it
    changes       says which keys of the configuration a resumed run may change
"""

from crossbatch.engine.checkpoint.async_writer import AsyncCheckpointWriter
from crossbatch.engine.checkpoint.changes import check_allowed, is_allowed
from crossbatch.engine.checkpoint.directory import Keep, candidates, create_run_directory, find
from crossbatch.engine.checkpoint.resume import Resumed, resume
from crossbatch.engine.checkpoint.store import Manifest, Unreadable, read, read_manifest, write
