"""A recipe of ds_configs/ as the stages measure it: on one rank of this machine."""

import importlib.util
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from crossbatch.engine.config import Device, ResolvedConfig, load_config, resolve, to_dict
from crossbatch.engine.runtime.distributed import GroupCollective
from crossbatch.engine.sharding import Backend
from crossbatch.engine.tasks.build import build_backend, build_model

FOLDER = Path(__file__).parents[1] / "ds_configs"


def load(name: str, overrides: Iterable[str] = ()) -> ResolvedConfig:
    """`name` of ds_configs/<name>.json, resolved for one rank; sharded by FSDP2 where DeepSpeed is not installed."""
    overrides = list(overrides)
    if importlib.util.find_spec("deepspeed") is None:
        overrides.append("crossbatch.sharding=fsdp")
    return resolve(load_config(FOLDER / f"{name}.json", overrides), 1, Device.detect())


def settings(name: str, overrides: Iterable[str], run: ResolvedConfig, **more: Any) -> dict[str, Any]:
    """For a row: what was asked for, and what it came to."""
    asked = {"recipe": name, "overrides": list(overrides), "device": run.device.type}
    return {**asked, **more, "config": to_dict(run.config)}


def build(run: ResolvedConfig, device: torch.device) -> Backend:
    """The sharded model of `run` from seed 0; inside a process group."""
    torch.manual_seed(0)
    model = build_model(run).to(device)
    model.set_collective(GroupCollective())
    return build_backend(model, run)
