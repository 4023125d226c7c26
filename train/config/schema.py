"""YAML files and `key=value` overrides into frozen dataclasses: closed, strict, with suggestions.

OmegaConf does the merging and the interpolation; this file adds what it is lenient about: a value of the
wrong type is refused instead of converted, and a misspelt key is answered with the nearest one anywhere. All that is
wrong with a config comes in one message: types, ranges (`train/config/key.py`), missing keys, and what does not go
together, as far as the keys that a rule reads are sound.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from train.base.errors import ExitCode, Halt
from train.config import shipped
from train.config.key import Key, default_of, key_of, range_problems
from train.config.sound import other_kind, sound_part, told_by

T = TypeVar("T")

# Environment variables a config may refer to as ${oc.env:NAME}; locations only, so that no secret gets in.
ENVIRONMENT = ("ANIX_DATA", "ANIX_MODELS", "ANIX_RUNS")
_MAX_BYTES = 1 << 20
_YAML_NULL = ("null", "~")


# What does not go together, as sentences that name the keys. A rule is handed the sound part of a config: reading a
# key that has a problem of its own ends it.
Rule = Callable[[Any], Iterable[str]]
Problem = tuple[str, str]  # (key, sentence)
_MISSING = ""  # in the place of a sentence: nobody set a key that has no default; all of them are told in one


def load_into(
    schema: type[T], paths: Sequence[str | Path], overrides: Sequence[str] = (), rules: Sequence[Rule] = (),
    gone: Mapping[str, str] = types.MappingProxyType({}),
) -> T:  # fmt: skip
    """An instance of the frozen dataclass `schema` from files (later win) and overrides (win over files).

    `gone`: keys that earlier configs had, and why they went; one that is null there is passed over. Raises Halt(USAGE) for a missing
    file, and naming everything that is wrong with the keys and their values.
    """
    merged = merge_sources(paths, overrides)
    _pass_over(merged, gone)
    try:
        # Types are judged as they are after resolution: what the environment holds is text, and nothing is converted.
        if problems := all_problems(schema, OmegaConf.to_container(merged, resolve=True), rules):
            raise Halt(ExitCode.USAGE, "; ".join(problems))
        return typing.cast(T, OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), merged)))
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None)
        first_line = str(error).splitlines()[0]
        raise Halt(ExitCode.USAGE, f"{key}: {first_line}" if key else first_line) from error


def _pass_over(merged: DictConfig, gone: Mapping[str, str]) -> None:
    """Take keys out that went and that say nothing. Raises Halt(USAGE) for one that says something."""
    for key, why in gone.items():
        section, _, name = key.rpartition(".")
        holder = OmegaConf.select(merged, section) if section else merged
        if isinstance(holder, DictConfig) and name in holder:
            if holder[name] is not None:
                raise Halt(ExitCode.USAGE, f"{key} is {holder[name]!r}, and is no key any more: {why}; leave it out")
            del holder[name]


def all_problems(schema: type, found: Any, rules: Sequence[Rule] = ()) -> list[str]:
    """Every problem of the values `found` (nested dicts and lists, as YAML gives them) for a schema; each told once."""
    if (other := other_kind(schema, found)) is not None:
        return [other]
    problems = list(_problems(schema, found, "", all_keys(schema)))
    told = [sentence for _, sentence in problems if sentence != _MISSING]
    if missing := sorted(key for key, sentence in problems if sentence == _MISSING):
        told.append(f"missing value for {', '.join(missing)}: set it in the YAML or as key=value")
    if isinstance(found, dict):
        config = sound_part(schema, found, {key for key, _ in problems})
        told += [sentence for rule in rules for sentence in told_by(rule, config)]
    return list(dict.fromkeys(told))


def merge_sources(paths: Sequence[str | Path], overrides: Sequence[str]) -> DictConfig:
    """The files and overrides merged into one untyped config, references unresolved."""
    if not paths:
        raise Halt(ExitCode.USAGE, "no config given: --config FILE")
    layers = [_load_yaml(shipped.find(path)) for path in paths]
    layers += [_load_override(override) for override in overrides]
    _refuse_references([OmegaConf.to_container(layer, resolve=False) for layer in layers])
    try:
        merged = OmegaConf.merge(*layers[: len(paths)])
        for layer in layers[len(paths) :]:  # one by one: an item of a list is that of all layers before
            below, over = (OmegaConf.to_container(one, resolve=False) for one in (merged, layer))
            merged = OmegaConf.merge(merged, OmegaConf.create(typing.cast(dict[str, Any], _items_placed(below, over, ""))))
        # OmegaConf's word for a missing value: in a merge it quietly leaves what was there
        if empty := sorted({key for layer in layers for key in OmegaConf.missing_keys(layer)}):
            raise Halt(ExitCode.USAGE, f"{', '.join(empty)}: ??? is no value; give one, or leave the key out")
    except (OmegaConfBaseException, TypeError) as error:  # a section in one, a number or a list in the other
        told = ", ".join([*map(str, paths), *overrides])
        raise Halt(ExitCode.USAGE, f"{told} do not go together: {str(error).splitlines()[0]}") from error
    return typing.cast(DictConfig, merged)


def _load_yaml(path: Path) -> DictConfig:
    if path.is_dir():
        raise Halt(ExitCode.USAGE, f"config file {path} is a folder: name a YAML file in it")
    if not path.is_file():
        raise Halt(ExitCode.USAGE, f"config file {path} does not exist")
    if path.stat().st_size > _MAX_BYTES:
        raise Halt(ExitCode.USAGE, f"config file {path} is larger than {_MAX_BYTES} bytes")
    try:
        config = OmegaConf.load(path)
    except Exception as error:  # python tags, alias bombs and bad syntax each raise their own kind
        raise Halt(ExitCode.USAGE, f"config file {path} cannot be read: {error}") from error
    if not isinstance(config, DictConfig):
        raise Halt(ExitCode.USAGE, f"config file {path} must hold keys and values")
    return config


def _load_override(override: str) -> DictConfig:
    """`key=value`: numbers, true, null, lists and quoted texts as in YAML, anything else as the text that it is.

    A shell has no comments and no block texts: `###`, `|` or `my set #2` would be nothing, or cut off.
    """
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise Halt(ExitCode.USAGE, f"override {override!r} is not of the form key=value")
    plain = text.strip()
    try:
        if plain[:1] in ("[", "{", "'", '"') or not text or plain.lower() in _YAML_NULL or _is_scalar(plain):
            return OmegaConf.from_dotlist([f"{key}={text}"])
        return OmegaConf.from_dotlist([f"{key}={json.dumps(plain or text, ensure_ascii=False)}"])
    except Exception as error:  # the YAML scanner raises its own family here
        hint = f" ({_REFERENCE_RULE}; with brackets around it, in quotes)" if "${" in override else ""
        raise Halt(ExitCode.USAGE, f"override {override!r} cannot be read: {error}{hint}") from error


def _is_scalar(text: str) -> bool:
    """Whether YAML reads a number or a truth value there."""
    try:
        return isinstance(OmegaConf.from_dotlist([f"x={text}"]).x, bool | int | float)
    except Exception:  # no YAML at all, so a text
        return False


def _items_placed(below: Any, over: Any, key: str) -> Any:
    """`over` with every `{"0": ...}` that stands where `below` has a list made into that list with its item changed.

    So `sources.0.adapter=x` means the first source. Raises Halt(USAGE) naming how many items there are.
    """
    if not isinstance(over, dict):
        return over
    if isinstance(below, dict):
        return {name: _items_placed(below.get(name), inner, f"{key}.{name}" if key else str(name)) for name, inner in over.items()}
    if not isinstance(below, list):
        return over
    items = list(below)
    for name, inner in over.items():
        if not re.fullmatch("[0-9]+", str(name)) or int(name) >= len(items):
            called = f"{key}.0 to {key}.{len(items) - 1}" if len(items) > 1 else f"{key}.0" if items else f"nothing: write {key}=[...]"
            raise Halt(ExitCode.USAGE, f"{key}.{name}: {key} is a list of {len(items)}, whose items are called {called}")
        inner = _items_placed(items[int(name)], inner, f"{key}.{name}")
        both = isinstance(items[int(name)], dict) and isinstance(inner, dict)
        items[int(name)] = _merged(items[int(name)], inner) if both else inner
    return items


def _merged(below: dict[Any, Any], over: dict[Any, Any]) -> Any:
    return OmegaConf.to_container(OmegaConf.merge(below, over), resolve=False)


_REFERENCE_RULE = f"only ${{oc.env:NAME}} or ${{oc.env:NAME,default}} is taken, NAME one of {', '.join(ENVIRONMENT)}"
_REFERENCE = re.compile(rf"(?<!\\)\$\{{oc\.env: *(?:{'|'.join(ENVIRONMENT)}) *(?:,[^${{}}()\[\],'\"\\\n]*)?\}}")


def _refuse_references(layers: Sequence[Any]) -> None:
    """Halt(USAGE) naming every key whose value, or name, refers to more than a listed location."""
    found = {key: text for layer in layers for key, text in _texts(layer, "") if "${" in _REFERENCE.sub("", text)}
    if found:
        told = "; ".join(f"{key}: {text[:200]!r} holds a reference that is refused" for key, text in found.items())
        raise Halt(ExitCode.USAGE, f"{told}: {_REFERENCE_RULE}. Write the value itself")


def _texts(value: Any, key: str) -> Iterator[tuple[str, str]]:
    """(dotted key, text) of every text in a container; a key's own name is a text too."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict):
        for name, inner in value.items():
            full = f"{key}.{name}" if key else str(name)
            yield full, str(name)
            yield from _texts(inner, full)
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from _texts(inner, f"{key}[{number}]")


