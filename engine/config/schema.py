"""Declare every key of pretraining once: type, default, allowed range, meaning, and whether a resumed run may change it.

A recipe is a DeepSpeed JSON. Keys that DeepSpeed has keep DeepSpeed's names and stand at the top level; ours stand in one
section, "crossbatch". Defaults are those of MoCo v3's released code, so an empty recipe is MoCo v3 without BatchFormer.
ds_configs/README.md shows the same list to users; a test holds the two together.
"""

import json
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt, Le, MinLen
from pydantic import ValidationInfo, field_validator

from crossbatch.engine.config.keys import Auto, Section, key
from crossbatch.models.loss import BatchFormerLoss

Count = Annotated[int, Ge(1)]
CountOrZero = Annotated[int, Ge(0)]
AtLeastTwo = Annotated[int, Ge(2)]
Pixels = Annotated[int, Ge(8)]
ImageSize = Pixels | tuple[Pixels, Pixels]
Positive = Annotated[float, Gt(0)]
NotNegative = Annotated[float, Ge(0)]
Seconds = Annotated[float, Gt(0), Le(1e7)]  # four months
Fraction = Annotated[float, Ge(0), Le(1)]
PositiveFraction = Annotated[float, Gt(0), Le(1)]
Beta = Annotated[float, Ge(0), Le(1 - 1e-6)]
Backend = Literal["auto", "dali", "opencv", "torchvision"]
Precision = Literal["auto", "fp32", "bf16", "fp16"]
Sharding = Literal["zero", "fsdp"]
Stem = Literal["imagenet", "small"]

# Keys of what DeepSpeed prints itself, which it gets as they are.
PRINTED_BY_DEEPSPEED = ("steps_per_print", "memory_breakdown", "dump_state", "comms_logger")
OVERLAPPED_BUCKET = 25_000_000  # elements: the 60 million of ResNet-50 with BatchFormer are three messages

# Meanings of keys that several commands have.
PATH = (
    "folder with train/ and val/, validation/ or test/, or of images without classes; or list://, hf://, cifar10://, "
    "cifar100://, flowers://, pets://, synthetic://, shapes://; tar shards at s3://, gs://, https://; with ?fraction= or "
    "?per_class=, a part of it"
)
BACKEND = "library that decodes and augments; auto: DALI where it is installed and there is a GPU, else OpenCV"
BASE_LR = "learning rate after warm-up: base_lr * train_batch_size / reference_batch"
REFERENCE_BATCH = "number of images that base_lr is given for"


class ModelConfig(Section):
    arch: str = key("resnet50", "backbone: resnet18/34/50/101, vit_small, vit_base, vit_conv_small, vit_conv_base")
    stem: Stem = key("imagenet", "first layers of a ResNet; small: 3x3 without pooling, for images up to 64 pixels")
    projection_dim: AtLeastTwo = key(256, "output width of the projector and the predictor")
    mlp_dim: AtLeastTwo = key(4096, "hidden width of the projector and the predictor")
    temperature: Positive = key(1.0, "temperature: cosine similarities are divided by it")
    stop_grad_conv1: bool = key(False, "freeze the patch projection of a ViT at its initialisation")
    norm_ranks: Literal["world", "node"] | Count = key(
        "world", "ranks that share the statistics of batch norms: all; those of a node; or N consecutive ranks"
    )
    checkpoint_activations: Literal["none", "norms", "blocks"] = key(
        "none",
        "computed again in the backward pass, to keep less; norms: output of norm and ReLU in a ResNet; blocks: a whole block",
        resumable=True,
    )
    cuda_graph: bool = key(
        False, "replay BatchFormer and heads as a CUDA graph; one GPU, sharding zero below stage 3", resumable=True
    )
    compile: bool = key(
        False,
        "torch.compile the blocks of a ViT, the heads' linear layers and BatchFormer; not a ResNet",
        resumable=True,
    )
    init: str | None = key(
        None,
        "weights that both backbones start from: a run, one of its checkpoints, or a file; resuming does not load them again",
    )
    backbone_args: Mapping[str, Any] = key(
        {}, "arguments of the backbone: width (ResNet); embed_dim, depth, num_heads, patch_size, mlp_ratio (ViT)"
    )

    @field_validator("checkpoint_activations", mode="before")
    @classmethod
    def _from_a_boolean(cls, value: Any) -> Any:
        """Accept the values that the key had before, as in the config.json of old runs."""
        return {True: "blocks", False: "none"}[value] if isinstance(value, bool) else value


