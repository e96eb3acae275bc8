"""What one step needs on one GPU, part by part: what fits, and what would make it fit.

    parameters      of both encoders, heads and BatchFormer; cut by stage 3, and while the step runs gathered again
    optimizer       state of what this rank steps on (LARS one number per parameter, AdamW two), and, under ZeRO, the fp32 copy
                    that DeepSpeed steps on
    gradients       fp32
    bucket          DeepSpeed's buffer for what is reduced together, `reduce_bucket_size` elements whatever the model
    activations     what the online backbone keeps for one chunk (activations.py), and 16-bit weights under autocast
    batch-wide part the same of BatchFormer and heads, for the whole local batch, and cached features where there are chunks
    keys            normalised, gathered and put in order; a tile of logits
    images          a chunk as bytes, as normalised fp32, and as the first layer takes it
    working memory  what is alive for a moment: the largest layer of the momentum encoder's forward pass
    context         CUDA, cuDNN and NCCL: assumed

The peak is where the momentum encoder's first layers run, all activations being kept, or where the backward pass begins. What
the allocator loses to fragmentation is not counted but left free: see `RESERVED`.
"""

from dataclasses import dataclass

import torch

from benchmarks.scaling.activations import BYTES, Kept, kept, kept_by_backbone, largest_moment
from benchmarks.scaling.fsdp import largest_groups
from benchmarks.scaling.traffic import BUCKET
from crossbatch.engine.config import LarsConfig, ResolvedConfig
from crossbatch.engine.runtime.chunk_size import loader_bytes
from crossbatch.models import NUM_VIEWS, MoCo
from crossbatch.models.loss import NUM_TERMS

GIB = 2.0**30
CONTEXT = 1.0 * GIB  # assumed
RESERVED = 0.05  # of the memory, for fragmentation: assumed
_FP32, _LOGITS = 4, 8 * 2**20


@dataclass(frozen=True)
class Part:
    name: str
    bytes: float
    origin: str


@dataclass(frozen=True)
class Memory:
    """The parts that are in memory together at the peak, and the others."""

    parts: tuple[Part, ...]

    @property
    def total(self) -> float:
        return sum(part.bytes for part in self.parts)

    def fits(self, memory_gib: float) -> bool:
        return self.total <= (1 - RESERVED) * memory_gib * GIB


def step_memory(model: MoCo, run: ResolvedConfig, chunk: int) -> Memory:
    """Of `run` with chunks of `chunk` images; `model` on the "meta" device."""
    permanent = _state(model, run)
    activations = backbone_kept(model, run)
    wide = batch_wide_kept(model, run)
    images = _one_image(run)
    transient = chunk * largest_moment(model.momentum.backbone, images, run.precision)
    behind = wide + _keys(model, run) + sum(part.bytes for part in _gradients(model, run))
    parts = [
        *permanent,
        Part("activations", activations.bytes(chunk), f"computed: {activations.per_image / 2**20:.1f} MiB an image"),
        Part("images", chunk * images.numel() * (1 + _FP32) + loader_bytes(run), "computed"),
    ]
    if transient > behind:
        parts.append(Part("working memory", transient, "computed: the momentum encoder's largest layer"))
    else:
        parts += [Part("batch-wide part", wide, "computed"), Part("keys and logits", _keys(model, run), "computed")]
        parts += _gradients(model, run)
    return Memory((*parts, Part("context", CONTEXT, "assumed")))


def backbone_kept(model: MoCo, run: ResolvedConfig) -> Kept:
    ours = run.config.crossbatch
    backbone = model.online.backbone
    return kept_by_backbone(backbone, ours.data.image_size, run.precision, ours.model.checkpoint_activations)


def batch_wide_kept(model: MoCo, run: ResolvedConfig) -> float:
    """Bytes that autograd keeps behind the backbone, for the local batch; and features, where chunks cache them."""
    streams = 1 if model.batchformer is None else 2
    rows, width = NUM_VIEWS * run.local_batch, model.online.backbone.num_features
    heads = torch.nn.Sequential(model.online.projector, model.predictor)
    row = kept(heads, torch.empty(1, width, device="meta"), run.precision)
    dim = run.config.crossbatch.model.projection_dim
    loss = (
        (rows * streams + NUM_TERMS[model.batchformer_loss] * run.local_batch) * dim * _FP32
    )  # queries, and their gradients
    cached = 0 if run.chunks == 1 else 3 * rows * width * _FP32  # features of both encoders, and a gradient
    return row.bytes(rows * streams) + loss + cached + _batchformer_kept(model, run, rows)


