"""Convert data to tar shards, and checkpoints to and from the formats of other programs.

python launch/convert.py shards --data /data/imagenet --output /data/imagenet-shards
python launch/convert.py import checkpoint_0099.pth.tar --out runs/continued --data /data/imagenet -a resnet50 -b 4096 ...
python launch/convert.py export --checkpoint runs/bs4096 --to moco-v3 --output checkpoint_0099.pth.tar
python launch/convert.py export --checkpoint checkpoint_0299.pth.tar --to timm --output vit_small.pth
"""

if __name__ == "__main__":
    from crossbatch.launch.__main__ import run

    run("convert")  # before the imports below, which take seconds

import argparse
import json
import sys
from functools import partial
from pathlib import Path

from rich.markup import escape
from rich.progress import Progress

from crossbatch import InputError
from crossbatch.data.sources import describe_source, has_evaluation_split, open_source, prepare
from crossbatch.data.sources.shard_writer import UnreadableImage, write_shards
from crossbatch.engine.config import Device, load_config, resolve, user_input
from crossbatch.engine.config.evaluation import ExportConfig
from crossbatch.engine.pretrained.formats import FORMATS
from crossbatch.engine.runtime.output import console
from crossbatch.engine.runtime.run_lock import locked
from crossbatch.launch.arguments import ArgumentParser, add_config_flags, output_folder, overrides, positive


def main() -> None:
    """Run the subcommand. Raises InputError."""
    parser = ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in (add_shards, add_import, add_export):
        add(commands)
    arguments = parser.parse_args(_as_export(sys.argv[1:]))
    arguments.run(arguments)


def _as_export(given: list[str]) -> list[str]:
    """Return MoCo v3's command line of convert_to_deit.py, --input X --output Y, as that of `export`; any other as it is."""
    if not given or not given[0].startswith(("--input", "--output")):
        return given
    return ["export", "--to", "deit", *(text.replace("--input", "--checkpoint", 1) for text in given)]


def add_shards(commands) -> None:
    """Add `convert.py shards`, which writes any data that can be trained on as tar shards with an index."""
    parser = commands.add_parser(
        "shards",
        help="write images as tar shards",
        description="Writes OUTPUT/train and, if there is one, OUTPUT/val as tar shards (webdataset's conventions, images "
        "in random order, copied as they are) with an index. OUTPUT is then a --data.",
        epilog="example: python launch/convert.py shards --data /data/imagenet --output /data/imagenet-shards",
    )
    add = parser.add_argument
    add(
        "--data",
        metavar="DIR",
        required=True,
        help="what to read: a folder, list://FILE, hf://NAME, s3://BUCKET/DIR, cifar10://DIR, ...",
    )
    add("--output", metavar="DIR", type=Path, required=True, help="where train/ and val/ are written")
    what = "largest number of images in a shard; default %(default)s"
    add("--images-per-shard", metavar="N", type=positive, default=5000, help=what)
    add("--seed", metavar="N", type=int, default=0, help="seed of the order in the shards; default %(default)s")
    parser.set_defaults(run=shards)


def shards(arguments: argparse.Namespace) -> None:
    """Write the training and evaluation images as shards. Raises InputError."""
    folders = {"train": arguments.output / "train"}
    with user_input("--data"):
        prepare(arguments.data)
        if has_evaluation_split(arguments.data):
            folders["eval"] = arguments.output / "val"
        sources = {split: open_source(arguments.data, split) for split in folders}
    for source in sources.values():
        print(f"read: {describe_source(source)}")
    for folder in folders.values():
        if folder.exists():
            raise InputError(f"--output: {folder} exists already; remove it or give another folder")
    for split, folder in folders.items():
        with Progress(console=console(stderr=True)) as progress:
            advance = partial(progress.advance, progress.add_task(escape(str(folder)), total=len(sources[split])))
            try:
                written = write_shards(sources[split], folder, arguments.images_per_shard, arguments.seed, advance)
            except UnreadableImage as error:
                raise InputError(
                    f"--data: cannot read {error}; nothing was written to {folder}; make it readable, or remove it"
                ) from error
            except OSError as error:
                raise InputError(f"--output: cannot write {folder}: {error}; give a folder with room") from error
        for name in written.skipped[:10]:
            print(f"left out, broken: {name}", file=sys.stderr)
        if not written.images:
            raise InputError(
                f"--data: none of the {len(written.skipped)} images for {folder} can be read; nothing written"
            )
        left_out = f", {len(written.skipped)} broken images left out" if written.skipped else ""
        print(f"{folder}: {written.images} images in {written.shards} shards{left_out}")
    print(f"next: python launch/pretrain.py --deepspeed_config ds_configs/bs4096.json --data {arguments.output}")


