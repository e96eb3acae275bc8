"""Weights from anything and to anything: `load` reads, `export` and `moco_v3` write, `files` guards both."""
