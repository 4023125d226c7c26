"""Runs a function on several gloo processes, forked from this one so that nobody pays for imports again."""

from __future__ import annotations

import json
import multiprocessing
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState


def run_ranks(world: int, function: Callable[..., Any], folder: Path, *args: Any, timeout_s: float = 120, joined: bool = True) -> list[Any]:
    """What `function(rank, world, *args)` returned on each of `world` ranks (JSON values); fails with their traces.

    Without `joined` the function makes the process group.
    """
    folder.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("fork")
    children = [
        context.Process(target=_rank, args=(rank, world, function, str(folder), args, joined)) for rank in range(world)
    ]
    for child in children:
        child.start()
    for child in children:
        child.join(timeout_s)
        if child.is_alive():
            child.kill()
            child.join()
    answers = [folder / f"answer.{rank}.json" for rank in range(world)]
    results = [json.loads(path.read_text()) if path.is_file() else {"error": "no answer"} for path in answers]
    errors = [result["error"] for result in results if "error" in result]
    assert not errors, "\n".join(errors)
    return [result["value"] for result in results]


def _rank(rank: int, world: int, function: Callable[..., Any], folder: str, args: tuple[Any, ...], joined: bool) -> None:
    torch.set_num_threads(1)
    AcceleratorState._reset_state(True)  # of a stage that an earlier test ran in the process that this one is forked from
    GradientState._reset_state()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}  # accelerate asks for them, and uses the group that exists
    try:
        if joined:
            store = dist.FileStore(f"{folder}/store", world)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
        result = {"value": function(rank, world, *args)}
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        result = {"error": f"rank {rank}: {traceback.format_exc()}"}
    Path(folder, f"answer.{rank}.json").write_text(json.dumps(result))
    os._exit(0)  # the parent's test machinery must not run its exit handlers here
