"""Fine-tune a pretrained backbone on labelled images.

python launch/finetune.py --deepspeed_config ds_configs/finetune_cifar10.json --checkpoint runs/vitb --data cifar10://datasets
deepspeed --num_gpus 8 launch/finetune.py --deepspeed_config ds_configs/finetune_pets.json --checkpoint runs/vitb --data pets://DIR
"""

if __name__ == "__main__":
    from crossbatch.launch.__main__ import run

    run("finetune")  # before the imports below, which take seconds

from crossbatch.engine.config import Device, FinetuneConfig, load_config, resolve_finetune
from crossbatch.engine.runtime.distributed import world_from_environment
from crossbatch.launch.arguments import Alias, ArgumentParser, add_config_flags, add_run_flags, overrides

ALIASES: list[Alias] = [
    (("-a", "--arch", "--model"), "crossbatch.model.arch", str),
    (("-b", "--batch-size"), "train_batch_size", int),
    (("-j", "--workers", "--num_workers"), "crossbatch.data.workers", int),
    (("--input-size",), "crossbatch.data.image_size", int),
    (("--epochs",), "crossbatch.schedule.epochs", int),
    (("--warmup-epochs",), "crossbatch.schedule.warmup_epochs", float),
    (("--lr",), "optimizer.params.base_lr", float),
    (("--weight-decay",), "optimizer.params.weight_decay", float),
    (("--clip-grad",), "gradient_clipping", float),
    (("--drop-path",), "crossbatch.finetune.drop_path", float),
    (("--mixup",), "crossbatch.finetune.mixup", float),
    (("--cutmix",), "crossbatch.finetune.cutmix", float),
    (("--smoothing",), "crossbatch.finetune.label_smoothing", float),
    (("--reprob",), "crossbatch.finetune.random_erasing", float),
    (("--seed",), "crossbatch.seed", int),
    (("--checkpoint", "--pretrained", "--finetune"), "crossbatch.model.checkpoint", str),
]


def main() -> None:
    """Fine-tune on this rank. Raises InputError or RunStopped."""
    parser = ArgumentParser(description=__doc__)
    add_config_flags(parser, ALIASES, "DeiT's flags")
    add_run_flags(parser)
    arguments = parser.parse_args()
    config = load_config(arguments.deepspeed_config, overrides(arguments, ALIASES), FinetuneConfig)
    world = world_from_environment()
    cfg = resolve_finetune(config, world.size, Device.detect(), world.local_size)
    # Late: its libraries take seconds, which wrong input should not wait for.
    from crossbatch.engine.tasks.finetune import finetune_task
    from crossbatch.launch.training import train

    train(finetune_task, cfg, world, arguments, "finetune")