class BatchFormerConfig(Section):
    loss: BatchFormerLoss = key(
        "none",
        "none: no BatchFormer; sum: 8 terms; mean: sum / 4; mean_with_self: 10 terms / 5; joint: streams as one batch",
    )
    group_size: Count = key(256, "images that attend to each other, consecutive in the global batch; cut to the batch")
    mode: Literal["trained", "released", "ema"] = key(
        "trained", "trained with the model; released: frozen at its initialisation; ema: the keys use a moving average"
    )
    dropout: Annotated[float, Ge(0), Le(0.95)] = key(0.5, "dropout probability of the BatchFormer layer")
    kernel: Literal["auto", "fused", "sdpa", "reference"] = key(
        "auto", "implementation (launch/doctor.py says which can run); sdpa needs dropout 0", resumable=True
    )
    lr_scale: Positive = key(1.0, "factor on the learning rate for BatchFormer's parameters")


class MomentumConfig(Section):
    base: Fraction = key(0.99, "momentum of the momentum encoder (a moving average) at the start")
    cosine: bool = key(False, "raise the momentum to 1 along a half cosine")


class ScheduleConfig(Section):
    epochs: Count | Positive = key(100, "epochs to train; 0.5 is half an epoch")
    warmup_epochs: NotNegative = key(10.0, "epochs over which the learning rate rises linearly from 0")
    freeze_backbone_epochs: NotNegative = key(
        0.0,
        "epochs at the start in which only BatchFormer and heads are trained; running statistics of norms still move",
    )


class PathConfig(Section):
    """Declares where images are, for all commands that read some."""

    # A resumed run needs the same images, which is checked, but not at the same path.
    path: str | None = key(None, PATH, resumable=True)
    cache_dir: str | None = key(
        None,
        "folder on a local disk that keeps images of remote shards; none: read anew in every epoch",
        resumable=True,
    )
    cache_gib: Positive = key(32.0, "largest size of cache_dir in GiB", resumable=True)


class ImageConfig(PathConfig):
    """Declares the keys of training images, for all commands that train."""

    backend: Backend = key("auto", BACKEND)
    crop_min: PositiveFraction = key(0.08, "smallest crop, as a fraction of the image's area")
    scaled_decode: bool = key(
        True,
        "decode JPEGs of 900 px and more at 1/2, 1/4 or 1/8 of the resolution where crops stay twice as large as views",
    )
    workers: CountOrZero | Auto = key(
        "auto", "loader processes (with DALI: threads) per rank; 0 loads in the training process", resumable=True
    )
    max_skipped_fraction: Fraction = key(0.001, "fraction of broken images above which the run stops", resumable=True)


class DataConfig(ImageConfig):
    image_size: ImageSize = key(224, "side of a view in pixels, or [height, width]")
    channels: Count = key(
        3,
        "channels of the images; other than 3: bands of a file or pages of a TIFF, without hue, saturation and grayscale",
    )
    blur_probability: tuple[Fraction, Fraction] = key(
        (1.0, 0.1), "probability of blurring the first and the second view, by up to 2 pixels at any image_size"
    )
    mean: Annotated[tuple[float, ...], MinLen(1)] | Auto = key(
        "auto", "mean of each channel, of values from 0 to 1; auto: ImageNet's"
    )
    std: Annotated[tuple[Positive, ...], MinLen(1)] | Auto = key(
        "auto", "standard deviation of each channel, of values from 0 to 1; auto: ImageNet's"
    )
    shuffle_window: CountOrZero = key(
        0, "size of the shuffle window in images, at least a batch; for tar shards on a network disk; 0: shuffle all"
    )


class EvaluateConfig(Section):
    every_epochs: CountOrZero = key(
        1,
        "epochs between two measurements without labels (rank, alignment, uniformity), also at step 0 and the end; 0: never",
    )
    sample_size: Count = key(
        10_000, "largest number of training images whose rank is measured, evenly spread among those of knn_bank_size"
    )
    knn_every_epochs: CountOrZero = key(1, "epochs between two k-NN evaluations, also at step 0 and the end; 0: never")
    knn_k: Count = key(20, "neighbours that vote")
    knn_bank_size: Count = key(50_000, "largest number of training images to search for neighbours, evenly spread")


class LogConfig(Section):
    every_steps: Count = key(10, "optimizer steps between two lines of metrics.jsonl")
    to: tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...] = key(
        ("tensorboard",), "where metrics go besides metrics.jsonl, each an optional package but TensorBoard"
    )


