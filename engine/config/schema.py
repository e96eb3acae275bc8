"""Every configuration key, once: type, default, allowed range and one line of meaning.

A recipe is a DeepSpeed JSON. Keys that DeepSpeed has keep DeepSpeed's names and stand at the top level; ours stand in one
section, "crossbatch". Defaults are the originals', so an empty recipe is vanilla MoCo v3.
ds_configs/README.md shows the same list to users; a test holds the two together.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Auto = Literal["auto"]


def key(default: Any, meaning: str, *, low: float | None = None, high: float | None = None, above: float | None = None):
    """A dataclass field with its meaning and its bounds: low <= value <= high, or above < value."""
    bounds = {"meaning": meaning, "low": low, "high": high, "above": above}
    if isinstance(default, type):
        return field(default_factory=default, metadata=bounds)
    return field(default=default, metadata=bounds)


@dataclass(frozen=True)
class ModelConfig:
    arch: str = key("resnet50", "backbone: resnet18/34/50/101, vit_small, vit_base, vit_conv_small, vit_conv_base")
    stem: Literal["imagenet", "small"] = key(
        "imagenet", "first layers of a ResNet; small (3x3, no pooling) for <= 64 px"
    )
    dim: int = key(256, "width of the contrasted vectors", low=2)
    mlp_dim: int = key(4096, "hidden width of projector and predictor", low=2)
    temperature: float = key(1.0, "divides the cosine similarities", above=0.0)
    stop_grad_conv1: bool = key(False, "freeze the patch projection of a ViT at its initialisation")
    checkpoint_activations: bool = key(
        False, "run the blocks of the backbone once more in the backward pass instead of keeping their activations"
    )
    cuda_graph: bool = key(
        False, "replay BatchFormer and heads as a CUDA graph, for small batches; one GPU, sharding zero below stage 3"
    )
    backbone_args: Mapping[str, Any] = key(
        dict,
        "keyword arguments of the backbone: width (ResNet); embed_dim, depth, num_heads, patch_size, mlp_ratio (ViT)",
    )


@dataclass(frozen=True)
class BatchFormerConfig:
    add_bf: int = key(0, "0 off; 1 or 34 sum of 8 loss terms; 36 their sum / 4; 37 with two more, / 5; other > 0 joint")
    group_size: int = key(
        256, "images that attend to each other, runs of the global batch (at most train_batch_size)", low=1
    )
    mode: Literal["trained", "released", "ema"] = key(
        "trained", "trained with the model; released: frozen at its initialisation; ema: the keys use a moving average"
    )
    dropout: float = key(0.5, "dropout of the BatchFormer layer", low=0.0, high=0.95)
    kernel: Literal["auto", "fused", "sdpa", "reference"] = key(
        "auto", "who computes it (launch/doctor.py says which can run); sdpa only at dropout 0"
    )
    lr_scale: float = key(1.0, "learning rate of BatchFormer relative to the rest", above=0.0)


@dataclass(frozen=True)
class MomentumConfig:
    base: float = key(0.99, "momentum of the moving-average encoder at the start", low=0.0, high=1.0)
    cosine: bool = key(False, "raise the momentum to 1 along a half cosine")


@dataclass(frozen=True)
class ScheduleConfig:
    epochs: int = key(100, "epochs to train", low=1)
    warmup_epochs: float = key(10, "epochs of linear warm-up from 0", low=0.0)


@dataclass(frozen=True)
class DataConfig:
    path: str | None = key(
        None,
        "folder with train/ and, for k-NN, val/ or test/; or cifar10://, cifar100://, flowers://, pets://, synthetic://, shapes://",
    )
    backend: Literal["auto", "dali", "opencv", "torchvision"] = key(
        "auto", "who decodes and augments; auto: DALI where it is installed and there is a GPU, else OpenCV"
    )
    crop_min: float = key(0.08, "smallest crop as a share of the image's area", above=0.0, high=1.0)
    image_size: int = key(224, "side of a view in pixels", low=8)
    workers: int | Auto = key(
        "auto", "loader processes (with DALI: threads) of a rank; 0 loads in the training process", low=0
    )
    max_skipped_fraction: float = key(0.001, "share of broken images above which the run stops", low=0.0, high=1.0)
    shuffle_window: int = key(
        0, "images shuffled among each other, at least a batch, for tar shards on a network disk; 0 all", low=0
    )


@dataclass(frozen=True)
class EvaluateConfig:
    knn_every_epochs: int = key(1, "k-NN monitor every so many epochs, at step 0 and at the end; 0 off", low=0)
    knn_k: int = key(20, "neighbours that vote", low=1)
    knn_images: int = key(50_000, "at most so many training images as the bank, evenly spread", low=1)


@dataclass(frozen=True)
class LogConfig:
    every_steps: int = key(10, "optimizer steps between two lines of metrics.jsonl", low=1)


@dataclass(frozen=True)
class CheckpointConfig:
    every_steps: int | Auto = key("auto", "optimizer steps between two checkpoints; auto = once an epoch", low=1)
    keep: int = key(2, "newest checkpoints kept", low=1)
    keep_every_steps: int = key(0, "those of multiples of so many steps are kept for good; 0 none", low=0)
    asynchronous: bool = key(True, "train on while a checkpoint is written, from a copy in host memory")


@dataclass(frozen=True)
class WatchConfig:
    timeout_s: float = key(600.0, "seconds that a rank may keep the others waiting before the run stops", above=0.0)
    max_nonfinite_steps: int = key(
        30, "steps in a row without finite gradients before the run stops (a loss scale of 2^16 falls to 2^-14)", low=1
    )
    spike_sigmas: float = key(6.0, "warn of a loss so many standard deviations above its recent mean; 0 off", low=0.0)
    collapse_std: float = key(0.05, "warn when feature_std falls below; 0 off", low=0.0)


@dataclass(frozen=True)
class CrossbatchConfig:
    model: ModelConfig = key(ModelConfig, "the network")
    batchformer: BatchFormerConfig = key(BatchFormerConfig, "attention over the batch")
    momentum: MomentumConfig = key(MomentumConfig, "the moving-average encoder")
    schedule: ScheduleConfig = key(ScheduleConfig, "epochs and warm-up")
    data: DataConfig = key(DataConfig, "images")
    evaluate: EvaluateConfig = key(EvaluateConfig, "monitor")
    log: LogConfig = key(LogConfig, "metrics.jsonl and TensorBoard")
    checkpoint: CheckpointConfig = key(CheckpointConfig, "what is kept")
    watch: WatchConfig = key(WatchConfig, "when a run stops itself or warns")
    sharding: Literal["zero", "fsdp"] = key(
        "zero", "zero (DeepSpeed) or fsdp (FSDP2); both read zero_optimization.stage"
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = key(
        "auto", "autocast of the forward pass; auto: bf16 where the GPU has it, fp16 before, fp32 on a CPU"
    )
    deterministic: bool = key(
        False, "on a GPU only algorithms that give the same bits again, so that a resumed run is the same one; slower"
    )
    seed: int = key(0, "of weights, data order, augmentation and dropout", low=0)

    @property
    def lr_scales(self) -> dict[str, float]:
        """By prefix of a parameter's name; see `optimizers.parameter_groups`."""
        return {"batchformer.": self.batchformer.lr_scale}


