"""Train a linear classifier on the frozen features of a pretrained backbone; the defaults are those of MoCo v3.

torchrun --nproc_per_node 8 launch/linear.py --checkpoint runs/bs4096 --data /data/imagenet
python launch/linear.py -a vit_small --pretrained checkpoint_0299.pth.tar --lr 3 /data/imagenet
python launch/linear.py --checkpoint runs/cifar10 --data cifar10://datasets --cache --lr '[0.01, 0.1, 1]' --epochs 30
"""

if __name__ == "__main__":
    from crossbatch.launch.__main__ import run

    run("linear")  # before the imports below, which take seconds

import json
from functools import partial

from crossbatch.engine.config import Device, load_config, to_dict
from crossbatch.engine.config.evaluation import LinearConfig
from crossbatch.engine.config.resolve import resolve_training
from crossbatch.engine.runtime.distributed import broadcast_object, process_group
from crossbatch.engine.runtime.run_lock import locked_on_main
from crossbatch.engine.runtime.same_run import check_same_run, facts_of
from crossbatch.engine.runtime.world import world_from_environment
from crossbatch.launch.arguments import (
    Alias,
    ArgumentParser,
    add_config_flags,
    add_output_flags,
    output_folder,
    overrides,
)
from crossbatch.launch.legacy_launch import add_legacy_launch_flags, launched


def number_or_list(text: str) -> float | list:
    """Return the number or the JSON list in `text`, for argparse. Raises ValueError for anything else."""
    return json.loads(text) if text.startswith("[") else float(text)


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


def main() -> None:
    """Run the linear probe on this rank. Raises InputError or RunStopped."""
    parser = ArgumentParser(description=__doc__)
    add_config_flags(parser, ALIASES, "flags")
    add_output_flags(parser)
    add_legacy_launch_flags(parser)
    arguments = parser.parse_args()
    config = load_config(arguments.deepspeed_config, overrides(arguments, ALIASES), LinearConfig)
    if launched(arguments):
        return
    world, device = world_from_environment(), Device.detect()
    cfg = resolve_training(config, world.size, device, world.local_size)
    out = output_folder(arguments, "linear")
    facts = facts_of(to_dict(cfg.config), out=arguments.out, resume=arguments.resume)
    with process_group(world, device.type, cfg.threads, check=partial(check_same_run, facts)) as torch_device:
        from crossbatch.engine.evaluation.linear_evaluation import LinearEvaluation

        out = broadcast_object(out)
        with locked_on_main(out):
            LinearEvaluation(cfg, world, torch_device, out, arguments.resume).run()
