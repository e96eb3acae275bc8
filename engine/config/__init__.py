"""The one configuration surface: `schema` (every key), `load` (JSON -> checked dataclasses), `resolve` ("auto" -> numbers)."""

from crossbatch.engine.config.load import key_paths, load_config, parse_config, to_dict
from crossbatch.engine.config.resolve import Device, ResolvedConfig, resolve, resolve_precision
from crossbatch.engine.config.schema import AdamWConfig, Config, LarsConfig, WatchConfig

__all__ = [
    "AdamWConfig",
    "Config",
    "Device",
    "LarsConfig",
    "ResolvedConfig",
    "WatchConfig",
    "key_paths",
    "load_config",
    "parse_config",
    "resolve",
    "resolve_precision",
    "to_dict",
]
