"""Stands for `benchmarks.measure` and `benchmarks.rows` until benchmarks/scaling/ imports those; then delete this file."""

from benchmarks.measure import append as append
from benchmarks.measure import clocks as clocks
from benchmarks.rows import Row as Row
