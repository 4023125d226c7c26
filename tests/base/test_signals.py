"""A stop is a flag; a second Ctrl-C is an end; a launcher's death is a stop."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import preparedset
import pytest

from train.base import signals

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGTERM, "stopped"), (signal.SIGINT, "stopped"), (signal.SIGUSR1, "requeue"), (signal.SIGHUP, "stopped")],
)
def test_handlers_only_set_a_flag(number, status):
    outer = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored, and then respected, when we run under nohup
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)}
    stop = signals.install()
    try:
        assert not stop.asked
        os.kill(os.getpid(), number)
        assert stop.asked
        assert (stop.name, stop.status) == (number.name, status)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.name == number.name  # the first one is the reason
    finally:
        stop.restore()
        left = {n: signal.getsignal(n) for n in before}
        signal.signal(signal.SIGHUP, outer)
    assert left == before


def test_nohup_is_respected():
    old = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop = signals.install()
    os.kill(os.getpid(), signal.SIGHUP)
    assert not stop.asked
    stop.restore()
    signal.signal(signal.SIGHUP, old)


def run_script(script: str, **env: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-u", "-c", script], cwd=ROOT, env={**os.environ, **env}, stdout=subprocess.PIPE, text=True
    )


def test_one_interrupt_delivered_twice_is_one_but_a_later_one_ends_at_once():
    script = """
import time
from train.base import signals
stop = signals.install()
stop.stop_now = lambda: print("bye", flush=True)
print("ready")
while True:
    time.sleep(0.01)
"""
    process = run_script(script)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)  # the launcher's copy of the same Ctrl-C
    time.sleep(signals.SECOND_INTERRUPT_S + 0.2)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(5) == 85
    assert process.stdout.read() == "bye\n"
    process.stdout.close()


CHILD = """
import os, sys, time
from train.base import signals
stop = signals.install(orphan=True)
print(os.getpid(), flush=True)
end = time.monotonic() + 10
while not stop.asked and time.monotonic() < end:
    time.sleep(0.01)
open(sys.argv[1], "w").write(str(stop.name))
"""


@pytest.mark.parametrize(("mark", "expected"), [("ACCELERATE_MIXED_PRECISION", "SIGTERM"), (None, None)])
def test_the_launchers_death_is_a_stop_but_a_shells_is_not(tmp_path, mark, expected):
    launcher = f"""
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-u", "-c", {CHILD!r}, {str(tmp_path / "out")!r}], stdout=subprocess.PIPE)
print(child.stdout.readline().decode(), end="")
time.sleep(60)
"""
    process = run_script(launcher, **({mark: "no"} if mark else {}))
    child = int(process.stdout.readline())
    process.kill()
    process.wait()
    process.stdout.close()
    out = tmp_path / "out"
    deadline = time.monotonic() + 3
    while not out.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    if expected:
        assert out.read_text() == expected
    else:
        assert not out.exists()
        os.kill(child, signal.SIGKILL)


def test_workers_die_of_sigterm_and_survive_ctrl_c():
    script = """
import os, signal, time
from train.base import signals
signals.install()
signals.reset_in_worker()
os.kill(os.getpid(), signal.SIGINT)
print("alive")
os.kill(os.getpid(), signal.SIGTERM)
time.sleep(5)
"""
    process = run_script(script)
    assert process.wait(10) == -signal.SIGTERM
    assert process.stdout.read() == "alive\n"
    process.stdout.close()


def test_grace():
    assert signals.grace_warning(14, 15, 30) is None
    assert "launch.grace_s says 30 s" in signals.grace_warning(14, 17, 30)


SLOW_PREPARE = """
import sys, time, runpy
script = sys.argv.pop(1)
sys.path[0] = script.rpartition("/scripts/")[0]
from train.prepare import probe
real = probe._row
probe._row = lambda *given: (time.sleep(1), real(*given))[1]
sys.argv[0] = script
runpy.run_path(script, run_name="__main__")
"""
LAUNCHER = "import subprocess, sys; sys.exit(subprocess.Popen([sys.executable, '-c', *sys.argv[1:]]).wait())"


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks Linux")
def test_preparation_stops_when_its_launcher_dies(tmp_path: Path) -> None:
    """Not even SIGKILL of the launcher leaves it at work: it stops between two pictures and says so."""
    preparedset.write_posts(tmp_path / "pictures", 40)
    preparedset.prepare(preparedset.settings_of(tmp_path), "ingest")
    command = [
        sys.executable, "-c", LAUNCHER, SLOW_PREPARE, str(ROOT / "scripts" / "prepare.py"), "probe", "--config",
        str(tmp_path / "dataset.yaml"), "name=set", f"root={tmp_path / 'data'}", "seed=5", "workers=0",
    ]  # fmt: skip
    log = tmp_path / "log"
    with open(log, "w") as file:
        launcher = subprocess.Popen(command, env={**os.environ, "ANIX_LAUNCHED": "1"}, stdout=file, stderr=file)
    end = time.monotonic() + 60
    while "probe" not in log.read_text() and time.monotonic() < end:
        assert launcher.poll() is None, log.read_text()
        time.sleep(0.05)
    launcher.kill()
    launcher.wait()
    end = time.monotonic() + 10
    while "stopped by a signal (SIGTERM)" not in log.read_text():
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.05)
