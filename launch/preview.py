"""Draws augmented pairs as the network will see them, through every installed backend side by side, into a PNG.

python launch/preview.py --data /data/imagenet --output preview.png
"""

import argparse
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from rich.console import Console

from crossbatch import InputError
from crossbatch.data import BACKENDS, TrainLoader, moco_v3_augmentations, open_source
from crossbatch.data.augment.backends import has_dali
from crossbatch.engine.config import user_input
from crossbatch.engine.datasets import stop_on_lost_images
from crossbatch.engine.runtime.exit_codes import run_main
from crossbatch.launch.arguments import ArgumentParser

_GAP, _HEADER = 4, 16  # pixels


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument(
        "--data", metavar="DIR", required=True, help="a folder, shards, cifar10://DIR, shapes://DIR, ..."
    )
    parser.add_argument("--output", metavar="FILE", type=Path, default=Path("preview.png"), help="default preview.png")
    parser.add_argument("--count", metavar="N", type=int, default=8, help="images; default 8")
    parser.add_argument("--image-size", metavar="PX", type=int, default=224, help="side of a view; default 224")
    parser.add_argument("--crop-min", metavar="A", type=float, default=0.08, help="smallest crop; default 0.08")
    parser.add_argument(
        "--seed", metavar="N", type=int, default=0, help="seed of the order and the augmentation; default 0"
    )
    run_main(lambda: preview(parser.parse_args()))


def preview(arguments: argparse.Namespace) -> None:
    """Write the picture and print how far the backends differ. Raises InputError."""
    if arguments.count < 1 or arguments.image_size < 8:
        raise InputError(
            f"--count, --image-size: given {arguments.count}, {arguments.image_size}; allowed: at least 1 image, at least 8 px"
        )
    with user_input("--data"):
        source = open_source(arguments.data, download=True)
    names = [name for name in BACKENDS if name != "dali" or has_dali()]
    views = {name: first_batch(source, name, arguments) for name in names}
    drawing = draw(views)
    try:
        drawing.save(arguments.output)
    except (OSError, ValueError) as error:
        raise InputError(f"--output {arguments.output}: cannot be written: {error}; give another file") from None
    console = Console(highlight=False)
    console.print(f"{arguments.output}: {arguments.count} images, both views by {', '.join(names)}")
    reference = views["torchvision"]
    for name in names[:-1]:
        apart = (views[name] - reference).abs().mean((2, 3, 4)) / 255
        console.print(
            f"{name} differs from torchvision by {100 * apart.mean():.2f} % of the range, {100 * apart.max():.2f} % at most"
        )


def first_batch(source, backend: str, arguments: argparse.Namespace) -> torch.Tensor:
    """Return the first batch of both views as float [2, n, 3, S, S], 0 to 255."""
    device = torch.device("cuda" if backend == "dali" and torch.cuda.is_available() else "cpu")
    count, views = min(arguments.count, len(source)), moco_v3_augmentations(arguments.image_size, arguments.crop_min)
    loader = TrainLoader(
        source, count, augmentations=views, seed=arguments.seed, workers=0, backend=backend, device=device
    )
    with stop_on_lost_images(), loader:
        return next(loader.epoch(0)).views.float().cpu()


def draw(views: dict[str, torch.Tensor]) -> Image.Image:
    """Draw a row for each image and a pair of columns for each backend."""
    _, count, _, size, _ = next(iter(views.values())).shape
    pair = 2 * size + 3 * _GAP
    canvas = Image.new("RGB", (pair * len(views), _HEADER + count * (size + _GAP)), "white")
    pen = ImageDraw.Draw(canvas)
    for column, (name, pairs) in enumerate(views.items()):
        pen.text((column * pair, 2), name, fill="black")
        for row in range(count):
            for view in range(2):
                pixels = pairs[view, row].permute(1, 2, 0).byte().numpy()
                at = column * pair + view * (size + _GAP), _HEADER + row * (size + _GAP)
                canvas.paste(Image.fromarray(pixels), at)
    return canvas


if __name__ == "__main__":
    main()
