"""Rows A4 to A6 and A10 of benchmark A: what our loop adds to bare training, host synchronisations, stalls around a
save, and what the host spends on launching an optimizer's step."""

from __future__ import annotations

import contextlib
import copy
import math
import statistics
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from train.base import signals
from train.config.stage import CheckpointConfig, OptimizerConfig, load_stage
from train.data.shards import write_shard
from train.diffusion.objective import image_losses
from train.engine import handoff, processes, setup
from train.engine import session as sessions
from train.engine.loop import run_updates
from train.engine.session import Session
from train.engine.step import TileBackward
from train.optim import optimizers
from train.storage.checkpoint import Progress
from train.storage.rundir import open_run_dir
from train.storage.saver import Saver, SaveReport
from train.testing.counts import SDXL_UNET
from train.testing.references import write_index
from train.testing.timing import Timing, interleave, lasting, row
from train.tools.tiny.model import write_model

ROOT = Path(__file__).resolve().parents[2]
IMAGES, MICRO, TILES, BUCKET = 480, 16, 3, (128, 128)
UPDATES_PER_ROUND, WARM_UPDATES = 6, 5
STATE_BYTES = 1_000_000_000
MAX_WRITE_S = 120.0
SAVERS, QUIET_UPDATES = 3, 8
SMALL_BATCH = ("batch.micro=2", "batch.effective=6")  # where only the kind of work counts
_SYNCING = ("tolist", "numpy", "cpu", "item", "__repr__", "__bool__", "__float__", "__int__", "__index__")


# Of the tiny stages' previews and held-out losses, which a measurement must not meet.
NOTHING_SHOWN = ("sampling.every_steps=0", "sampling.at_start=false", "validation.every_steps=0", "validation.at_start=false",
                 "validation.share=0", "validation.select=null")  # fmt: skip


@contextlib.contextmanager
def tiny_session(folder: Path, *overrides: str) -> Iterator[Session]:
    """A real stage on the tiny SDXL over synthetic latents of 16x16."""
    torch.manual_seed(0)
    write_model(folder / "model")
    write_index(folder / "data", IMAGES, [("latents.safetensors", IMAGES)], BUCKET)
    write_shard(folder / "data" / "latents.safetensors", torch.randn(IMAGES, 4, 16, 16).half(), {})
    config = load_stage(
        [ROOT / "configs" / "tiny" / "pretrain.yaml"],
        [
            f"output_dir={folder / 'run'}", f"model.init_from={folder / 'model'}", f"data.path={folder / 'data'}",
            "data.select=bench", f"batch.micro={MICRO}", f"batch.effective={MICRO * TILES}", "epochs=1000",
            "schedule.cycles=10", "schedule.cycle_steps=100000", "checkpoint.every_steps=1000000",
            *NOTHING_SHOWN, *overrides,
        ],
    )  # fmt: skip
    run = open_run_dir(config.output_dir, config.stage)
    machine = setup.open_machine(config.batch, config.launch)
    with contextlib.closing(run), processes.watching(machine.place.rank, machine.place.world) as watch:
        source, components = handoff.open_source(config.origin)
        data = setup.open_data(config.images, source)
        model = setup.open_model(config.running, config.objective, machine, data.plan, source, components)
        running = sessions.open_session(config.owners, run, signals.StopFlag(), machine, data, model, watch)
        with sessions.closing(running):
            yield running


def advance(session: Session, updates: int) -> None:
    """Run that many updates of the real loop, with a checkpoint due at none of them."""
    session.run.last_step = session.run.progress.step + updates + 1  # the loop saves at the true last step only
    goal = session.run.progress.step + updates
    session.run.last_step = goal
    run_updates(session)


def bare_update(session: Session, batches: list[Any]) -> None:
    """The same tiles forward, backward, clip and step: no data, plan, learning rate, checks or log."""
    for parameter in session.trained.gradients.parameters:
        parameter.grad = None
    for batch in batches:
        losses_B = image_losses(session.trained.gradients.model, batch, session.trained.diffusion)
        (losses_B.sum() / (MICRO * TILES)).backward()
    optimizers.clip_grad_norm(session.trained.gradients.parameters, session.trained.max_grad_norm)
    session.trained.optimizer.step()


