"""Hold the commands: each parses flags, resolves the configuration and calls the engine; `run_main` makes the exit codes.

A new command is a new file with a `--help` that shows an example; flags that several share are in `arguments`.
"""
