"""Trains a linear classifier on the frozen features of a pretrained backbone; the defaults are those of MoCo v3.

torchrun --nproc_per_node 8 launch/linear.py --checkpoint runs/bs4096 --data /data/imagenet
python launch/linear.py -a vit_small --pretrained checkpoint_0299.pth.tar --lr 3 /data/imagenet
python launch/linear.py --checkpoint runs/cifar10 --data cifar10://datasets --cache --lr '[0.01, 0.1, 1]' --epochs 30
"""

import argparse
import contextlib
import json
from pathlib import Path

from crossbatch.engine.config import Device, load_config
from crossbatch.engine.config.evaluation import LinearConfig
from crossbatch.engine.config.resolve import resolve_training
from crossbatch.engine.runtime.distributed import broadcast_object, process_group, world_from_environment
from crossbatch.engine.runtime.exit_codes import run_main
from crossbatch.launch.arguments import (
    Alias,
    ArgumentParser,
    add_config_flags,
    default_out,
    overrides,
    resume,
    writable_folder,
)
from crossbatch.launch.legacy_launch import add_legacy_launch_flags, launched


def number_or_list(text: str) -> str:
    """Return a number or a list as JSON, for argparse; a number may be written as in Python, such as .1. Raises ValueError."""
    with contextlib.suppress(ValueError):
        return repr(float(text))
    if not isinstance(json.loads(text), (int, float, list)):
        raise ValueError(text)
    return text


ALIASES: list[Alias] = [
    (("--checkpoint", "--pretrained"), "crossbatch.model.checkpoint", str),
    (("-a", "--arch"), "crossbatch.model.arch", str),
    (("--encoder",), "crossbatch.model.encoder", str),
    (("-b", "--batch-size"), "train_batch_size", int),
    (("-j", "--workers"), "crossbatch.data.workers", int),
    (("-p", "--print-freq"), "crossbatch.log.every_steps", int),
    (("--epochs",), "crossbatch.schedule.epochs", int),
    (("--lr", "--learning-rate"), "optimizer.params.base_lr", number_or_list),
    (("--wd", "--weight-decay"), "optimizer.params.weight_decay", float),
    (("--momentum",), "optimizer.params.momentum", float),
    (("--cache",), "crossbatch.linear.cache", None),
    (("--seed",), "crossbatch.seed", int),
]


def parse_arguments() -> argparse.Namespace:
    """Return the command line."""
    parser = ArgumentParser(description=__doc__)
    add_config_flags(parser, ALIASES, "flags")
    parser.add_argument("--out", metavar="DIR", type=Path, help="where results go (default runs/linear-<time>)")
    parser.add_argument(
        "--resume",
        metavar="auto|none|DIR|FILE",
        type=resume,
        default="auto",
        help="probe to continue (default auto: the one in --out)",
    )
    add_legacy_launch_flags(parser)
    return parser.parse_args()


def main() -> None:
    """Run the linear probe on this rank. Raises InputError or RunStopped."""
    arguments = parse_arguments()
    config = load_config(arguments.deepspeed_config, overrides(arguments, ALIASES), LinearConfig)
    if launched(arguments):
        return
    world, device = world_from_environment(), Device.detect()
    cfg = resolve_training(config, world.size, device, world.local_size)
    out = writable_folder(arguments.out or default_out(arguments.deepspeed_config, "linear"))
    with process_group(world, device.type, cfg.threads) as torch_device:
        from crossbatch.engine.evaluation.linear_evaluation import LinearEvaluation

        LinearEvaluation(cfg, world, torch_device, broadcast_object(out), arguments.resume).run()


if __name__ == "__main__":
    run_main(main)
