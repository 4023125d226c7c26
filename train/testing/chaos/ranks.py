"""A stage on several gloo processes, forked from this one: the imports are paid once, a launch costs a second.

Stands in for torchrun in fault tests and in kills.py. The children meet over a file store, so no port is needed.
"""

from __future__ import annotations

import datetime
import importlib
import os
import pkgutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from train.base.console import log_to_stderr
from train.base.errors import ExitCode, Halt
from train.base.secrets import mask


def warm_up() -> None:
    """Import all a stage may need, so that forked children find it ready. One thread, or a fork would hang."""
    torch.set_num_threads(1)
    import accelerate
    import diffusers
    import transformers

    import train

    for module in pkgutil.iter_modules(train.__path__):
        if not module.ispkg:
            importlib.import_module(f"train.{module.name}")
    _ = (accelerate.Accelerator, diffusers.UNet2DConditionModel, diffusers.AutoencoderKL)
    _ = (transformers.CLIPTextModel, transformers.CLIPTextModelWithProjection, transformers.CLIPTokenizer)


class Ranks:
    """Owner of the forked processes of one launch of `train/run.py` with `arguments`."""

    def __init__(
        self,
        arguments: Sequence[str],
        folder: Path,
        *,
        world: int = 1,
        env: Mapping[str, str] | None = None,
        timeout_s: float = 30.0,
        store: Callable[[int], dist.Store] | None = None,
    ) -> None:
        """`store`: what a rank meets the others over; a file of its own where none is given."""
        folder.mkdir(parents=True, exist_ok=True)
        self.logs = [folder / f"rank{rank}.log" for rank in range(world)]
        self.codes: list[int | None] = [None] * world
        self.started = time.monotonic()
        path = folder / f"store-{os.getpid()}-{time.monotonic_ns()}"
        store = store or (lambda rank: dist.FileStore(str(path), world))
        sys.stdout.flush()
        sys.stderr.flush()
        self.pids: list[int] = []
        for rank in range(world):
            pid = os.fork()
            if pid == 0:
                _child(arguments, rank, world, store, self.logs[rank], env or {}, timeout_s)
            self.pids.append(pid)

    def send(self, number: int, rank: int | None = None) -> None:
        """Send a signal to one rank, or to every rank still there, as a launcher would."""
        for index, pid in enumerate(self.pids):
            if self.codes[index] is None and rank in (None, index):
                os.kill(pid, number)

    def poll(self) -> bool:
        """Collect what has ended; True when nothing runs any more."""
        for index, pid in enumerate(self.pids):
            if self.codes[index] is None:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    self.codes[index] = os.waitstatus_to_exitcode(status)
        return all(code is not None for code in self.codes)

    def wait(self, timeout_s: float = 300.0) -> list[int]:
        """Exit code per rank, negative for a signal. What still runs after `timeout_s` is killed: an AssertionError."""
        end = time.monotonic() + timeout_s
        while not self.poll():
            if time.monotonic() > end:
                self.send(signal.SIGKILL)
                while not self.poll():
                    time.sleep(0.01)
                raise AssertionError(f"still running after {timeout_s} s: {self.codes}\n{self.text()}")
            time.sleep(0.005)
        return [code for code in self.codes if code is not None]

    def text(self, rank: int | None = None) -> str:
        """What the ranks printed."""
        chosen = self.logs if rank is None else [self.logs[rank]]
        return "\n".join(f"--- {log.name}\n{log.read_text(errors='replace')}" for log in chosen if log.exists())


def _child(
    arguments: Sequence[str], rank: int, world: int, store: Callable[[int], dist.Store], log: Path, env: Mapping[str, str],
    timeout_s: float,
) -> None:  # fmt: skip
    """The whole life of one forked rank; never returns."""
    code = int(ExitCode.UNEXPECTED)
    try:
        fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        os.dup2(fd, 1)
        os.dup2(fd, 2)
        sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
        if world > 1:
            os.environ |= dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank))
            os.environ |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(world))
        os.environ |= env
        log_to_stderr()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        if world > 1:
            dist.init_process_group(
                "gloo", store=store(rank), rank=rank, world_size=world,
                timeout=datetime.timedelta(seconds=timeout_s),
            )  # fmt: skip
        from train import run

        code = run.main(list(arguments))
    except Halt as halt:
        print(f"error: {mask(halt.message)}", file=sys.stderr)
        code = int(halt.code)
    except SystemExit as leave:
        code = leave.code if isinstance(leave.code, int) else 1
    except BaseException:
        print(mask(traceback.format_exc()), file=sys.stderr)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
