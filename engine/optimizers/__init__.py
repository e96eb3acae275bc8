"""Optimizers that mean the same under every sharding."""

from crossbatch.engine.optimizers.groups import build_optimizer, parameter_groups, set_learning_rate
from crossbatch.engine.optimizers.lars import LARS, Layout, Segment

__all__ = ["LARS", "Layout", "Segment", "build_optimizer", "parameter_groups", "set_learning_rate"]
