"""sd-scripts training TOML -> stage YAML: what has a counterpart is mapped, every other key is named with the reason.

The original flattens the sections of its file and passes keys it does not know in silence. Nothing is silent here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from train.base.errors import ExitCode, Halt
from train.base.files import replace_file
from train.config import schema
from train.config.dataset import load_settings
from train.config.dataset_rules import MAX_NAME
from train.config.stage import StageConfig, load_stage
from train.model.folder import refuse_existing
from train.storage import revision
from train.tools.convert import dataset as convert_dataset
from train.tools.convert import keys, kinds, optimizers
from train.tools.convert.keys import CHOICES, DATASET, DEFAULT_LR, DIRECT
from train.tools.convert.kinds import number, switch, whole
from train.tools.show.dispatch import plain


@dataclass
class Result:
    """The stage config, and every key that is not in it, with the reason."""

    config: dict[str, Any] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)


def convert_file(source: Path, out: Path, processes: int = 1) -> list[str]:
    """Write `out` with the notes at its top; the lines to show. Raises Halt(USAGE).

    A training TOML becomes a stage YAML and, where it names its pictures, `<out>_dataset.yaml` beside it; a dataset TOML
    becomes a dataset YAML.
    """
    refuse_existing(out)
    if processes < 1:
        raise Halt(ExitCode.USAGE, f"--processes is {processes}, must be at least 1")
    stage, dataset = kinds.parts(source, kinds.read_table(source))
    if stage is None:
        made = convert_dataset.convert(dataset or {}, {}, name_of(out))
        return write(out, source, made.config, made.notes, load_settings)
    lines, beside = [], out.with_name(f"{out.stem}_dataset.yaml")
    if dataset is not None:
        refuse_existing(beside)
        made = convert_dataset.convert(dataset, _flat(stage, Result()), name_of(beside))
        stage = {**stage, " of the pictures": made.stage}  # the last section wins
        lines = write(beside, source, made.config, made.notes, load_settings)
    result = convert(stage, processes)
    if dataset is not None:
        result.config |= {"data.path": f"data/{made.config['name']}", "data.select": convert_dataset.SELECTION}
        result.notes.pop("(ours) data.path", None)
        result.notes = {key: told for key, told in result.notes.items() if key not in made.read}
    return [*write(out, source, _nested(result.config), result.notes, load_stage), *lines]


def name_of(out: Path) -> str:
    """A file's name as the name of what it describes."""
    name = "".join(c if c.isascii() and (c.isalnum() or c in "-_") else "-" for c in out.stem).lstrip("-_")[:MAX_NAME]
    return name or "converted"


def write(
    out: Path, source: Path, config: dict[str, Any], notes: Mapping[str, str], load: Callable[[list[str | Path]], Any]
) -> list[str]:
    """One YAML, its notes as comments at the top, and what to tell: also what keeps it from loading."""
    told = [plain(f"{key}: {reason}") for key, reason in notes.items()]  # a line break would end the comment
    head = [
        f"# From {plain(source.name)} by scripts/convert.py. Keys without a counterpart, and what to know:",
        *(f"#   {note}" for note in told),
    ]
    try:
        body = OmegaConf.to_yaml(OmegaConf.create(config))
    except OmegaConfBaseException as error:  # "${" in a path
        raise Halt(ExitCode.USAGE, f"{source} holds what a config would take for a reference: {error}") from None
    replace_file(out, "\n".join(head) + "\n" + body)
    lines = [f"{out}: {sum(len(v) if isinstance(v, dict) else 1 for v in config.values())} keys", *(f"note: {note}" for note in told)]
    try:
        load([out])
    except Halt as halt:  # what the TOML left open, or what we refuse: told now, not at the start of a run
        lines.append(f"to do before it loads: {halt.message}")
    return lines


