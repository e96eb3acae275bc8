"""Train a task from the command line, as `pretrain.py` and `finetune.py` do once their configuration is resolved."""

import argparse
import contextlib
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from crossbatch import InputError
from crossbatch.engine.checkpoint import check_allowed, create_run_directory
from crossbatch.engine.config import Resolved, to_dict
from crossbatch.engine.runtime import distributed
from crossbatch.engine.runtime.run_lock import locked_on_main
from crossbatch.engine.runtime.same_run import check_same_run, check_visible, facts_of
from crossbatch.engine.runtime.watchdog import Watchdog
from crossbatch.engine.runtime.world import World, may_be_restarted
from crossbatch.engine.start import build_trainer
from crossbatch.engine.tasks.task import Task
from crossbatch.launch.arguments import output_folder


def train(
    build_task: Callable[[Any, World, torch.device, Path], Task[Any]],
    cfg: Resolved,
    world: World,
    arguments: argparse.Namespace,
    name: str,
    profile_steps: int = 0,
) -> None:
    """Join the other ranks and train.

    Args:
        build_task: `pretrain_task` or `finetune_task`.
        cfg: the resolved configuration.
        world: this rank among the others.
        arguments: of `add_run_flags` and `add_config_flags`.
        name: of the run directory if there is neither --out nor a recipe.
        profile_steps: how many steps to profile; 0 for none.
    """
    check_allowed(arguments.allow_change, type(cfg.config))
    if arguments.out is None and may_be_restarted():
        raise InputError(
            "--out: not given, but torchrun may restart this run, which must then find its checkpoints; give a folder"
        )
    out = output_folder(arguments, name)
    timeout_s, device_type = cfg.crossbatch.watch.timeout_s, cfg.device.type
    # NCCL would end a process whose peer is gone, with SIGABRT; `Watchdog` does so with a message that names the peer.
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
    if cfg.crossbatch.deterministic:
        distributed.make_deterministic()
    flags = {name: getattr(arguments, name) for name in ("out", "steps", "resume", "allow_change")}
    facts = facts_of(to_dict(cfg.config), precision=cfg.precision, profile=profile_steps, **flags)
    group = distributed.process_group(world, device_type, cfg.threads, timeout_s, partial(check_same_run, facts))
    with group as device, Watchdog(world, timeout_s) as watchdog:
        out = distributed.broadcast_object(out)
        with _leaving_nothing_empty(out), locked_on_main(out):
            distributed.on_main(lambda: create_run_directory(out))
            check_visible(out)
            task = build_task(cfg, world, device, out)
            how = arguments.resume, arguments.steps, arguments.allow_change
            trainer = build_trainer(task, world, device, out, *how, watchdog, profile_steps)
            trainer.signals.ignores_late = True
            trainer.train()


@contextlib.contextmanager
def _leaving_nothing_empty(out: Path) -> Iterator[None]:
    """Remove the run directory again if wrong input ends the run while nothing is in it, and if it was not there before."""
    existed = out.exists()
    try:
        yield
    except InputError:
        for folder in () if existed else (out / "checkpoints", out):
            with contextlib.suppress(OSError):  # it is not empty
                folder.rmdir()
        raise
