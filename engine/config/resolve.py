"""Resolve a configuration for a world size and a device: "auto" becomes numbers, or an error says why it cannot run there."""

import os
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch

from crossbatch import InputError
from crossbatch.data import choose_backend
from crossbatch.engine.config.load import to_dict
from crossbatch.engine.config.schema import PRINTED_BY_DEEPSPEED, Config, CrossbatchConfig, LarsConfig, OptimizerConfig
from crossbatch.engine.config.user_input import user_input
from crossbatch.engine.runtime.gpu_check import check_gpus
from crossbatch.models.loss import chance_loss


@dataclass(frozen=True)
class Device:
    """Describes the hardware of a rank, as far as a configuration depends on it."""

    type: str  # "cuda" or "cpu"
    has_bf16: bool = True
    name: str = "CPU"
    has_amx: bool = False  # a CPU that multiplies matrices of bf16 in several times the speed of fp32

    @staticmethod
    def detect() -> "Device":
        """Return the device that torch finds. Raises InputError for a GPU that torch cannot use."""
        check_gpus()
        if not torch.cuda.is_available():
            capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.11
            return Device("cpu", has_amx=capabilities.get("amx_bf16", False))
        return Device("cuda", torch.cuda.get_device_capability() >= (8, 0), torch.cuda.get_device_name())


Crossbatch = TypeVar("Crossbatch")
Optimizer = TypeVar("Optimizer")


@dataclass(frozen=True)
class Resolved(Generic[Crossbatch, Optimizer]):
    """Holds a configuration without "auto", and the numbers that follow from it for any kind of training."""

    config: Any
    world_size: int
    device: Device
    local_batch: int
    chunk: int
    chunks: int
    auto_chunk: bool  # `chunk` is the local batch until memory is known
    precision: str
    workers: int
    threads: int  # that compute, on a CPU
    choices: tuple[str, ...]  # what "auto" became, and why, for the log

    @property
    def crossbatch(self) -> Crossbatch:
        """Return the section `crossbatch` of the configuration."""
        return self.config.crossbatch

    @property
    def optimizer(self) -> Optimizer:
        """Return the section `optimizer` of the configuration."""
        return self.config.optimizer

    @property
    def train_batch_size(self) -> int:
        """Return the number of images in one optimizer step over all ranks."""
        return self.config.train_batch_size

    @property
    def lr_peak(self) -> float:
        """Return the learning rate after warm-up, which is linear in the global batch (Goyal et al. 2017)."""
        params = self.config.optimizer.params
        return params.base_lr * self.train_batch_size / params.reference_batch


@dataclass(frozen=True)
class ResolvedConfig(Resolved[CrossbatchConfig, OptimizerConfig]):
    """Holds a configuration of pretraining without "auto", and the numbers that follow from it."""

    config: Config
    group_size: int | None  # None without BatchFormer

    @property
    def chance_loss(self) -> float:
        """Return the loss of a network to which all keys look alike, as at the start of training."""
        loss, temperature = self.crossbatch.batchformer.loss, self.crossbatch.model.temperature
        return chance_loss(loss, temperature, self.train_batch_size)

    @property
    def norm_ranks(self) -> int:
        """Return how many consecutive ranks share the statistics of a batch norm; it divides the number of ranks."""
        resolved = self.crossbatch.model.norm_ranks
        return resolved if isinstance(resolved, int) else self.world_size


def resolve(config: Config, world_size: int, device: Device, local_world_size: int = 1) -> ResolvedConfig:
    """Replace every "auto" of a configuration of pretraining.

    Raises:
        InputError: if the configuration cannot run on `world_size` ranks of `device`.
    """
    check_training(config)
    _check_lars(config)
    _check_cuda_graph(config, world_size, device)
    model = config.crossbatch.model.model_copy(update={"norm_ranks": _norm_ranks(config, world_size, local_world_size)})
    config = config.model_copy(update={"crossbatch": config.crossbatch.model_copy(update={"model": model})})
    shared = resolve_training(config, world_size, device, local_world_size)
    return ResolvedConfig(**vars(shared), group_size=_group_size(config, shared.local_batch))


