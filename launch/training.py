"""What `pretrain.py` and `finetune.py` do once their configuration is resolved."""

import argparse
import os
from collections.abc import Callable

from crossbatch import InputError
from crossbatch.engine.checkpoint import check_allowed
from crossbatch.engine.config import Resolved
from crossbatch.engine.runtime.distributed import (
    World,
    broadcast_object,
    make_deterministic,
    may_be_restarted,
    process_group,
)
from crossbatch.engine.runtime.watchdog import Watch
from crossbatch.engine.trainer import Trainer
from crossbatch.launch.arguments import default_out, writable_folder


def train(
    trainer: Callable[..., Trainer], run: Resolved, world: World, arguments: argparse.Namespace, name: str
) -> None:
    """Joins the other ranks and trains.

    Args:
        arguments: of `add_run_flags` and `add_config_flags`.
        name: of the run directory if there is neither --out nor a recipe.
    """
    check_allowed(arguments.allow_change, type(run.config))
    if arguments.out is None and may_be_restarted():
        raise InputError(
            "--out: not given, but torchrun may restart this run, which then must find its checkpoints; name one"
        )
    out = writable_folder(arguments.out or default_out(arguments.deepspeed_config, name))
    timeout_s, device = run.config.crossbatch.watch.timeout_s, run.device
    # NCCL would end a process whose peer is gone, with SIGABRT; `Watch` does, and names the peer.
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
    if run.config.crossbatch.deterministic:
        make_deterministic()
    with process_group(world, device.type, run.threads, timeout_s) as torch_device, Watch(world, timeout_s) as watch:
        out, resume, steps = broadcast_object(out), arguments.resume, arguments.steps
        trainer(run, world, torch_device, out, resume, steps, arguments.allow_change, watch).train()