@dataclass(frozen=True)
class LarsConfig:
    lr: float = key(0.6, "per 256 images: peak = lr * train_batch_size / 256", above=0.0)
    momentum: float = key(0.9, "of the velocity", above=0.0, high=1.0)
    weight_decay: float = key(1e-6, "on parameters with two or more dimensions", low=0.0)
    trust_coefficient: float = key(0.001, "scale of the layer-wise rate", above=0.0)
    variant: Literal["moco-v3", "larc", "mlperf"] = key(
        "moco-v3", "whose formula (engine/optimizers/lars.py): MoCo v3's, apex LARC's, or that of the MLPerf reference"
    )
    eps: float = key(1e-8, "added to the gradient's norm; larc and mlperf only", low=0.0)
    clip: bool = key(False, "lr becomes a ceiling of the layer-wise rate; larc only")
    decay_after_momentum: bool = key(False, "keep weight decay out of the velocity; mlperf only")


@dataclass(frozen=True)
class AdamWConfig:
    lr: float = key(1.5e-4, "per 256 images: peak = lr * train_batch_size / 256", above=0.0)
    betas: tuple[float, float] = key((0.9, 0.999), "decay of the two moments", low=0.0, high=1 - 1e-6)
    eps: float = key(1e-8, "added to the denominator", above=0.0)
    weight_decay: float = key(0.1, "decoupled", low=0.0)
    decay_1d: bool = key(True, "decay biases, norms and the class token too, as the originals do")