def all_keys(schema: type, prefix: str = "") -> list[str]:
    """Every dotted key of a schema; what the user names is `*` (`select.*.where`), a list's element `[]`."""
    keys = []
    for name, hint in _hints(schema).items():
        keys.append(prefix + name)
        for below, inner in _sections(hint):
            keys += all_keys(inner, f"{prefix}{name}{below}.")
    return keys


def _sections(hint: Any) -> Iterator[tuple[str, type]]:
    """(how its keys are reached, dataclass) of an annotation that holds one, or None, or many by name or in a list."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        yield "", typing.cast(type, hint)
    elif origin is dict:
        yield from ((f".*{below}", inner) for below, inner in _sections(arguments[1]))
    elif origin is list:
        yield from ((f"[]{below}", inner) for below, inner in _sections(arguments[0]))
    elif origin in (Union, types.UnionType):
        for option in arguments:
            yield from _sections(option)


@dataclasses.dataclass(frozen=True)
class Found:
    """One key of a schema: what is said at it, its annotation and default, and where it is declared."""

    said: Key
    hint: Any
    default: Any
    declared: str  # module, class and field, with dots


def keys_of(schema: type, prefix: str = "") -> dict[str, Found]:
    """Every dotted key that holds a value; what the user names is `*`, a list's element `[]`, as in `all_keys`."""
    found: dict[str, Found] = {}
    hints = _hints(schema)
    for field in dataclasses.fields(schema):
        said, hint = key_of(field), hints[field.name]
        if said is not None:
            declared = f"{schema.__module__}.{schema.__qualname__}.{field.name}"
            found[prefix + field.name] = Found(said, hint, default_of(field), declared)
        for below, inner in _sections(hint):
            found |= keys_of(inner, f"{prefix}{field.name}{below}.")
    return found