class PretrainLogConfig(LogConfig):
    noise_scale: bool = key(
        True, "measure the gradient noise scale where ranks or chunks have gradients of their own; up to 2 % of a step"
    )


class CheckpointConfig(Section):
    every_steps: Count | Auto = key("auto", "optimizer steps between two checkpoints; auto: once an epoch")
    keep: Count = key(2, "number of newest checkpoints that are kept")
    keep_every_steps: CountOrZero = key(0, "checkpoints at multiples of this many steps are kept for good; 0: none")
    asynchronous: bool = key(True, "continue training while a checkpoint is written from a copy in host memory")
    memory_every_steps: CountOrZero | Auto = key(
        "auto",
        "optimizer steps between two copies of the state in host memory, from which a restarted run goes on; 0: none; auto: 1 "
        "where torchrun may restart the run (--max-restarts), else 0",
    )


class WatchConfig(Section):
    timeout_s: Seconds = key(600.0, "seconds that a rank may keep the others waiting before the run stops")
    # A loss scale of 2^16 falls to 2^-14 in 30 steps.
    max_nonfinite_steps: Count = key(30, "consecutive steps without finite gradients before the run stops")
    spike_sigmas: NotNegative = key(6.0, "warn of a loss this many standard deviations above its recent mean; 0: never")
    collapse_std: NotNegative = key(0.05, "warn when the metric feature_std falls below this; 0: never")
    collapse_rank: NotNegative = key(1.5, "warn when the metric effective_rank falls below this; 0: never")


class TrainingConfig(Section):
    """Declares the keys of `crossbatch` that pretraining and fine-tuning share."""

    log: LogConfig = key(LogConfig(), resumable=True)
    checkpoint: CheckpointConfig = key(CheckpointConfig(), resumable=True)
    watch: WatchConfig = key(WatchConfig(), resumable=True)
    sharding: Sharding = key("zero", "zero: DeepSpeed; fsdp: FSDP2; both read zero_optimization.stage", resumable=True)
    precision: Precision = key(
        "auto", "autocast precision of the forward pass; auto: bf16, on older GPUs fp16, on CPUs without AMX fp32"
    )
    deterministic: bool = key(
        False,
        "use deterministic algorithms on a GPU, so that a resumed run repeats the same bits; slower",
        resumable=True,
    )
    seed: CountOrZero = key(0, "seed of initial weights, data order, augmentation and all other randomness")


class CrossbatchConfig(TrainingConfig):
    model: ModelConfig = ModelConfig()
    batchformer: BatchFormerConfig = BatchFormerConfig()
    momentum: MomentumConfig = MomentumConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    data: DataConfig = DataConfig()
    log: PretrainLogConfig = key(PretrainLogConfig(), resumable=True)  # pyright: ignore[reportIncompatibleVariableOverride]
    evaluate: EvaluateConfig = key(EvaluateConfig(), resumable=True)


class LarsConfig(Section):
    KIND: ClassVar = "LARS"
    base_lr: Positive = key(0.6, BASE_LR)
    reference_batch: Count = key(256, REFERENCE_BATCH)
    momentum: PositiveFraction = key(0.9, "momentum of the velocity")
    weight_decay: NotNegative = key(1e-6, "weight decay of parameters with two or more dimensions")
    trust_coefficient: Positive = key(0.001, "trust coefficient: factor of the trust ratio")
    variant: Literal["moco-v3", "larc", "mlperf"] = key(
        "moco-v3",
        "formula (engine/optimizers/lars.py): that of MoCo v3, of apex's LARC, or of the MLPerf reference",
    )
    eps: NotNegative = key(1e-8, "added to the denominator of the trust ratio; only for larc and mlperf")
    clip_trust_ratio: bool = key(False, "make the learning rate an upper limit of the layer-wise rate; only for larc")
    decay_after_momentum: bool = key(False, "keep weight decay out of the velocity; only for mlperf")


class AdamWConfig(Section):
    KIND: ClassVar = "AdamW"
    base_lr: Positive = key(1.5e-4, BASE_LR)
    reference_batch: Count = key(256, REFERENCE_BATCH)
    betas: tuple[Beta, Beta] = key((0.9, 0.999), "decay rates of the two moments")
    eps: Positive = key(1e-8, "added to the denominator")
    weight_decay: NotNegative = key(0.1, "decoupled weight decay")
    decay_1d: bool = key(True, "decay biases, norms and the class token, too, as MoCo v3's released code does")


