"""The process beside a training run that talks to wandb and TensorBoard: `python -m train.observe.outlet_process`.

First line on stdin: the settings as JSON; every further line one message. Answers "ready" or the reason of a
failure on stdout, once. The end of stdin is the end of the run. Started by train/observe/outlets.py alone.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from train.base import streams
from train.base.secrets import mask

INIT_S = 20  # below the time that the training gives this process to become ready
FINISH_S = 25.0


def main() -> int:
    """Serve one run until stdin ends; exit code 1 when an outlet cannot be opened."""
    streams.install()
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the libraries print must not be taken for the answer
    settings = json.loads(sys.stdin.readline())
    try:
        writers = _open_all(settings)
    except Exception as error:
        print(mask(f"{type(error).__name__}: {error}".splitlines()[0]), file=answer, flush=True)
        return 1
    print("ready", file=answer, flush=True)
    answer.close()
    for line in sys.stdin:
        message = json.loads(line)
        for writer in writers:
            writer.write(message)
    # A service that never answers must not keep a finished run's process alive.
    watchdog = threading.Timer(FINISH_S, os._exit, (1,))
    watchdog.daemon = True
    watchdog.start()
    for writer in writers:
        writer.close()
    return 0


def _open_all(settings: Mapping[str, Any]) -> list[Wandb | TensorBoard]:
    writers: list[Wandb | TensorBoard] = []
    if settings["wandb"] != "disabled":
        writers.append(Wandb(settings))
    if settings["tensorboard"]:
        try:
            writers.append(TensorBoard(settings))
        except ImportError:
            if not writers:
                raise ImportError("tensorboard is not installed: pip install tensorboard") from None
            print("WARNING: tensorboard is not installed: pip install tensorboard", file=sys.stderr)
    return writers


class Wandb:
    """One wandb run; a resumed stage continues the same one."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        import wandb

        self._wandb = wandb
        run_dir = Path(settings["run_dir"])
        self._run = wandb.init(
            project=settings["project"],
            name=settings["name"],
            id=_run_id(run_dir),
            resume="allow",
            mode=settings["wandb"],
            dir=str(run_dir),
            config=dict(settings["config"]),
            settings=wandb.Settings(
                init_timeout=INIT_S,
                console="off",
                silent=True,
                save_code=False,
                disable_code=True,
                disable_git=True,
                x_disable_meta=True,  # user name, command line and paths are nobody's business
                x_save_requirements=False,
            ),
        )
        # Own x axis: after a resume the updates go back a little, and wandb drops a falling `step`.
        self._run.define_metric("update")
        self._run.define_metric("*", step_metric="update")
        self._update = 0

    def write(self, message: Mapping[str, Any]) -> None:
        """Send one message."""
        if message["kind"] == "metrics":
            record = flatten(message["record"])
            self._update = record.get("update", self._update)
            self._run.log(record)
        elif message["kind"] == "images":
            # One series per prompt: wandb shows a list of pictures of different sizes wrongly, and says so each time.
            files = [Path(file) for file in message["files"] if os.path.isfile(file)]
            pictures = {f"samples/{file.stem}": self._wandb.Image(str(file)) for file in files}
            self._run.log({**pictures, "update": message["step"]})
        elif message["kind"] == "alert":
            self._run.alert(title="training", text=message["text"])

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


def _run_id(run_dir: Path) -> str:
    """The id kept in the run directory, made at the first start."""
    path = run_dir / "wandb_id.txt"
    if path.is_file():
        return path.read_text().strip()
    made = uuid.uuid4().hex[:12]
    path.write_text(made + "\n")
    return made


class TensorBoard:
    """Event files under `<run>/tensorboard`, written without torch's writer, which would import torch here."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event, self._summary = event_pb2, summary_pb2
        self._writer = EventFileWriter(str(Path(settings["run_dir"]) / "tensorboard"))
        self._update = 0
        for key, value in settings["config"].items():  # flat text: list values are refused as hyper-parameters
            self._text(f"config/{key}", json.dumps(value))

    def write(self, message: Mapping[str, Any]) -> None:
        """Write one message as an event."""
        values = []
        if message["kind"] == "metrics":
            record = flatten(message["record"])
            self._update = record.get("update", self._update)
            for key, value in record.items():
                if isinstance(value, int | float) and key not in ("update", "step"):
                    values.append(self._summary.Summary.Value(tag=key, simple_value=value))
        elif message["kind"] == "images":
            for file in message["files"]:
                if os.path.isfile(file):
                    picture = self._summary.Summary.Image(encoded_image_string=Path(file).read_bytes())
                    values.append(self._summary.Summary.Value(tag=f"samples/{Path(file).stem}", image=picture))
        elif message["kind"] == "alert":
            self._text("alerts", message["text"])
        if values:
            self._add(values, message.get("step", self._update))

    def close(self) -> None:
        """Flush and close the event file."""
        self._writer.close()

    def _text(self, tag: str, text: str) -> None:
        from tensorboard.plugins.text.metadata import create_summary_metadata
        from tensorboard.util.tensor_util import make_tensor_proto

        metadata = create_summary_metadata(display_name=tag, description="")
        tensor = make_tensor_proto([text.encode()])
        self._add([self._summary.Summary.Value(tag=tag, metadata=metadata, tensor=tensor)], self._update)

    def _add(self, values: list[Any], step: int) -> None:
        summary = self._summary.Summary(value=values)
        self._writer.add_event(self._event.Event(wall_time=time.time(), step=step, summary=summary))


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


if __name__ == "__main__":
    sys.exit(main())
