"""Provides optimizers that compute the same with any number of ranks, any ZeRO stage, or FSDP2. They need torch only."""

from crossbatch.engine.optimizers.groups import freeze_at_first, lars_param_groups, set_learning_rate, split_parameters
from crossbatch.engine.optimizers.lars import LARS, Layout, Segment