def convert(table: Mapping[str, Any], processes: int = 1) -> Result:
    """Our keys ("batch.micro") and the notes, from a parsed TOML, its sections flattened as the original does."""
    result = Result()
    theirs = _plain_values(_flat(table, result))
    _batch(theirs, result, processes)
    optimizers.optimizer(theirs, result.config, result.notes)
    _schedule(theirs, result, processes)
    used = {"train_batch_size", *keys.SPECIAL, *_rest(theirs, result)}
    for key, value in theirs.items():
        if key in used or value is None:
            continue
        if value == "":
            result.notes[key] = "empty, so not set"
        elif key in DIRECT:
            result.config[DIRECT[key]] = value
        elif key in CHOICES:
            ours, choices = CHOICES[key]
            if (value if isinstance(value, str | bool) else repr(value)) in choices:
                result.config[ours] = choices[value]
            else:
                result.notes[key] = f"{value!r} has no counterpart in {ours}"
        elif key in DATASET:
            result.notes[key] = f"belongs to dataset.yaml: {DATASET[key]}"
        elif key in keys.NO_COUNTERPART:
            result.notes[key] = f"no counterpart: {keys.NO_COUNTERPART[key]}"
        else:
            near = key.replace("-", "_")
            hint = f"; it knows {near}" if near in {*DIRECT, *CHOICES} and near != key else ""
            result.notes[key] = f"not known here (the original ignores keys it does not know, in silence{hint})"
    _complete(theirs, result)
    _fit_types(result)
    return result


def _flat(table: Mapping[str, Any], result: Result, path: str = "") -> dict[str, Any]:
    """Keys without their sections; those of [[datasets]] tables are named, for they are no part of a stage."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, dict):
            flat |= _flat(value, result, path)
        elif isinstance(value, list) and value and all(isinstance(entry, dict) for entry in value):
            for number, entry in enumerate(value):
                inner = f"{path}{key}[{number}]."
                for name in _flat(entry, result, inner):
                    here = "batch.micro" if name == "batch_size" else DIRECT.get(name)
                    result.notes[inner + name] = (
                        f"one value for the whole stage here: set {here}" if here and name not in DATASET else
                        f"belongs to dataset.yaml: {DATASET.get(name, 'sources, select')}"
                    )  # fmt: skip
        else:
            flat[key] = value
    return flat


def _plain_values(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers and booleans written as text, "225" or "true", as what they mean, where our key holds no text."""
    hints = {key: found.hint for key, found in schema.keys_of(StageConfig).items()}
    values: dict[str, Any] = {}
    for key, value in theirs.items():
        if isinstance(value, str) and not (key in DIRECT and schema.fits(hints[DIRECT[key]], value)):
            found = None if key == "lr_warmup_steps" else number(value)
            value = switch(value) if found is None else found
        values[key] = value
    return values


def _fit_types(result: Result) -> None:
    """Values of the type that our key has (500.0 is 500); what cannot be is named and left out."""
    hints = {key: found.hint for key, found in schema.keys_of(StageConfig).items()}
    for key, value in list(result.config.items()):
        if isinstance(value, float) and value.is_integer() and not schema.fits(hints[key], value):
            value = int(value)
        if schema.fits(hints[key], value):
            result.config[key] = value
        else:
            del result.config[key]
            result.notes[key] = f"{value!r} does not fit {key}, which must be {schema.describe(hints[key])}"


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        section, _, name = key.rpartition(".")
        (nested.setdefault(section, {}) if section else nested)[name] = value
    top = {key: value for key, value in nested.items() if not isinstance(value, dict)}
    return top | {key: value for key, value in nested.items() if isinstance(value, dict)}


def _batch(theirs: dict[str, Any], result: Result, processes: int) -> None:
    micro = whole(theirs, "train_batch_size", 1, 1)
    accumulation = whole(theirs, "gradient_accumulation_steps", 1, 1)
    result.config["batch.micro"] = micro
    result.config["batch.effective"] = micro * accumulation * processes
    result.notes["gradient_accumulation_steps"] = (
        f"batch.effective = {micro} x {accumulation} x {processes} process(es); --processes says how many ran"
    )


