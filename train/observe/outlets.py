"""wandb and TensorBoard at arm's length: a bounded queue, a thread that feeds it to a process of its own.

Whatever happens over there (no network, a hang, a kill), the training neither stops nor waits nor changes a bit.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from train.base import faults
from train.base.secrets import mask
from train.config.stage import TrackingConfig

log = logging.getLogger("anix")

READY_S = 30.0  # an outlet that is not ready by then is started again offline
CLOSE_S = 30.0  # what the end of a run waits for the outlets
QUEUE_LENGTH = 4096  # messages; at 10 updates/s enough for the start of an outlet


def outlet_modes(tracking: TrackingConfig) -> tuple[str, ...]:
    """wandb modes to try one after the other; empty when nothing but metrics.jsonl is asked for."""
    alone = ("disabled",) if tracking.tensorboard else ()  # a wandb that cannot run costs TensorBoard nothing
    if tracking.wandb == "online":
        return ("online", "offline", *alone)
    if tracking.wandb == "offline":
        return ("offline", "offline", *alone)  # a killed outlet is started once more
    return ("disabled", "disabled") if tracking.tensorboard else ()


class Outlet:
    """Feeds the outlet process from a thread. `put` never blocks: a full queue drops the message and counts it."""

    def __init__(self, settings: Mapping[str, Any], modes: Sequence[str], *, ready_s: float | None = None) -> None:
        self._settings = dict(settings)
        self._modes = tuple(modes)
        self._ready_s = READY_S if ready_s is None else ready_s
        self._queue: queue.Queue[tuple[int | None, str] | None] = queue.Queue(QUEUE_LENGTH)
        self._unsent: tuple[int | None, str] | None = None
        self._child: subprocess.Popen[bytes] | None = None
        self._gone = False
        self.dropped = 0
        self._thread = threading.Thread(target=self._run, name="tracking", daemon=True)
        self._thread.start()

    def put(self, message: Mapping[str, Any]) -> None:
        """Queue a message for the outlets, or drop it."""
        if self._gone:
            self.dropped += 1
            return
        try:
            step = message.get("record", message).get("step")
            self._queue.put_nowait((step, json.dumps(message)))
        except queue.Full:
            self.dropped += 1

    def waiting(self) -> int:
        """Messages not yet handed to the outlet process; 0 once it is given up."""
        return 0 if self._gone else self._queue.qsize() + (self._unsent is not None)

    def close(self, timeout_s: float | None = None) -> None:
        """Deliver what is queued within `timeout_s` (CLOSE_S), then end the outlet process one way or the other."""
        deadline = time.monotonic() + (CLOSE_S if timeout_s is None else timeout_s)
        while not self._gone:
            try:
                self._queue.put(None, timeout=0.1)
                break
            except queue.Full:
                if time.monotonic() > deadline:
                    break
        self._thread.join(max(deadline - time.monotonic(), 0.0))
        self._kill()
        if self.dropped:
            log.warning("tracking: %d messages were not delivered; metrics.jsonl is complete", self.dropped)

    def _run(self) -> None:
        for number, mode in enumerate(self._modes):
            try:
                reason = self._serve(mode)
            except Exception as error:  # nothing that goes wrong here may reach the training
                reason = f"{type(error).__name__}: {error}"
            self._kill()
            if reason is None:
                return
            following = self._modes[number + 1] if number + 1 < len(self._modes) else None
            next_text = f"going on with {_told(following)}"
            log.warning("tracking (wandb %s) failed: %s; %s", mode, mask(reason), next_text)
        self._gone = True

    def _serve(self, mode: str) -> str | None:
        """Run one outlet process to the end of the queue; None, or the reason why it failed."""
        child = _start_child(self._settings | {"wandb": mode})
        self._child = child
        assert child.stdin is not None
        assert child.stdout is not None
        answer = _first_line(child.stdout, self._ready_s)
        if answer != "ready":
            return answer or _silence(child, self._ready_s)
        while True:
            if self._unsent is None:
                message = self._queue.get()
                if message is None:
                    child.stdin.close()
                    child.wait()
                    return None
                self._unsent = message
            step, line = self._unsent
            pictures = line.startswith('{"kind": "images"')
            faults.at("upload" if pictures else "track", step)
            try:
                child.stdin.write(line.encode() + b"\n")
                child.stdin.flush()
            except OSError:
                return f"its process ended (code {child.poll()})"
            self._unsent = None

    def _kill(self) -> None:
        child = self._child
        if child is not None and child.poll() is None:
            try:
                os.killpg(child.pid, signal.SIGKILL)  # its own session: wandb's helper processes go too
            except OSError as error:
                log.debug("outlet process: %s", error)
            child.wait()
        for pipe in (child.stdout, child.stdin) if child else ():
            try:
                if pipe:
                    pipe.close()
            except OSError as error:  # what was still buffered for a dead process
                log.debug("outlet process: %s", error)


def _told(mode: str | None) -> str:
    return {None: "metrics.jsonl alone", "disabled": "TensorBoard alone"}.get(mode, f"wandb {mode}")


def _silence(child: subprocess.Popen[bytes], ready_s: float) -> str:
    """Why a process gave no answer: it ended, or it took too long."""
    try:
        return f"its process ended (code {child.wait(1.0)})"
    except subprocess.TimeoutExpired:
        return f"no answer within {ready_s:.0f} s"


def _start_child(settings: Mapping[str, Any]) -> subprocess.Popen[bytes]:
    # A session of its own: Ctrl-C at the terminal stops the training, which then closes the outlet in order.
    child = subprocess.Popen(
        [sys.executable, "-m", "train.observe.outlet_process"],
        cwd=Path(__file__).resolve().parents[2],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert child.stdin is not None
    try:
        child.stdin.write(json.dumps(settings).encode() + b"\n")
        child.stdin.flush()
    except OSError as error:
        log.debug("outlet process: %s", error)  # its end is noticed when no answer comes
    return child


def _first_line(pipe: IO[bytes], timeout_s: float) -> str:
    """The first line a process prints, "" when it prints none in time or ends."""
    deadline = time.monotonic() + timeout_s
    data = b""
    while b"\n" not in data:
        ready, _, _ = select.select([pipe], [], [], max(deadline - time.monotonic(), 0.0))
        piece = os.read(pipe.fileno(), 4096) if ready else b""
        if not piece:
            break
        data += piece
    return data.partition(b"\n")[0].decode(errors="replace")
