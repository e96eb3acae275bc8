"""Pretrains a backbone with MoCo v3 + BatchFormer.

python launch/pretrain.py --deepspeed_config ds_configs/quickstart.json
deepspeed --num_gpus 8 launch/pretrain.py --deepspeed_config ds_configs/bs4096.json --data /data/imagenet
torchrun --nproc_per_node 8 launch/pretrain.py --deepspeed_config ds_configs/bs4096.json --data /data/imagenet
python launch/pretrain.py --multiprocessing-distributed --world-size 2 --rank 0 --dist-url tcp://node0:29500 ... /data/imagenet
"""

import argparse
import json
import time
from pathlib import Path

from crossbatch import InputError
from crossbatch.data import open_source
from crossbatch.engine.build import describe
from crossbatch.engine.checkpoint import check_allowed
from crossbatch.engine.config import Config, Device, load_config, resolve
from crossbatch.engine.distributed import (
    broadcast_object,
    make_deterministic,
    may_be_restarted,
    process_group,
    world_from_environment,
)
from crossbatch.engine.watch import Watch
from crossbatch.launch.arguments import add_config_flags, overrides, writable_folder
from crossbatch.launch.exits import run_main
from crossbatch.launch.legacy_launch import add_legacy_launch_flags, asked_world_size, launched


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_config_flags(parser)
    add_legacy_launch_flags(parser)
    parser.add_argument("--out", metavar="DIR", type=Path, help="run directory (default runs/<recipe>-<time>)")
    parser.add_argument(
        "--steps", metavar="N", type=int, help="stop at optimizer step N, counted from the start of the run"
    )
    parser.add_argument("--resume", metavar="auto|none|DIR", default="auto", help="what to continue (default auto)")
    parser.add_argument(
        "--allow-change", metavar="KEY", action="append", default=[], help="resume although KEY changed; repeatable"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print what would run as JSON, without data or processes"
    )
    parser.add_argument("--world-size-hint", metavar="N", type=int, help="with --dry-run: as if on N ranks")
    arguments = parser.parse_args()
    if arguments.steps is not None and arguments.steps < 1:
        parser.error(f"--steps: given {arguments.steps}; allowed: >= 1")
    if arguments.world_size_hint is not None and not (arguments.dry_run and arguments.world_size_hint >= 1):
        parser.error(f"--world-size-hint: given {arguments.world_size_hint}; allowed: >= 1, with --dry-run")
    arguments.resume = arguments.resume or "none"  # '' in the originals
    if Path(arguments.resume).is_file():
        parser.error(
            f"--resume: {arguments.resume} is a file; allowed: auto, none, a run directory or one of its checkpoints/step-N; "
            f"python launch/convert.py import makes a run of a checkpoint of the originals"
        )
    return arguments


def main() -> None:
    arguments = parse_arguments()
    config = load_config(arguments.deepspeed_config, overrides(arguments))
    check_allowed(arguments.allow_change)
    if arguments.dry_run:
        ranks = arguments.world_size_hint or asked_world_size(arguments) or world_from_environment().size
        run = resolve(config, ranks, Device.detect())
        print(json.dumps(describe(run, steps_per_epoch(config)), indent=2))
        return
    if launched(arguments):
        return
    world, device = world_from_environment(), Device.detect()
    if arguments.out is None and may_be_restarted():
        raise InputError(
            "--out: not given, but torchrun may restart this run, which then must find its checkpoints; name one"
        )
    run = resolve(config, world.size, device, world.local_size)
    out = writable_folder(arguments.out or default_out(arguments.deepspeed_config))
    timeout_s = run.config.crossbatch.watch.timeout_s
    if run.config.crossbatch.deterministic:
        make_deterministic()
    with process_group(world, device.type, run.threads, timeout_s) as torch_device, Watch(world, timeout_s) as watch:
        from crossbatch.engine.trainer import Trainer

        out, resume, steps = broadcast_object(out), arguments.resume, arguments.steps
        Trainer(run, world, torch_device, out, resume, steps, arguments.allow_change, watch).train()


def steps_per_epoch(config: Config) -> int | None:
    """None where no data is named, or where it would have to be generated or downloaded first."""
    path = config.crossbatch.data.path
    if path is None:
        return None
    try:
        return len(open_source(path, "train")) // config.train_batch_size
    except InputError:
        if path.startswith(("shapes://", "cifar10://", "cifar100://")):
            return None
        raise


def default_out(recipe: str | None) -> Path:
    return Path("runs") / f"{Path(recipe).stem if recipe else 'pretrain'}-{time.strftime('%Y%m%d-%H%M%S')}"


if __name__ == "__main__":
    run_main(main)
