"""The data room: which images, in which order, with which augmentation, by which machinery.

Three questions, kept apart, each answered in one file:

- **who reads what**: order.py. Pure integers; the global batch does not depend on the world size.
- **what is done to an image**: recipe.py. Parameters as a pure function of (seed, epoch, index, view),
  by counter.py.
- **how**: a backend, chosen in backends.py. torchvision_backend.py applies the parameters with PIL and is the reference;
  opencv_backend.py is the fast one for CPUs; dali_backend.py decodes with DALI and, on a GPU, leaves the colours to
  colour_cuda.py. loader.py, stream.py and pieces.py run them ahead of the training.

Beside them stands what images there are: sources.py opens a path (location.py parses it); image_folder.py, shards.py,
cifar.py, flowers.py, pets.py, synthetic.py and shapes.py are the kinds of source; decode.py says what an image file means,
listing.py keeps what was found in a folder. image_list.py belongs to flowers.py and pets.py; shard_scan.py, shard_index.py
and shard_writer.py belong to shards.py.

Where the next thing goes: another kind of source, in its own file, with a branch in sources.py and location.py; another
backend, in its own file, with parameters from recipe.draw, so that tests/data/test_backends.py compares it to PIL view by
view; another augmentation, as fields of ViewRecipe and ViewParameters, drawn in recipe.draw, applied in every backend.
"""

from crossbatch.data.augment.backends import BACKENDS, choose_backend
from crossbatch.data.augment.parameters import ViewAugmentation, ViewParameters, draw, moco_v3_augmentations, normalize
from crossbatch.data.loader import Batch, EvaluationLoader, TrainLoader
from crossbatch.data.sampler import GlobalBatchSampler, evaluation_share
from crossbatch.data.sources import Source, has_evaluation_split, open_source, prepare
from crossbatch.data.sources.shapes import write_shapes

__all__ = [
    "BACKENDS",
    "Batch",
    "EvaluationLoader",
    "GlobalBatchSampler",
    "Source",
    "TrainLoader",
    "ViewAugmentation",
    "ViewParameters",
    "choose_backend",
    "draw",
    "evaluation_share",
    "has_evaluation_split",
    "moco_v3_augmentations",
    "normalize",
    "open_source",
    "prepare",
    "write_shapes",
]
