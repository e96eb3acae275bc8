"""Shards the same step in two ways: `zero` (DeepSpeed, stages 0-3) and `fsdp` (FSDP2).

A backend owns the wrapped model and the optimizer, and answers three questions: how a backward pass and an optimizer step are
made, which memory the momentum update works on, and which slices of every tensor this rank holds (for checkpoints). The rest of
the engine does not know how the state is sharded. `zero_layout` reads the same from anybody's DeepSpeed engine.
"""

from crossbatch.engine.sharding.backend import Backend, FlatSlice, LocalShards
from crossbatch.engine.sharding.zero_layout import lars_for_zero
