#!/usr/bin/env python
"""One stage of the recipe: `accelerate launch --quiet train/run.py --config configs/ft1.yaml [key=value ...]`.

Reads as the recipe, top to bottom in `train_stage`: the selection and its plan (recipe/order.py), captions with their
separator (recipe/captions.py), the predecessor's weights (model/source.py), U-Net and text encoders as one module
(model/networks.py), AdamW or Adafactor (optim/optimizers.py), noise offset (diffusion/noise.py), restart schedule
(recipe/schedule.py), the loop (engine/loop.py), checkpoints (storage/checkpoint.py), the hand-off (engine/handoff.py).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # started as a file: train/ is first on sys.path, and its modules would shadow others
    sys.path[0] = str(Path(__file__).resolve().parents[1])
from train.base import environment

environment.settle()  # before the libraries that read it

# Only the light core here: a locked or read-only run directory must answer before torch is loaded.
from train.base import faults
from train.base.console import run_cli
from train.base.errors import ExitCode
from train.config.stage import StageConfig, load_stage, unresolved_yaml
from train.engine import ending, refusals


def main(argv: Sequence[str] | None = None) -> int:
    """Run or resume one stage; the exit code also stands in the run directory's exit.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", action="append", required=True, type=Path, help="stage YAML; later ones win")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="wins over the files")
    arguments = parser.parse_intermixed_args(argv)
    config = load_stage(arguments.config, arguments.overrides)
    faults.warn_if_set()
    if (run := refusals.open_run(config.start)) is not None:  # None: the stage is already done
        with ending.recorded(run, config.identity.hash) as attempt:
            refusals.refuse_start(config.start, run)
            train_stage(config, attempt, unresolved_yaml(arguments.config, arguments.overrides))
    return ExitCode.DONE


def train_stage(config: StageConfig, attempt: ending.Attempt, yaml: str) -> None:
    """The recipe of one stage, from the dataset to the files the next stage starts from."""
    from train.engine import handoff, loop, processes, session, setup, trial

    # Processes: the update's tiles divide among them. One that fails is named by the others.
    with processes.joining(attempt.run, attempt.record):
        machine = setup.open_machine(config.batch, config.launch)
    with processes.watching(machine.place.rank, machine.place.world, attempt.record, attempt.run) as watch:
        # Model: the predecessor's weights, hash checked; its tokenizers and VAE.
        source, components = handoff.open_source(config.origin, watch)

        # Data: the stage's selection, held-out images apart, in the order of the plan; captions behind the separator.
        data = setup.open_data(config.images, source)

        # Networks: U-Net and text encoders as one module, recomputing as much as memory asks for.
        model = setup.open_model(config.running, config.objective, machine, data.plan, source, components)

        # Optimizer, EMA, and the state of an interrupted run: weights, optimizer, two counters, nothing else.
        running = session.open_session(config.owners, attempt.run, attempt.stop, machine, data, model, watch)
        attempt.reached = lambda: running.run.progress.step
        with session.closing(running):
            attempt.run.write_config(yaml)
            trial.run(running)  # every shape once: memory runs out now or never

            # Updates: learning rate in closed form, noise with its offset, one sync per update, clip, step.
            loop.train(running)

            # Hand-off: last checkpoint and pictures, diffusers folder and single file, lineage, then DONE.
            loop.conclude(running)
            with watch.main_only("export"):
                handoff.finish(running)


if __name__ == "__main__":
    run_cli(main, answers=False)
