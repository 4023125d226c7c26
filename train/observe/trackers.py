"""wandb and TensorBoard beside a run: for each a bounded queue, and a thread that feeds it.

Whatever happens over there (no network, a hang, a failure), the training neither stops nor waits nor changes a bit:
what is not taken is dropped, counted, and told of at the end; metrics.jsonl holds it all. wandb sends from a service
process of its own (wandb-core), whose end is a failed call here. One thing a thread does not survive: a library that
ends the process it runs in, by os._exit or a crash of its compiled parts. Such a run resumes from its last checkpoint,
with `tracking.wandb=disabled`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from train.base import faults
from train.base.secrets import mask
from train.config.stage import TrackingConfig

log = logging.getLogger("anix")

CLOSE_S = 30.0  # what the end of a run waits for both together
KILL_S = 3.0  # what a thread gets to notice that its service was killed
INIT_S = 20.0  # a wandb that has not answered by then is started again offline
QUEUE_LENGTH = 4096  # messages; at 10 updates/s enough for the start of a tracker
Message = Mapping[str, Any]


class Writer(Protocol):
    """One tracker, open."""

    def write(self, message: Message) -> None:
        """Send one message: `kind` metrics, images or alert."""

    def close(self) -> None:
        """Send what is left, and end."""


class Queued:
    """One tracker at arm's length. `ways` are tried one after the other: what it is called, and what opens it."""

    def __init__(
        self,
        ways: Sequence[tuple[str, Callable[[], Writer]]],
        abort: Callable[[], None] = lambda: None,
        clear: Callable[[], None] = lambda: None,
    ) -> None:
        """`abort` ends what the thread may be waiting for, `clear` removes what a failure left, in the thread."""
        self._ways, self._abort, self._clear = tuple(ways), abort, clear
        self._queue: queue.Queue[Message | None] = queue.Queue(QUEUE_LENGTH)
        self._unsent: Message | None = None
        self._gone = False
        self.dropped = 0
        self._thread = threading.Thread(target=self._run, name=f"tracking {self._ways[0][0]}", daemon=True)
        self._thread.start()

    def put(self, message: Message) -> None:
        """Queue a message, which must not change any more, or drop it: never waits."""
        try:
            if self._gone:
                raise queue.Full
            self._queue.put_nowait(message)
        except queue.Full:
            self.dropped += 1

    def waiting(self) -> int:
        """Messages not yet taken; 0 once the tracker is given up."""
        return 0 if self._gone else self._queue.qsize() + (self._unsent is not None)

    def close(self, deadline: float) -> None:
        """Deliver what is queued until the monotonic time `deadline`, then end the tracker one way or the other."""
        while not self._gone:
            try:
                self._queue.put(None, timeout=0.1)
                break
            except queue.Full:
                if time.monotonic() > deadline:
                    break
        self._thread.join(max(deadline - time.monotonic(), 0.0))
        if self._thread.is_alive():
            self.dropped += self.waiting()
            self._gone = True
            self._abort()
            self._thread.join(KILL_S)
        if self.dropped:
            name = self._ways[0][0]
            log.warning("tracking (%s): %d messages were not delivered; metrics.jsonl is complete", name, self.dropped)

    def _run(self) -> None:
        for number, (name, opened) in enumerate(self._ways):
            try:
                self._serve(opened())
                return
            except BaseException as error:  # nothing that goes wrong here may reach the training, no SystemExit either
                text = f"{type(error).__name__}: {error}".splitlines()[0]
            self._clear()
            if self._gone:  # given up by `close`
                return
            following = self._ways[number + 1][0] if number + 1 < len(self._ways) else "metrics.jsonl alone"
            log.warning("tracking (%s) failed: %s; going on with %s", name, mask(text), following)
        self._gone = True
        self.dropped += self._queue.qsize() + (self._unsent is not None)

    def _serve(self, writer: Writer) -> None:
        while not self._gone:
            if self._unsent is None:
                self._unsent = self._queue.get()
            if self._unsent is None:
                writer.close()
                return
            step = self._unsent.get("record", self._unsent).get("step")
            faults.at("upload" if self._unsent["kind"] == "images" else "track", step)
            writer.write(self._unsent)
            self._unsent = None


def open_trackers(tracking: TrackingConfig, settings: Mapping[str, Any]) -> list[Queued]:
    """What the config asks for beside metrics.jsonl. `settings`: run_dir, project, name, config, all masked."""
    found = []
    if tracking.wandb != "disabled":
        _import("wandb")
        offline = "wandb offline", lambda: Wandb(settings, "offline")
        online = "wandb online", lambda: Wandb(settings, "online")
        found.append(Queued([online if tracking.wandb == "online" else offline, offline], kill_wandb, end_wandb))
    if tracking.tensorboard:
        _import("torch.utils.tensorboard")
        found.append(Queued([("TensorBoard", lambda: TensorBoard(settings))] * 2))  # one that failed is opened again
    return found


def close_trackers(trackers: Sequence[Queued], timeout_s: float | None = None) -> None:
    """Deliver and end all of them within `timeout_s` (CLOSE_S)."""
    deadline = time.monotonic() + (CLOSE_S if timeout_s is None else timeout_s)
    for tracker in trackers:
        tracker.close(deadline)


