"""The table of all keys in ds_configs/README.md, made from the schema: `python -m crossbatch.engine.config.document`."""

import dataclasses
import json
import typing

from crossbatch.engine.config.load import describe_allowed, options_of
from crossbatch.engine.config.schema import (
    AdamWConfig,
    Config,
    CrossbatchConfig,
    LarsConfig,
    OffloadConfig,
    OptimizerConfig,
    ZeroConfig,
)


def key_table() -> str:
    """One Markdown table per section."""
    sections: list[tuple[str, type, str]] = [
        ("Top level", Config, ""),
        ("optimizer", OptimizerConfig, "optimizer."),
        ("optimizer.params of LARS", LarsConfig, "optimizer.params."),
        ("optimizer.params of AdamW", AdamWConfig, "optimizer.params."),
        ("zero_optimization", ZeroConfig, "zero_optimization."),
        ("zero_optimization.offload_optimizer", OffloadConfig, "zero_optimization.offload_optimizer."),
        ("crossbatch", CrossbatchConfig, "crossbatch."),
    ]
    for item in dataclasses.fields(CrossbatchConfig):
        if isinstance(item.default_factory, type) and dataclasses.is_dataclass(item.default_factory):
            sections.append((f"crossbatch.{item.name}", item.default_factory, f"crossbatch.{item.name}."))
    return "\n".join(_table(*section) for section in sections)


def _table(title: str, section: type, prefix: str) -> str:
    lines = [f"### {title}", "", "| key | default | allowed | meaning |", "| --- | --- | --- | --- |"]
    hints = typing.get_type_hints(section)
    for item in dataclasses.fields(section):
        options = options_of(hints[item.name])
        if not any(dataclasses.is_dataclass(option) for option in options):
            allowed, meaning = describe_allowed(options, item.metadata), item.metadata["meaning"]
            lines.append(f"| `{prefix}{item.name}` | {_default(item)} | {allowed} | {meaning} |")
    return "\n".join(lines) + "\n"


def _default(item: dataclasses.Field) -> str:
    value = item.default_factory() if item.default is dataclasses.MISSING else item.default  # pyright: ignore
    return "none" if value is None else json.dumps(value)


if __name__ == "__main__":
    print(key_table())
