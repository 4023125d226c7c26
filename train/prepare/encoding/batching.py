"""How many pictures go through a model at once: as configured, or as many as fit, found by going on with half."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar

import torch

from train.base.errors import ExitCode, Halt
from train.prepare.tables.progress import say

AUTO = {"cuda": 64, "cpu": 8}  # to begin with; a card that holds less says so and half is tried
_SIGNS = ("out of memory", "Failed to allocate memory", "ALLOC_FAILED", "bad allocation")  # torch's, onnxruntime's, cuDNN's
Item = TypeVar("Item")
Answer = TypeVar("Answer")


class Batches:
    """Owner of the number for one model, of which `key` names the setting. `size` is what goes on at once from now on."""

    def __init__(self, setting: int | Literal["auto"], key: str, device_type: str) -> None:
        self.key, self.auto = key, setting == "auto"
        self.size = AUTO.get(device_type, AUTO["cpu"]) if setting == "auto" else int(setting)
        self.device_type, self.seen = device_type, 0
        self._started = time.monotonic()

    def through(self, model: Callable[[Sequence[Item]], Sequence[Answer]], items: Sequence[Item]) -> list[Answer]:
        """What `model` answers to each of `items`, at most `size` at once.

        Out of memory with `auto`, half of that many are tried, and all that follow go in such runs. Raises
        Halt(OUT_OF_MEMORY) naming the key where a number is set, or where one picture alone does not fit.
        """
        found: list[Answer] = []
        while len(found) < len(items):
            part = items[len(found) : len(found) + self.size]
            failure = None
            try:
                found += model(part)
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                failure = (f"{error}".splitlines() or [type(error).__name__])[0]
            if failure is not None:  # here, since what was raised holds on to the tensors
                self._halve(len(part), failure)
        self.seen += len(items)
        return found

    def told(self, step: str) -> str:
        """`latents: 1,200 images, 24.1 images/s, 32 at once`."""
        return f"{step}: {self.seen:,} images, {self.seen / max(time.monotonic() - self._started, 1e-9):.1f} images/s, {self.size} at once"

    def _halve(self, tried: int, failure: str) -> None:
        if not self.auto or tried == 1:
            help = f"one alone does not fit: {self.key.split('.')[0]}.device: cpu would" if tried == 1 else f"set {self.key}: auto, or fewer"
            raise Halt(ExitCode.OUT_OF_MEMORY, f"{self.key}: {tried} pictures at once do not fit the memory ({failure}); {help}")
        self.size = max(tried // 2, 1)
        if self.device_type == "cuda":
            torch.cuda.empty_cache()
        say(f"{self.key}: {tried} pictures at once do not fit the memory, going on with {self.size}")


def out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, in the words of torch, onnxruntime, cuDNN or Python."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(sign in f"{error}" for sign in _SIGNS)


def own_device(name: str, rank: int) -> Any:
    """The torch device of one of several processes: `auto` and `cuda` give each its own card where there are cards."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device("cuda", rank % max(torch.cuda.device_count(), 1)) if name == "cuda" else torch.device(name)