def _import(name: str) -> None:
    """In the main thread: a data worker forked in the middle of another thread's import could wait for it for ever."""
    with contextlib.suppress(Exception):  # the thread meets it again, and says so
        __import__(name)


class Wandb:
    """One wandb run; a resumed stage continues the same one."""

    def __init__(self, settings: Mapping[str, Any], mode: Literal["online", "offline"]) -> None:
        import wandb

        self._wandb = wandb
        run_dir = Path(settings["run_dir"])
        ending = sys.exit, sys.excepthook
        try:
            self._run = wandb.init(
                project=settings["project"],
                name=settings["name"],
                id=_run_id(run_dir),
                resume="allow",
                mode=mode,
                dir=str(run_dir),
                config=dict(settings["config"]),
                reinit="create_new",
                settings=wandb.Settings(
                    init_timeout=INIT_S,
                    console="off",
                    silent=True,
                    save_code=False,
                    disable_code=True,
                    disable_git=True,
                    x_disable_meta=True,  # user name, command line and paths are nobody's business
                    x_save_requirements=False,
                    stop_fn=_not_stopped,
                ),
            )
        finally:
            sys.exit, sys.excepthook = ending  # wandb hooks both; how a run ends is ours to say
        # Own x axis: after a resume the updates go back a little, and wandb drops a falling `step`.
        self._run.define_metric("update")
        self._run.define_metric("*", step_metric="update")

    def write(self, message: Message) -> None:
        """Send one message."""
        if message["kind"] == "metrics":
            self._run.log(flatten(message["record"]))
        elif message["kind"] == "images":
            # One series per prompt: wandb shows a list of pictures of different sizes wrongly, and says so each time.
            files = [Path(file) for file in message["files"] if os.path.isfile(file)]
            pictures = {f"samples/{file.stem}": self._wandb.Image(str(file)) for file in files}
            self._run.log({**pictures, "update": message["step"]})
        elif message["kind"] == "alert":
            self._run.alert(title="training", text=message["text"])

    def close(self) -> None:
        """Finish the run and its service, which else would be waited for without limit as the process ends."""
        self._run.finish()
        self._wandb.teardown()


def _not_stopped() -> None:
    log.warning("wandb asks for a stop, which it may not: SIGTERM stops the run")


def end_wandb() -> None:
    """wandb without a service, so that the next `init` starts another: one that does not end by itself is killed."""
    killing = threading.Timer(KILL_S, kill_wandb)
    killing.start()
    with contextlib.suppress(BaseException):
        from wandb.sdk import wandb_setup

        service = wandb_setup.singleton()._connection
        try:
            wandb_setup.teardown()
        finally:  # a dead service fails that before anybody waits for it
            kill_wandb()
            service._proc.join()
    killing.cancel()


def kill_wandb() -> None:
    """Kill wandb's service process and its helpers; calls that wait for it end then."""
    import psutil

    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error, OSError):
            if child.name().startswith("wandb-core"):
                os.killpg(child.pid, signal.SIGKILL)  # wandb starts it in a session of its own, away from Ctrl-C


def _run_id(run_dir: Path) -> str:
    """The id kept in the run directory, made at the first start."""
    path = run_dir / "wandb_id.txt"
    if path.is_file():
        return path.read_text().strip()
    made = uuid.uuid4().hex[:12]
    path.write_text(made + "\n")
    return made


class TensorBoard:
    """Event files under `<run>/tensorboard`."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ImportError("tensorboard is not installed: pip install tensorboard") from None
        self._writer = SummaryWriter(str(Path(settings["run_dir"]) / "tensorboard"))
        self._update = 0
        for key, value in settings["config"].items():  # flat text: list values are refused as hyper-parameters
            self._writer.add_text(f"config/{key}", json.dumps(value), 0)

    def write(self, message: Message) -> None:
        """Write one message as events."""
        if message["kind"] == "metrics":
            record = flatten(message["record"])
            self._update = record.get("update", self._update)
            for key, value in record.items():
                if isinstance(value, int | float) and key not in ("update", "step"):
                    self._writer.add_scalar(key, value, self._update)
        elif message["kind"] == "images":
            import numpy as np
            from PIL import Image

            for file in (Path(name) for name in message["files"] if os.path.isfile(name)):
                with Image.open(file) as image:
                    pixels = np.asarray(image.convert("RGB"))
                self._writer.add_image(f"samples/{file.stem}", pixels, message["step"], dataformats="HWC")
        elif message["kind"] == "alert":
            self._writer.add_text("alerts", message["text"], self._update)

    def close(self) -> None:
        """Flush and close the event file."""
        self._writer.close()


def flatten(record: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested objects and lists as `a/b` keys, None left out: {"x": [1, None]} gives {"x/0": 1}."""
    flat: dict[str, Any] = {}
    for key, value in record.items():
        if isinstance(value, list):
            value = {str(number): inner for number, inner in enumerate(value)}
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}/")
        elif value is not None:
            flat[prefix + key] = value
    return flat
