"""Chooses the backend; imports DeepSpeed only where it is used, because that takes seconds."""

from crossbatch.engine.config import Resolved
from crossbatch.engine.sharding.backend import Backend
from crossbatch.models import ShardableModel


def build_backend(model: ShardableModel, run: Resolved) -> Backend:
    """Shards `model` (already on its device, equal on all ranks) and builds its optimizer."""
    if run.config.crossbatch.sharding == "fsdp":
        from crossbatch.engine.sharding.fsdp import FsdpBackend

        return FsdpBackend(model, run)
    from crossbatch.engine.sharding.zero import ZeroBackend

    return ZeroBackend(model, run)
