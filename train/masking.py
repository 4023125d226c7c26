"""Secrets never reach a file or a log: their values are replaced by `***`. Standard library only."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from typing import Any

_SECRET_NAME = re.compile(r"TOKEN|KEY|SECRET|PASSWORD|PASSWD|CREDENTIAL", re.IGNORECASE)
_SECRET_TEXT = (
    re.compile(r"\bhf_[A-Za-z0-9]{8,}"),  # hub tokens
    re.compile(r"(?<![0-9A-Fa-f@])[0-9a-f]{40}(?![0-9A-Fa-f])"),  # 40-hex API keys; hashes and name@commit stay
)
_USERINFO = re.compile(r"(\b[a-z][a-z0-9+.-]*://)[^/\s:@]+(:[^/\s@]*)?@", re.IGNORECASE)
_SHORTEST_SECRET = 6  # masking every "1" because SOME_KEY=1 would make logs unreadable
_SHORTEST_IN_SETTINGS = 8  # settings are read again: a path must not be lost because SSH_KEY_DIR holds its beginning


def secret_values(environ: Mapping[str, str] | None = None) -> list[str]:
    """Values of the environment variables whose name marks a secret, the longest first."""
    env = os.environ if environ is None else environ
    found = {v for k, v in env.items() if _SECRET_NAME.search(k) and len(v) >= _SHORTEST_SECRET}
    return sorted(found, key=lambda value: (-len(value), value))


def mask(text: str, environ: Mapping[str, str] | None = None) -> str:
    """`text` with secret values, known token shapes and the userinfo of addresses replaced by `***`."""
    for value in secret_values(environ):
        text = text.replace(value, "***")
    for pattern in _SECRET_TEXT:
        text = pattern.sub("***", text)
    return _USERINFO.sub(r"\1***@", text)


def mask_settings(value: Any, environ: Mapping[str, str] | None = None) -> Any:
    """Settings (text, or JSON values of it) without secrets; what a run needs to be repeated stays readable."""
    if isinstance(value, Mapping):
        return {key: mask_settings(inner, environ) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [mask_settings(inner, environ) for inner in value]
    if not isinstance(value, str):
        return value
    secret = [s for s in secret_values(environ) if len(s) >= _SHORTEST_IN_SETTINGS and "/" not in s]
    return mask(value, {f"SECRET{number}": text for number, text in enumerate(secret)})


class MaskingFilter(logging.Filter):
    """On a logger, or a handler: no record carries a secret."""

    def filter(self, record: logging.LogRecord) -> bool:
        """True: the record is kept, masked."""
        record.msg, record.args = mask(record.getMessage()), ()
        return True
