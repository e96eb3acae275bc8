"""Builds a recipe of ds_configs/ as the stages measure it: on one rank of this machine."""

import importlib.util
from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from benchmarks.stages import Effort
from crossbatch.engine.config import Device, ResolvedConfig, load_config, resolve, to_dict
from crossbatch.engine.runtime.distributed import process_group
from crossbatch.engine.runtime.world import world_from_environment
from crossbatch.engine.sharding import Backend
from crossbatch.engine.tasks.build import build_backend, build_model, connect

FOLDER = Path(__file__).parents[2] / "ds_configs"
SMALL = ['crossbatch.model.backbone_args={"width": 8}', "crossbatch.model.mlp_dim=64"]


def load(name: str, overrides: Iterable[str] = ()) -> ResolvedConfig:
    """Return ds_configs/<name>.json resolved for one rank; sharded by FSDP2 where DeepSpeed is not installed."""
    overrides = list(overrides)
    if importlib.util.find_spec("deepspeed") is None:
        overrides.append("crossbatch.sharding=fsdp")
    return resolve(load_config(FOLDER / f"{name}.json", overrides), 1, Device.detect())


def settings(name: str, overrides: Iterable[str], cfg: ResolvedConfig, **more: Any) -> dict[str, Any]:
    """Return for a row what was asked for, and the configuration that it resolved to."""
    asked = {"recipe": name, "overrides": list(overrides), "device": cfg.device.type}
    return {**asked, **more, "config": to_dict(cfg.config)}


def load_main(effort: Effort) -> tuple[ResolvedConfig, dict[str, Any]]:
    """Return the main recipe, ResNet-50 + BatchFormer with LARS, small where effort is quick, and the settings of its rows."""
    overrides = effort.pick(SMALL, [], [])
    cfg = load("bs4096", overrides)
    return cfg, settings("bs4096", overrides, cfg)


def one_rank() -> AbstractContextManager[torch.device]:
    """Enter a process group of this process alone, which computes with as many threads as before; it gives the device."""
    return process_group(world_from_environment(), Device.detect().type, threads=torch.get_num_threads())


def build(cfg: ResolvedConfig, device: torch.device) -> Backend:
    """Return the sharded model of `cfg` from seed 0; inside a process group."""
    torch.manual_seed(0)
    model = build_model(cfg).to(device)
    connect(model, cfg)
    return build_backend(model, cfg)
