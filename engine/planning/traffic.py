"""What the ranks send each other in one training step: collectives by part of the step, kind and bytes of the whole tensor.

Ours are exact on any number of ranks (tests/benchmarks/test_scaling_traffic.py counts them):

    norms   forward, an all-gather of mean and variance of each view and rank; backward, an all-reduce of two sums of each view;
            one of each for every norm and chunk. The passes that repeat a chunk know its statistics
    keys    one all-gather, of all views and streams
    groups  where a BatchFormer group spans ranks: its features, forward for queries and keys, and back for the queries
    LARS    the sums of squares of all tensors, fp64, in one all-reduce for each call of the optimizer that adapts

Those of DeepSpeed and FSDP2 (gradients, parameters, gradient norm) are right in their bytes, within an eighth; how they are cut
into calls is the library's business. DeepSpeed's stage 3 in several chunks gathers more than is counted: see `is_lower_bound`.
"""

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from torch import nn

from crossbatch.engine.config import LarsConfig, ResolvedConfig
from crossbatch.engine.memory_model import BUCKET, unit_sizes
from crossbatch.engine.tasks.build import parameter_groups
from crossbatch.models import NUM_VIEWS, MoCo
from crossbatch.models.norm import ViewBatchNorm

OURS = ("norms", "keys", "groups", "LARS")
PREFETCH = 50_000_000  # elements: DeepSpeed's default of stage 3
_FP32, _FP64 = 4, 8


class Message(NamedTuple):
    """One collective: `kind` is all-reduce, all-gather or reduce-scatter; `size` in bytes, of the whole tensor."""

    part: str
    kind: str
    size: float


Traffic = Counter[Message]  # of one step: message -> calls


def step_traffic(model: MoCo, cfg: ResolvedConfig) -> Traffic:
    """Count the collectives of one step of `cfg`; `model` may have no memory."""
    if cfg.world_size == 1:
        return Counter()
    traffic = Counter(_norms(model, cfg))
    traffic.update(_batch_wide(model, cfg))
    traffic.update(_lars(model, cfg))
    traffic.update(_fsdp(model, cfg) if cfg.config.crossbatch.sharding == "fsdp" else _zero(model, cfg))
    return traffic


def is_lower_bound(cfg: ResolvedConfig) -> bool:
    """Return whether DeepSpeed gathers parameters module by module, more often than is counted."""
    return cfg.config.crossbatch.sharding == "zero" and cfg.config.zero_optimization.stage == 3 and cfg.chunks > 1


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
    passes: list[tuple[nn.Module, int, int]] = [  # module, forward and backward passes
        (model.online.backbone, cfg.chunks, cfg.chunks),
        (model.momentum.backbone, cfg.chunks, 0),
        (model.online.projector, 1, 1),
        (model.predictor, 1, 1),
        (model.momentum.projector, 1, 0),
    ]
    for module, forward, backward in passes:
        for norm in module.modules():
            if isinstance(norm, ViewBatchNorm):
                size = 2 * NUM_VIEWS * norm.num_features * _FP32
                yield from [Message("norms", "all-gather", size * cfg.world_size)] * forward
                yield from [Message("norms", "all-reduce", size)] * backward


def _batch_wide(model: MoCo, cfg: ResolvedConfig) -> Iterator[Message]:
    ours, images = cfg.config.crossbatch, NUM_VIEWS * cfg.config.train_batch_size
    streams = (1 if model.batchformer is None else 2) + (model.batchformer_loss == "mean_with_self")
    yield Message("keys", "all-gather", images * streams * ours.model.projection_dim * _FP32)
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


def _zero(model: MoCo, cfg: ResolvedConfig) -> Iterator[Message]:
    """DeepSpeed's.

    Stages 0 to 2 all-reduce the gradients in buckets (1 and 2, too: `reduce_scatter` chooses what a rank keeps, not what is
    sent); 1 and 2 then gather what each rank has updated, group by group. Stage 3 scatters the gradients and gathers every
    parameter of both encoders once a step.
    """
    zero = cfg.config.zero_optimization
    groups = [sum(p.numel() for p in group["params"]) for group in parameter_groups(model, cfg.config)]
    bucket = BUCKET if zero.stage == 0 else zero.reduce_bucket_size or BUCKET
    kind = "reduce-scatter" if zero.stage == 3 else "all-reduce"
    yield from _in_buckets("gradients", kind, sum(groups), bucket)
    if zero.stage > 0:
        yield from [Message("gradient norm", "all-reduce", _FP32)] * len(groups)
    if zero.stage == 3:
        total, prefetch = sum(p.numel() for p in model.parameters()), zero.stage3_prefetch_bucket_size
        yield from _in_buckets("parameters", "all-gather", total, PREFETCH if prefetch is None else prefetch)
    elif zero.stage > 0:
        yield from (Message("parameters", "all-gather", _FP32 * group) for group in groups)


def _in_buckets(part: str, kind: str, elements: int, bucket: int) -> list[Message]:
    calls = -(-elements // max(bucket, 1))
    return [Message(part, kind, _FP32 * elements / calls)] * calls


def _fsdp(model: MoCo, cfg: ResolvedConfig) -> Iterator[Message]:
    """FSDP2's: a unit is gathered where it is not whole; its gradients are scattered once, with the last chunk.

    On stages 1 and 2 a unit stays whole until the next end of a backward pass, so the online backbone is gathered once for the
    batch-wide part, and once for every chunk that is repeated. On stage 3 it is gathered for every pass, forward and backward.
    """
    stage, chunks = cfg.config.zero_optimization.stage, cfg.chunks
    online, momentum = (set(encoder.backbone.modules()) for encoder in (model.online, model.momentum))
    for unit, (numel, is_trained) in unit_sizes(model).items():
        if is_trained:
            yield Message("gradients", "reduce-scatter" if stage else "all-reduce", _FP32 * numel)
        if unit in online:
            again = 0 if chunks == 1 else chunks
            gathers = 1 + again if stage < 3 else (2 if chunks == 1 else 3 * chunks)
        elif unit in momentum:
            gathers = chunks if stage == 3 else 1
        else:
            shared = unit is model.batchformer and model.momentum.batchformer is None
            gathers = 1 + is_trained + shared if stage == 3 else 1
            # FSDP2 fetches what ran before the backbone's backward pass, though nobody needs it any more.
            gathers += chunks > 1 and unit is model.momentum.projector
        if stage > 0:
            yield from [Message("parameters", "all-gather", _FP32 * numel)] * gathers
    if stage > 0:
        yield Message("gradient norm", "all-reduce", _FP32)
