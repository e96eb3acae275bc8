"""Stands for `benchmarks.rows` until benchmarks/scaling/ imports that; then delete this file."""

from benchmarks.rows import Results as Results
from benchmarks.rows import StoredRow as Row  # noqa: F401
from benchmarks.rows import machine_of as machine_of
from benchmarks.rows import read as read