def loop_row(folder: Path, repeats: int) -> dict[str, Any]:
    """A4: our update against the bare one, in turn; the difference is the median over the turns.

    A shared machine changes its speed by half within seconds, which medians of each side keep and differences lose.
    A repeat of the row is a round of turns.
    """
    with tiny_session(folder) as session:
        dataset = session.data.loader.dataset
        batches = [dataset[0, number] for number in range(TILES)]
        advance(session, WARM_UPDATES)
        timings = {"ours": Timing(), "bare": Timing()}
        sides = {"ours": lambda: advance(session, 1), "bare": lambda: bare_update(session, batches)}
        for _ in range(repeats * UPDATES_PER_ROUND):
            for name, run in sides.items():
                wall, cpu = time.perf_counter(), time.process_time()
                run()
                timings[name].wall_s.append(time.perf_counter() - wall)
                timings[name].cpu_s.append(time.process_time() - cpu)
    turns = list(zip(timings["ours"].cpu_s, timings["bare"].cpu_s, strict=True))
    more = statistics.median(ours - bare for ours, bare in turns)
    notes = {
        "overhead over bare, CPU time": f"{statistics.median((ours - bare) / bare for ours, bare in turns):+.1%}",
        "overhead per update, ms": round(more * 1000, 1),
        "includes": "data made in the same process (on a GPU machine workers make it), noise, plan, log, one read",
        "diffusers' script": "skipped: it needs torchvision, which this project does not install",
    }
    what = f"update of {TILES} x {MICRO} images, tiny SDXL, logging on"
    rounds = {name: timing.rounds(UPDATES_PER_ROUND) for name, timing in timings.items()}
    return row("A4", what, "<= 3 % over bare forward + backward + clip + step", rounds, MICRO * TILES, notes=notes)


def least_shapes() -> list[tuple[int, ...]]:
    """The U-Net's 1,680 tensors in their 44 shapes and order, with at most 16 values each: all that is left is the host's."""
    with torch.device("meta"):
        shapes = [tuple(parameter.shape) for parameter in UNet2DConditionModel(**SDXL_UNET).parameters()]
    pairs = sorted(((r, c) for r in range(1, 17) for c in range(1, 17) if r * c <= 16), key=math.prod)
    small: dict[tuple[int, ...], tuple[int, ...]] = {}
    for rank in (1, 2, 4):
        for number, shape in enumerate(shape for shape in dict.fromkeys(shapes) if len(shape) == rank):
            small[shape] = (number + 1,) if rank == 1 else (*pairs[number], *[1] * (rank - 2))
    return [small[shape] for shape in shapes]


def optimizer_row(repeats: int) -> dict[str, Any]:
    """A10: a step of Adafactor, tensors of one shape at once, against transformers' own, which takes them one by one."""
    sides = {}
    for name, strict in (("ours", False), ("transformers", True)):
        parameters = [nn.Parameter(torch.ones(shape)) for shape in least_shapes()]
        for parameter in parameters:
            parameter.grad = torch.full_like(parameter, 0.1)
        config = OptimizerConfig(name="adafactor", unet_lr=1e-5)
        optimizer = optimizers.make_optimizer([("unet", parameters, 1e-5)], config, strict=strict)
        optimizer.step()
        sides[name] = lasting(optimizer.step)
    what = f"host time of an Adafactor step: {len(parameters)} tensors of at most 16 values in 44 shapes"
    return row("A10", what, ">= 3x", interleave(sides, repeats))


