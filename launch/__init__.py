"""Thin mains. Each parses flags, resolves the configuration and calls the engine; exit codes are in `exits`.

A new command is a new file with a `--help` that shows an example; flags that several share are in `arguments`.
"""
