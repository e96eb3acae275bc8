"""Loads images: which images, in which order, with which augmentation, by which backend.

Three questions, kept apart:

- **Who reads what?** `sampler`, in integers only; the global batch does not depend on the number of ranks.
- **What is done to an image?** `augment/parameters`, a pure function of (seed, epoch, index, view), by the counter-based random
  numbers of `counter`.
- **By what?** A backend that `augment/backends` chooses: `augment/pil` applies the parameters with PIL and is the reference,
  `augment/opencv` is the fast one on CPUs, `augment/dali` decodes with DALI and leaves the colours to `augment/triton_colours`
  on a GPU. `loader`, `workers` and `worker_batches` run them ahead of the training.

`sources/` opens images: `open_source` reads a folder of images or tar shards, remote shards, a list of files, data sets of
torchvision or Hugging Face, or generated images.
`decode` says what an image file means, and is the only place that decodes one with PIL.

docs/extending.md says how to add a source or an augmentation. Importing this package loads torch, numpy and PIL; OpenCV,
DALI, Triton and torchvision are loaded when they are used.
"""

from crossbatch.data.augment.backends import BACKENDS, choose_backend
from crossbatch.data.augment.parameters import (
    ViewAugmentation,
    draw_parameters,
    moco_v3_augmentations,
    normalize,
)
from crossbatch.data.loader import Batch, EvaluationLoader, SkipLimitExceeded, TrainLoader
from crossbatch.data.sampler import GlobalBatchSampler, evaluation_share
from crossbatch.data.sources import RemoteOptions, Source, describe_source, has_evaluation_split, open_source, prepare
from crossbatch.data.workers import ImagesLost, WaitInterrupted, asked_to_stop, check_workers

__all__ = [
    "BACKENDS",
    "Batch",
    "EvaluationLoader",
    "GlobalBatchSampler",
    "ImagesLost",
    "RemoteOptions",
    "SkipLimitExceeded",
    "Source",
    "TrainLoader",
    "ViewAugmentation",
    "WaitInterrupted",
    "asked_to_stop",
    "check_workers",
    "choose_backend",
    "describe_source",
    "draw_parameters",
    "evaluation_share",
    "has_evaluation_split",
    "moco_v3_augmentations",
    "normalize",
    "open_source",
    "prepare",
]
