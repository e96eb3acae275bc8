""" "auto" -> numbers: what a configuration means for a world size and a device, or why it cannot run there."""

import os
from dataclasses import dataclass, replace
from typing import Any

import torch

from crossbatch import InputError
from crossbatch.data import choose_backend
from crossbatch.engine.config.schema import Config, LarsConfig
from crossbatch.models.loss import chance_loss, uses_batchformer


@dataclass(frozen=True)
class Device:
    """What a configuration needs to know of the hardware: `type` is "cuda" or "cpu"."""

    type: str
    has_bf16: bool = True
    name: str = "CPU"

    @staticmethod
    def detect() -> "Device":
        if not torch.cuda.is_available():
            return Device("cpu")
        return Device("cuda", torch.cuda.get_device_capability() >= (8, 0), torch.cuda.get_device_name())


@dataclass(frozen=True)
class Resolved:
    """A configuration without "auto", and the numbers that follow from it for any kind of training."""

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
    def crossbatch(self) -> Any:
        """Return the section `crossbatch` of the configuration."""
        return self.config.crossbatch


@dataclass(frozen=True)
class ResolvedConfig(Resolved):
    """Of pretraining."""

    config: Config
    group_size: int | None

    @property
    def lr_peak(self) -> float:
        """Learning rate after warm-up: linear in the global batch (Goyal et al. 2017)."""
        return self.config.optimizer.params.lr * self.config.train_batch_size / 256

    @property
    def chance_loss(self) -> float:
        ours = self.config.crossbatch
        return chance_loss(ours.batchformer.add_bf, ours.model.temperature, self.config.train_batch_size)


def resolve(config: Config, world_size: int, device: Device, local_world_size: int = 1) -> ResolvedConfig:
    """Raises InputError where the configuration cannot run on `world_size` ranks of `device`."""
    check_training(config, world_size)
    _check_lars(config)
    _check_cuda_graph(config, world_size, device)
    shared = resolve_training(config, world_size, device, local_world_size)
    return ResolvedConfig(**vars(shared), group_size=_group_size(config, shared.local_batch))


def resolve_training(config: Any, world_size: int, device: Device, local_world_size: int) -> Resolved:
    """What every kind of training resolves alike."""
    local_batch = config.train_batch_size // world_size
    chunk = config.train_micro_batch_size_per_gpu
    auto_chunk = chunk == "auto"
    chunk = local_batch if chunk == "auto" else min(chunk, local_batch)
    workers, threads = share_cores(config.crossbatch.data.workers, device, local_world_size)
    precision, why_precision = choose_precision(config.crossbatch.precision, device)
    backend, why_backend = choose_backend(config.crossbatch.data.backend, device.type)
    data = replace(config.crossbatch.data, workers=workers, backend=backend)
    ours = replace(config.crossbatch, precision=precision, data=data)
    return Resolved(
        config=replace(config, crossbatch=ours, train_micro_batch_size_per_gpu=chunk),
        world_size=world_size,
        device=device,
        local_batch=local_batch,
        chunk=chunk,
        chunks=-(-local_batch // chunk),
        auto_chunk=auto_chunk,
        precision=precision,
        workers=workers,
        threads=threads,
        choices=(f"images: {backend} ({why_backend})", f"precision: {precision} ({why_precision})"),
    )


def usable_cores() -> int:
    """CPU cores that this process may run on: fewer than there are under Slurm, or in a container with a cpuset."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def share_cores(workers: int | str, device: Device, local_world_size: int) -> tuple[int, int]:
    """Loader workers and compute threads of a rank; `workers` may be "auto"."""
    cores = usable_cores() // local_world_size
    if not isinstance(workers, int):
        # Where the CPU computes too, that takes far longer than loading.
        workers = max(1, min(16, cores - 1 if device.type == "cuda" else cores // 4))
    # Compute threads wait actively: two of them beside a loader on two cores are slower than one (170 against 198
    # images/s in the quickstart).
    return workers, max(1, cores - workers)


def check_training(config: Any, world_size: int) -> None:
    """Batch, ranks, schedule and sharding of any kind of training."""
    ours, zero = config.crossbatch, config.zero_optimization
    batch = config.train_batch_size
    if batch % world_size:
        near = max(batch // world_size, 1) * world_size
        raise InputError(
            f"train_batch_size: given {batch} for {world_size} ranks; allowed: a multiple; set it to {near}"
        )
    if ours.schedule.warmup_epochs >= ours.schedule.epochs:
        raise InputError(
            f"crossbatch.schedule.warmup_epochs: given {ours.schedule.warmup_epochs:g} of {ours.schedule.epochs} epochs; "
            f"allowed: less than crossbatch.schedule.epochs; lower it"
        )
    offloads = zero.offload_optimizer.device != "none"
    if ours.sharding == "fsdp":
        given = [name for name in vars(zero) if name not in ("stage", "offload_optimizer")]
        given = [name for name in given if getattr(zero, name) is not None]
        if offloads or given:
            name = "offload_optimizer.device" if offloads else given[0]
            raise InputError(
                f"zero_optimization.{name}: given {zero.offload_optimizer.device if offloads else getattr(zero, name)} with "
                f"crossbatch.sharding fsdp, which has no such thing; remove it or set crossbatch.sharding to zero"
            )
    if offloads and zero.stage == 0:
        raise InputError(
            "zero_optimization.offload_optimizer.device: given cpu with zero_optimization.stage 0, where DeepSpeed ignores it; "
            "allowed: none; set the stage to 1, 2 or 3"
        )


def _check_lars(config: Config) -> None:
    params = config.optimizer.params
    if isinstance(params, LarsConfig):
        for name, variant in (("clip", "larc"), ("decay_after_momentum", "mlperf")):
            if getattr(params, name) and params.variant != variant:
                raise InputError(
                    f"optimizer.params.{name}: given true with optimizer.params.variant {params.variant}; allowed: false; "
                    f"set the variant to {variant}"
                )


def _check_cuda_graph(config: Config, world_size: int, device: Device) -> None:
    """Of what a graph cannot replay: other devices' work, collectives, parameters that move."""
    obstacles = {
        f"on a {device.name}": device.type != "cuda",
        f"with {world_size} ranks": world_size > 1,
        "with crossbatch.sharding fsdp": config.crossbatch.sharding == "fsdp",
        "with zero_optimization.stage 3": config.zero_optimization.stage == 3,
    }
    if config.crossbatch.model.cuda_graph and any(obstacles.values()):
        raise InputError(
            f"crossbatch.model.cuda_graph: given true {next(why for why, stands in obstacles.items() if stands)}; allowed: "
            f"false, or true on one GPU with crossbatch.sharding zero and zero_optimization.stage 0 to 2; set it to false"
        )


def _group_size(config: Config, local_batch: int) -> int | None:
    if not uses_batchformer(config.crossbatch.batchformer.add_bf):
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
    """The precision for `crossbatch.precision` on this device, and why. Raises InputError for bf16 where there is none."""
    if given == "bf16" and not device.has_bf16:
        raise InputError(f"crossbatch.precision: given bf16; {device.name} has none; allowed: auto, fp16, fp32")
    if given != "auto":
        return given, "as configured"
    if device.type == "cpu":
        return "fp32", "no GPU"
    return ("bf16", f"{device.name} has bf16") if device.has_bf16 else ("fp16", f"{device.name} has no bf16")


def autocast_dtype(precision: str) -> torch.dtype | None:
    """What forward passes compute in; None: in that of the parameters, fp32."""
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)


def resolve_precision(given: str, device: Device) -> str:
    """`choose_precision` without the reason."""
    return choose_precision(given, device)[0]
