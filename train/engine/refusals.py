"""What is wrong with a start, all of it in one message, seconds after the command and before torch is loaded.

Headers, records and listings are read, no weights and no images; what only the weights themselves can tell (values
that are not finite, a checkpoint of another run) is refused later.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from train.base.errors import ExitCode, Halt
from train.config.derived import Origin, Rates, Start
from train.config.prompts import load_prompts
from train.data.selection import open_selection, refuse_other_vae
from train.engine import finished
from train.model import clip_tokens, prediction
from train.model import source as model_source
from train.model.adapters import names
from train.model.folder import TOKENIZERS
from train.model.source import LocalModel
from train.recipe import groups, schedule
from train.recipe.optimizer_state import checkpoint_bytes
from train.recipe.order import Plan, share_of
from train.storage import resume, revision, space
from train.storage.rundir import RunDir, open_run_dir

T = TypeVar("T")
# A start with several faults ends with the code of the one that waiting does not mend.
_FIRST = (ExitCode.USAGE, ExitCode.MISMATCH, ExitCode.CANNOT_WRITE, ExitCode.LOCKED)


def open_run(start: Start) -> RunDir | None:
    """The run directory of this start, locked; None, and a line that says so, where the stage is already done.

    Raises one Halt with everything that is wrong with a start that may not have it.
    """
    rank, world = own_place()
    folder, stage = start.identity.output_dir, start.identity.stage
    try:
        refuse_entangled(folder, start.reads)
        run = open_run_dir(folder, stage, rank=rank)
    except Halt as refusal:  # what else is wrong is told with it
        raise together([refusal, *refusals(start, None, world)]) from refusal
    if run.done is not None and (answer := finished.answer(start)) is not None:
        print(answer.text, file=sys.stderr)
        if not answer.goes_on:
            return None
        run = open_run_dir(folder, stage, rank=rank, go_on=True)
    return run


def own_place() -> tuple[int, int]:
    """RANK and WORLD_SIZE as launchers set them, 0 and 1 without one. Raises Halt(USAGE) where they make no sense."""
    rank, world = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    if not (rank.isdigit() and world.isdigit() and int(rank) < int(world)):
        raise Halt(ExitCode.USAGE, f"RANK is {rank!r} and WORLD_SIZE {world!r}: start the processes with a launcher")
    return int(rank), int(world)


def refuse_start(start: Start, run: RunDir) -> None:
    """One Halt with everything that is wrong with this start, as far as it shows before torch is loaded."""
    found = refusals(start, run, own_place()[1])
    try:
        run.check_attempts(start.identity.hash, start.identity.accept)
    except Halt as halt:
        found.append(halt)
    if found:
        raise together(found)


def together(halts: Sequence[Halt]) -> Halt:
    """One Halt for all of them; a message that several share is told once."""
    messages = list(dict.fromkeys(halt.message for halt in halts))
    if len(messages) == 1:
        return halts[0]
    code = min((halt.code for halt in halts), key=lambda code: _FIRST.index(code) if code in _FIRST else len(_FIRST))
    lines = "\n".join(f"  {number}. {message}" for number, message in enumerate(messages, 1))
    return Halt(code, f"{len(messages)} things are wrong with this start:\n{lines}")


def refusals(start: Start, run: RunDir | None, world: int) -> list[Halt]:
    """Everything that refuses this start. `run` is None where it could not be opened.

    First all that shows without torch; where that is sound, all that the model's shapes, licence and VAE tell.
    """
    found: list[Halt] = []
    identity, origin = start.identity, start.origin

    def tried(check: Callable[[], T]) -> T | None:
        try:
            return check()
        except Halt as halt:
            found.append(halt)
        return None

    tried(lambda: resume.check_accept(identity.accept, identity.flat))
    tried(lambda: share_of(start.batch, world))
    tried(lambda: refuse_foreign_engines(start.running.sharding))
    tried(lambda: refuse_processes(start.running.offload, world))
    # A hub model is fetched once everything else is known to be right.
    local = Path(origin.path).exists() or not revision.pinned(origin.path)
    if local:
        tried(lambda: model_source.look(origin.model))
    selection = tried(lambda: open_selection(start.images))
    if selection is not None:
        tried(lambda: check_schedule(start.rates, selection.plan))
    if (prompts := start.prompts) is not None:
        tried(lambda: load_prompts(prompts))
    if found or run is None or not local:
        return found
    # What the networks' shapes tell needs the libraries that build them, which a start that ends here never loads.
    source = tried(lambda: model_source.resolve(origin.model, hashed=False))
    if source is not None and origin.adapter is not None:
        from train.model.adapters import runs  # with torch

        source = runs.continued(source)
    if source is not None and selection is not None:
        tried(lambda: refuse_source(origin, source))
        tried(lambda: prediction.conversion(origin.trained_as, source, convert=origin.convert))
        tried(lambda: refuse_other_vae(selection.folder, selection.index, source))
        if run.rank == 0 and (problem := tried(lambda: _lacking(start, run, source))):
            found.append(Halt(ExitCode.MISMATCH, problem))
    return found


def refuse_processes(offload: str, world: int) -> None:
    """Halt(USAGE) for masters in host memory on several processes."""
    if offload == "host" and world > 1:
        raise Halt(
            ExitCode.USAGE,
            f"optimizer.offload: host on {world} processes: each would need the host memory again; start one, or set "
            "optimizer.offload=none and optimizer.sharding=fsdp2",
        )


def refuse_foreign_engines(sharding: str) -> None:
    """Halt(USAGE) for a launch config that wants the model wrapped by another engine than the stage's, or compiled whole.

    One that asks for FSDP means what it says beside `optimizer.sharding: fsdp2` or hsdp: torch's own, without
    accelerate's plugin, whose variable is taken away.
    """
    instead = {
        "ACCELERATE_USE_FSDP": "for FSDP, which is a key of the stage: add optimizer.sharding=fsdp2",
        "ACCELERATE_USE_DEEPSPEED": "for DeepSpeed, which is not built: optimizer.sharding=fsdp2 shares weights, gradients and state",
        "ACCELERATE_USE_MEGATRON_LM": "for Megatron-LM, which is not built",
    }
    if sharding in ("fsdp2", "hsdp"):
        os.environ.pop("ACCELERATE_USE_FSDP", None)
    for variable, answer in instead.items():
        if os.environ.get(variable, "false").lower() in ("1", "true", "yes"):
            raise Halt(ExitCode.USAGE, f"the launch config asks {answer}. Or use one of configs/launch/")
    if os.environ.get("ACCELERATE_DYNAMO_BACKEND", "NO").upper() != "NO":
        raise Halt(
            ExitCode.USAGE,
            "the launch config sets dynamo_config, which would compile the whole model: remove it, and set "
            "model.compile: true for the repeated blocks",
        )


def refuse_source(origin: Origin, source: LocalModel) -> None:
    """Halt(USAGE) for a model that the stage's other settings do not go with, naming the setting."""
    problems = []
    if origin.trained_as.pooled_projection == "sd_scripts" and source.kind != "single_file":
        problems.append(
            "model.pooled_projection: sd_scripts reproduces a trainer that read single files: give a .safetensors"
        )
    folders = [] if source.tokenizers is None else [source.tokenizers / name for name in TOKENIZERS]
    if not folders and (why := clip_tokens.unlike(source.configs)):
        problems.append(
            f"{source.path} carries no tokenizers, and the shipped ones do not go with it: {why}. model.tokenizers "
            "names a folder with the model's own tokenizer/ and tokenizer_2/"
        )
    problems += [f"model.tokenizers: {folder} is no folder" for folder in folders if not folder.is_dir()]
    if not model_source.stated_license(origin.export, source):
        problems.append(f"{source.path} declares no licence: set export.license to the one its weights are under")
    if problems:
        raise Halt(ExitCode.USAGE, "; ".join(problems))


