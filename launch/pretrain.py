"""Pretrain a backbone with MoCo v3 + BatchFormer.

python launch/pretrain.py --deepspeed_config ds_configs/quickstart.json
deepspeed --num_gpus 8 launch/pretrain.py --deepspeed_config ds_configs/bs4096.json --data /data/imagenet
torchrun --nproc_per_node 8 launch/pretrain.py --deepspeed_config ds_configs/bs4096.json --data /data/imagenet
python launch/pretrain.py --multiprocessing-distributed --world-size 2 --rank 0 --dist-url tcp://node0:29500 ... /data/imagenet
"""

if __name__ == "__main__":
    from crossbatch.launch.__main__ import run

    run("pretrain")  # before the imports below, which take seconds

import argparse
import json
from pathlib import Path

from crossbatch import InputError
from crossbatch.data import open_source
from crossbatch.data.sources.location import REMOTE
from crossbatch.engine.config import Config, Device, load_config, resolve, user_input
from crossbatch.engine.runtime.output import check_printed
from crossbatch.engine.runtime.world import world_from_environment
from crossbatch.engine.tasks.build import describe
from crossbatch.launch.arguments import ArgumentParser, add_config_flags, add_run_flags, overrides, positive
from crossbatch.launch.legacy_launch import add_legacy_launch_flags, asked_world_size, launched


def parse_arguments() -> argparse.Namespace:
    """Return the command line; flags that contradict each other exit with code 2."""
    parser = ArgumentParser(description=__doc__)
    add_config_flags(parser)
    add_run_flags(parser)
    add_legacy_launch_flags(parser)
    what = "start both backbones from a run or a file of weights, with new heads; sets crossbatch.model.init"
    parser.add_argument("--init", metavar="FILE|RUN", help=what)
    what = "time N steps part by part, trace N more, and write both to OUT/profile"
    parser.add_argument("--profile", metavar="N", type=positive, default=0, help=what)
    what = "print what would run, as JSON, and exit without starting it"
    parser.add_argument("--dry-run", action="store_true", help=what)
    parser.add_argument("--world-size-hint", metavar="N", type=positive, help="with --dry-run: as if on N ranks")
    arguments = parser.parse_args()
    if arguments.world_size_hint is not None and not arguments.dry_run:
        parser.error(f"--world-size-hint: given {arguments.world_size_hint}; allowed: only with --dry-run")
    if Path(arguments.resume).is_file():
        parser.error(
            f"--resume: {arguments.resume} is a file; allowed: auto, none, a run directory or one of its checkpoints/step-N; "
            f"python launch/convert.py import turns a checkpoint of the released code into a run"
        )
    return arguments


def main() -> None:
    """Pretrain on this rank, or print what would run. Raises InputError or RunStopped."""
    arguments = parse_arguments()
    init = [] if arguments.init is None else [f"crossbatch.model.init={json.dumps(arguments.init)}"]
    config = load_config(arguments.deepspeed_config, [*init, *overrides(arguments)])
    if arguments.dry_run:
        ranks = arguments.world_size_hint or asked_world_size(arguments) or world_from_environment().size
        cfg = resolve(config, ranks, Device.detect())
        print(json.dumps({**describe(cfg, steps_per_epoch(config)), "device": cfg.device.name}, indent=2))
        check_printed()
        return
    if launched(arguments):
        return
    world, device = world_from_environment(), Device.detect()
    cfg = resolve(config, world.size, device, world.local_size)
    # Late: its libraries take seconds, which wrong input should not wait for.
    from crossbatch.engine.runtime.profiling import check_steps_left
    from crossbatch.engine.tasks.pretrain import pretrain_task
    from crossbatch.launch.training import train

    if arguments.profile and arguments.steps is not None:  # before anything is written
        check_steps_left(arguments.profile, arguments.steps)
    train(pretrain_task, cfg, world, arguments, "pretrain", arguments.profile)


def steps_per_epoch(config: Config) -> int | None:
    """Return the steps of an epoch; None if no data is named, or if it is remote or not yet downloaded or generated."""
    path = config.crossbatch.data.path
    if path is None or path.partition("://")[0] in REMOTE:
        return None
    try:
        with user_input("crossbatch.data.path"):
            return len(open_source(path)) // config.train_batch_size
    except InputError:
        if path.startswith(("hf://", "shapes://", "cifar10://", "cifar100://", "flowers://", "pets://")):
            return None
        raise
