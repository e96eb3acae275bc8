"""What the ranks send each other in one training step: every collective, by part of the step, kind and bytes.

These are not estimates: on any number of ranks a step makes exactly these calls (tests/benchmarks/test_scaling_traffic.py
counts them), with one exception, marked by `exact`. Bytes are those of the whole tensor: what is gathered, or what
is reduced before it is scattered. Everything is fp32 but where it says otherwise.

    norms        forward, an all-gather of mean and variance of each view and rank; backward, an all-reduce of two sums of
                 each view; one of each for every norm and chunk. The passes that repeat a chunk know its statistics
    keys         one all-gather, of all views and streams
    groups       where a BatchFormer group spans ranks: its features, forward for queries and keys, and back for the queries
    gradients, parameters    see `zero_messages` and fsdp.py
    LARS         the sums of squares of all tensors, fp64, in one all-reduce for each call of the optimizer that adapts
    gradient norm            a number for each tensor that the optimizer steps on
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from benchmarks.scaling.fsdp import fsdp_messages
from crossbatch.engine.config import LarsConfig, ResolvedConfig
from crossbatch.engine.tasks.build import parameter_groups
from crossbatch.models import NUM_VIEWS, MoCo
from crossbatch.models.batchformer import BatchFormer
from crossbatch.models.norm import ViewBatchNorm

FP32, FP64 = 4, 8
BUCKET = 500_000_000  # elements: DeepSpeed's default, and at stage 0 the only one
PREFETCH, SUB_GROUP = 50_000_000, 1_000_000_000  # DeepSpeed's defaults of stage 3
_ALIGNMENT = 2  # elements of a rank's partition: DeepSpeed's nccl_start_alignment_factor


class Message(NamedTuple):
    """One collective: `kind` is all-reduce, all-gather, reduce-scatter or broadcast; `size` in bytes, of the whole tensor."""

    part: str
    kind: str
    size: int


@dataclass(frozen=True)
class Traffic:
    """The messages of one step, with their number."""

    calls: Counter[Message]
    exact: bool = True

    def of(self, *parts: str) -> dict[Message, int]:
        return {message: calls for message, calls in self.calls.items() if message.part in parts}

    def by_kind(self) -> Counter[tuple[str, int]]:
        """(kind, bytes) -> calls, whatever the part: what can be counted on the wire."""
        counted: Counter[tuple[str, int]] = Counter()
        for (_, kind, size), calls in self.calls.items():
            counted[kind, size] += calls
        return counted


def step_traffic(model: MoCo, run: ResolvedConfig) -> Traffic:
    """Of one step of `run`; `model` may be on the "meta" device."""
    if run.world_size == 1:
        return Traffic(Counter())
    sharding = run.config.crossbatch.sharding
    calls: Counter[Message] = Counter(norm_messages(model, run))
    calls.update(batch_messages(model, run))
    calls.update(lars_messages(model, run))
    messages = fsdp_messages(model, run) if sharding == "fsdp" else zero_messages(model, run)
    calls.update(Message(*message) for message in messages)
    stage = run.config.zero_optimization.stage
    return Traffic(calls, exact=not (sharding == "zero" and stage == 3 and run.chunks > 1))


def norm_messages(model: MoCo, run: ResolvedConfig) -> Iterator[Message]:
    passes: list[tuple[nn.Module, int, int]] = [
        (model.online.backbone, run.chunks, run.chunks),
        (model.momentum.backbone, run.chunks, 0),
        (model.online.projector, 1, 1),
        (model.predictor, 1, 1),
        (model.momentum.projector, 1, 0),
    ]
    for module, forward, backward in passes:
        for norm in module.modules():
            if isinstance(norm, ViewBatchNorm):
                size = 2 * NUM_VIEWS * norm.num_features * FP32
                yield from [Message("norms", "all-gather", size * run.world_size)] * forward
                yield from [Message("norms", "all-reduce", size)] * backward


def batch_messages(model: MoCo, run: ResolvedConfig) -> Iterator[Message]:
    """Keys, and features of BatchFormer groups."""
    ours, images = run.config.crossbatch, NUM_VIEWS * run.local_batch * run.world_size
    streams = 1 if model.batchformer is None else 2
    streams += model.batchformer_loss == "mean_with_self"
    yield Message("keys", "all-gather", images * streams * ours.model.projection_dim * FP32)
    if run.group_size is not None and run.group_size > run.local_batch:
        size = images * model.online.backbone.num_features * FP32
        yield from [Message("groups", "all-gather", size)] * 2
        yield Message("groups", "reduce-scatter", size)


def lars_messages(model: MoCo, run: ResolvedConfig) -> Iterator[Message]:
    config, stage = run.config, run.config.zero_optimization.stage
    if not isinstance(config.optimizer.params, LarsConfig) or stage == 0:
        return
    groups = [group for group in parameter_groups(model, config) if group["adapts"]]
    tensors = sum(p.requires_grad for p in model.parameters())
    calls = 1
    if config.crossbatch.sharding == "zero":  # DeepSpeed steps group by group
        calls = len(groups) if stage < 3 else sum(len(_sub_groups(group["params"], run)) for group in groups)
    yield from [Message("LARS", "all-reduce", 2 * tensors * FP64)] * calls


def zero_messages(model: MoCo, run: ResolvedConfig) -> Iterator[Message]:
    """DeepSpeed's.

    Stages 0 to 2 all-reduce the gradients in buckets (1 and 2, too: DeepSpeed's `reduce_scatter` chooses what a rank keeps, not
    what is sent); 1 and 2 then gather what each rank has updated, group by group. Stage 3 scatters the gradients, and gathers
    every parameter, of both encoders, once a step: it fetches ahead in buckets as the modules of the forward pass come, and
    keeps what it has until the backward pass (`stage3_max_live_parameters` and `stage3_max_reuse_distance` are 1e9 elements).
    With several chunks DeepSpeed throws away what it learned of the order, and gathers module by module: see `Traffic.exact`.
    """
    zero, ranks = run.config.zero_optimization, run.world_size
    groups = [group["params"] for group in parameter_groups(model, run.config)]
    trainable = [p for p in model.parameters() if p.requires_grad]
    bucket = zero.reduce_bucket_size or BUCKET
    if zero.stage == 0:
        for some in _buckets_over(trainable, BUCKET):
            yield Message("gradients", "all-reduce", FP32 * sum(some))
        return
    if zero.stage < 3:
        order = [p for group in groups for p in group] if zero.stage == 1 else _gradients_as_they_come(model)
        for some in _buckets_up_to(order, bucket):
            yield Message("gradients", "all-reduce", FP32 * sum(some))
        for group in groups:
            yield Message("gradient norm", "all-reduce", FP32)
            yield Message("parameters", "all-gather", FP32 * _padded(sum(p.numel() for p in group), _ALIGNMENT * ranks))
        return
    for some in _buckets_up_to(_gradients_as_they_come(model), bucket):
        yield Message("gradients", "reduce-scatter", FP32 * sum(_padded(numel, ranks) for numel in some))
    yield from [Message("gradient norm", "all-reduce", FP64)] * sum(len(_sub_groups(group, run)) for group in groups)
    prefetch = PREFETCH if zero.stage3_prefetch_bucket_size is None else zero.stage3_prefetch_bucket_size
    for fetched in _fetches(model, prefetch):
        yield Message("parameters", "all-gather", FP32 * sum(_padded(p.numel(), ranks) for p in fetched))


def _buckets_over(parameters: Iterable[nn.Parameter], limit: int) -> Iterator[list[int]]:
    """Buckets that are sent when they have grown beyond the limit."""
    bucket: list[int] = []
    for p in parameters:
        bucket.append(p.numel())
        if sum(bucket) > limit:
            yield bucket
            bucket = []
    if bucket:
        yield bucket


def _buckets_up_to(parameters: Iterable[nn.Parameter], limit: int) -> Iterator[list[int]]:
    """Buckets that are sent before they would grow beyond the limit; a larger tensor has one of its own."""
    bucket: list[int] = []
    for p in parameters:
        if bucket and sum(bucket) + p.numel() > limit:
            yield bucket
            bucket = []
        bucket.append(p.numel())
    if bucket:
        yield bucket


def _sub_groups(parameters: list[nn.Parameter], run: ResolvedConfig) -> list[list[int]]:
    """What stage 3 steps on: runs of a group's parameters, closed when this rank's part has reached `sub_group_size`."""
    limit = run.config.zero_optimization.sub_group_size or SUB_GROUP
    groups: list[list[int]] = [[]]
    for p in parameters:
        if sum(groups[-1]) >= limit:
            groups.append([])
        groups[-1].append(-(-p.numel() // run.world_size))
    return groups


def _fetches(model: MoCo, prefetch: int) -> Iterator[list[nn.Parameter]]:
    """What stage 3 gathers together, after the first steps, in which it has learned the order of the modules."""
    visits = [list(module.parameters(recurse=False)) for module in _forward_order(model)]
    queue = [p for visit in visits for p in visit]
    available: set[nn.Parameter] = set()
    for visit in visits:
        missing = [p for p in visit if p not in available]
        if missing:
            yield missing
            available.update(missing)
        ahead: list[nn.Parameter] = []
        while queue and sum(p.numel() for p in ahead) < prefetch:
            p = queue.pop(0)
            if p not in available:
                ahead.append(p)
                available.add(p)
        if ahead:
            yield ahead


def _forward_order(model: MoCo) -> Iterator[nn.Module]:
    """Modules in the order in which a step of one chunk calls them."""
    yield model
    keys = model.momentum.batchformer or model.batchformer
    heads = (model.batchformer, model.online.projector, model.predictor, keys, model.momentum.projector)
    for part in (model.online.backbone, model.momentum.backbone, *heads):
        if isinstance(part, BatchFormer):
            yield part
            yield from (part.self_attn, part.self_attn.out_proj, part.norm1, part.linear1, part.linear2, part.norm2)
        elif part is not None:
            yield from part.modules()


def _gradients_as_they_come(model: MoCo) -> list[nn.Parameter]:
    """Trained parameters in the order of the backward pass."""
    modules = dict.fromkeys(_forward_order(model))  # each once, where it first comes
    return [p for module in reversed(modules) for p in module.parameters(recurse=False) if p.requires_grad]


def _padded(numel: int, multiple: int) -> int:
    return -(-numel // multiple) * multiple
