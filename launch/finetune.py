"""Fine-tune a pretrained backbone on labelled images.

python launch/finetune.py --deepspeed_config ds_configs/finetune_cifar10.json --checkpoint runs/vitb --data cifar10://datasets
deepspeed --num_gpus 8 launch/finetune.py --deepspeed_config ds_configs/finetune_pets.json --checkpoint runs/vitb --data pets://DIR
"""

if __name__ == "__main__":
    from crossbatch.launch.__main__ import run

    run("finetune")  # before the imports below, which take seconds

import argparse
from functools import partial
from pathlib import Path

from crossbatch import InputError
from crossbatch.engine.config import Device, FinetuneConfig, load_config, resolve_finetune
from crossbatch.engine.runtime.world import World, world_from_environment
from crossbatch.launch.arguments import (
    Alias,
    ArgumentParser,
    add_config_flags,
    add_run_flags,
    overrides,
    positive,
    shown_path,
)

ALIASES: list[Alias] = [
    (("-a", "--arch", "--model"), "crossbatch.model.arch", lambda name: DEIT_MODELS.get(name, name)),
    (("-b",), "train_batch_size", int),
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
    (("--model-ema-decay",), "crossbatch.finetune.ema_decay", float),
    (("--color-jitter",), "crossbatch.data.color_jitter", float),
    (("--aa",), "crossbatch.data.auto_augment", lambda name: "null" if name == "none" else name),
    (("--train-interpolation",), "crossbatch.data.interpolation", str),
    (("--opt-eps",), "optimizer.params.eps", float),
    (("--eval-freq",), "crossbatch.evaluate.every_epochs", int),
    (("--seed",), "crossbatch.seed", int),
    (("--checkpoint", "--pretrained", "--finetune"), "crossbatch.model.checkpoint", str),
]


# Of these names; the number of heads is that of the checkpoint.
DEIT_MODELS = {"deit_small_patch16_224": "vit_small", "deit_base_patch16_224": "vit_base"}
DATA_SETS = {  # CIFAR is CIFAR-100 there; the lower-case names are those of the released transfer commands
    **{"CIFAR": "cifar100://", "IMNET": "", "cifar10": "cifar10://", "cifar100": "cifar100://"},
    **{"flowers": "flowers://", "pets": "pets://"},
}
# Flags with the only values that they can have here, and what to do instead of others.
FIXED: dict[str, tuple[tuple[str, ...], str]] = {
    "--opt": (("adamw",), "fine-tuning uses AdamW"),
    "--sched": (("cosine",), "the schedule is a cosine"),
    "--drop": (("0", "0.0"), "use --drop-path"),
    "--warmup-lr": (("1e-6", "1e-06"), "the warm-up starts at 1e-6"),
    "--min-lr": (("1e-5", "1e-05"), "the schedule ends at 1e-5"),
    "--mixup-prob": (("1", "1.0"), "set --mixup and --cutmix to 0 to mix nothing"),
    "--mixup-switch-prob": (("0.5",), "set one of --mixup and --cutmix to 0"),
    "--mixup-mode": (("batch",), "a batch is mixed with one strength"),
    "--remode": (("pixel",), "erased pixels become noise"),
    "--recount": (("1",), "one rectangle is erased"),
    "--distillation-type": (("none",), "crossbatch has no teacher"),
    "--device": (("cuda",), "the GPU is used where there is one"),
    "--start_epoch": (("0",), "a resumed run goes on where its checkpoint is"),
    "--world_size": ((), "start the ranks with torchrun --nproc_per_node N or deepspeed"),
    "--dist_url": ((), "start the ranks with torchrun --nproc_per_node N or deepspeed"),
    "--eval-crop-ratio": (
        ("0.875",),
        "evaluation resizes to 256 / 224 of crossbatch.data.image_size, up to 64 px to image_size itself",
    ),
    "--teacher-model": ((), "crossbatch has no teacher"),
}


