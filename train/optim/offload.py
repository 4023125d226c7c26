"""Masters in host memory: fp32 weights, gradients and optimizer state lie there; the card holds what autocast would make.

The working copy is 16-bit where autocast casts (linear and convolution layers) and fp32 where it does not, so forward and
backward compute what they compute over fp32 weights. A parameter's gradient leaves as its accumulation ends and adds up in
fp32 in host memory over parts and tiles, as autocast's own cast adds it to an fp32 weight's; then the card's is forgotten.
Clipping, step and average see the masters alone. One process: each would need the host memory again.

On a card copies run beside the computing, on a stream of their own through page-locked memory: gradients of a block while
the block before it runs backward, weights of the next block while one runs forward (`Lane`). After a backward every
gradient has arrived; a block waits for its own weights. Never run on a card yet.
"""

from __future__ import annotations

import math
import queue
import threading
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import nn

from train.recipe.optimizer_state import state_bytes

CASTS = (nn.Linear, nn.Conv2d)  # layers whose weights and biases autocast turns into 16 bit
UNITS = ("Transformer2DModel", "ResnetBlock2D", "CLIPEncoderLayer")  # class names of what waits for its weights at once
HOST = torch.device("cpu")
IN_FLIGHT = 8  # gradients on their way: at most so many more lie on the card, and in page-locked memory


def beside(device: torch.device) -> bool:
    """Whether copies run beside the computing: where the two do not share memory."""
    return device.type == "cuda"


class Lane:
    """Owner of a thread that does what it is given, in order. A failure is raised to whoever waits for the end of it."""

    def __init__(self) -> None:
        self.failure: BaseException | None = None
        self._jobs: queue.Queue[Callable[[], None]] = queue.Queue(IN_FLIGHT)
        threading.Thread(target=self._work, name="offload", daemon=True).start()

    def put(self, job: Callable[[], None]) -> None:
        """Do `job` after all that came before; waits while too many do."""
        self._jobs.put(job)

    def drain(self) -> None:
        """Return when all is done. Raises what a job raised."""
        self._jobs.join()
        self.check()

    def check(self) -> None:
        """Raises what a job raised."""
        if self.failure is not None:
            raise RuntimeError(f"optimizer.offload: a copy between host and card failed: {self.failure}") from self.failure

    def _work(self) -> None:
        while True:
            job = self._jobs.get()
            try:
                if self.failure is None:
                    job()
            except BaseException as failure:  # told by `check`; whoever waits for the queue must come back
                self.failure = failure
            finally:
                self._jobs.task_done()


