"""The folder that new.py writes: each line with its reason, and never over what somebody has edited."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from train.base.errors import ExitCode, Halt
from train.base.files import read_json, replace_file, write_json
from train.tools.new.decide import Line

RECORD = ".new.json"  # sha256 of each file as it was written
_COMMENT_AT = 44  # column of the reasons
_PLAIN_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def as_yaml(head: str, lines: Iterable[Line]) -> str:
    """A YAML file: sections in the order of their first line; numbers among the keys are places in a list."""
    tree: dict[str, Any] = {}
    for line in lines:
        at = tree
        *sections, name = line.key.split(".")
        for section in sections:
            at = at.setdefault(section, {})
        at[name] = line
    return "".join(f"# {one}\n" for one in head.splitlines()) + "".join(_written(tree, 0))


def _written(tree: Mapping[str, Any], depth: int) -> Iterable[str]:
    for name, value in tree.items():
        if isinstance(value, Line):
            yield _commented(f"{'  ' * depth}{name}: {_value(value.value)}", value.why)
        elif all(key.isdigit() for key in value):
            yield f"{'  ' * depth}{name}:\n"
            for item in value.values():
                yield from _item(item, depth + 1)
        else:
            if depth == 0:
                yield "\n"
            yield f"{'  ' * depth}{name}:\n"
            yield from _written(value, depth + 1)


def _item(item: Line | Mapping[str, Any], depth: int) -> Iterable[str]:
    if isinstance(item, Line):
        yield _commented(f"{'  ' * depth}- {_value(item.value)}", item.why)
        return
    first = f"{'  ' * depth}- "
    for text in _written(item, depth + 1):
        yield first + text[len(first) :]
        first = "  " * (depth + 1)


def _commented(text: str, why: str) -> str:
    return f"{text.ljust(_COMMENT_AT)}  # {' '.join(why.split())}\n" if why else f"{text}\n"


def _value(value: Any) -> str:
    if isinstance(value, float):
        text = f"{value:g}"
        mantissa, e, exponent = text.partition("e")
        return text if not e else f"{mantissa if '.' in mantissa else mantissa + '.0'}e{int(exponent)}"
    if isinstance(value, str) and "${" in value:
        raise Halt(ExitCode.USAGE, f"{value!r} holds what a config takes for a reference (${{): rename it")
    return yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**6, sort_keys=False).removesuffix("\n").removesuffix("\n...")


def write_all(folder: Path, texts: Mapping[str, str]) -> list[str]:
    """Write each file unless its content was changed since, or is somebody else's; lines to print.

    What would be written over an edited file goes to cache/new/ in the folder. Raises Halt(CANNOT_WRITE).
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return _write_all(folder, texts)
    except OSError as error:
        raise Halt(ExitCode.CANNOT_WRITE, f"cannot write into {folder}: {error}") from error


def _write_all(folder: Path, texts: Mapping[str, str]) -> list[str]:
    written, told = dict(read_json(folder / RECORD) or {}), []
    for name, text in texts.items():
        file, aside = folder / name, folder / "cache" / "new" / name
        before = _sha256(file.read_bytes()) if file.is_file() else None
        if before == _sha256(text.encode()):
            told.append(f"{file}: as it was")
        elif before is None or before == written.get(name):
            replace_file(file, text)
            told.append(f"{file}: {'written' if before is None else 'written anew'}")
        else:
            aside.parent.mkdir(parents=True, exist_ok=True)
            replace_file(aside, text)
            told.append(f"{file}: edited since it was written, so it stays; what would be written now is {aside}")
            continue
        aside.unlink(missing_ok=True)
        written[name] = _sha256(text.encode())
    write_json(folder / RECORD, written)
    return told


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