def _hints(schema: type) -> dict[str, Any]:
    return typing.get_type_hints(schema)


def _problems(hint: Any, value: Any, key: str, known: Sequence[str]) -> Iterator[Problem]:
    """Everything in `value` that does not fit the annotation `hint`; the key is that of a whole list of plain values."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        yield from _section_problems(typing.cast(type, hint), value, key, known)
    elif origin is dict:
        if not isinstance(value, dict):
            yield key, f"{key} must hold keys and values"
            return
        for name, inner in value.items():
            if not isinstance(name, str):
                yield key, f"{key}.{name}: the name {name!r} must be text, so in quotes"
            yield from _inside(key, arguments[1], _problems(arguments[1], inner, f"{key}.{name}", known))
    elif origin in (list, tuple):
        if not isinstance(value, list | tuple):
            hint = f": no file has one, so write it whole, {key}=[...]" if isinstance(value, dict) else ""
            yield key, f"{key} is {value!r}, must be a list{hint}"
        elif origin is tuple and arguments[-1] is not Ellipsis and len(value) != len(arguments):
            yield key, f"{key} is {value!r}, must hold {len(arguments)} values"
        else:
            for number, inner in enumerate(value):
                element = arguments[0] if origin is list or arguments[-1] is Ellipsis else arguments[number]
                yield from _inside(key, element, _problems(element, inner, f"{key}[{number}]", known))
    elif isinstance(value, dict) and (section := next(filter(dataclasses.is_dataclass, arguments), None)) is not None:
        yield from _section_problems(typing.cast(type, section), value, key, known)  # a section or nothing
    elif not fits(hint, value):
        yield key, f"{key} is {value!r}, must be {describe(hint)}"


def _inside(key: str, hint: Any, problems: Iterable[Problem]) -> Iterator[Problem]:
    """Problems of a list's or dict's items, put to the whole of it where the items are plain values."""
    yield from problems if list(_sections(hint)) else ((key, sentence) for _, sentence in problems)


def _section_problems(schema: type, value: Any, key: str, known: Sequence[str]) -> Iterator[Problem]:
    if not isinstance(value, dict):
        yield key, f"{key or 'the config'} must hold keys and values, not {value!r}"
        return
    hints, fields = _hints(schema), {field.name: field for field in dataclasses.fields(schema)}
    for name, inner in value.items():
        full = f"{key}.{name}" if key else str(name)
        if name not in hints:
            yield full, f"unknown key {full}{_suggestion(full, known, key, hints)}"
            continue
        problems = list(_problems(hints[name], inner, full, known))
        yield from problems
        said = key_of(fields[name])
        if said is not None and not problems:
            yield from ((full, sentence) for sentence in range_problems(said, inner, full))
    for name in hints.keys() - value.keys():
        full = f"{key}.{name}" if key else name
        if fields[name].default == MISSING:
            yield full, _MISSING
        elif dataclasses.is_dataclass(hints[name]):
            yield from _section_problems(typing.cast(type, hints[name]), {}, full, known)


def _suggestion(unknown: str, known: Sequence[str], section: str, siblings: Iterable[str]) -> str:
    """The nearest key: of the same section first, then any key whose words match (noise_offset: noise.offset)."""
    last = unknown.rsplit(".", 1)[-1]
    near = difflib.get_close_matches(last, siblings, n=1, cutoff=0.6)
    if near:
        found = f"{section}.{near[0]}" if section else near[0]
        return f": did you mean {found}?"
    words = {k.replace(".", "_"): k for k in known} | {k.rsplit(".", 1)[-1]: k for k in reversed(known)}
    near = difflib.get_close_matches(unknown.replace(".", "_"), words, n=1, cutoff=0.6)
    near = near or difflib.get_close_matches(last, words, n=1, cutoff=0.6)
    if near and words[near[0]] != section:
        return f": did you mean {words[near[0]]}?"
    return f": {section or 'the top level'} knows {', '.join(sorted(siblings)) or 'no keys'}"


def fits(hint: Any, value: Any) -> bool:
    """Whether a value read from YAML is what the annotation asks for; nothing is converted."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin in (Union, types.UnionType):
        return any(fits(option, value) for option in arguments)
    if origin is Literal:
        return value in arguments and not isinstance(value, bool)
    if origin in (list, tuple, dict):
        return all(sentence == _MISSING for _, sentence in _problems(hint, value, "", ()))
    if dataclasses.is_dataclass(hint):
        return isinstance(value, dict)
    if hint is types.NoneType:
        return value is None
    if isinstance(value, bool) or hint is bool:
        return isinstance(value, bool) and hint is bool
    if hint is float:
        return isinstance(value, int | float)
    return isinstance(value, hint)


