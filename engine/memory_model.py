"""What one training step needs on one GPU, part by part: the model behind the automatic chunk and `launch/plan.py`.

What autograd keeps is not modelled but asked: see `engine.sketch`. The rest follows from the configuration:

    parameters      both encoders, heads and BatchFormer; cut by stage 3, and gathered again while the step runs
    optimizer       the state of what this rank steps on (LARS one number per parameter, AdamW two), and, under ZeRO, the fp32
                    copy that DeepSpeed steps on
    gradients       fp32
    bucket          DeepSpeed's buffer for what is reduced together: `reduce_bucket_size` elements, whatever the model
    activations     what the online backbone keeps for one chunk, and 16-bit weights under autocast
    batch-wide part the same for BatchFormer and heads on the whole local batch, and cached features where there are chunks
    keys            normalised, gathered and put in order; a tile of logits
    images          a chunk as bytes and as normalised fp32
    working memory  what is alive for a moment: the largest layer of the momentum encoder's forward pass
    context         CUDA, cuDNN and NCCL: assumed

The peak is where the momentum encoder's first layers run, all activations being kept, or where the backward pass begins.
"""

from dataclasses import dataclass

from torch import nn

from crossbatch.engine.config import LarsConfig, ResolvedConfig
from crossbatch.engine.sketch import sketch
from crossbatch.models import NUM_VIEWS, MoCo

GIB = 2.0**30
CONTEXT = 1.0 * GIB  # assumed
RESERVED = 0.05  # of the memory, for fragmentation: assumed
BUCKET = 500_000_000  # elements: DeepSpeed's default
_FP32, _LOGITS = 4, 8 * 2**20


@dataclass(frozen=True)
class Part:
    name: str
    bytes: float
    origin: str = "computed"


@dataclass(frozen=True)
class Memory:
    """The parts that are in memory together at the peak, in bytes."""

    parts: tuple[Part, ...]

    @property
    def total(self) -> float:
        return sum(part.bytes for part in self.parts)

    @property
    def without_context(self) -> float:
        """Return what torch allocates: everything but the context."""
        return sum(part.bytes for part in self.parts if part.name != "context")

    def fits(self, memory_gib: float) -> bool:
        """Return whether a GPU of this size holds them and leaves `RESERVED` free."""
        return self.total <= (1 - RESERVED) * memory_gib * GIB