def check_schedule(rates: Rates, plan: Plan) -> None:
    """Halt(USAGE) for a schedule that means something else than it says."""
    updates = schedule.cycle_length(rates.schedule, epoch_updates=plan.cycle_updates)
    peaks = schedule.peak_keys(rates.optimizer)
    schedule.check(rates.schedule, peaks, cycle_updates=updates, total_updates=plan.total_updates, epochs=rates.epochs)


def refuse_entangled(output_dir: str, reads: Mapping[str, str]) -> None:
    """Halt(MISMATCH) where the run would write or clear among what it reads. Comes before anything is made there."""
    problems = []
    output = Path(os.path.realpath(output_dir))
    named = [(key, path) for key, path in reads.items() if key != "model.tokenizers"]
    if tokenizers := reads.get("model.tokenizers"):
        named += [("model.tokenizers", os.path.join(tokenizers, name)) for name in TOKENIZERS]
    for key, value in named:
        if not os.path.exists(value):
            continue
        read = Path(os.path.realpath(value))
        if read.is_relative_to(output):
            problems.append(
                f"{key} {value} lies in output_dir {output_dir}, where the run writes and clears: move one of them"
            )
        elif output.is_relative_to(read):
            problems.append(f"output_dir {output_dir} lies in {key} {value}, which a run only reads: choose another")
    if problems:
        raise Halt(ExitCode.MISMATCH, "; ".join(problems))


def _lacking(start: Start, run: RunDir, source: LocalModel) -> str | None:
    """What is wrong when the checkpoints will not fit, judged by the shapes of the trained weights."""
    running = start.running
    trained = ("unet.", "text_encoder.", "text_encoder_2.") if running.trains_text else ("unet.",)
    own = [name for name in source.weights if name.startswith(trained)]
    if running.adapter is None:
        groups.decided(own, running.groups)
    shapes = [source.weights[name].shape for name in own if groups.trains(name, running.groups)]
    if running.adapter is not None:
        modules = {name.removesuffix(".weight"): blob.shape for name, blob in source.weights.items() if name.startswith(trained)}
        reached = {n: s for n, s in modules.items() if names.is_usual(n) and len(s) in (2, 4) and not n.endswith(".bias")}
        from train.model.adapters import training  # with torch

        shapes = training.factors(running.adapter, reached)
    least = checkpoint_bytes(running.optimizer, shapes, weights=running.weights, average=running.average)
    return space.lacking_space(run, least / space.SPACE_FACTOR, start.checkpoint)
