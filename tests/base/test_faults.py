"""The fault hook: off unless asked for, exact when it is."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from train.base import faults
from train.base.errors import ExitCode, Halt
from train.base.faults import Fault, parse

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def no_rank(monkeypatch):
    monkeypatch.delenv("ANIX_FAULT", raising=False)
    monkeypatch.delenv("RANK", raising=False)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("loss@7:1:nan", Fault("loss", 7, 1, "nan", "")),
        ("read@3", Fault("read", 3, None, "raise", "")),
        ("forward@8:*:raise", Fault("forward", 8, None, "raise", "")),
        ("forward@8:*:raise=KeyError", Fault("forward", 8, None, "raise", "KeyError")),
        ("save.write@*:sleep=5", Fault("save.write", None, None, "sleep", "5")),
        ("worker@*:0", Fault("worker", None, 0, "raise", "")),
        ("loss@9:0:scale=100", Fault("loss", 9, 0, "scale", "100")),
        ("reduce@5:1:skip", Fault("reduce", 5, 1, "skip", "")),
    ],
)
def test_grammar(text, expected):
    assert parse(text) == (expected,)


def test_several_are_joined_by_semicolons():
    assert [f.point for f in parse("loss@1:nan; save.begin@*:eio ;")] == ["loss", "save.begin"]


@pytest.mark.parametrize(
    "text",
    [
        "loss", "los@1", "loss@x", "loss@1:2:3:nan", "loss@1:explode", "loss@1:sleep=soon", "@", "loss@--1", "loss@\u00b2",
        "loss@1:sleep=-1", "loss@1:sleep=nan",
    ],
)
def test_nonsense_is_refused(text):
    with pytest.raises(Halt) as caught:
        parse(text)
    assert caught.value.code == ExitCode.USAGE
    assert "ANIX_FAULT" in caught.value.message


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("save.rename@4:nan", "save.rename"), ("forward@1:inf", "forward"), ("optimizer@1:scale=2", "optimizer"),
        ("loss@1:skip", "loss"), ("save.write@*:skip", "save.write"), ("export@3", "export"), ("handoff@1:kill", "handoff"),
    ],
)  # fmt: skip
def test_what_can_never_be_due_is_refused_by_name(text, named, monkeypatch):
    monkeypatch.setenv("ANIX_FAULT", text)
    with pytest.raises(Halt) as caught:
        faults.warn_if_set()
    assert caught.value.code == ExitCode.USAGE
    assert repr(text) in caught.value.message
    assert named in caught.value.message


def test_every_point_is_reached_somewhere():
    text = "".join(path.read_text() for path in (ROOT / "train").rglob("*.py") if path.name != "faults.py")
    for point in faults.POINTS:
        assert f'("{point}"' in text or f'else "{point}"' in text, point


def test_inert_unless_set(capsys):
    assert faults.at("loss", 1) is None
    assert faults.bend("loss", 2.0, 1) == 2.0
    assert faults.skips("reduce", 1) is False
    faults.warn_if_set()
    assert capsys.readouterr().err == ""


def test_step_and_rank_decide(monkeypatch, capsys):
    monkeypatch.setenv("ANIX_FAULT", "loss@7:1:scale=100")
    faults.warn_if_set()
    assert capsys.readouterr().err.count("\n") == 1
    assert faults.bend("loss", 2.0, 7, 1) == 200.0
    assert faults.bend("loss", 2.0, 7, 0) == 2.0
    assert faults.bend("loss", 2.0, 6, 1) == 2.0
    monkeypatch.setenv("RANK", "1")
    assert faults.bend("loss", 2.0, 7) == 200.0


def test_values(monkeypatch):
    for action, check in (("nan", lambda x: x != x), ("inf", lambda x: x == float("inf"))):
        monkeypatch.setenv("ANIX_FAULT", f"loss@*:{action}")
        assert check(faults.bend("loss", 2.0, 3))
    monkeypatch.setenv("ANIX_FAULT", "reduce@*:skip")
    assert faults.skips("reduce", 3)


@pytest.mark.parametrize(
    ("action", "kind"),
    [
        ("raise", RuntimeError), ("raise=KeyError", KeyError), ("raise=OSError", OSError),
        ("raise=os.system", RuntimeError), ("raise=SystemExit", RuntimeError), ("raise=print", RuntimeError),
    ],
)  # fmt: skip
def test_raising_only_builtin_exceptions(monkeypatch, action, kind):
    monkeypatch.setenv("ANIX_FAULT", f"forward@1:{action}")
    with pytest.raises(Exception, match="injected at forward") as caught:
        faults.at("forward", 1)
    assert type(caught.value) is kind


@pytest.mark.parametrize(("action", "number"), [("enospc", errno.ENOSPC), ("eio", errno.EIO)])
def test_errno(monkeypatch, action, number):
    monkeypatch.setenv("ANIX_FAULT", f"save.write@*:{action}")
    with pytest.raises(OSError) as caught:
        faults.at("save.write", 4)
    assert caught.value.errno == number


def test_sleep(monkeypatch):
    monkeypatch.setenv("ANIX_FAULT", "worker@*:sleep=0.05")
    start = time.monotonic()
    faults.at("worker", 1)
    assert time.monotonic() - start >= 0.05


@pytest.mark.parametrize(
    ("action", "code"), [("kill", -signal.SIGKILL), ("term", -signal.SIGTERM), ("exit=9", 9), ("oom", 1)]
)
def test_ends(action, code):
    env = {**os.environ, "ANIX_FAULT": f"clip@2:{action}"}
    script = "from train.base import faults; faults.at('clip', 1); print('alive', flush=True); faults.at('clip', 2)"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (code, "alive\n")
    assert action != "oom" or "MemoryError" in done.stderr
