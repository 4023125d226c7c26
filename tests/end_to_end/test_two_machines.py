"""Two machines, as two network namespaces on one disk: what a cut of the line between them does to a run.

Needs root and `ip`. Run with `-m long`; `-s` prints the times. Frames are sent to a hardware address that nobody has: no
side sees its line go down, and nothing is refused.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from train.testing.chaos import kills, world

ROOT = Path(__file__).resolve().parents[2]
DEFAULTS = ("launch.collective_timeout_s=600", "max_updates=20")
SLOW = "forward@*:sleep=0.15"
LIMIT_S = 45.0  # what docs/reliability.md promises


def ip(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["ip", *words], capture_output=True, text=True)


def namespaces_possible() -> bool:
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return False
    possible = ip("netns", "add", "anix-try").returncode == 0
    ip("netns", "del", "anix-try")
    return possible


pytestmark = [
    pytest.mark.long, pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(not namespaces_possible(), reason="needs root and network namespaces"),
]  # fmt: skip


class Machines:
    """Owner of two namespaces and the line between them."""

    def __init__(self) -> None:
        self.names = [f"anix{os.getpid()}{end}" for end in "ab"]
        self.addresses = ["10.77.0.1", "10.77.0.2"]
        for name in self.names:
            assert ip("netns", "add", name).returncode == 0
        one, other = self.names
        made = ip("link", "add", "line", "netns", one, "type", "veth", "peer", "name", "line", "netns", other)
        assert made.returncode == 0, made.stderr
        for name, address in zip(self.names, self.addresses, strict=True):
            for words in (["addr", "add", f"{address}/24", "dev", "line"], ["link", "set", "line", "up"], ["link", "set", "lo", "up"]):
                assert ip("-n", name, *words).returncode == 0
        links = [json.loads(ip("-j", "-n", name, "link", "show", "line").stdout)[0]["address"] for name in self.names]
        self._hardware = links[::-1]

    def _send_to(self, hardware: list[str]) -> None:
        for name, address, where in zip(self.names, self.addresses[::-1], hardware, strict=True):
            done = ip("-n", name, "neigh", "replace", address, "lladdr", where, "dev", "line", "nud", "permanent")
            assert done.returncode == 0, done.stderr

    def cut(self) -> None:
        self._send_to(["02:00:00:00:00:99"] * 2)

    def heal(self) -> None:
        self._send_to(self._hardware)

    def start(self, yaml: Path, output: Path, *settings: str, fault: str = "") -> list[subprocess.Popen[bytes]]:
        """torchrun on both, one process each; neither sees the other's processes."""
        launchers = []
        for rank, name in enumerate(self.names):
            command = [
                "ip", "netns", "exec", name, "unshare", "--pid", "--fork", "--kill-child", "--mount-proc", sys.executable, "-m", "torch.distributed.run", "--nnodes", "2",
                "--nproc_per_node", "1", "--node_rank", str(rank), "--master_addr", self.addresses[0],
                "--master_port", "29533", "train/run.py", "--config", str(yaml), f"output_dir={output}", *settings,
            ]  # fmt: skip
            environment = {
                **os.environ, "GLOO_SOCKET_IFNAME": "line", "ANIX_FAULT": fault, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
            }  # fmt: skip
            with open(output.parent / f"{output.name}.{rank}.log", "w") as log:
                launchers.append(
                    subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True)
                )
        return launchers

    def close(self) -> None:
        for name in self.names:
            ip("netns", "del", name)


@pytest.fixture(scope="module")
def machines() -> Iterator[Machines]:
    made = Machines()
    yield made
    made.close()


@pytest.fixture(scope="module")
def yaml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return world.write_chaos_world(tmp_path_factory.mktemp("machines"))


