"""Holds a module for each stage: its `run(effort)` yields rows, in which the stage stands beside what people use otherwise.

Several stages share the baselines in plain_data.py and plain_step.py, and recipe.py, which builds the recipes of ds_configs/.
A new stage is a module with `run` and its name in STAGES. This file imports nothing heavy.
"""

import enum
from typing import TypeVar

STAGES = (
    "decode",
    "augment",
    "data",
    "transfer",
    "index",
    "backbone",
    "batchformer",
    "heads",
    "collectives",
    "optimizer",
    "ema",
    "checkpoint",
    "step",
)
WITH_IMAGES = ("decode", "augment", "data")  # their `run` takes a folder of images

T = TypeVar("T")


class Effort(enum.Enum):
    """How much a stage measures."""

    QUICK = "quick"  # small sizes, few repeats: does it run?
    BRIEF = "brief"  # the sizes that matter, a second or two each: every stage within minutes
    FULL = "full"

    def pick(self, quick: T, brief: T, full: T) -> T:
        """Return the argument of this effort."""
        return {Effort.QUICK: quick, Effort.BRIEF: brief, Effort.FULL: full}[self]