def _schedule(theirs: dict[str, Any], result: Result, processes: int) -> None:
    config, notes = result.config, result.notes
    custom = str(theirs.get("lr_scheduler_type") or "")
    if custom:
        _custom_schedule(custom, optimizers.arguments(theirs, "lr_scheduler_args"), result, processes)
        for key in ("lr_scheduler", "lr_scheduler_num_cycles", "lr_warmup_steps"):
            if theirs.get(key):
                notes[key] = "ignored by the original: lr_scheduler_type takes its place"
        return
    name = str(theirs.get("lr_scheduler") or "constant")
    # epochs win over steps there, and then nothing tells how many steps there were
    steps = 0 if theirs.get("max_train_epochs") else whole(theirs, "max_train_steps", 0, 1600)
    warmup = _warmup(theirs, steps, result)
    if name in ("constant", "constant_with_warmup"):
        config["schedule.name"] = name
        if name == "constant_with_warmup":
            config["schedule.warmup_steps"] = warmup
            if processes > 1 and warmup:
                notes["lr_warmup_steps"] = (
                    f"the original advanced once per process, so it lasted 1/{processes} of these updates; "
                    f"schedule.unit: process_step, schedule.processes: {processes} is what ran"
                )
        elif warmup:
            notes["lr_warmup_steps"] = "ignored by the original: lr_scheduler is constant"
    elif name in ("cosine", "linear", "cosine_with_min_lr", "warmup_stable_decay"):
        _over_the_run(name, theirs, result)
        if warmup:
            config["schedule.warmup_steps"] = warmup
    elif name == "cosine_with_restarts":
        cycles = whole(theirs, "lr_scheduler_num_cycles", 1, 1)
        config |= {"schedule.name": "cosine_restarts", "schedule.cycles": cycles, "schedule.first_step_at_min": False}
        if steps:
            config["schedule.cycle_steps"] = math.ceil(steps / cycles)
        elif cycles != theirs.get("max_train_epochs"):
            config["schedule.cycle_steps"] = 0  # does not load; a guess would, and restart once per epoch
            notes["lr_scheduler"] = (
                "its cycles divide all steps, which an epoch count does not tell: set schedule.cycle_steps"
            )
        if warmup:
            notes["lr_warmup_steps"] = "no counterpart: cosine restarts have no warmup here"
    else:
        notes["lr_scheduler"] = f"{name} has no counterpart: choose schedule.name"


def _over_the_run(name: str, theirs: Mapping[str, Any], result: Result) -> None:
    """Schedules that fall to the run's end."""
    result.config["schedule.name"] = {"cosine_with_min_lr": "cosine", "warmup_stable_decay": "wsd"}.get(name, name)
    share = number(theirs.get("lr_scheduler_min_lr_ratio"))
    if share and name in ("cosine_with_min_lr", "warmup_stable_decay"):
        result.config["schedule.min_lr"] = share * float(theirs.get("learning_rate") or DEFAULT_LR)
    if name == "warmup_stable_decay":
        decay = number(theirs.get("lr_decay_steps"))
        if decay:
            result.config["schedule.cooldown_steps"] = decay
        result.notes["lr_scheduler"] = "its fall is a half cosine there and a line here"


def _warmup(theirs: Mapping[str, Any], steps: int, result: Result) -> int:
    """lr_warmup_steps in updates; below 1 or in percent it is a share of max_train_steps."""
    value = theirs.get("lr_warmup_steps") or 0
    percent = isinstance(value, str) and value.strip().endswith("%")
    given = number(value.strip().removesuffix("%") if isinstance(value, str) else value)
    if given is None or given < 0:
        raise Halt(ExitCode.USAGE, f"lr_warmup_steps is {value!r}, must be a number of steps or a share")
    share = given / 100 if percent else given
    if not percent and (share >= 1 or share == 0):
        return int(given)
    if not steps:
        result.notes["lr_warmup_steps"] = f"{value} of max_train_steps, which is not given: set schedule.warmup_steps"
    return int(share * steps)


