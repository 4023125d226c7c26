#!/usr/bin/env python
"""One stage of the recipe: `accelerate launch --quiet train/run.py --config configs/ft1.yaml [key=value ...]`.

Reads as the recipe, top to bottom in `train_stage`:
the selection and its plan (order.py), captions with their separator (captions.py, dataset.py), the predecessor's
weights (source.py), U-Net and text encoders as one module (networks.py), AdamW or Adafactor (optimizers.py), noise offset
(noise.py), restart schedule (schedule.py), the loop (loop.py), checkpoints (checkpoint.py) and the hand-off to the
next stage (export.py).
"""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # started as a file: train/ is first on sys.path, and its modules would shadow others
    sys.path[0] = str(Path(__file__).resolve().parents[1])

# Notebook: 1 CPU thread per process. More threads than idle cores turn a step of 0.2 s into 10 s.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Only the light core here: a locked or read-only run directory must answer before torch is loaded.
from train.base import faults, signals
from train.base.console import run_cli
from train.base.errors import ExitCode, Halt
from train.config.stage import StageConfig, config_hash, load_stage, unresolved_yaml
from train.engine import finished, refusals
from train.storage.rundir import RunDir, open_run_dir

# Of whatever was being written: the disk is full, over quota, read-only or broken.
CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO)