@pytest.fixture(scope="module")
def straight(yaml: Path) -> Path:
    """The same run by one process."""
    output = yaml.parent / "straight"
    command = [sys.executable, "train/run.py", "--config", str(yaml), f"output_dir={output}", *DEFAULTS]
    subprocess.run(command, cwd=ROOT, check=True, env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"})
    return output


def wait_until(what: str, done: object, launchers: list[subprocess.Popen[bytes]], timeout_s: float) -> float:
    """Seconds until `done()`; what still runs after the time is killed."""
    began = time.monotonic()
    while not done():  # type: ignore[operator]
        if time.monotonic() - began > timeout_s:
            for launcher in launchers:
                if launcher.poll() is None:
                    os.killpg(launcher.pid, signal.SIGKILL)
            raise AssertionError(f"{what}: not after {timeout_s} s")
        time.sleep(0.05)
    return time.monotonic() - began


def ended(launchers: list[subprocess.Popen[bytes]]) -> bool:
    return all(launcher.poll() is not None for launcher in launchers)


def finish(machines: Machines, yaml: Path, output: Path, straight: Path) -> None:
    """The same command again, on both machines: nothing is lost, to the last bit."""
    machines.heal()
    launchers = machines.start(yaml, output, *DEFAULTS)
    wait_until("the restart", lambda: ended(launchers), launchers, 240)
    assert [launcher.returncode for launcher in launchers] == [0, 0]
    assert kills.compare_runs(straight, output) == []


def workers() -> list[int]:
    """Trainers below the launchers, by pid."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if b"train/run.py" in words and b"torch.distributed.run" not in words:
            found.append(int(path.parent.name))
    return found


def test_a_line_cut_for_good_ends_both_sides(machines: Machines, yaml: Path, straight: Path) -> None:
    output = yaml.parent / "cut"
    launchers = machines.start(yaml, output, *DEFAULTS, fault=SLOW)
    wait_until("update 6", lambda: len(kills.metrics(output)) >= 6, launchers, 240)
    machines.cut()
    exits = [output / "exit.json", output / "exit.1.json"]
    taken = [wait_until(file.name, file.is_file, launchers, 90) for file in exits]
    taken[1] += taken[0]
    records = [json.loads(file.read_text()) for file in exits]
    gone = wait_until("the launchers", lambda: ended(launchers), launchers, 400)
    print(f"\ncut for good: {taken[0]:.1f} s {records[0]}\n{taken[1]:.1f} s {records[1]}\nlaunchers gone {gone:.1f} s later")
    assert max(taken) < LIMIT_S
    assert [record["code"] for record in records] == [9, 9]
    assert "rank 1 has not been heard from for 30 s" in records[0]["reason"]
    assert "the machine of rank 0 cannot be reached: no answer for 30 s" in records[1]["reason"]
    assert records[0]["checkpoint"] == f"checkpoints/step-{records[0]['update']:08d}", "the last completed update is saved"
    assert len(kills.metrics(output)) == records[0]["update"]
    finish(machines, yaml, output, straight)


def test_a_cut_of_five_seconds_changes_nothing(machines: Machines, yaml: Path, straight: Path) -> None:
    output = yaml.parent / "short"
    launchers = machines.start(yaml, output, *DEFAULTS, fault=SLOW)
    wait_until("update 6", lambda: len(kills.metrics(output)) >= 6, launchers, 240)
    machines.cut()
    time.sleep(5)
    before = len(kills.metrics(output))
    machines.heal()
    again = wait_until("the next update", lambda: len(kills.metrics(output)) > before, launchers, 60)
    wait_until("the end", lambda: ended(launchers), launchers, 240)
    print(f"\ncut of 5 s: goes on {again:.1f} s after the line is back")
    assert [launcher.returncode for launcher in launchers] == [0, 0]
    assert kills.compare_runs(straight, output) == []


def test_a_remote_process_that_is_killed_is_named_in_seconds(machines: Machines, yaml: Path, straight: Path) -> None:
    output = yaml.parent / "killed"
    before = set(workers())
    launchers = machines.start(yaml, output, *DEFAULTS, fault=SLOW)
    wait_until("update 6", lambda: len(kills.metrics(output)) >= 6, launchers, 240)
    ranks = {int(pid): Path(f"/proc/{pid}/environ").read_bytes() for pid in set(workers()) - before}
    remote = next(pid for pid, environment in ranks.items() if b"\0RANK=1\0" in b"\0" + environment)
    os.kill(remote, signal.SIGKILL)
    taken = wait_until("exit.json", (output / "exit.json").is_file, launchers, 60)
    record = json.loads((output / "exit.json").read_text())
    gone = wait_until("the launchers", lambda: ended(launchers), launchers, 400)
    print(f"\nSIGKILL of the remote process: {taken:.1f} s {record}\nlaunchers gone {gone:.1f} s later")
    assert taken < 10 and record["code"] == 9 and "rank 1" in record["reason"]
    assert record["checkpoint"] == f"checkpoints/step-{record['update']:08d}"
    finish(machines, yaml, output, straight)
