"""Measures augmentation, decoded images -> two views each on one core, beside torchvision's transforms on PIL images.

All apply MoCo v3's augmentations. The baseline ends in normalised fp32, ours in uint8, which the training device normalises:
`python -m benchmarks transfer`. Where they are installed, other libraries follow: torchvision's transforms v2 on uint8 tensors,
kornia on floats, and DALI's operators on uint8, whose hue is a matrix in YIQ. Where there is a GPU, our Triton kernels for
colours and blur run there, without a ratio: they neither crop nor resize.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image

from benchmarks.measure import compare
from benchmarks.rows import Row
from benchmarks.stages import Effort
from benchmarks.stages.plain_data import TwoViews, image_folder
from crossbatch.data import draw_parameters, moco_v3_augmentations, open_source
from crossbatch.data.augment import opencv as opencv_backend
from crossbatch.data.augment import pil as torchvision_backend
from crossbatch.data.augment.backends import make_views

SIZE = 224


def run(effort: Effort, images: Path | None = None) -> Iterator[Row]:
    """Yield a row for each implementation, of the images in `images` or of generated ones."""
    count, recipes = effort.pick(8, 64, 64), moco_v3_augmentations(SIZE)
    with image_folder(images, count) as root:
        source = open_source(root, "train")
        indices = np.arange(min(count, len(source)))
        pil = [source.open(int(index)) for index in indices]
    pixels = [np.array(image) for image in pil]
    plain = TwoViews(SIZE)
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    tensors = [torch.from_numpy(image).permute(2, 0, 1)[None].contiguous() for image in pixels]
    others: dict[str, Callable[[], object]] = {
        "torchvision's transforms v2 on tensors": lambda: _each(_torchvision_v2(), tensors),
        "kornia": lambda: _each(_kornia(), tensors),
        "DALI's operators": lambda: _dali(len(pixels))(pixels),
    }
    cases: dict[str, Callable[[], object]] = {
        "torchvision's transforms": lambda: [plain(image) for image in pil],
        "ours on PIL": lambda: make_views(torchvision_backend.augment, pixels, recipes, 0, 0, indices),
        "ours on OpenCV": lambda: make_views(opencv_backend.augment, pixels, recipes, 0, 0, indices),
        **others,
    }
    settings = {"images": len(indices), "size": SIZE, "folder": "given" if images else "generated"}
    yield from compare(cases, settings, effort, optional=others)
    if torch.cuda.is_available():
        for row in compare({"colours and blur in Triton": _triton(pil, indices)}, settings, effort):
            row.baseline = row.ratio = None
            yield row


def _each(views: Sequence[Callable[[torch.Tensor], torch.Tensor]], images: list[torch.Tensor]) -> None:
    for image in images:
        for view in views:
            view(image)


@functools.cache
def _torchvision_v2() -> list[Callable[[torch.Tensor], torch.Tensor]]:
    """Return the two views of an image, uint8 [1, 3, h, w]; the kernel of its blur reaches four sigmas."""
    from torchvision.transforms import v2

    def view(blur: float, solarize: float) -> v2.Compose:
        return v2.Compose(
            [
                v2.RandomResizedCrop(SIZE, scale=(0.08, 1.0)),
                v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
                v2.RandomGrayscale(p=0.2),
                v2.RandomApply([v2.GaussianBlur(17, (0.1, 2.0))], p=blur),
                v2.RandomSolarize(128, p=solarize),
                v2.RandomHorizontalFlip(),
            ]
        )

    return [view(1.0, 0.0), view(0.1, 0.2)]


@functools.cache
def _kornia() -> list[Callable[[torch.Tensor], torch.Tensor]]:
    """Return the two views of an image, uint8 [1, 3, h, w], in floats."""
    import kornia.augmentation as K  # pyright: ignore[reportMissingImports]

    def view(blur: float, solarize: float) -> Callable[[torch.Tensor], torch.Tensor]:
        transforms = torch.nn.Sequential(
            K.RandomResizedCrop((SIZE, SIZE), scale=(0.08, 1.0)),
            K.ColorJitter(0.4, 0.4, 0.2, 0.1, p=0.8),
            K.RandomGrayscale(p=0.2),
            K.RandomGaussianBlur((17, 17), (0.1, 2.0), p=blur),
            K.RandomSolarize(thresholds=(0.5, 0.5), additions=(0.0, 0.0), p=solarize),
            K.RandomHorizontalFlip(),
        )
        return lambda image: transforms(image.float() / 255)

    return [view(1.0, 0.0), view(0.1, 0.2)]


@functools.cache
def _dali(count: int) -> Callable[[list[np.ndarray]], None]:
    """Return a call that makes two views of `count` images, uint8 [h, w, 3], by DALI's CPU operators in one thread.

    The second view is neither blurred nor solarized, where MoCo v3 does so for a tenth and a fifth of them.
    """
    from crossbatch.data.augment.dali import dali

    fn, types = dali.fn, dali.types

    def view(image: Any, blurred: bool) -> Any:
        def factor(reach: float, coin: Any) -> Any:
            return 1 + coin * fn.random.uniform(range=(-reach, reach))

        coin = fn.random.coin_flip(probability=0.8)
        coloured = fn.random.coin_flip(probability=0.8)  # else gray
        image = fn.random_resized_crop(image, size=(SIZE, SIZE), random_area=(0.08, 1.0), antialias=True)
        image = fn.color_twist(
            image,
            brightness=factor(0.4, coin),
            contrast=factor(0.4, coin),
            saturation=coloured * factor(0.2, coin),
            hue=coin * fn.random.uniform(range=(-36.0, 36.0)),
        )
        if blurred:
            image = fn.gaussian_blur(image, sigma=fn.random.uniform(range=(0.1, 2.0)))
        return fn.flip(image, horizontal=fn.random.coin_flip())

    @dali.pipeline_def(batch_size=count, num_threads=1, device_id=None, prefetch_queue_depth=1)
    def graph() -> Any:
        image = fn.external_source(name="images", dtype=types.UINT8, ndim=3, layout="HWC")
        return view(image, True), view(image, False)

    pipeline: Any = graph()
    pipeline.build()

    def call(images: list[np.ndarray]) -> None:
        pipeline.feed_input("images", images, layout="HWC")
        pipeline.schedule_run()
        pipeline.share_outputs()
        pipeline.release_outputs()

    return call


def _triton(images: list[Image.Image], indices: np.ndarray) -> Callable[[], None]:
    """Return a call of the Triton kernels on crops of noise, with the parameters that the images would get."""
    from crossbatch.data.augment.triton_colours import colour_view

    crops = torch.randint(0, 256, (len(images), SIZE, SIZE, 3), dtype=torch.uint8, device="cuda")
    widths, heights = np.array([image.size for image in images]).T
    recipes = moco_v3_augmentations(SIZE)
    parameters = [draw_parameters(recipe, 0, 0, indices, view, heights, widths) for view, recipe in enumerate(recipes)]
    out = torch.empty_like(crops)

    def call() -> None:
        for recipe, p in zip(recipes, parameters, strict=True):
            colour_view(crops, p, recipe, out)

    return call
