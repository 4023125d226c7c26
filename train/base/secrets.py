"""Secrets never reach a file or a log: their values are replaced by `***`. Standard library only."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

_SECRET_WORDS = "TOKEN|KEY|SECRET|PASSWORD|PASSWD|CREDENTIAL"
_SECRET_NAME = re.compile(_SECRET_WORDS, re.IGNORECASE)
_PLACE_NAME = re.compile(r"(DIR|PATH|FILE|FOLDER|HOME|ROOT)$", re.IGNORECASE)  # SSH_KEY_DIR says where, not what
_SECRET_TEXT = (
    (re.compile(r"\bhf_[A-Za-z0-9]{8,}"), "***"),  # hub tokens
    # 40-hex API keys; hashes, name@commit and the commit in a hub's address stay.
    (re.compile(r"(?<![0-9A-Fa-f@])(?<!/resolve/)[0-9a-f]{40}(?![0-9A-Fa-f])"), "***"),
    (re.compile(r"(\bauthorization[\"']?\s*[:=]\s*[\"']?(?:bearer|basic|token)\s+)[^\s\"',]+", re.IGNORECASE), r"\1***"),
    # An address's query, or what follows an encoded one: ?token=..., &X-Amz-Signature=...
    (re.compile(rf"([?&;][\w.-]{{0,40}}(?:{_SECRET_WORDS}|SIGNATURE)[\w.-]{{0,40}}=)[^&;\s\"'<>]+", re.IGNORECASE), r"\1***"),
)
_SCHEME = r"\b[a-z][a-z0-9+.-]{0,30}"  # bounded, here and below: a long text must not be searched from each of its places
_MORE = r"(?:[^\s/?#@\"'<>]{0,200}@)*"  # a password may hold an @
_USERINFO = (
    re.compile(rf"({_SCHEME}:(?://|\\/\\/))(?:[^/\s:@\\]{{0,200}}(?::[^\s/@]{{0,200}})?)@{_MORE}", re.IGNORECASE),
    # A password may hold a slash, too; a port and a path do not begin one.
    re.compile(rf"({_SCHEME}:(?://|\\/\\/))[^/\s:@\\]{{0,200}}:(?!\d{{1,5}}[\\/?#])[^\s@\"'<>]{{0,200}}@{_MORE}", re.IGNORECASE),
    re.compile(rf"({_SCHEME}%3A%2F%2F)(?:(?!%2F|%40)[^\s&\"'<>]){{0,200}}%40", re.IGNORECASE),
)
_SHORTEST_SECRET = 6  # masking every "1" because SOME_KEY=1 would make logs unreadable
_SHORTEST_IN_SETTINGS = 8  # settings are read again: a word of them must not be lost to a short value
_SHORTEST_LINE = 16  # of a value of many lines, such as a private key, which is printed line by line


def secret_values(environ: Mapping[str, str] | None = None) -> list[str]:
    """Values of the environment variables whose name marks a secret, the longest first."""
    found = set(_secrets(environ).values())
    return sorted(found, key=lambda value: (-len(value), value))


def mask(text: str, environ: Mapping[str, str] | None = None) -> str:
    """`text` with secret values, known token shapes and the userinfo of addresses replaced by `***`.

    A value is found as it is, and as addresses, JSON, Python, YAML and HTML spell its special characters.
    """
    values = secret_values(environ)
    return _masked(text, tuple(values + [line for value in values for line in _lines(value)]))


def mask_settings(value: Any, environ: Mapping[str, str] | None = None) -> Any:
    """Settings (text, or JSON values of it) without secrets; what a run needs to be repeated stays readable."""
    secrets = {v for k, v in _secrets(environ).items() if len(v) >= _SHORTEST_IN_SETTINGS and not _is_place(k, v)}
    return _settings(value, tuple(sorted(secrets, key=lambda secret: (-len(secret), secret))))


def _settings(value: Any, secrets: tuple[str, ...]) -> Any:
    if isinstance(value, Mapping):
        return {key: _settings(inner, secrets) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_settings(inner, secrets) for inner in value]
    return _masked(value, secrets) if isinstance(value, str) else value


def _secrets(environ: Mapping[str, str] | None) -> dict[str, str]:
    env = os.environ if environ is None else environ
    return {k: v for k, v in env.items() if _SECRET_NAME.search(k) and len(v) >= _SHORTEST_SECRET}


def _is_place(name: str, value: str) -> bool:
    """A path that settings may hold as well. A secret may look like one: AWS keys have slashes."""
    return _PLACE_NAME.search(name) is not None or ("/" in value and "\0" not in value and os.path.exists(value))


def _masked(text: str, secrets: tuple[str, ...]) -> str:
    if secrets:
        text = _pattern(secrets).sub("***", text)
    for pattern, kept in _SECRET_TEXT:
        text = pattern.sub(kept, text)
    for pattern in _USERINFO:
        text = pattern.sub(r"\1***@", text)
    return text


def _lines(value: str) -> list[str]:
    lines = [line.strip() for line in value.splitlines()]
    return [line for line in lines if len(line) >= _SHORTEST_LINE] if len(lines) > 1 else []


@lru_cache(maxsize=16)
def _pattern(secrets: tuple[str, ...]) -> re.Pattern[str]:
    """Matches each secret in any spelling, character by character, so that mixed ones are found too."""
    parts = (re.findall(r"\\+|[^\\]", secret) for secret in secrets)
    return re.compile("|".join("".join(_spellings(part) for part in found) for found in parts))


@lru_cache(maxsize=512)
def _spellings(character: str) -> str:
    if character[0] == "\\":  # a run of them, doubled or not: one by one they would be matched in too many ways
        return rf"(?:\\{{{len(character)},{8 * len(character)}}}|(?i:(?:%(?:25){{0,4}}5C){{{len(character)}}}))"
    if character.isascii() and character.isalnum():
        return character
    encoded = character.encode("utf-8", "surrogateescape")
    percent = "".join(f"%(?:25){{0,4}}{byte:02X}" for byte in encoded)
    units = character.encode("utf-16-be", "surrogatepass")
    escapes = "".join(rf"\\{{1,8}}u{units[i : i + 2].hex()}" for i in range(0, len(units), 2))
    code = ord(character)
    ways = [re.escape(character), f"(?i:{percent})", f"(?i:{escapes})", f"&#{code};", f"(?i:&#x0*{code:x};)",
            rf"\\{{1,8}}{re.escape(character)}"]  # fmt: skip
    if code < 256:
        ways.append(rf"(?i:\\{{1,8}}x{code:02x})")
    ways += {
        " ": [r"\+", r"\n +"], "'": ["''"], "\n": [r"\\+n", r"\n\s*"], "\t": [r"\\+t"], "\r": [r"\\+r"],
        "&": ["&amp;"], "<": ["&lt;"], ">": ["&gt;"], '"': ["&quot;"],
    }.get(character, [])  # fmt: skip
    # The longest first: a way that is the beginning of another must not end the match inside it.
    return "(?:" + "|".join(sorted(ways, key=len, reverse=True)) + ")"


class MaskingFilter(logging.Filter):
    """On a logger, or a handler: no record carries a secret."""

    def filter(self, record: logging.LogRecord) -> bool:
        """True: the record is kept, masked."""
        record.msg, record.args = mask(record.getMessage()), ()
        return True