def add_import(commands) -> None:
    """Add `convert.py import`, which makes a checkpoint of moco-v3 or BatchFormer the first checkpoint of a run."""
    parser = commands.add_parser(
        "import",
        help="continue a checkpoint of moco-v3 or BatchFormer as a run",
        description="The file has no configuration: give the recipe, or the flags that its run was started with.",
        epilog="example: python launch/convert.py import checkpoint_0099.pth.tar --out runs/continued --data /data/imagenet "
        "--deepspeed_config ds_configs/bs4096.json",
    )
    parser.add_argument("file", metavar="FILE", type=Path, help="checkpoint_*.pth.tar")
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="run directory to create")
    add_config_flags(parser)
    parser.set_defaults(run=import_legacy)


def import_legacy(arguments: argparse.Namespace) -> None:
    """Write the first checkpoint of a run from a file of the originals. Raises InputError."""
    from crossbatch.engine.pretrained.moco_v3 import import_file

    cfg = resolve(load_config(arguments.deepspeed_config, overrides(arguments)), 1, Device("cpu"))
    path = cfg.crossbatch.data.path
    if path is None:
        raise InputError(
            "crossbatch.data.path: not given; the number of images says at which step an epoch ends; give --data"
        )
    with user_input("crossbatch.data.path"):
        num_images = len(open_source(path, download=True))
    out = output_folder(arguments, "import")
    with locked(out):
        print("\n".join(import_file(arguments.file, cfg, num_images, out)))
    print(f"next: python launch/pretrain.py --out {arguments.out} and the same recipe, flags and data")


def add_export(commands) -> None:
    """Add `convert.py export`, which writes a checkpoint in the format of another program."""
    formats = {"moco-v3": "to continue with the released code", **FORMATS}
    parser = commands.add_parser(
        "export",
        help="write a checkpoint in another format",
        description="moco-v3 writes a whole run, to continue with the released code of MoCo v3 or BatchFormer; the others "
        "write a backbone, of a run or of anything that launch/knn.py takes.",
        epilog="example: python launch/convert.py export --checkpoint runs/bs4096 --to torchvision --output resnet50.pth",
    )
    add = parser.add_argument
    add("--checkpoint", metavar="DIR|FILE", type=Path, required=True, help="what to export")
    add("--to", choices=formats, required=True, help="; ".join(f"{name}: {what}" for name, what in formats.items()))
    add("--output", metavar="FILE", type=Path, required=True, help="what to write; huggingface: a folder")
    add("-a", "--arch", metavar="X", help="backbone, where the checkpoint does not say")
    add("--encoder", choices=("online", "momentum"), help="encoder of pretraining; default online")
    what = "set a key of crossbatch.model; repeatable"
    add("--set", metavar="path=value", action="append", default=[], help=what)
    parser.set_defaults(run=export_checkpoint)


def export_checkpoint(arguments: argparse.Namespace) -> None:
    """Write a checkpoint in the format that --to names. Raises InputError."""
    named = {"arch": arguments.arch, "encoder": arguments.encoder}
    pairs = [f"crossbatch.model.{name}={value}" for name, value in named.items() if value is not None] + arguments.set
    if arguments.to == "moco-v3":
        from crossbatch.engine.pretrained.moco_v3 import export_file

        if pairs:
            raise InputError(f"--to moco-v3: writes the whole run, and {pairs[0]} would change nothing; leave it out")
        notes = export_file(arguments.checkpoint, arguments.output)
    else:
        from crossbatch.engine.pretrained.export import export
        from crossbatch.engine.pretrained.foreign import FOREIGN, write_card
        from crossbatch.engine.pretrained.load import load_configured

        checkpoint = f"crossbatch.model.checkpoint={json.dumps(str(arguments.checkpoint))}"
        config = load_config(None, [checkpoint, *pairs], ExportConfig)
        notes = export(load_configured(config.crossbatch.model, "auto"), arguments.to, arguments.output)
        if arguments.to in FOREIGN:
            notes.append(write_card(arguments.checkpoint, arguments.to, arguments.output, notes))
    print("\n".join(notes))
