"""Computes the memory of one training step on one GPU, part by part, for the automatic chunk and `launch/plan.py`.

What autograd keeps is not modelled: `engine.sketch` asks autograd itself. The rest follows from the configuration:

    parameters      both encoders, heads and BatchFormer; cut by stage 3, and gathered again while the step runs
    optimizer       the state of what this rank steps on (LARS one number per parameter, AdamW two), and, under ZeRO, the fp32
                    copy that DeepSpeed steps on
    gradients       fp32
    bucket          DeepSpeed's buffer for what is reduced together, see `ZeroConfig.bucket_size`; two with `overlap_comm`
    activations     what the online backbone keeps for one chunk, and 16-bit weights under autocast
    batch-wide part the same for BatchFormer and heads on the whole local batch, and cached features where there are chunks
    keys            normalised, gathered and put in order; a tile of logits
    images          a chunk as bytes and as normalised fp32; two batches of bytes on a GPU, three where DALI decodes there
    working memory  what is alive for a moment: the largest layer of the momentum encoder's forward pass
    copy            of the state, on its way to host memory (`engine.checkpoint.memory`), where such copies are made: at most
                    all of it
    context         CUDA, cuDNN and NCCL: assumed

The peak is where the momentum encoder's first layers run, all activations being kept, or where the backward pass begins.
"""

import math
from dataclasses import dataclass

from torch import nn

from crossbatch.data.augment.parameters import height_width
from crossbatch.engine.config import LarsConfig, ResolvedConfig
from crossbatch.engine.runtime.world import may_be_restarted
from crossbatch.engine.sketch import sketch
from crossbatch.engine.tasks.build import count
from crossbatch.models import NUM_VIEWS, MoCo

GIB = 2.0**30
CONTEXT = 1.0 * GIB  # assumed
RESERVED = 0.05  # of the memory, for fragmentation: assumed
_FP32, _LOGITS = 4, 8 * 2**20


@dataclass(frozen=True)
class Part:
    """Holds the bytes of one part of the memory, and where the number comes from."""

    name: str
    bytes: float
    origin: str = "computed"


@dataclass(frozen=True)
class Memory:
    """Lists the parts that are in memory together at the peak."""

    parts: tuple[Part, ...]

    @property
    def total(self) -> float:
        """Return the bytes of all parts."""
        return sum(part.bytes for part in self.parts)

    @property
    def without_context(self) -> float:
        """Return the bytes that torch allocates: everything but the context."""
        return sum(part.bytes for part in self.parts if part.name != "context")

    def fits(self, memory_gib: float) -> bool:
        """Return whether a GPU of this size holds them and leaves `RESERVED` free."""
        return self.total <= (1 - RESERVED) * memory_gib * GIB


