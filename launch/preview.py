"""Draw augmented pairs as the network will see them, through every installed backend side by side, into a PNG.

python launch/preview.py --data /data/imagenet --output preview.png
"""

if __name__ == "__main__":
    from crossbatch.launch.__main__ import run

    run("preview")  # before the imports below, which take seconds

import argparse
from pathlib import Path

import torch
from torchvision.utils import make_grid, save_image

from crossbatch import InputError
from crossbatch.data import BACKENDS, Source, TrainLoader, ViewAugmentation, moco_v3_augmentations, open_source
from crossbatch.data.augment.backends import has_dali
from crossbatch.engine.config import user_input
from crossbatch.engine.datasets import stop_on_lost_images
from crossbatch.launch.arguments import ArgumentParser, positive


def main() -> None:
    """Write the picture and print how far the backends differ. Raises InputError."""
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--data", metavar="DIR", required=True, help="a folder, shards, cifar10://DIR, shapes://DIR, ...")
    add("--output", metavar="FILE", type=Path, default="preview.png", help="picture to write; default %(default)s")
    add("--count", metavar="N", type=positive, default=8, help="number of images; default %(default)s")
    add("--image-size", metavar="PX", type=positive, default=224, help="side of a view; default %(default)s")
    what = "smallest crop, as a fraction of the image's area; default %(default)s"
    add("--crop-min", metavar="A", type=float, default=0.08, help=what)
    what = "probabilities of blurring the first and the second view; default %(default)s"
    add("--blur-probability", metavar="P", type=float, nargs=2, default=(1.0, 0.1), help=what)
    add("--seed", metavar="N", type=int, default=0, help="seed of the order and the augmentation; default %(default)s")
    arguments = parser.parse_args()
    with user_input("", crop_min="--crop-min", blur_probability="--blur-probability"):
        augmentations = moco_v3_augmentations(
            arguments.image_size, arguments.crop_min, blur_probability=arguments.blur_probability
        )
    with user_input("--data"):
        source = open_source(arguments.data, download=True)
    names = [name for name in BACKENDS if name != "dali" or has_dali()]
    views = {name: first_batch(source, name, augmentations, arguments) for name in names}
    # [backends, views, n, 3, S, S] -> a row for each image, and in it a pair of columns for each backend
    cells = torch.stack(list(views.values())).permute(2, 0, 1, 3, 4, 5).flatten(0, 2)
    try:
        save_image(make_grid(cells, nrow=2 * len(names), padding=4, pad_value=1), arguments.output)
    except (OSError, ValueError) as error:
        raise InputError(f"--output {arguments.output}: cannot be written: {error}; give another file") from None
    images = views["torchvision"].shape[1]
    print(f"{arguments.output}: a row for each of {images} images; pairs of columns: {', '.join(names)}")
    plain = views.pop("torchvision")
    for name, drawn in views.items():
        apart = 100 * (drawn - plain).abs().mean((2, 3, 4))
        print(f"{name} differs from torchvision by {apart.mean():.2f} % of the range, {apart.max():.2f} % at most")


def first_batch(
    source: Source,
    backend: str,
    augmentations: tuple[ViewAugmentation, ViewAugmentation],
    arguments: argparse.Namespace,
) -> torch.Tensor:
    """Return the first batch of both views as float [2, n, 3, S, S], 0 to 1."""
    device = torch.device("cuda" if backend == "dali" and torch.cuda.is_available() else "cpu")
    count = min(arguments.count, len(source))
    loader = TrainLoader(
        source, count, augmentations=augmentations, seed=arguments.seed, workers=0, backend=backend, device=device
    )
    with stop_on_lost_images(), loader:
        return next(loader.epoch(0)).views.float().cpu() / 255