def describe(hint: Any) -> str:
    """The annotation in words."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(describe(option) for option in arguments)
    if origin is Literal:
        return "one of " + ", ".join(str(choice) for choice in arguments)
    if origin in (list, tuple):
        count = "" if origin is list or arguments[-1] is Ellipsis else f"{len(arguments)} x "
        return f"list of {count}{describe(arguments[0])}"
    if origin is dict:
        return f"name: {describe(arguments[1])}"
    if dataclasses.is_dataclass(hint):
        return "a section"
    if hint is Any:
        return "a number or a list of numbers"
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text", types.NoneType: "null"}
    return names.get(hint, str(hint))


def plainly(value: Any) -> Any:
    """A default as YAML and JSON write it: sections and their lists as dicts."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plainly(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {name: plainly(inner) for name, inner in value.items()}
    return [plainly(inner) for inner in value] if isinstance(value, list | tuple) else value


def flatten(config: Any) -> dict[str, Any]:
    """`{"batch.micro": 16, ...}`: what trackers and comparisons want."""
    flat: dict[str, Any] = {}
    for key, value in dataclasses.asdict(config).items():
        if isinstance(value, dict):
            flat |= {f"{key}.{inner}": inner_value for inner, inner_value in value.items()}
        else:
            flat[key] = value
    return flat
