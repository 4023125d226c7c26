"""Nobody listening costs a command nothing: no traceback, no other exit code, and the training goes on."""

from __future__ import annotations

import io
import json
import os
import shlex
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from stages import Stage, result

from train.base.streams import LastingStream

ROOT = Path(__file__).resolve().parents[2]
WAYS = {  # how the command is started: code and stderr of the command stand on descriptor 3
    "reader of both gone": "CMD 2>&1 | true; echo ${PIPESTATUS[0]} >&3",
    "reader of one line": "CMD 2>&1 | head -1 >/dev/null; echo ${PIPESTATUS[0]} >&3",
    "both closed": "CMD >&- 2>&-; echo $? >&3",
    "all closed": "CMD <&- >&- 2>&-; echo $? >&3",
    "stderr full": "CMD >/dev/null 2>/dev/full; echo $? >&3",
}
SPEAKING = "import sys, logging\nfrom train.base.console import ExitCode, Halt, run_cli\n"
MAINS = {  # a command: its exit code
    "def main(): print('x' * 99999); print('y' * 99999, file=sys.stderr); return 0": 0,
    "def main(): logging.getLogger('anix').warning('w' * 99999); raise Halt(ExitCode.MISMATCH, 'm' * 99999)": 7,
    "def main(): raise KeyError('k' * 99999)": 1,
    "def main(): sys.stderr.write('no line end'); return 3": 3,
    "def main():\n import argparse; argparse.ArgumentParser().parse_args(['--help'])": 0,
    "def main():\n import argparse; argparse.ArgumentParser().parse_args(['--nonsense'])": 2,
}


def code_of(way: str, command: list[str]) -> int:
    """Exit code of the command, started that way."""
    reading, writing = os.pipe()
    script = f"exec 3>&{writing}; " + WAYS[way].replace("CMD", shlex.join(command) + " 3>&-")
    subprocess.run(["bash", "-c", script], cwd=ROOT, pass_fds=[writing], capture_output=True, check=False, timeout=120)
    os.close(writing)
    with open(reading) as answer:
        return int(answer.read())


@pytest.mark.parametrize("way", WAYS)
def test_an_exit_code_does_not_depend_on_who_listens(way: str) -> None:
    for main, code in MAINS.items():
        assert code_of(way, [sys.executable, "-c", f"{SPEAKING}{main}\nrun_cli(main)"]) == code, main


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_the_training_goes_on_and_says_the_truth(way: str, dataset: Path, base_model: Path, straight: Path, tmp_path: Path) -> None:
    stage = Stage(tmp_path, dataset, base_model)
    assert code_of(way, [sys.executable, "train/run.py", *stage.arguments()]) == 0
    assert json.loads((stage.output / "exit.json").read_text())["code"] == 0
    assert result(stage.output) == result(straight)


def test_an_answer_that_a_full_disk_swallowed_is_a_failure() -> None:
    line = [sys.executable, str(ROOT / "scripts/show.py"), "buckets"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(line, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, "answer could not be written" in done.stderr) == (8, True), done.stderr


def test_a_descriptor_that_was_closed_never_becomes_a_file_of_ours(tmp_path: Path) -> None:
    """What a library prints to descriptor 2 would otherwise land in the next file that is opened."""
    text = f"{SPEAKING}import os\ndef main():\n fd = os.open({str(tmp_path / 'f')!r}, os.O_WRONLY | os.O_CREAT)\n" \
           " os.write(2, b'stray'); return fd\nrun_cli(main)"  # fmt: skip
    assert code_of("all closed", [sys.executable, "-c", text]) >= 3
    assert (tmp_path / "f").read_bytes() == b""


def test_lines_are_masked_whole_and_threads_do_not_mix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_TOKEN", "canary-in-pieces")
    below = io.StringIO()
    stream = LastingStream(below, masked=True)
    stream.write("sent canary-")
    thread = threading.Thread(target=lambda: stream.write("other\n"))
    thread.start()
    thread.join()
    stream.write("in-pieces\n")
    print("a", "canary-in-pieces", file=stream, end="")
    stream.flush()
    assert below.getvalue() == "other\nsent ***\na ***"


def test_what_others_print_to_stderr_is_masked() -> None:
    text = SPEAKING + "import warnings, os\nos.environ['MY_TOKEN'] = 'canary/with+marks='\n" \
        "def main():\n print('p canary/with+marks=', file=sys.stderr); warnings.warn('w canary%2Fwith%2Bmarks%3D')\n" \
        " logging.getLogger('other').error('l canary/with+marks='); print('\\udcff'); return 0\nrun_cli(main)"  # fmt: skip
    done = subprocess.run([sys.executable, "-c", text], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "\\udcff\n")
    assert done.stderr.count("***") >= 3
    assert "canary" not in done.stderr
