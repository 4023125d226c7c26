"""What a failed run leaves for whoever looks for the cause: the last collectives, and what lay in the card's memory.

torch keeps both; here they are switched on, written into the run directory and named in exit.json.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from train.storage.rundir import RunDir

_COLLECTIVES = "2000"  # that are remembered
_WRITE_S = 10.0  # torch asks the communicators, and one of them may be what hangs


def record_collectives(run: RunDir) -> None:
    """Have torch remember the last collectives. Before the process group exists; what the user has set stands.

    Where NCCL itself finds that one hangs, it writes what it knows beside ours before it ends the process.
    """
    beside = f"{run.path}/flight_recorder.nccl."  # torch appends the rank
    for names, value in (
        (("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE"), _COLLECTIVES),
        (("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"), beside),
        (("TORCH_NCCL_DUMP_ON_TIMEOUT",), "1"),
    ):
        if not any(name in os.environ for name in names):
            # Of the buffer's two names torch warns of the older one, on a CPU too; for the file each torch asks its own.
            os.environ |= dict.fromkeys(names[:1] if value == _COLLECTIVES else names, value)


def write_collectives(run: RunDir) -> None:
    """`flight_recorder.<rank>.json`: the last collectives of this process, the one that did not end among them."""
    if run.met and dist.is_available() and dist.is_initialized():
        thread = threading.Thread(target=_write_collectives, args=(run,), name="flight-recorder", daemon=True)
        thread.start()
        thread.join(_WRITE_S)


def _write_collectives(run: RunDir) -> None:
    torch_c: Any = torch._C._distributed_c10d
    dump = getattr(torch_c, f"_dump_{'nccl' if dist.get_backend() == 'nccl' else 'fr'}_trace_json", None)
    if dump is None:
        return
    path = run.path / f"flight_recorder.{run.rank}.json"
    with contextlib.suppress(OSError, RuntimeError):  # the failure itself is what counts
        path.write_bytes(dump())
        run.aside["flight_recorder"] = path.name


@contextlib.contextmanager
def recorded_memory(run: RunDir) -> Iterator[None]:
    """From here on the card's memory is written down at the moment it runs out, for torch's viewer.

    `memory_snapshot.<rank>.json`, for torch's own file of it runs code when it is read; inside it also tells which line took
    each block, at the price of every allocation.
    """
    path = run.path / f"memory_snapshot.{run.rank}.json"

    def write(*_: int) -> None:  # still inside the allocator: everything lies where it lay
        with contextlib.suppress(OSError, RuntimeError, TypeError):
            path.write_text(json.dumps(torch.cuda.memory._snapshot()), encoding="utf-8")
            run.aside["memory_snapshot"] = path.name

    if attach := getattr(torch._C, "_cuda_attach_out_of_memory_observer", None):  # torch's own, not promised to stay
        attach(write)
    torch.cuda.memory._record_memory_history(stacks="python", max_entries=100_000)
    try:
        yield
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)
