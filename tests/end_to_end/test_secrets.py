"""R12: canaries in the environment and in settings appear in no byte that a run writes, its logs and exports included."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
import time
from html import escape
from pathlib import Path
from urllib.parse import quote, quote_plus

import pytest
from lab import Lab
from omegaconf import OmegaConf

from train.base import secrets
from train.base.secrets import MaskingFilter, mask, mask_settings

ROOT = Path(__file__).resolve().parents[2]
HEX40 = "c0ffee" * 6 + "beef"
ENVIRONMENT = {  # name: canary
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567", "HF_TOKEN": "hf_CanaryCanaryCanary",
    "AWS_SECRET_ACCESS_KEY": "canary/K7MDENG+bPxRfiCY/EXAMPLE=", "MY_SECRET": "canary-of-my-secret", "DB_PASSWORD": "canary/with/slashes", "AWS_CREDENTIALS": "canary-aws-9",
}  # fmt: skip
IN_SETTINGS = {  # key: (value, canary)
    "tracking.name": ("run of hf_SettingsCanary123", "hf_SettingsCanary123"),
    "tracking.project": ("https://user:canaryuserinfo@example.org/p", "canaryuserinfo"),
    "export.author": (f"key {HEX40}", HEX40),
    "export.description": ("my canary-of-my-secret", "canary-of-my-secret"),
    "export.title": ("key canary/K7MDENG+bPxRfiCY/EXAMPLE=, canary%2FK7MDENG%2BbPxRfiCY%2FEXAMPLE%3D", "K7MDENG"),
}
CANARIES = [*ENVIRONMENT.values(), *(canary for _, canary in IN_SETTINGS.values())]


def leaks(folder: Path) -> list[tuple[str, str]]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    return [(path.name, canary) for path in files for canary in CANARIES if canary.encode() in path.read_bytes()]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_no_canary_in_any_byte_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lab = Lab(tmp_path / "lab")
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    settings = [f"{key}='{value}'" for key, (value, _) in IN_SETTINGS.items()]
    more = (*settings, "tracking.wandb=offline", "max_updates=6")
    # A failure whose text holds secrets, a stop, a resume with other values in the environment, the end.
    text = "https://me:canaryuserinfo@example.org hf_CanaryCanaryCanary"
    monkeypatch.setattr("train.engine.handoff.open_source", raising(text, lab))
    assert lab.run("leaky", *more, world=1) == [1]
    assert "Traceback" in lab.last.text()
    assert "https://***@example.org" in lab.last.text()
    assert "https://***@example.org" in lab.exit("leaky")["reason"]
    monkeypatch.undo()
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    assert lab.run("leaky", *more, world=2, fault="control@2:term") == [85, 85], lab.last.text()
    monkeypatch.setenv("MY_SECRET", "another-secret-altogether")
    assert lab.run("leaky", *more, f"model.init_from={text}") == [2], lab.last.text()
    monkeypatch.setenv("MY_SECRET", ENVIRONMENT["MY_SECRET"])
    assert lab.run("leaky", *more) == [0], lab.last.text()
    for folder in (lab.folder / "leaky", lab.folder / "logs-leaky"):
        assert leaks(folder) == []
    state = json.loads(next((lab.folder / "leaky/checkpoints").glob("step-00000006/state.json")).read_text())
    assert state["config"]["tracking.name"] == "run of ***"
    assert (lab.folder / "leaky/model/training.yaml").is_file()


def raising(text: str, lab: Lab):
    def open_source(*_: object, **__: object) -> None:
        raise ConnectionError(text)

    return open_source


def test_an_unexpected_traceback_is_masked(tmp_path: Path) -> None:
    code = (
        "from train.base.console import run_cli\n"
        "def main(): raise KeyError('hf_CanaryCanaryCanary', 'ftp://u:canaryuserinfo@h')\n"
        "run_cli(main)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "KeyError" in done.stderr
    assert "hf_Canary" not in done.stderr
    assert "canaryuserinfo" not in done.stderr


def test_log_records_are_masked() -> None:
    record = logging.LogRecord("anix", logging.WARNING, "f", 1, "sent %s to %s", ("hf_CanaryCanary", "here"), None)
    assert MaskingFilter().filter(record)
    assert record.getMessage() == "sent *** to here"


AWS = "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLE+KEY="  # the documented example of its kind
ODD = 'a"b\\c\nd&e ü/=+%5'


@pytest.mark.parametrize("secret", [AWS, ODD, "\\" * 40 + "x", "#'?;:@!$()*[],<>{}|^`~"], ids=["aws", "odd", "backslashes", "marks"])
def test_a_secret_is_found_however_it_is_spelled(secret: str) -> None:
    environment = {"SOME_SECRET": secret}
    once = quote(secret, safe="")
    spelled = {
        "plain": secret, "quoted": once, "path": quote(secret), "plus": quote_plus(secret), "twice": quote(once, safe=""),
        "lower": re.sub("%..", lambda found: found.group().lower(), once), "json": json.dumps(secret),
        "json text": json.dumps(secret, ensure_ascii=False), "json in json": json.dumps(json.dumps(secret)),
        "slashes": json.dumps(secret).replace("/", "\\/"), "repr": repr(secret), "ascii": ascii(secret), "html": escape(secret),
        "escaped": secret.replace("/", "\\u002f").replace("+", "\\u002B"), "yaml": OmegaConf.to_yaml({"a": secret}),
        "mixed": secret.replace("/", "%2F", 1).replace("=", "\\u003d", 1),
    }  # fmt: skip
    for how, text in spelled.items():
        masked = mask(f"before {text} after", environment)
        assert "***" in masked, how
        assert len(masked) < len("before  after") + 12, (how, masked)
    started = time.monotonic()
    for long in ("\\" * 20_000 + "%25" * 20_000, "a." * 50_000, "http://" * 10_000, "&" + "token" * 20_000):
        mask(long, environment)
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(("address", "shown"), [
    (f"s3://AKIA:{AWS}@host/x", "s3://***@host/x"), ("https://user:pa/ss@host/x", "https://***@host/x"),
    ("https://user:pa@ss@host/x", "https://***@host/x"), ("https://:tok@host", "https://***@host"),
    ("redis://:p/a/s/s@h:1/0", "redis://***@h:1/0"), ("https:\\/\\/user:pw@host\\/x", "https:\\/\\/***@host\\/x"),
    ("https%3A%2F%2Fuser%3Apw%40host%2Fx", "https%3A%2F%2F***@host%2Fx"),
    ("https://h/x?token=abc/def+g=&page=2", "https://h/x?token=***&page=2"),
    ("https://h/x?a=1&X-Amz-Signature=0a1b2c", "https://h/x?a=1&X-Amz-Signature=***"),
    ("Authorization: Bearer abc/def+g=", "Authorization: Bearer ***"),
    ("http://localhost:8080/a@v2", "http://localhost:8080/a@v2"), ("https://example.org/@someone", "https://example.org/@someone"),
    ("https://h/x?page=2", "https://h/x?page=2"), ("owner/name@main", "owner/name@main"),
])  # fmt: skip
def test_addresses(address: str, shown: str) -> None:
    assert mask(f"see {address} there", {}) == f"see {shown} there"


def test_a_secret_with_slashes_is_masked_in_settings_and_a_path_is_not(tmp_path: Path) -> None:
    environment = {"AWS_SECRET_ACCESS_KEY": AWS, "KEYSTORE": str(tmp_path), "TOKEN_FILE": "secrets/token"}
    settings = {"title": f"my {AWS}", "path": f"{tmp_path}/set", "file": "secrets/token"}
    assert mask_settings(settings, environment) == {**settings, "title": "my ***"}


def test_a_key_of_many_lines_is_found_line_by_line() -> None:
    key = "-----BEGIN A KEY-----\nMIIEvQIBADANBgkq\nhkiG9w0BAQEFAASC\n-----END A KEY-----\n"
    assert mask("line 2: MIIEvQIBADANBgkq", {"MY_PRIVATE_KEY": key}) == "line 2: ***"


def test_settings_keep_what_a_run_needs_to_be_repeated() -> None:
    environment = {"SSH_KEY_DIR": "/data/pictures", "KEYBOARD": "us-intl", "API_KEY": "canary-1234"}
    settings = {"init_from": f"owner/model@{HEX40}", "path": "/data/pictures/set", "layout": "us-intl", "n": 3}
    assert mask_settings(settings, environment) == settings
    assert mask_settings(["canary-1234", HEX40], environment) == ["***", "***"]
    assert mask(f"see owner/model@{HEX40}", {}) == f"see owner/model@{HEX40}"
    assert secrets.secret_values({"A_TOKEN": "x", "B_TOKEN": "longer-one", "C_TOKEN": "longest-one"})[0] == "longest-one"