def _batchformer_kept(model: MoCo, run: ResolvedConfig, rows: int) -> float:
    """See crossbatch.models.batchformer.ops: what the fused kernels keep."""
    if model.batchformer is None or run.group_size is None:
        return 0.0
    width, element = model.online.backbone.num_features, BYTES[run.precision]
    heads = model.batchformer.self_attn.num_heads
    gathered = NUM_VIEWS * max(run.group_size, run.local_batch) if run.group_size > run.local_batch else rows
    own = rows * width * (4 * element + 2 * _FP32)  # query, attention's output, input and output of the MLP; two sums
    group = gathered * width * (3 * element)  # keys, values and what they are computed from
    extra = (rows * width * element if gathered != rows else 0) + gathered * width * (_FP32 if gathered != rows else 0)
    return own + group + extra + rows * _FP32 * (heads + 4)


def _keys(model: MoCo, run: ResolvedConfig) -> float:
    streams = (1 if model.batchformer is None else 2) + (model.batchformer_loss == "mean_with_self")
    keys = NUM_VIEWS * streams * run.config.train_batch_size * run.config.crossbatch.model.projection_dim
    return (2 if run.world_size > 1 else 1) * keys * _FP32 + _LOGITS


def _one_image(run: ResolvedConfig) -> torch.Tensor:
    size = run.config.crossbatch.data.image_size
    return torch.empty(NUM_VIEWS, 3, size, size, device="meta")


def _counts(model: MoCo) -> tuple[int, int]:
    """Parameters, and those that are trained."""
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)


def _state(model: MoCo, run: ResolvedConfig) -> list[Part]:
    """What stays from step to step."""
    total, trained = _counts(model)
    stage, ranks = run.config.zero_optimization.stage, run.world_size
    is_zero = run.config.crossbatch.sharding == "zero"
    offloaded = run.config.zero_optimization.offload_optimizer.device != "none"
    share = ranks if stage > 0 else 1
    states = 1 if isinstance(run.config.optimizer.params, LarsConfig) else 2
    copy = 1 if is_zero and stage > 0 else 0
    parameters, gathered = float(total), 0.0
    if stage == 3 or (not is_zero and stage > 0):
        parameters = total / ranks
        # ZeRO keeps up to 1e9 elements that it has gathered; FSDP2 on stages 1 and 2 all, on 3 two groups at a time.
        gathered = float(total) if is_zero or stage < 3 else largest_groups(model, 2)
    optimizer = 0.0 if offloaded else (states + copy) * trained / share
    return [
        Part("parameters", parameters * _FP32, "computed"),
        *([Part("gathered parameters", gathered * _FP32, "computed")] if gathered else []),
        Part("optimizer", optimizer * _FP32, "computed"),
    ]


def _gradients(model: MoCo, run: ResolvedConfig) -> list[Part]:
    """While the backward pass runs."""
    _, trained = _counts(model)
    zero, ranks = run.config.zero_optimization, run.world_size
    if run.config.crossbatch.sharding == "fsdp":
        whole = largest_groups(model, 2) if zero.stage else 0
        return [Part("gradients", (trained / (ranks if zero.stage else 1) + whole) * _FP32, "computed")]
    parts = [Part("gradients", trained * _FP32 / (ranks if zero.stage >= 2 else 1), "computed")]
    if zero.stage > 0 and zero.contiguous_gradients is not False:
        buffers = 2 if zero.overlap_comm and zero.stage < 3 else 1
        size = buffers * (zero.reduce_bucket_size or BUCKET) * _FP32
        parts.append(
            Part("bucket", size, "DeepSpeed: reduce_bucket_size elements" + (", twice" if buffers > 1 else ""))
        )
    return parts