class StepMemory:
    """The memory of one step of `cfg` on one rank, for every chunk; on a CPU everything but the context is the same."""

    def __init__(self, cfg: ResolvedConfig):
        self.cfg, self.sketch = cfg, sketch(cfg)

    def at(self, chunk: int) -> Memory:
        """Return the parts at the peak of a step whose backbone sees `chunk` images at once."""
        kept, size = self.sketch.backbone, self.cfg.config.crossbatch.data.image_size
        images = chunk * NUM_VIEWS * 3 * size**2 * (1 + _FP32)
        parts = [
            *self._state(),
            Part(
                "activations",
                kept.per_image * chunk + kept.fixed,
                f"computed: {kept.per_image / 2**20:.1f} MiB an image",
            ),
            Part("images", images + loader_bytes(self.cfg)),
        ]
        later = [
            Part("batch-wide part", self._batch_wide(chunk)),
            Part("keys and logits", self._keys()),
            *self._gradients(),
        ]
        working = Part("working memory", chunk * self.sketch.working, "computed: the momentum encoder's largest layer")
        parts += [working] if working.bytes > sum(part.bytes for part in later) else later
        context = Part("context", CONTEXT if self.cfg.device.type == "cuda" else 0.0, "assumed")
        return Memory((*parts, context))

    def largest_chunk(self, budget: float) -> int:
        """Find the largest of even chunks whose step takes `budget` bytes besides the context; 0 if not one image fits."""
        local = self.cfg.local_batch
        for chunks in range(1, local + 1):
            chunk = -(-local // chunks)
            if self.at(chunk).without_context <= budget:
                return chunk
        return 0

    def _state(self) -> list[Part]:
        """What stays from step to step."""
        config, ranks = self.cfg.config, self.cfg.world_size
        total, trained = _count(self.sketch.model), _count(self.sketch.model, trained=True)
        stage, is_zero = config.zero_optimization.stage, config.crossbatch.sharding == "zero"
        states = 1 if isinstance(config.optimizer.params, LarsConfig) else 2
        states += is_zero and stage > 0
        if config.zero_optimization.offload_optimizer.device != "none":
            states = 0
        is_cut = stage == 3 or (not is_zero and stage > 0)
        parts = [Part("parameters", _FP32 * total / (ranks if is_cut else 1))]
        if is_cut:
            # ZeRO keeps up to 1e9 elements that it has gathered; FSDP2 on stages 1 and 2 all, on 3 two groups at a time.
            gathered = total if is_zero or stage < 3 else largest_units(self.sketch.model, 2)
            parts.append(Part("gathered parameters", _FP32 * gathered))
        return [*parts, Part("optimizer", _FP32 * states * trained / (ranks if stage > 0 else 1))]

    def _gradients(self) -> list[Part]:
        """What there is of them while the backward pass runs."""
        zero, ranks = self.cfg.config.zero_optimization, self.cfg.world_size
        trained = _count(self.sketch.model, trained=True)
        if self.cfg.config.crossbatch.sharding == "fsdp":
            whole = largest_units(self.sketch.model, 2) if zero.stage else 0
            return [Part("gradients", _FP32 * (trained / (ranks if zero.stage else 1) + whole))]
        parts = [Part("gradients", _FP32 * trained / (ranks if zero.stage >= 2 else 1))]
        if zero.stage > 0 and zero.contiguous_gradients is not False:
            buffers = 2 if zero.overlap_comm and zero.stage < 3 else 1
            size = _FP32 * buffers * (zero.reduce_bucket_size or BUCKET)
            if self.cfg.device.type == "cpu":
                size = min(size, parts[0].bytes)  # pages that nobody writes take no memory
            parts.append(Part("bucket", size, f"DeepSpeed: reduce_bucket_size elements{', twice' * (buffers - 1)}"))
        return parts

    def _batch_wide(self, chunk: int) -> float:
        rows, width = NUM_VIEWS * self.cfg.local_batch, self.sketch.model.online.backbone.num_features
        cached = 3 * rows * width * _FP32 if chunk < self.cfg.local_batch else 0  # features of both, and a gradient
        return self.sketch.batch_wide + cached

    def _keys(self) -> float:
        model, config = self.sketch.model, self.cfg.config
        streams = (1 if model.batchformer is None else 2) + (model.batchformer_loss == "mean_with_self")
        keys = NUM_VIEWS * streams * config.train_batch_size * config.crossbatch.model.projection_dim
        return (2 if self.cfg.world_size > 1 else 1) * keys * _FP32 + _LOGITS


def loader_bytes(cfg: ResolvedConfig) -> float:
    """Count the bytes of batches on a GPU that DALI decodes on: one in use, one ready, one being filled; else 0."""
    data = cfg.config.crossbatch.data
    if cfg.device.type != "cuda" or data.backend != "dali":
        return 0.0
    return 3.0 * NUM_VIEWS * cfg.local_batch * 3 * data.image_size**2


def largest_units(model: MoCo, count: int) -> int:
    """Count the parameters of the `count` largest units that FSDP2 gathers: what is whole at once, at most."""
    return sum(sorted(numel for numel, _ in unit_sizes(model).values())[-count:])


def unit_sizes(model: MoCo) -> dict[nn.Module, tuple[int, bool]]:
    """Map each unit to the number of its own parameters, without those of units inside it, and whether they are trained."""
    owned: set[nn.Parameter] = set()
    sizes = {}
    for unit in model.fsdp_units():
        own = [p for p in unit.parameters() if p not in owned]
        owned.update(own)
        sizes[unit] = sum(p.numel() for p in own), any(p.requires_grad for p in own)
    return sizes


def _count(model: nn.Module, trained: bool = False) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trained)
