"""A published run in an object store: the same files and the same card as on a page of the hub, at an address of one's own."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from train.base.files import file_sha256
from train.storage.objects import Store
from train.tools.publish.gather import Publication

SENT = "published.json"  # what lies there with which sha256; written after every file, so that a cut start goes on


def send(found: Publication, store: Store) -> str:
    """The store's address, once everything is there; the card goes last. What lies there with the same hash is not sent again.

    Raises Halt: USAGE (no right to write), UNEXPECTED (the store fails, whatever is tried).
    """
    there = _sent(store)
    with tempfile.TemporaryDirectory() as scratch:
        made = Path(scratch) / "made"
        for name in sorted(found.files, key=lambda name: (name == "README.md", name)):
            content = found.files[name]
            if isinstance(content, bytes):
                made.write_bytes(content)
                content = made
            digest = file_sha256(content)
            version = store.version(name)
            if version is None or there.get(name) != [digest, version]:
                store.put(content, name)
                there[name] = [digest, str(store.version(name))]
                made.write_text(json.dumps({"files": there}))
                store.put(made, SENT)
    return store.url


def _sent(store: Store) -> dict[str, list[str]]:
    try:
        found = json.loads(store.read(SENT))["files"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return {}
    return found if isinstance(found, dict) else {}
