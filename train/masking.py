"""Secrets never reach a file or a log: their values are replaced by `***`. Standard library only."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

_SECRET_NAME = re.compile(r"TOKEN|KEY|SECRET|PASSWORD|PASSWD|CREDENTIAL", re.IGNORECASE)
_SECRET_TEXT = (
    re.compile(r"\bhf_[A-Za-z0-9]{8,}"),  # hub tokens
    re.compile(r"(?<![0-9A-Fa-f])[0-9a-f]{40}(?![0-9A-Fa-f])"),  # 40-hex API keys (64-hex hashes stay)
)
_USERINFO = re.compile(r"(\b[a-z][a-z0-9+.-]*://)[^/\s:@]+(:[^/\s@]*)?@", re.IGNORECASE)
_SHORTEST_SECRET = 6  # masking every "1" because SOME_KEY=1 would make logs unreadable


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
