"""Everything between a recipe and the numbers of a run.

schema      every key of pretraining; `finetune` and `evaluation` have those of the other commands
keys        how keys are declared, and what can be asked about them
aliases     former names of keys
load        JSON -> a checked configuration
resolve     "auto" -> numbers, for a world size and a device
user_input  errors about arguments -> errors about keys
document    the table of all keys in ds_configs/README.md
"""

from crossbatch.engine.config.finetune import FinetuneConfig, ResolvedFinetune, resolve_finetune
from crossbatch.engine.config.keys import key_paths, resumable_keys
from crossbatch.engine.config.load import load_config, parse_config, to_dict
from crossbatch.engine.config.resolve import (
    Device,
    Resolved,
    ResolvedConfig,
    autocast_dtype,
    choose_precision,
    resolve,
    resolve_precision,
    usable_cores,
)
from crossbatch.engine.config.schema import AdamWConfig, Config, LarsConfig, WatchConfig
from crossbatch.engine.config.user_input import user_input

__all__ = [
    "AdamWConfig",
    "Config",
    "Device",
    "FinetuneConfig",
    "LarsConfig",
    "Resolved",
    "ResolvedConfig",
    "ResolvedFinetune",
    "WatchConfig",
    "autocast_dtype",
    "choose_precision",
    "key_paths",
    "load_config",
    "parse_config",
    "resolve",
    "resolve_finetune",
    "resolve_precision",
    "resumable_keys",
    "to_dict",
    "usable_cores",
    "user_input",
]
