"""The table of all keys in ds_configs/README.md, made from the schema: `python -m crossbatch.engine.config.document`."""

import dataclasses
import json
import typing

from crossbatch.engine.config.evaluation import KnnConfig, LinearConfig
from crossbatch.engine.config.finetune import FinetuneConfig
from crossbatch.engine.config.load import describe_allowed, options_of
from crossbatch.engine.config.schema import Config


def all_tables() -> str:
    """What ds_configs/README.md shows."""
    parts = [key_table(Config)]
    for title, schema in (("fine-tuning", FinetuneConfig), ("the linear probe", LinearConfig), ("k-NN", KnnConfig)):
        parts.append(
            f"## Keys of {title}\n\nSections not shown are those of pretraining.\n\n{key_table(schema, Config)}"
        )
    return "\n".join(parts)


def key_table(schema: type, known: type | None = None) -> str:
    """One Markdown table per section of `schema`; those that are sections of `known`, too, are left out."""
    left_out = {section for _, section, _ in _sections(known)} if known else set()
    return "\n".join(_table(*found) for found in _sections(schema) if found[1] not in left_out)


def _sections(section: type, prefix: str = "", title: str = "Top level") -> list[tuple[str, type, str]]:
    """(title, dataclass, prefix of its keys) of a dataclass and those inside of it."""
    found = [(title, section, prefix)]
    hints = typing.get_type_hints(section)
    for item in dataclasses.fields(section):
        inner = [option for option in options_of(hints[item.name]) if dataclasses.is_dataclass(option)]
        path = f"{prefix}{item.name}"
        for option in typing.cast(list[type], inner):
            of = f" of {option.__name__.removesuffix('Config').replace('Lars', 'LARS')}" if len(inner) > 1 else ""
            found += _sections(option, f"{path}.", f"{path}{of}")
    return found


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
    print(all_tables())
