"""Write the features of images with a pretrained backbone, as a .npy or .parquet file.

python launch/embed.py --checkpoint runs/bs4096 --data /data/imagenet --output features.npy
torchrun --nproc_per_node 8 launch/embed.py --checkpoint runs/bs4096 --data /data/imagenet --split eval --output val.parquet
"""

if __name__ == "__main__":
    from crossbatch.launch.__main__ import run

    run("embed")  # before the imports below, which take seconds

import importlib.util
from functools import partial
from pathlib import Path

from crossbatch import InputError
from crossbatch.engine.config import Device, choose_precision, load_config, to_dict
from crossbatch.engine.config.evaluation import EmbedConfig
from crossbatch.engine.config.resolve import share_cores
from crossbatch.engine.runtime.distributed import on_main, process_group
from crossbatch.engine.runtime.run_lock import locked_on_main
from crossbatch.engine.runtime.same_run import check_same_run, facts_of
from crossbatch.engine.runtime.world import world_from_environment
from crossbatch.launch.arguments import Alias, ArgumentParser, add_config_flags, overrides
from crossbatch.launch.knn import ALIASES as KNN_ALIASES

ALIASES: list[Alias] = KNN_ALIASES


def main() -> None:
    """Embed this rank's share of the images. Raises InputError or RunStopped."""
    parser = ArgumentParser(description=__doc__)
    add_config_flags(parser, ALIASES, "flags")
    add = parser.add_argument
    add(
        "--output",
        metavar="FILE",
        type=Path,
        required=True,
        help="features.npy (with features.csv) or features.parquet",
    )
    what = "images to embed: train (default), or eval, the evaluation images"
    add("--split", choices=("train", "eval"), default="train", help=what)
    arguments = parser.parse_args()
    output = arguments.output
    if output.suffix not in (".npy", ".parquet"):
        raise InputError(f"--output: given {output}; allowed: a name that ends with .npy or .parquet")
    if output.suffix == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise InputError("--output: .parquet needs pyarrow; pip install pyarrow, or give a name that ends with .npy")
    config = load_config(arguments.deepspeed_config, overrides(arguments, ALIASES), EmbedConfig)
    world, device = world_from_environment(), Device.detect()
    choose_precision(config.crossbatch.precision, device)  # refuses bf16 where there is none
    workers, threads = share_cores(config.crossbatch.data.workers, device, world.local_size)
    facts = facts_of(to_dict(config), output=output, split=arguments.split)
    with process_group(world, device.type, threads, check=partial(check_same_run, facts)) as torch_device:
        from crossbatch.engine.evaluation.embedding import embed, parts_folder

        parts = on_main(lambda: parts_folder(output))
        with locked_on_main(parts):
            embed(config, world, torch_device, workers, output, parts, arguments.split)