class OptimizerConfig(Section):
    type: Literal["LARS", "AdamW"] = key("LARS", "optimizer; LARS for ResNets, AdamW for ViTs")
    params: LarsConfig | AdamWConfig = key({}, validate_default=True)

    @field_validator("params", mode="before")
    @classmethod
    def _of_type(cls, params: Any, info: ValidationInfo) -> Any:
        kinds = {kind.KIND: kind for kind in (LarsConfig, AdamWConfig)}
        kind = kinds.get(info.data.get("type", ""))
        return kind.model_validate_json(json.dumps(params)) if kind and isinstance(params, dict) else params


class OffloadConfig(Section):
    device: Literal["none", "cpu"] = key("none", "cpu: keep the optimizer's state and take its steps in host memory")
    pin_memory: bool = key(True, "use page-locked host memory, for faster copies")


class ZeroConfig(Section):
    """Declares how state is sharded: both shardings read `stage`; the other keys are DeepSpeed's, and FSDP2 refuses them."""

    stage: Annotated[int, Ge(0), Le(3)] = key(
        0, "0: replicate everything; 1: shard the optimizer's state; 2: also the gradients; 3: also the parameters"
    )
    overlap_comm: bool | None = key(
        None, "reduce gradients while the backward pass runs; none: in stage 3 only; fsdp: always"
    )
    contiguous_gradients: bool | None = key(None, "copy gradients into one buffer as they are produced")
    reduce_scatter: bool | None = key(None, "use reduce-scatter instead of all-reduce")
    reduce_bucket_size: Count | None = key(
        None, "gradients reduced at once; none: all, or with overlap_comm at most 25 million, for which memory is kept"
    )
    allgather_bucket_size: Count | None = key(None, "largest number of elements gathered at once")
    sub_group_size: Count | None = key(None, "stage 3: number of elements in a sub-group of the optimizer")
    stage3_prefetch_bucket_size: CountOrZero | None = key(None, "stage 3: largest number of elements gathered ahead")
    stage3_max_live_parameters: CountOrZero | None = key(
        None, "stage 3: largest number of gathered elements at any time"
    )
    stage3_max_reuse_distance: CountOrZero | None = key(
        None, "stage 3: keep parameters gathered that are needed again within this many elements"
    )
    log_trace_cache_warnings: bool | None = key(None, "stage 3: warn when the order of parameters changes")
    offload_optimizer: OffloadConfig = OffloadConfig()

    @property
    def overlaps(self) -> bool:
        """Return whether DeepSpeed reduces gradients while the backward pass runs."""
        return self.stage > 0 and (self.stage == 3 if self.overlap_comm is None else self.overlap_comm)

    def bucket_size(self, trained: int) -> int:
        """Return how many elements DeepSpeed reduces at once in stages 1 to 3, for `trained` elements in all.

        It allocates a buffer of this size (two with `overlap_comm`) in every backward pass, however few gradients there are:
        at its own default of 500 million, 1.86 GiB.
        """
        return self.reduce_bucket_size or (min(trained, OVERLAPPED_BUCKET) if self.overlaps else trained)


class DeepSpeedConfig(Section):
    """Declares the keys outside of `crossbatch` that pretraining and fine-tuning share."""

    train_batch_size: AtLeastTwo = key(4096, "images of one optimizer step over all ranks: the contrastive batch")
    train_micro_batch_size_per_gpu: Count | Auto = key("auto", "chunk: images that the backbone sees at once")
    gradient_clipping: NotNegative = key(0.0, "largest global norm of the gradients; 0: no clipping")
    zero_optimization: ZeroConfig = key(ZeroConfig(), resumable=True)
    steps_per_print: Count | None = key(None, "steps between two lines that DeepSpeed prints itself", resumable=True)
    memory_breakdown: bool | None = key(None, "let DeepSpeed print how much memory is in use", resumable=True)
    dump_state: bool | None = key(None, "let DeepSpeed print its state at the start", resumable=True)
    comms_logger: Mapping[str, Any] | None = key(None, "DeepSpeed's log of its own collectives", resumable=True)


class Config(DeepSpeedConfig):
    """Declares the keys of `launch/pretrain.py`."""

    optimizer: OptimizerConfig = OptimizerConfig()
    crossbatch: CrossbatchConfig = CrossbatchConfig()
