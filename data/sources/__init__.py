"""Opens images: `open_source` reads a folder, tar shards, a torchvision data set or generated images, by its path.

A source knows how many images it has, their labels and class names, and reads one image by its index.
"""

from crossbatch.data.sources.location import RemoteOptions
from crossbatch.data.sources.open import Source, describe_source, has_evaluation_split, open_source, prepare

__all__ = ["RemoteOptions", "Source", "describe_source", "has_evaluation_split", "open_source", "prepare"]
