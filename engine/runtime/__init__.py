"""The process and its surroundings: ranks, signals, watchdog, non-finite steps, chunk size, timing, files, exit codes."""