class HostMasters:
    """Owner of the fp32 weights of `trained` by name, whose places in `networks` working copies on `device` take."""

    group = None  # every tensor is whole, as `optim.zero1.Shares` says it

    def __init__(self, networks: nn.Module, trained: Mapping[str, nn.Parameter], device: torch.device, dtype: torch.dtype) -> None:
        self.parameters, self.device = dict(trained), device
        self.working: dict[str, nn.Parameter] = {}
        self._sums: dict[str, torch.Tensor] = {}  # kept from update to update: 13.5 GB are not asked for anew each time
        self._lane = Lane() if beside(device) else None
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._units: dict[str, list[str]] = {"": []}  # "" has what belongs to no block, and arrives first
        self._left: dict[str, None] = {}  # units as their last gradients left: the forward's order, backwards
        self._arriving: dict[str, threading.Event] = {}  # weights on their way
        self._arrived: dict[str, torch.cuda.Event] = {}
        names = {id(master): name for name, master in trained.items()}
        for module_name, module in networks.named_modules():
            if type(module).__name__ in UNITS:
                self._units[module_name] = []
                self._wait_before(module, module_name)
            for inner, master in list(module._parameters.items()):
                if master is not None and id(master) in names:
                    kind = dtype if isinstance(module, CASTS) else torch.float32
                    module._parameters[inner] = self._copy_of(names[id(master)], master, kind, module_name)
        for child in networks.children():  # whoever reads one of their tensors runs one of them first
            self._wait_before(child, "")

    def _copy_of(self, name: str, master: nn.Parameter, kind: torch.dtype, module: str) -> nn.Parameter:
        unit = max((unit for unit in self._units if f"{module}.".startswith(f"{unit}.")), key=len, default="")
        self._units[unit].append(name)
        self.working[name] = working = nn.Parameter(master.detach().to(self.device, kind, copy=True))
        working.register_post_accumulate_grad_hook(lambda p: self._leaves(name, unit, p))
        return working

    def mine(self, parameters: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
        """The masters of these working copies, in their order: what the optimizer holds."""
        return {name: self.parameters[name] for name in parameters}

    def pending_bytes(self, optimizer: str) -> int:
        """Host memory that the first update takes: gradients and the state of `optimizer`."""
        shapes = [tuple(master.shape) for master in self.parameters.values()]
        return sum(4 * math.prod(shape) for shape in shapes) + state_bytes(optimizer, shapes)

    @torch.no_grad()
    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take over a checkpoint's weights, and give them to the working copies. Raises KeyError for a missing name."""
        for name, master in self.parameters.items():
            master.copy_(tensors[name])
        self.follow()

    # --- weights ------------------------------------------------------------------------------------

    @torch.no_grad()
    def follow(self) -> None:
        """Working copies become the masters' values, rounded as autocast rounds; beside a card when they are needed."""
        order = ["", *(unit for unit in reversed(self._left) if unit), *(unit for unit in self._units if unit and unit not in self._left)]
        if self._lane is None:
            for name, working in self.working.items():
                working.copy_(self.parameters[name])
            return
        self._arriving = {unit: threading.Event() for unit in order}
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self.device))  # the weights of before are still read
        self._lane.put(partial(self._send, order, dict(self._arriving)))

    @torch.no_grad()
    def _send(self, order: list[str], arriving: Mapping[str, threading.Event]) -> None:
        last: torch.cuda.Event | None = None
        try:
            with torch.cuda.stream(self._stream):  # None: a no-op
                for unit in order:
                    for name in self._units[unit]:
                        working = self.working[name]
                        staged = torch.empty(working.shape, dtype=working.dtype, pin_memory=self._stream is not None)
                        working.copy_(staged.copy_(self.parameters[name]), non_blocking=True)
                    if self._stream is not None:
                        self._arrived[unit] = self._stream.record_event()
                        if last is not None:
                            last.synchronize()  # two units lie in page-locked memory, not all
                        last = self._arrived[unit]
                    arriving[unit].set()
        finally:
            for waited in arriving.values():
                waited.set()

    def _wait_before(self, module: nn.Module, unit: str) -> None:
        if self._lane is not None:  # a function of its own: a copy of the networks must not copy this owner
            module.register_forward_pre_hook(lambda module, args: self._wait(unit))

    def _wait(self, unit: str) -> None:
        if (arriving := self._arriving.get(unit)) is None or self._lane is None:
            return
        arriving.wait()
        self._lane.check()
        if unit in self._arrived:
            torch.cuda.current_stream(self.device).wait_event(self._arrived[unit])
        self._arriving.pop(unit, None)

    # --- gradients ----------------------------------------------------------------------------------

    @torch.no_grad()
    def _leaves(self, name: str, unit: str, working: torch.Tensor) -> None:
        """Send a gradient that is ready to its master's and forget it where it was made."""
        gradient, working.grad = working.grad, None
        assert gradient is not None
        if self._lane is None:
            self._add(name, gradient)
            return
        self._left.pop(unit, None)
        self._left[unit] = None
        ready = None
        if self._stream is not None:
            staged = torch.empty(gradient.shape, dtype=gradient.dtype, pin_memory=True)
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self._stream):
                staged.copy_(gradient, non_blocking=True)
                ready = self._stream.record_event()
            gradient.record_stream(self._stream)  # its memory is not given to another before it was read
            gradient = staged
        self._lane.put(partial(self._add, name, gradient, ready))
        # At the end of this backward, so that its caller finds every gradient where it belongs.
        torch.autograd.Variable._execution_engine.queue_callback(self._lane.drain)

    @torch.no_grad()
    def _add(self, name: str, gradient: torch.Tensor, ready: torch.cuda.Event | None = None) -> None:
        """Add to the master's in fp32, once it is `ready`."""
        if ready is not None:
            ready.synchronize()
        master = self.parameters[name]
        if master.grad is not None:
            master.grad.add_(gradient.to(master.device))
        else:
            if name not in self._sums:
                self._sums[name] = torch.empty_like(master)
            master.grad = self._sums[name].copy_(gradient)