def resolve_training(config: Any, world_size: int, device: Device, local_world_size: int) -> Resolved:
    """Resolve what pretraining, fine-tuning and the linear probe have in common: batch, cores, precision, data backend.

    Raises InputError if the batch cannot be divided by the ranks, or the backend is not there.
    """
    batch, given = config.train_batch_size, config.train_micro_batch_size_per_gpu
    if batch % world_size:
        near = max(batch // world_size, 1) * world_size
        raise InputError(
            f"train_batch_size: given {batch} for {world_size} ranks; allowed: a multiple of the number of ranks; "
            f"set it to {near}"
        )
    local_batch = batch // world_size
    chunk = local_batch if given == "auto" else min(given, local_batch)
    workers, threads = share_cores(config.crossbatch.data.workers, device, local_world_size)
    precision, why_precision = choose_precision(config.crossbatch.precision, device)
    with user_input("crossbatch.data.backend"):
        backend, why_backend = choose_backend(
            config.crossbatch.data.backend, device.type, getattr(config.crossbatch.data, "channels", 3)
        )
    data = config.crossbatch.data.model_copy(update={"workers": workers, "backend": backend})
    crossbatch = config.crossbatch.model_copy(update={"precision": precision, "data": data})
    return Resolved(
        config=config.model_copy(update={"crossbatch": crossbatch, "train_micro_batch_size_per_gpu": chunk}),
        world_size=world_size,
        device=device,
        local_batch=local_batch,
        chunk=chunk,
        chunks=-(-local_batch // chunk),
        auto_chunk=given == "auto",
        precision=precision,
        workers=workers,
        threads=threads,
        choices=(f"images: {backend} ({why_backend})", f"precision: {precision} ({why_precision})"),
    )


def usable_cores() -> int:
    """Return how many CPU cores this process may run on; Slurm and containers may grant fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def share_cores(workers: int | str, device: Device, local_world_size: int) -> tuple[int, int]:
    """Return the loader workers and compute threads of a rank; `workers` may be "auto"."""
    cores = usable_cores() // local_world_size
    if not isinstance(workers, int):
        # Where the CPU computes too, that takes far longer than loading.
        workers = max(1, min(16, cores - 1 if device.type == "cuda" else cores // 4))
    # Also with the loader's worker beside them, as many threads as cores compute: on two cores, two instead of one make 235
    # instead of 190 images/s in the quickstart.
    return workers, max(1, cores)


def check_training(config: Any) -> None:
    """Check schedule and sharding of pretraining or fine-tuning. Raises InputError."""
    schedule, zero = config.crossbatch.schedule, config.zero_optimization
    for name in ("warmup_epochs", "freeze_backbone_epochs"):  # the second one is of pretraining
        if (value := getattr(schedule, name, 0)) >= schedule.epochs:
            raise InputError(
                f"crossbatch.schedule.{name}: given {value:g} of {schedule.epochs} epochs; "
                f"allowed: less than crossbatch.schedule.epochs; lower it"
            )
    offload, sharding = zero.offload_optimizer.device, config.crossbatch.sharding
    if offload != "none" and (sharding == "fsdp" or zero.stage == 0):
        raise InputError(
            f"zero_optimization.offload_optimizer.device: given {offload} with crossbatch.sharding {sharding} and "
            f"zero_optimization.stage {zero.stage}; allowed: none, or cpu with sharding zero and stage 1 to 3; set it to none"
        )
    if sharding == "fsdp":
        settings = {f"zero_optimization.{name}": value for name, value in to_dict(zero).items()}
        settings |= {name: value for name, value in to_dict(config).items() if name in PRINTED_BY_DEEPSPEED}
        for name, value in settings.items():
            if name.endswith((".stage", ".offload_optimizer")) or (name.endswith(".overlap_comm") and value):
                continue  # FSDP2 always overlaps
            raise InputError(
                f"{name}: given {value} with crossbatch.sharding fsdp, which has no such setting; remove it or set "
                f"crossbatch.sharding to zero"
            )


def _check_lars(config: Config) -> None:
    params = config.optimizer.params
    if isinstance(params, LarsConfig):
        for name, variant in (("clip_trust_ratio", "larc"), ("decay_after_momentum", "mlperf")):
            if getattr(params, name) and params.variant != variant:
                raise InputError(
                    f"optimizer.params.{name}: given true with optimizer.params.variant {params.variant}; allowed: false; "
                    f"set the variant to {variant}"
                )
        if params.variant == "moco-v3" and params.eps != LarsConfig().eps:
            raise InputError(
                f"optimizer.params.eps: given {params.eps} with optimizer.params.variant moco-v3, which has none; remove it or "
                f"set the variant to larc or mlperf"
            )


def _check_cuda_graph(config: Config, world_size: int, device: Device) -> None:
    """Refuse what a CUDA graph cannot replay: a CPU's work, collectives, parameters that move."""
    sharding, stage = config.crossbatch.sharding, config.zero_optimization.stage
    fits = device.type == "cuda" and world_size == 1 and sharding == "zero" and stage < 3
    if config.crossbatch.model.cuda_graph and not fits:
        raise InputError(
            f"crossbatch.model.cuda_graph: given true on {'a CPU' if device.type == 'cpu' else device.name} with {world_size} "
            f"rank{'s' * (world_size > 1)}, crossbatch.sharding {sharding} and zero_optimization.stage {stage}; "
            f"allowed: false, or true on one GPU with sharding zero and stage 0 to 2; set it to false"
        )


def _norm_ranks(config: Config, world_size: int, local_world_size: int) -> int | str:
    """Return how many ranks share statistics: a number below the number of ranks, or "world", which fits any of them."""
    given = config.crossbatch.model.norm_ranks
    ranks = given if isinstance(given, int) else {"world": world_size, "node": local_world_size}[given]
    if world_size % ranks:
        what = f"node, which has {ranks} ranks here," if given == "node" else given
        near = max(n for n in range(1, min(ranks, world_size) + 1) if world_size % n == 0)
        raise InputError(
            f"crossbatch.model.norm_ranks: given {what} for {world_size} ranks; allowed: world, node, or a divisor of "
            f"{world_size}; set it to {near}"
        )
    return "world" if ranks == world_size else ranks


def _group_size(config: Config, local_batch: int) -> int | None:
    if config.crossbatch.batchformer.loss == "none":
        return None
    batch = config.train_batch_size
    size = min(config.crossbatch.batchformer.group_size, batch)
    if batch % size == 0 and (local_batch % size == 0 or size % local_batch == 0):
        return size
    fitting = [g for g in range(1, batch + 1) if batch % g == 0 and (local_batch % g == 0 or g % local_batch == 0)]
    near = min(fitting, key=lambda g: abs(g - size))
    raise InputError(
        f"crossbatch.batchformer.group_size: given {size} for train_batch_size {batch} and {local_batch} images a rank; "
        f"allowed: a divisor of train_batch_size that divides the local batch or is a multiple of it; set it to {near}"
    )


def choose_precision(given: str, device: Device) -> tuple[str, str]:
    """Return the precision for `crossbatch.precision`, and why. Raises InputError for bf16 on a device without it."""
    if given == "bf16" and not device.has_bf16:
        raise InputError(
            f"crossbatch.precision: given bf16, which {device.name} does not support; allowed: auto, fp16, fp32"
        )
    if given != "auto":
        return given, "as configured"
    if device.type == "cpu":
        return ("bf16", "the CPU has AMX") if device.has_amx else ("fp32", "no GPU")
    return ("bf16", f"{device.name} has bf16") if device.has_bf16 else ("fp16", f"{device.name} has no bf16")


def autocast_dtype(precision: str) -> torch.dtype | None:
    """Return the dtype of autocast in forward passes; None means no autocast, in the parameters' fp32."""
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