OPTIMIZERS: dict[str, type] = {"LARS": LarsConfig, "AdamW": AdamWConfig}


@dataclass(frozen=True)
class OptimizerConfig:
    type: Literal["LARS", "AdamW"] = key("LARS", "LARS for ResNets, AdamW for ViTs")
    params: LarsConfig | AdamWConfig = key(LarsConfig, "of the chosen type")


@dataclass(frozen=True)
class OffloadConfig:
    device: Literal["none", "cpu"] = key("none", "where the optimizer's state lives and its step runs")
    pin_memory: bool = key(True, "page-locked memory, for faster copies")


@dataclass(frozen=True)
class ZeroConfig:
    """`stage` serves both shardings; the others are DeepSpeed's, forwarded where given, refused with FSDP2."""

    stage: Literal[0, 1, 2, 3] = key(0, "0 replicate; 1 shard the optimizer; 2 and gradients; 3 and parameters")
    overlap_comm: bool | None = key(None, "reduce gradients while the backward pass runs")
    contiguous_gradients: bool | None = key(None, "copy gradients into one buffer as they are produced")
    reduce_scatter: bool | None = key(None, "reduce-scatter instead of all-reduce")
    reduce_bucket_size: int | None = key(None, "elements reduced at once", low=1)
    allgather_bucket_size: int | None = key(None, "elements gathered at once", low=1)
    sub_group_size: int | None = key(None, "elements per optimizer sub-group of stage 3", low=1)
    stage3_prefetch_bucket_size: int | None = key(None, "elements gathered ahead", low=0)
    stage3_max_live_parameters: int | None = key(None, "elements gathered at a time", low=0)
    stage3_max_reuse_distance: int | None = key(
        None, "keep a parameter that is needed again within so many elements", low=0
    )
    offload_optimizer: OffloadConfig = key(OffloadConfig, "fp32 copies and optimizer in host memory, stages 1 to 3")


@dataclass(frozen=True)
class Config:
    train_batch_size: int = key(4096, "images of one optimizer step over all ranks: the contrastive batch", low=2)
    train_micro_batch_size_per_gpu: int | Auto = key("auto", "chunk: images that the backbone sees at once", low=1)
    gradient_clipping: float = key(0.0, "largest global gradient norm; 0 off", low=0.0)
    optimizer: OptimizerConfig = key(OptimizerConfig, "LARS or AdamW")
    zero_optimization: ZeroConfig = key(ZeroConfig, "how state is sharded")
    crossbatch: CrossbatchConfig = key(CrossbatchConfig, "everything that DeepSpeed has no key for")


# DeepSpeed's keys that would do nothing here or fight the engine, each with what to write instead.
REFUSED_DEEPSPEED_KEYS = {
    "gradient_accumulation_steps": "set train_micro_batch_size_per_gpu; accumulation does not enlarge a contrastive batch",
    "scheduler": "set crossbatch.schedule",
    "fp16": "set crossbatch.precision to fp16",
    "bf16": "set crossbatch.precision to bf16",
    "bfloat16": "set crossbatch.precision to bf16",
    "amp": "set crossbatch.precision",
    "torch_autocast": "set crossbatch.precision",
    "zero_allow_untested_optimizer": "remove it; it silently turns LARS into SGD, and the engine sets it where it is exact",
    "steps_per_print": "set crossbatch.log.every_steps",
    "tensorboard": "remove it; every run writes TensorBoard files",
    "activation_checkpointing": "set crossbatch.model.checkpoint_activations, or a smaller train_micro_batch_size_per_gpu",
}
