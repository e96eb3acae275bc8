"""Counts what ranks send each other in a training step: collectives by part, kind and bytes of the whole tensor.

Ours are exact on any number of ranks (tests/benchmarks/test_scaling_traffic.py counts them):

    norms   forward, an all-gather of mean and variance of each view and rank; backward, an all-reduce of two sums of each view;
            one of each for every norm and chunk; the norm of a shortcut shares those of the one that adds it. Norms of the
            momentum encoder share the all-gathers of their online counterparts (`crossbatch.models.lockstep`). The passes that
            repeat a chunk know its statistics
    keys    one all-gather, of all views and streams
    stats   where groups of ranks have statistics of their own: all running statistics, averaged in one all-reduce
    groups  where a BatchFormer group spans ranks: its features, forward for queries and keys, and back for the queries
    LARS    the sums of squares of all tensors, fp64, in one all-reduce for each call of the optimizer that adapts

Those of DeepSpeed and FSDP2 (gradients, parameters) are estimates: right in their bytes within a quarter, while
how they are cut into calls is the library's business. DeepSpeed's stage 3 in several chunks gathers more, module by module.
"""

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from torch import nn

from crossbatch.engine.config import LarsConfig, ResolvedConfig
from crossbatch.engine.memory_model import key_streams
from crossbatch.engine.tasks.build import count, parameter_groups
from crossbatch.models import NUM_VIEWS, MoCo
from crossbatch.models.norm import ViewBatchNorm
from crossbatch.models.resnet import norms_of_shortcuts

OURS = ("norms", "stats", "keys", "groups", "LARS")
BUCKET = 500_000_000  # elements that DeepSpeed reduces at once in stage 0
PREFETCH = 50_000_000  # elements: DeepSpeed's default of stage 3
_FP32, _FP64 = 4, 8


class Message(NamedTuple):
    """Describes one collective: `kind` is all-reduce, all-gather or reduce-scatter; `size` in bytes, of the whole tensor."""

    part: str
    kind: str
    size: float


Traffic = Counter[Message]  # of one step: message -> calls


def step_traffic(model: MoCo, cfg: ResolvedConfig) -> Traffic:
    """Count the collectives of one step of `cfg`; `model` may have no memory."""
    if cfg.world_size == 1:
        return Counter()
    return Counter(message for messages in (_norms, _batch_wide, _lars, _backend) for message in messages(model, cfg))


def of_parts(traffic: Traffic, *parts: str) -> Traffic:
    """Select the messages of some parts of a step."""
    return Counter({message: calls for message, calls in traffic.items() if message.part in parts})


def totals(traffic: Traffic, by: str = "part") -> dict[str, dict[str, float]]:
    """Add up calls and bytes by part, or by kind: {part: {"calls": ..., "bytes": ...}}."""
    found: dict[str, dict[str, float]] = {}
    for message, calls in traffic.items():
        total = found.setdefault(getattr(message, by), {"calls": 0, "bytes": 0})
        total["calls"] += calls
        total["bytes"] += calls * message.size
    return found


def _norms(model: MoCo, cfg: ResolvedConfig) -> Iterator[Message]:
    encoders: list[tuple[nn.Module, int, int]] = [  # module, encoders that have it, passes
        (model.online.backbone, 2, cfg.chunks),
        (model.online.projector, 2, 1),
        (model.predictor, 1, 1),
    ]
    channels = 0
    for module, networks, passes in encoders:
        shortcuts = norms_of_shortcuts(module)
        for norm in module.modules():
            if isinstance(norm, ViewBatchNorm):
                channels += networks * norm.num_features
                if cfg.norm_ranks > 1 and norm not in shortcuts.values():
                    gathered, reduced = (4, 3) if norm in shortcuts else (2, 2)  # sum(dy) is the same for both norms
                    size = NUM_VIEWS * norm.num_features * _FP32
                    yield from [Message("norms", "all-gather", gathered * networks * size * cfg.norm_ranks)] * passes
                    yield from [Message("norms", "all-reduce", reduced * size)] * passes
    if cfg.norm_ranks < cfg.world_size:
        yield Message("stats", "all-reduce", 2 * channels * _FP32)


def _batch_wide(model: MoCo, cfg: ResolvedConfig) -> Iterator[Message]:
    images = NUM_VIEWS * cfg.config.train_batch_size
    yield Message(
        "keys", "all-gather", images * key_streams(model) * cfg.config.crossbatch.model.projection_dim * _FP32
    )
    if cfg.group_size is not None and cfg.group_size > cfg.local_batch:
        size = images * model.online.backbone.num_features * _FP32
        yield from [Message("groups", "all-gather", size)] * 2
        yield Message("groups", "reduce-scatter", size)


def _lars(model: MoCo, cfg: ResolvedConfig) -> Iterator[Message]:
    config = cfg.config
    if not isinstance(config.optimizer.params, LarsConfig) or config.zero_optimization.stage == 0:
        return
    groups = sum(group["adapts"] for group in parameter_groups(model, config))
    calls = groups if config.crossbatch.sharding == "zero" else 1  # DeepSpeed steps group by group
    tensors = sum(p.requires_grad for p in model.parameters())
    yield from [Message("LARS", "all-reduce", 2 * tensors * _FP64)] * calls


def _backend(model: MoCo, cfg: ResolvedConfig) -> Iterator[Message]:
    """Estimate what DeepSpeed or FSDP2 sends of gradients and parameters, in calls of equal size.

    DeepSpeed all-reduces gradients on stages 0 to 2 (`reduce_scatter` chooses what a rank keeps, not what is sent), and gathers
    what ranks have updated; on stage 3 it gathers every parameter of both encoders once a step. FSDP2 gathers a unit where it
    is not whole: on stages 1 and 2 once, and the online backbone again for every repeated chunk, on stage 3 for every pass.
    """
    zero, is_fsdp, chunks = cfg.config.zero_optimization, cfg.config.crossbatch.sharding == "fsdp", cfg.chunks
    total, trained = count(model), count(model, trained=True)
    if is_fsdp:
        backbone = count(model.online.backbone)
        gathered = total + (chunks * backbone if chunks > 1 else 0)
        gathered += trained + 3 * (chunks - 1) * backbone if zero.stage == 3 else 0
        bucket = prefetch = -(-total // len(model.fsdp_units()))
    else:
        gathered = total if zero.stage == 3 else trained
        bucket = BUCKET if zero.stage == 0 else zero.bucket_size(trained)
        prefetch = gathered if zero.stage < 3 else zero.stage3_prefetch_bucket_size or PREFETCH
    is_scattered = zero.stage == 3 or (is_fsdp and zero.stage > 0)
    yield from _in_buckets("gradients", "reduce-scatter" if is_scattered else "all-reduce", trained, bucket)
    if zero.stage > 0:
        yield from _in_buckets("parameters", "all-gather", gathered, prefetch)


def _in_buckets(part: str, kind: str, elements: int, bucket: int) -> list[Message]:
    calls = -(-elements // bucket)
    return [Message(part, kind, _FP32 * elements / calls)] * calls
