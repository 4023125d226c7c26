"""A source key that its adapter does not read must hold its default."""

from __future__ import annotations

import dataclasses
import re
import typing
from pathlib import Path
from typing import Any

import pytest

from train.base.errors import ExitCode, Halt
from train.config.dataset import SourceConfig, load_settings
from train.config.source_rules import READS

OTHER: dict[str, Any] = {  # a value of each key that is not its default
    "images": "elsewhere", "columns": "{caption: text}", "tag_separator": "' '", "dictionary": "d.csv", "rating_scheme": "sqe",
    "assume_rating": "g", "escaped": "true", "on_bad_tag": "drop", "on_second_separator": "fork", "caption_ext": ".caption",
    "caption_lines": "first", "prose": "none", "keep_tokens": "2", "repeats": "3", "weight": "2", "mask": "alpha", "follow_links": "true", "on_missing_caption": "take",
    "npz_vae": "vae", "class_tokens": "cat",
}  # fmt: skip
ADAPTERS = typing.get_args(typing.get_type_hints(SourceConfig)["adapter"])


@pytest.fixture
def yaml(tmp_path: Path) -> Path:
    (tmp_path / "d.yaml").write_text("name: d\n")
    return tmp_path / "d.yaml"


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(Halt) as stopped:
        load_settings([path], overrides)
    assert stopped.value.code == ExitCode.USAGE
    return stopped.value.message


def test_every_adapter_and_key_is_declared() -> None:
    keys = {field.name for field in dataclasses.fields(SourceConfig)}
    assert set(READS) == set(ADAPTERS)
    assert set().union(*READS.values()) == keys
    assert set(OTHER) | {"name", "adapter", "path"} == keys


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_key_is_read_or_refused(yaml: Path, adapter: str) -> None:
    def override(keys: list[str]) -> str:
        named = {"columns": "{id: id}"} if adapter == "table" else {}
        named |= {"name": "s", "adapter": adapter, "path": "x"} | {key: OTHER[key] for key in keys}
        return f"sources=[{{{', '.join(f'{key}: {value}' for key, value in named.items())}}}]"

    read, unread = ([key for key in OTHER if (key in READS[adapter]) is wanted] for wanted in (True, False))
    assert load_settings([yaml], [override(read)]).sources[0].adapter == adapter
    message = refusal(yaml, override(unread))
    for key in unread:
        readers = ", ".join(reader for reader, keys in READS.items() if key in keys)
        assert re.search(rf"sources s: {key} is [^;]*, which adapter {adapter} does not read: [^;]*\(read by {readers}\)", message)
    assert not [key for key in read if f"sources s: {key} is" in message]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("separator=''", "separator is ''"), ("separator=' '", "separator is ' '"), ("separator='a,b'", "no comma"),
        ('separator="a\\nb"', "no comma, line break"), ("separator='a\\b'", "backslash"), ("separator=' ### '", "without spaces"),
        ("sources.0.keep_tokens=-1", "keep_tokens is -1"),
        ("sources.0.tag_separator=''", "tag_separator is empty"), ("sources.0.tag_separator='|||'", "as separator"),
        ("sources.0.caption_ext=''", "caption_ext is ''"), ("sources.0.caption_ext='*.txt'", "such as .caption"),
        ("sources.0.caption_ext=.json", "ending of metadata"), ("sources.0.caption_ext='a/b'", "such as .caption"),
        ("sources.0.caption_ext=[.txt,.json]", "ending of metadata"), ("sources.0.caption_ext=[]", "an ending at least"),
        ("sources.0.caption_ext=[.txt,3]", "or a list of them"),
    ],
)  # fmt: skip
def test_values_that_mean_nothing(tmp_path: Path, override: str, words: str) -> None:
    source = {"name": "s", "adapter": "sidecar", "path": "x"}
    key, _, value = override.partition("=")
    if key.startswith("sources.0."):
        source[key.removeprefix("sources.0.")] = value
    text = ", ".join(f"{name}: {value}" for name, value in source.items())
    line = "" if key.startswith("sources.0.") else f"{key}: {value}\n"
    (tmp_path / "d.yaml").write_text(f"name: d\n{line}sources: [{{{text}}}]\n")
    assert words in refusal(tmp_path / "d.yaml")


def test_a_default_that_is_written_out_is_no_setting(yaml: Path) -> None:
    assert load_settings([yaml], ["sources=[{name: s, adapter: danbooru, path: x, keep_tokens: 0, caption_ext: null, columns: {}}]"])