def main(argv: Sequence[str] | None = None) -> int:
    """Run or resume one stage; the exit code also stands in the run directory's exit.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", action="append", required=True, type=Path, help="stage YAML; later ones win")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="wins over the files")
    arguments = parser.parse_intermixed_args(argv)

    config = load_stage(arguments.config, arguments.overrides)
    faults.warn_if_set()
    rank, world = own_place()
    try:
        refusals.refuse_entangled(config)
        run = open_run_dir(config.output_dir, config.stage, rank=rank)
    except Halt as refusal:  # what else is wrong is told with it
        raise refusals.together([refusal, *refusals.refusals(config, None, world)]) from refusal
    if run.done is not None and (answer := finished.answer(config)) is not None:
        print(answer.text, file=sys.stderr)
        if not answer.goes_on:
            return ExitCode.DONE
        run = open_run_dir(config.output_dir, config.stage, rank=rank, go_on=True)
    run.met = run.rank == 0  # which holds the lock; it is refused it where another run is at work
    stop = signals.install(orphan=True)
    progress = {"update": 0}
    last_words = "interrupted a second time: stopped at once, the last checkpoint is valid"
    stop.stop_now = lambda: run.write_exit(ExitCode.STOPPED, stop.status, last_words, None)
    try:
        refuse_start(config, run, world)
        train_stage(config, run, stop, unresolved_yaml(arguments.config, arguments.overrides), progress)
        run.write_exit(ExitCode.DONE, "done", "", progress["update"])
        return ExitCode.DONE
    except BaseException as error:
        halt = as_halt(error, progress["update"])
        record_end(run, config, halt, stop, progress["update"])
        if halt is error:
            raise
        if halt.code == ExitCode.UNEXPECTED:
            raise
        raise halt from error
    finally:
        run.close()


def refuse_start(config: StageConfig, run: RunDir, world: int) -> None:
    """One Halt with everything that is wrong with this start, as far as it shows before torch is loaded."""
    found = refusals.refusals(config, run, world)
    try:
        run.check_attempts(config_hash(config), config.resume.accept)
    except Halt as halt:
        found.append(halt)
    if found:
        raise refusals.together(found)


def record_end(run: RunDir, config: StageConfig, halt: Halt, stop: signals.StopFlag, update: int) -> None:
    """Leave in the run directory why the run ended."""
    status = stop.status if halt.code == ExitCode.STOPPED else "failed"
    run.write_exit(halt.code, status, halt.message, update)
    run.count_attempt(halt.code, halt.message, update, config_hash(config))


def own_place() -> tuple[int, int]:
    """RANK and WORLD_SIZE as launchers set them, 0 and 1 without one. Raises Halt(USAGE) where they make no sense."""
    rank, world = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    if not (rank.isdigit() and world.isdigit() and int(rank) < int(world)):
        raise Halt(ExitCode.USAGE, f"RANK is {rank!r} and WORLD_SIZE {world!r}: start the processes with a launcher")
    return int(rank), int(world)


def as_halt(error: BaseException, update: int = 0) -> Halt:
    """The exit code that an exception stands for, after `update` updates."""
    if isinstance(error, Halt):
        return error
    kind = type(error).__name__
    after = f"after update {update}: " if update else ""  # inside a bucket the update's own code has named it
    if kind == "OutOfMemoryError" or isinstance(error, MemoryError):
        return Halt(
            ExitCode.OUT_OF_MEMORY,
            f"{after}out of memory: {error}; try model.gradient_checkpointing=full, batch.split=2 or configs/memory/",
        )
    if isinstance(error, OSError) and error.errno in CANNOT_WRITE:
        return Halt(ExitCode.CANNOT_WRITE, f"{error.filename or 'a file'} cannot be written: {error.strerror}")
    if kind in ("DistBackendError", "DistNetworkError", "DistStoreError"):
        return Halt(ExitCode.PEER_LOST, f"another process is gone or silent: {error}")
    return Halt(ExitCode.UNEXPECTED, f"{kind}: {error}")


def train_stage(config: StageConfig, run: RunDir, stop: signals.StopFlag, yaml: str, reached: dict[str, int]) -> None:
    """The recipe of one stage, from the dataset to the files the next stage starts from."""
    from train.engine import handoff, loop, processes, session, setup, trial
    from train.optim import collectives

    # Processes: the update's tiles divide among them.
    if signals.orphaned():  # all are; a stop that only some have heard of is agreed upon after they met
        raise Halt(ExitCode.STOPPED, "the launcher is gone, before the first update: the same command goes on")
    with processes.joining(lambda code, reason: record_end(run, config, Halt(code, reason), stop, 0)):
        machine = setup.open_machine(config)
    run.met = True

    # From here on a process that fails is named by the others, and work of one is waited for.
    with processes.watching(machine.place.rank, machine.place.world) as watch:
        watch.last_words = lambda code, reason: record_end(run, config, Halt(code, reason), stop, watch.step)

        # Model: the predecessor's weights, hash checked; its tokenizers and VAE.
        source, components = handoff.open_source(config, with_vae=config.sampling.every_steps > 0)

        # Data: the stage's selection, held-out images apart, in the order of the plan; captions behind the separator.
        data = setup.open_data(config, source)

        # Networks: U-Net and text encoders as one module, recomputing as much as memory asks for.
        execution = setup.settle(config, machine, data.plan, source)
        networks = setup.open_networks(config, components, machine, execution)

        # Optimizer, EMA, and the state of an interrupted run: weights, optimizer, two counters, nothing else.
        running = session.open_session(config, run, machine, data, source, components, networks, execution, stop)
        reached["update"] = running.progress.step
        with session.closing(running):
            run.write_config(yaml)
            collectives.stop_if_asked(stop.asked, machine.place.device, running.progress.step)
            trial.check(running, data.tokenizer)
            collectives.stop_if_asked(stop.asked, machine.place.device, running.progress.step)

            # Updates: learning rate in closed form, noise with its offset, one sync per update, clip, step.
            running.watch, watch.step, watch.met = watch, running.progress.step, True
            try:
                loop.run_updates(running)
            except BaseException as error:
                loop.leave(running, error)
                raise
            finally:
                reached["update"] = running.progress.step

            # Hand-off: last checkpoint and pictures, diffusers folder and single file, lineage, then DONE.
            loop.conclude(running)
            with watch.main_only("export"):
                handoff.finish(running, source, data.index.fingerprint, session.versions())


if __name__ == "__main__":
    run_cli(main, answers=False)
