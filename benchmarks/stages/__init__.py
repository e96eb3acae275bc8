"""Each stage is a module with `run(effort)`, which yields rows that show it beside what people use otherwise.

Stages share recipe.py, which builds the recipes of ds_configs/, and the baselines in plain_data.py and plain_step.py. A new
stage is a module with `run` and its name in STAGES. This file imports nothing heavy.
"""

import enum
from typing import TypeVar

# What a GPU decides comes first: where time runs out, the rest is left out.
STAGES = ("step", "backbone", "norm", "batchformer", "heads", "optimizer", "ema", "transfer", "augment", "data")
STAGES += ("decode", "checkpoint", "memory", "trainer", "collectives", "index", "remote")
WITH_IMAGES = ("decode", "augment", "data")  # their `run` takes a folder of images

T = TypeVar("T")


class Effort(enum.Enum):
    """Says how much a stage measures."""

    QUICK = "quick"  # small sizes, few repeats: does it run?
    BRIEF = "brief"  # the sizes that matter, a second or two each: every stage within minutes
    FULL = "full"

    def pick(self, quick: T, brief: T, full: T) -> T:
        """Return the argument of this effort."""
        return {Effort.QUICK: quick, Effort.BRIEF: brief, Effort.FULL: full}[self]
