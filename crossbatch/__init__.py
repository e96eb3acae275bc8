"""crossbatch trains vision backbones with large contrastive batches: MoCo v3 and BatchFormer.

The names below are the library: each works in a training loop of your own, and is imported when it is first used. The packages
`data`, `models`, `engine` and `launch` are folders at the top of the repository, linked into this one.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0.dev0"

if TYPE_CHECKING:
    from crossbatch.data import TrainLoader, open_source
    from crossbatch.engine.chunked import chunked_backward
    from crossbatch.engine.optimizers import LARS, lars_param_groups
    from crossbatch.engine.sharding.zero_layout import lars_for_zero
    from crossbatch.models import (
        BatchFormer,
        MoCo,
        ViewBatchNorm,
        contrastive_loss,
        convert_norms,
        cross_entropy_over_keys,
    )

_PACKAGES = {
    "TrainLoader": "crossbatch.data",
    "open_source": "crossbatch.data",
    "chunked_backward": "crossbatch.engine.chunked",
    "LARS": "crossbatch.engine.optimizers",
    "lars_param_groups": "crossbatch.engine.optimizers",
    "lars_for_zero": "crossbatch.engine.sharding.zero_layout",
    "BatchFormer": "crossbatch.models",
    "MoCo": "crossbatch.models",
    "ViewBatchNorm": "crossbatch.models",
    "contrastive_loss": "crossbatch.models",
    "convert_norms": "crossbatch.models",
    "cross_entropy_over_keys": "crossbatch.models",
}

__all__ = [
    "LARS",
    "BatchFormer",
    "InputError",
    "MoCo",
    "RunStopped",
    "TrainLoader",
    "ViewBatchNorm",
    "chunked_backward",
    "contrastive_loss",
    "convert_norms",
    "cross_entropy_over_keys",
    "lars_for_zero",
    "lars_param_groups",
    "open_source",
]


class InputError(ValueError):
    """Raised when the user's input is wrong; the commands print its message without a traceback and exit with code 2.

    The message says where the error is (key path, flag or file), what was given, what is allowed, and what to change.
    """


class RunStopped(RuntimeError):
    """Raised when a run stops itself (non-finite loss, lost data, a full disk); the commands exit with code 3.

    The message says what was saved, and what to change before the run is resumed.
    """


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `crossbatch.LARS` needs torch and nothing else."""
    if name not in _PACKAGES:
        raise AttributeError(f"module 'crossbatch' has no attribute {name!r}")
    value = getattr(importlib.import_module(_PACKAGES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