class SyncCounter(TorchDispatchMode):
    """Counts reads of tensor values by the host; the patched methods count what dispatch does not see."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()
        self._kept: dict[str, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if "_local_scalar_dense" in name or "nonzero" in name or "masked_select" in name:
            self.found[name] += 1
        elif "aten.index" in name and any(_is_mask(x) for x in (args[1] if len(args) > 1 else ()) or ()):
            self.found["boolean index"] += 1
        return func(*args, **(kwargs or {}))

    def __enter__(self) -> SyncCounter:
        for name in _SYNCING:
            self._kept[name] = getattr(torch.Tensor, name)
            setattr(torch.Tensor, name, self._counting(name, self._kept[name]))
        super().__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        for name, method in self._kept.items():
            setattr(torch.Tensor, name, method)

    def _counting(self, name: str, method: Any) -> Any:
        def counted(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            self.found[name] += 1
            return method(tensor, *args, **kwargs)

        return counted


def _is_mask(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype in (torch.bool, torch.uint8)


def micro_step_syncs(session: Session) -> Counter[str]:
    """A5: host reads of one micro-step (forward, loss, backward of one tile) of a real session."""
    batch = session.data.loader.dataset[0, 0]
    assert not isinstance(batch, Exception)
    backward = TileBackward(
        session.trained.diffusion, session.trained.scale, MICRO * TILES, TILES, session.run.place.device,
        average=session.trained.diffusion.loss.average,
    )  # fmt: skip
    backward(session.trained.gradients.model, batch, factor=1)
    with SyncCounter() as counter:
        backward(session.trained.gradients.model, batch, factor=1)
    return counter.found


def sync_row(folder: Path) -> dict[str, Any]:
    """A5 as a row."""
    with tiny_session(folder, *SMALL_BATCH) as session:
        found = micro_step_syncs(session)
    notes = {"host synchronisations per micro-step": sum(found.values()), "by kind": dict(found)}
    return {"id": "A5", "what": "host synchronisations", "goal": "= 0", "sides": {}, "ratios": {}, "noisy": [],
            "notes": notes}  # fmt: skip


def checkpoint_row(folder: Path, size: int = STATE_BYTES) -> dict[str, Any]:
    """A6: how much longer than usual the longest update around a background save is, against one copy of the state.

    A first save finds buffers that were only reserved, so it is made several times, by savers that have not saved yet.
    """
    each = size // 40
    state = {"model": {f"w{i}": torch.ones(each // 4) for i in range(40)}}
    seconds: dict[str, list[float]] = {}
    reports: list[SaveReport] = []
    for number in range(SAVERS):
        run = open_run_dir(folder / f"run{number}", "bench")
        for name, found in _stalls(Saver(run, CheckpointConfig(keep=2), permanent_every=10**9), state, reports).items():
            seconds.setdefault(name, []).append(found)
        run.close()
    medians = {name: statistics.median(found) for name, found in seconds.items()}
    memcpy = medians["one memcpy"]
    notes = {
        "state, GB": size / 1e9,
        **{f"{name}, s": round(median, 3) for name, median in medians.items()},
        "first stall over memcpy": round(medians["stall of the first save"] / memcpy, 2),
        "later stalls over memcpy": round(medians["stall of a later save"] / memcpy, 2),
        "each first stall over memcpy": [round(s / memcpy, 2) for s in seconds["stall of the first save"]],
        "saves": [report.reason or f"written in {report.write_s:.1f} s" for report in reports],
    }
    return {"id": "A6", "what": "checkpoint stall", "goal": "<= 1.5x one host memcpy of the state", "sides": {},
            "ratios": {}, "noisy": [], "notes": notes}  # fmt: skip


def _stalls(saver: Saver, state: dict[str, dict[str, torch.Tensor]], reports: list[SaveReport]) -> dict[str, float]:
    """Seconds of one copy, of a usual update, and by how much the longest update around the first and second save is longer."""
    work = torch.randn(700, 700)
    done = 0

    def updates(count: int, save_at: int = -1) -> list[float]:
        nonlocal work, done
        times = []
        for number in range(count):
            started = time.perf_counter()
            saver.before_step()
            for _ in range(6):
                work = torch.tanh(work @ work)
            if number == save_at:
                saver.save(Progress(done + 1, done + 1, 0), state, {})
            saver.raise_failures()
            times.append(time.perf_counter() - started)
            done += 1
        return times

    updates(1)
    saver.reserve(state)  # as the loop does after its first update; a save comes an interval later
    while any(thread.name == "checkpoint-buffers" for thread in threading.enumerate()):
        updates(1)
    found = {"one memcpy": _memcpy_s(state)}
    for name in ("stall of the first save", "stall of a later save"):
        found["usual update"] = statistics.median(updates(QUIET_UPDATES))
        found[name] = max(updates(4, save_at=1)) - found["usual update"]  # two of them beside the writer
        give_up = time.monotonic() + MAX_WRITE_S
        while not (told := saver.reports()) and time.monotonic() < give_up:
            time.sleep(0.1)
        reports += told
    saver.finish()
    reports += saver.reports()
    return found


def _memcpy_s(state: dict[str, dict[str, torch.Tensor]]) -> float:
    """Median seconds of copying the state into memory that is there already."""
    target = copy.deepcopy(state)
    spent = []
    for _ in range(3):
        started = time.perf_counter()
        for name, tensor in state["model"].items():
            target["model"][name].copy_(tensor)
        spent.append(time.perf_counter() - started)
    return statistics.median(spent)