def add_deit_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of DeiT's main.py without a key of their own, so that its command lines need only another script name."""
    add = parser.add_argument_group("DeiT's flags without a key of their own").add_argument
    what = "as -b; with crossbatch.schedule.deit_compat the images of one rank, as in DeiT"
    add("--batch-size", metavar="N", type=positive, dest="deit_batch_size", help=what)
    add("--data-path", metavar="DIR", help="as --data, with --data-set")
    add("--data-set", choices=DATA_SETS, default="IMNET", help="what is in --data-path; IMNET: class folders")
    add("--output_dir", "--output-dir", metavar="DIR", type=Path, dest="out", help="as --out")
    add("--repeated-aug", action="store_const", const=3, dest="repeats", help="crossbatch.data.repeats=3")
    add("--no-repeated-aug", action="store_const", const=1, dest="repeats", help="crossbatch.data.repeats=1")
    for flag in ("--pin-mem", "--no-pin-mem", "--dist-eval"):
        add(flag, action="store_true", help="changes nothing: memory is pinned for a GPU, all ranks evaluate")
    for flag, (allowed, remedy) in FIXED.items():
        add(flag, metavar="X", type=partial(_fixed, allowed, remedy), help=argparse.SUPPRESS)


def _fixed(allowed: tuple[str, ...], remedy: str, text: str) -> str:
    """Return `text` if it is allowed, as a type for argparse."""
    if text not in allowed:
        values = f"allowed here: {allowed[0]}" if allowed else "a flag of DeiT that does nothing here"
        raise argparse.ArgumentTypeError(f"given {text}; {values}; {remedy}")
    return text


def pairs_of(given: argparse.Namespace) -> list[str]:
    """Return what the flags say as key=value pairs, DeiT's own first. Raises InputError if two contradict each other."""
    if given.data_path:
        if given.data or given.data_positional:
            raise InputError(
                f"--data-path: given beside --data {shown_path(given.data or given.data_positional)}; leave one of them out"
            )
        given.data = f"{DATA_SETS[given.data_set]}{given.data_path}"
    checkpoint = "crossbatch.model.checkpoint"
    if Path(given.resume).is_file():  # of weights, which DeiT resumes from
        if getattr(given, checkpoint):
            raise InputError(
                f"--resume {given.resume}: a file of weights beside --checkpoint {getattr(given, checkpoint)}; leave one "
                f"of them out; a run is resumed from its folder"
            )
        setattr(given, checkpoint, given.resume)
        given.resume = "auto"
    batch = [f"train_batch_size={given.deit_batch_size}"] if given.deit_batch_size else []
    repeats = [f"crossbatch.data.repeats={given.repeats}"] if given.repeats else []
    return [*batch, *repeats, *overrides(given, ALIASES)]


def load(given: argparse.Namespace, world: World) -> FinetuneConfig:
    """Return the configuration, with DeiT's batch of one process as that of all ranks where `deit_compat` says so."""
    pairs, one = pairs_of(given), given.deit_batch_size
    config = load_config(given.deepspeed_config, pairs, FinetuneConfig)
    if one is None or world.size == 1 or any(pair.startswith("train_batch_size=") for pair in pairs[1:]):
        return config
    if config.crossbatch.schedule.deit_compat:
        config = config.model_copy(update={"train_batch_size": one * world.size})
        note = f"{one} for each of {world.size} ranks, as crossbatch.schedule.deit_compat is true"
    else:
        note = f"over all {world.size} ranks; in DeiT it is that of one, as with crossbatch.schedule.deit_compat=true"
    if world.is_main:
        print(f"train_batch_size: {config.train_batch_size}, {note}", flush=True)
    return config


def parse_arguments() -> argparse.Namespace:
    """Return the command line."""
    parser = ArgumentParser(description=__doc__)
    add_config_flags(parser, ALIASES, "DeiT's flags")
    add_run_flags(parser)
    add_deit_flags(parser)
    return parser.parse_args()


def main() -> None:
    """Fine-tune on this rank. Raises InputError or RunStopped."""
    arguments, world = parse_arguments(), world_from_environment()
    config = load(arguments, world)
    cfg = resolve_finetune(config, world.size, Device.detect(), world.local_size)
    # Late: its libraries take seconds, which wrong input should not wait for.
    from crossbatch.engine.tasks.finetune import finetune_task
    from crossbatch.launch.training import train

    train(finetune_task, cfg, world, arguments, "finetune")