def _custom_schedule(custom: str, given: dict[str, Any], result: Result, processes: int) -> None:
    if not custom.endswith("CosineAnnealingWarmupRestarts"):
        result.notes["lr_scheduler_type"] = f"{custom} has no counterpart: choose schedule.name"
        return
    result.config["schedule.name"] = "cosine_restarts"
    theirs_to_ours = {"min_lr": "min_lr", "gamma": "decay", "first_cycle_steps": "cycle_steps"}
    for name, value in given.items():
        if name in theirs_to_ours:
            result.config[f"schedule.{theirs_to_ours[name]}"] = value
        elif (name, value) not in (("cycle_mult", 1), ("cycle_mult", 1.0), ("warmup_steps", 0)):
            reason = "is optimizer.unet_lr here" if name == "max_lr" else "no counterpart: choose schedule.name"
            result.notes[f"lr_scheduler_args {name}"] = reason
    if processes > 1:
        result.notes["lr_scheduler_type"] = (
            f"the original advanced it once per process; schedule.unit: process_step, schedule.processes: {processes} "
            "is what ran"
        )


def _rest(theirs: dict[str, Any], result: Result) -> set[str]:
    """Keys that count only beside others; those that are done with."""
    used = set[str]()
    if theirs.get("min_timestep") is not None or theirs.get("max_timestep") is not None:
        result.config["noise.timesteps"] = [whole(theirs, "min_timestep", 0, 0), whole(theirs, "max_timestep", 1, 1000)]
    if theirs.get("max_train_epochs") and theirs.get("max_train_steps"):
        result.notes["max_train_steps"] = "ignored by the original: max_train_epochs takes its place"
        used.add("max_train_steps")
    if theirs.get("v_parameterization"):
        result.notes["v_parameterization"] = "the recipe's fork went on training epsilon; loss.prediction: v means v"
    if "loss_type" not in theirs or theirs["loss_type"] == "l2":
        for key in {"huber_c", "huber_schedule"} & theirs.keys():
            result.notes[key] = "not read by the original with loss_type l2"
            used.add(key)
    used |= {key for key in ("min_snr_gamma", "ip_noise_gamma") if not theirs.get(key)}  # 0 is off there
    trackers = str(theirs.get("log_with") or "")
    if trackers in ("wandb", "all"):
        result.config["tracking.wandb"] = "offline"
        result.notes["log_with"] = "tracking.wandb is offline; set online after wandb login"
    if trackers in ("tensorboard", "all"):
        result.config["tracking.tensorboard"] = True
    return used


def _complete(theirs: Mapping[str, Any], result: Result) -> None:
    """The original's defaults where ours differ, and what a TOML cannot say."""
    config = result.config
    if "optimizer.unet_lr" not in config:
        config["optimizer.unet_lr"] = DEFAULT_LR
        result.notes["(ours) optimizer.unet_lr"] = "learning_rate was not given; 2e-6 is the original's default"
    if not theirs.get("max_train_epochs") and "max_updates" not in config:
        config["max_updates"] = 1600
        result.notes["(ours) max_updates"] = "neither epochs nor steps were given; 1600 is the original's default"
    if not theirs.get("save_precision"):
        config["export.dtype"] = "fp32"  # the original saves what it trained
    plain = {"data.max_tokens": 75, "data.shuffle_tags": False, "precision": "fp32", "model.gradient_checkpointing": "none",
             "stage": "converted"}  # fmt: skip
    config |= {key: value for key, value in plain.items() if key not in config}
    name = "".join(c if c.isalnum() or c in "-_" else "-" for c in str(config["stage"]))[:MAX_NAME]
    config["stage"] = name if any(c.isalnum() for c in name) else "converted"
    if "epochs" not in config:
        config["epochs"] = config["max_updates"]  # fewer could end the run before its steps: an epoch may be one update
        result.notes["(ours) epochs"] = "max_train_epochs was not given; as many as max_updates, which ends the run"
    for key, value, reason in (
        ("seed", 0, "the run had none; our streams need one"), ("data.path", "data/prepared", "a prepared dataset: scripts/prepare.py"),
        ("output_dir", f"runs/{config['stage']}", "not given"),
    ):  # fmt: skip
        if key not in config:
            config[key] = value
            result.notes[f"(ours) {key}"] = f"{reason}; check {value!r}"
    start = str(config.get("model.init_from", ""))
    if start.count("/") == 1 and not revision.pinned(start) and not start.startswith((".", "/")):
        result.notes["(ours) model.init_from"] = f"a hub model needs its 40-digit commit: {start}@<commit>"
