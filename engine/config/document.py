"""Make the tables of all keys in ds_configs/README.md from the schema: `python -m crossbatch.engine.config.document`."""

import json

from crossbatch.engine.config.aliases import ALIASES, current_path
from crossbatch.engine.config.evaluation import KnnConfig, LinearConfig
from crossbatch.engine.config.finetune import FinetuneConfig
from crossbatch.engine.config.keys import (
    Section,
    covers,
    describe_allowed,
    inner_sections,
    join,
    resumable_keys,
    sections,
)
from crossbatch.engine.config.schema import Config


def all_tables() -> str:
    """Return the Markdown that ds_configs/README.md ends with."""
    parts = ["## Keys of pretraining\n", *_tables(Config)]
    for title, schema in (("fine-tuning", FinetuneConfig), ("the linear probe", LinearConfig), ("k-NN", KnnConfig)):
        parts += [
            f"## Keys of {title}\n\nSections that are not shown are those of pretraining.\n",
            *_tables(schema, Config),
        ]
    aliases = [f"| `{alias}` | `{current_path(alias)}` |" for alias in ALIASES]
    parts.append("\n".join(["## Former names\n", "| former name | key |", "| --- | --- |", *aliases]) + "\n")
    return "\n".join(parts)


def _tables(schema: type[Section], known: type[Section] | None = None) -> list[str]:
    """Return one table for each section of `schema` that is not a section of `known`, too."""
    resumable = resumable_keys(schema) if schema is not KnnConfig else ()  # k-NN starts from the beginning
    left_out = {section for _, _, section in sections(known)} if known else set()
    return [_table(*at, resumable) for at in sections(schema) if at[2] not in left_out]


def _table(at: str, kind: str, section: type[Section], resumable: tuple[str, ...]) -> str:
    title = (at or "Top level") + (f" of {kind}" if kind else "")
    lines = [f"### {title}", "", "| key | default | allowed | on resume | meaning |", "| --- | --- | --- | --- | --- |"]
    for name, field in section.model_fields.items():
        if not inner_sections(field):
            path = join(at, name)
            may_change = "may change" if any(covers(key, path) for key in resumable) else ""
            default = json.dumps(field.get_default(call_default_factory=True)).replace("null", "none")  # pyright: ignore
            lines.append(f"| `{path}` | {default} | {describe_allowed(field)} | {may_change} | {field.description} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(all_tables())
