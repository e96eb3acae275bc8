"""crossbatch: large-batch contrastive pretraining (MoCo v3 + BatchFormer).

The rooms `engine`, `models`, `data` and `launch` stand at the top of the repository and are linked into this package, so
that `crossbatch.engine`... resolves the same way from a checkout, an editable install and a wheel.
"""

__version__ = "0.1.0"


class InputError(ValueError):
    """The user's input was wrong; the launchers print the message without a traceback and exit with code 2.

    The message names where (key path, flag or file), what was given, what is allowed and what to do.
    """


class RunStopped(RuntimeError):
    """The run stopped itself (non-finite loss, lost data) with everything saved; exit code 3."""