class StepMemory:
    """Computes the memory of one step of `cfg` on one rank, for any chunk; without the context it holds on a CPU, too."""

    def __init__(self, cfg: ResolvedConfig):
        self.cfg, self.sketch = cfg, sketch(cfg)
        model = self.sketch.model
        self._total, self._trained, self._two_units = count(model), count(model, trained=True), _two_units(model)
        self._stage, self._is_zero = cfg.config.zero_optimization.stage, cfg.crossbatch.sharding == "zero"

    def at(self, chunk: int) -> Memory:
        """Return the parts at the peak of a step whose backbone sees `chunk` images at once."""
        cfg, kept, model = self.cfg, self.sketch.backbone, self.sketch.model
        local, data = cfg.local_batch, cfg.crossbatch.data
        size = NUM_VIEWS * data.channels * math.prod(height_width(data.image_size))
        batches = 0 if cfg.device.type != "cuda" else 3 if cfg.crossbatch.data.backend == "dali" else 2
        cached = 3 * NUM_VIEWS * local * model.online.backbone.num_features * _FP32 if chunk < local else 0
        keys = NUM_VIEWS * key_streams(model) * cfg.train_batch_size * cfg.crossbatch.model.projection_dim * _FP32
        each = f"computed: {kept.per_image / 2**20:.1f} MiB an image"
        parts = [
            *self._state(),
            *self._copy(),
            Part("activations", kept.per_image * chunk + kept.fixed, each),
            Part("images", chunk * size * (1 + _FP32) + batches * local * size),
        ]
        later = [
            Part("batch-wide part", self.sketch.batch_wide + cached),
            Part("keys and logits", (2 if cfg.world_size > 1 else 1) * keys + _LOGITS),
            *self._gradients(),
        ]
        working = Part("working memory", chunk * self.sketch.working, "computed: the momentum encoder's largest layer")
        parts += [working] if working.bytes > sum(part.bytes for part in later) else later
        return Memory((*parts, Part("context", CONTEXT if cfg.device.type == "cuda" else 0.0, "assumed")))

    def largest_chunk(self, budget: float) -> int:
        """Find the largest even chunk whose step takes at most `budget` bytes besides the context; 0 if no image fits."""
        even = (-(-self.cfg.local_batch // chunks) for chunks in range(1, self.cfg.local_batch + 1))
        return next((chunk for chunk in even if self.at(chunk).without_context <= budget), 0)

    def _state(self) -> list[Part]:
        """Return what stays from step to step."""
        config, ranks = self.cfg.config, self.cfg.world_size
        states = 1 if isinstance(config.optimizer.params, LarsConfig) else 2
        states += self._is_zero and self._stage > 0
        if config.zero_optimization.offload_optimizer.device != "none":
            states = 0
        optimizer = Part("optimizer", _FP32 * states * self._trained / (ranks if self._stage > 0 else 1))
        if self._stage == 0 or (self._is_zero and self._stage < 3):
            return [Part("parameters", _FP32 * self._total), optimizer]
        # ZeRO keeps up to 1e9 elements that it has gathered; FSDP2 on stages 1 and 2 all, on 3 two groups at a time.
        gathered = self._total if self._is_zero or self._stage < 3 else self._two_units
        parameters = Part("parameters", _FP32 * self._total / ranks)
        return [parameters, Part("gathered parameters", _FP32 * gathered), optimizer]

    def _copy(self) -> list[Part]:
        """Return where a GPU gathers its part of the state, if that is copied to host memory."""
        every = self.cfg.crossbatch.checkpoint.memory_every_steps
        if self.cfg.device.type != "cuda" or not (may_be_restarted() if every == "auto" else every):
            return []
        state = sum(part.bytes for part in self._state() if part.name in ("parameters", "optimizer"))
        return [Part("copy", state, "computed, as if there were one GPU a node; less with more")]

    def _gradients(self) -> list[Part]:
        """Return what there is of gradients while the backward pass runs."""
        zero, ranks = self.cfg.config.zero_optimization, self.cfg.world_size
        if not self._is_zero:
            gradients = self._trained / ranks + self._two_units if zero.stage else self._trained
            return [Part("gradients", _FP32 * gradients)]
        parts = [Part("gradients", _FP32 * self._trained / (ranks if zero.stage >= 2 else 1))]
        if zero.stage > 0 and zero.contiguous_gradients is not False:
            buffers = 2 if zero.overlaps and zero.stage < 3 else 1
            size = _FP32 * buffers * zero.bucket_size(self._trained)
            if self.cfg.device.type == "cpu":
                size = min(size, parts[0].bytes)  # pages that nobody writes take no memory
            parts.append(Part("bucket", size, f"DeepSpeed: reduce_bucket_size elements{', twice' * (buffers - 1)}"))
        return parts


def key_streams(model: MoCo) -> int:
    """Count the keys of one view of one image: one for each stream, and one more for the loss "mean_with_self"."""
    return (1 if model.batchformer is None else 2) + (model.batchformer_loss == "mean_with_self")


def _two_units(model: MoCo) -> int:
    """Count the parameters of the two largest units of FSDP2, each without the units inside it: what is whole at once."""
    owned: set[nn.Parameter] = set()
    sizes = []
    for unit in model.fsdp_units():
        own = set(unit.parameters()) - owned
        owned |= own
        sizes.append(sum(p.numel() for p in own))
    return sum(sorted(sizes)[-2:])
