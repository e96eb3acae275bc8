"""Parses a data path strictly: a folder, or scheme://target?option=number&..."""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qsl

_OPTIONS: dict[str, dict[str, int | None]] = {  # of each scheme, with their defaults
    "synthetic": {"size": 64, "classes": 10, "eval": None},  # eval: number of evaluation images; None: a tenth of train
    "shapes": {"train": 4000, "val": 800, "size": 64, "seed": 0},
    "cifar10": {},
    "cifar100": {},
    "flowers": {},
    "pets": {},
}
_EXAMPLES = {"shapes": "shapes://runs/shapes?train=4000&val=800"}


@dataclass(frozen=True)
class Location:
    """Holds a parsed path. `scheme` is '' for a folder; `target` is the folder or, for synthetic, the number of images."""

    scheme: str
    target: str
    options: dict[str, int | None]


def parse(path: str | Path) -> Location:
    """Split a data path into scheme, target and options. Raises ValueError with what is allowed if it is malformed."""
    text = str(path)
    scheme, separator, rest = text.partition("://")
    if not separator:
        if not text:
            raise ValueError("the path is empty; give a folder, or synthetic://1000 to try without images")
        return Location("", str(Path(text).expanduser()), {})
    if scheme not in _OPTIONS:
        allowed = "a folder, " + ", ".join(f"{name}://..." for name in _OPTIONS)
        raise ValueError(f"unknown scheme in {text!r}{_nearest(scheme, _OPTIONS)}; allowed: {allowed}")
    target, _, query = rest.partition("?")
    options = _parse_query(scheme, query, text)
    if scheme == "synthetic":
        if not (target.isdecimal() and int(target) > 0):
            raise ValueError(f"{text!r} needs a number of images, as in synthetic://1000?size=64&classes=10")
        return Location(scheme, target, options)
    if not target:
        raise ValueError(f"{text!r} needs a folder, as in {_EXAMPLES.get(scheme, f'{scheme}://datasets')}")
    return Location(scheme, str(Path(target).expanduser()), options)


def _parse_query(scheme: str, query: str, text: str) -> dict[str, int | None]:
    options = dict(_OPTIONS[scheme])
    given = set()
    for part in filter(None, query.split("&")):
        name, value = (parse_qsl(part, keep_blank_values=True) or [(part, "")])[0]
        if name not in options:
            allowed = ", ".join(options) or "none"
            raise ValueError(f"unknown option {name!r} in {text!r}{_nearest(name, options)}; allowed: {allowed}")
        if name in given:
            raise ValueError(f"option {name!r} is given twice in {text!r}; give it once")
        if not value.isdecimal() or (int(value) == 0 and name != "seed"):
            kind = "an integer >= 0" if name == "seed" else "an integer >= 1"
            raise ValueError(f"option {name!r} in {text!r} is {value!r}; it must be {kind}")
        options[name] = int(value)
        given.add(name)
    return options


def _nearest(name: str, allowed: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(allowed), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""
