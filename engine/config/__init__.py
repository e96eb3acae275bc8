"""The one configuration surface: `schema` (every key), `load` (JSON -> checked dataclasses), `resolve` ("auto" -> numbers)."""

from crossbatch.engine.config.finetune import FinetuneConfig, ResolvedFinetune, resolve_finetune
from crossbatch.engine.config.load import key_paths, load_config, parse_config, to_dict
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
    "to_dict",
    "usable_cores",
]
