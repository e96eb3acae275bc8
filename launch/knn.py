"""Classify the evaluation images by their nearest training images in the features of a pretrained backbone.

python launch/knn.py --checkpoint runs/bs4096 --data /data/imagenet
torchrun --nproc_per_node 8 launch/knn.py --checkpoint checkpoint_0099.pth.tar --data /data/imagenet --out runs/knn
python launch/knn.py --checkpoint runs/cifar10 --data cifar10://datasets --set crossbatch.knn.k=[20,5]
"""

if __name__ == "__main__":
    from crossbatch.launch.__main__ import run

    run("knn")  # before the imports below, which take seconds

from functools import partial
from pathlib import Path

from crossbatch.engine.config import Device, choose_precision, load_config, to_dict
from crossbatch.engine.config.evaluation import KnnConfig
from crossbatch.engine.config.resolve import share_cores
from crossbatch.engine.runtime.distributed import broadcast_object, process_group
from crossbatch.engine.runtime.run_lock import locked_on_main
from crossbatch.engine.runtime.same_run import check_same_run, facts_of
from crossbatch.engine.runtime.world import world_from_environment
from crossbatch.launch.arguments import Alias, ArgumentParser, add_config_flags, output_folder, overrides

ALIASES: list[Alias] = [
    (("--checkpoint", "--pretrained"), "crossbatch.model.checkpoint", str),
    (("-a", "--arch"), "crossbatch.model.arch", str),
    (("--encoder",), "crossbatch.model.encoder", str),
    (("-j", "--workers"), "crossbatch.data.workers", int),
    (("-b", "--batch-size"), "train_micro_batch_size_per_gpu", int),
]


def main() -> None:
    """Run k-NN on this rank. Raises InputError or RunStopped."""
    parser = ArgumentParser(description=__doc__)
    add_config_flags(parser, ALIASES, "flags")
    parser.add_argument("--out", metavar="DIR", type=Path, help="where results go (default runs/knn-<time>)")
    arguments = parser.parse_args()
    config = load_config(arguments.deepspeed_config, overrides(arguments, ALIASES), KnnConfig)
    world, device = world_from_environment(), Device.detect()
    choose_precision(config.crossbatch.precision, device)  # refuses bf16 where there is none
    workers, threads = share_cores(config.crossbatch.data.workers, device, world.local_size)
    out = output_folder(arguments, "knn")
    facts = facts_of(to_dict(config), out=arguments.out)
    with process_group(world, device.type, threads, check=partial(check_same_run, facts)) as torch_device:
        from crossbatch.engine.evaluation.knn_evaluation import KnnEvaluation

        out = broadcast_object(out)
        with locked_on_main(out):
            KnnEvaluation(config, world, torch_device, workers, out).run()
