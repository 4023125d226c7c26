"""What a model predicts: what its files say of it, whether a stage goes on with it, and how an export tells it.

Two facts: the prediction (epsilon, v or flow) and whether the noise schedule ends at a signal-to-noise ratio of zero. Files
say both, one or neither, each kind with marks of its own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from train.base.errors import ExitCode, Halt
from train.config.derived import TrainedAs
from train.model import sdxl

if TYPE_CHECKING:  # source reads files by way of the marks that are told here
    from train.model.source import LocalModel

FLOW_SHIFT_KEY = "anix.flow_shift"  # metadata of a single file of rectified flow
ENDS_AT_ZERO = "rescale_betas_zero_snr"  # diffusers' word for zero terminal SNR


@dataclass(frozen=True)
class Objective:
    """None = no file says so."""

    prediction: str | None
    zero_terminal_snr: bool | None

    def __str__(self) -> str:
        ends = {True: " with zero terminal SNR", False: "", None: " (zero terminal SNR or not: not said)"}
        return f"{self.prediction or 'nothing it names'}{ends[self.zero_terminal_snr]}"


def trained(own: TrainedAs) -> Objective:
    """What the stage trains."""
    return Objective(own.prediction, own.zero_terminal_snr)


def stated(source: LocalModel) -> Objective:
    """What the parent's files say: our record, a folder's scheduler config, a single file's marks.

    A single file without marks says nothing: most predict epsilon, but trainers exist that mark neither v-prediction nor
    zero terminal SNR, and some that mark the first alone.
    """
    scheduler, ours = source.configs["scheduler"], bool(source.lineage)
    if flow_shift_of(scheduler) is not None:
        return Objective("flow", False)
    if str(scheduler.get("prediction_type", "epsilon")).startswith("v"):
        known = ours or ENDS_AT_ZERO in scheduler
        return Objective("v", bool(scheduler.get(ENDS_AT_ZERO)) if known else None)
    # The config that files without marks are given, and folders made from them.
    marked = ours or dict(scheduler) != sdxl.STANDARD["scheduler"] or "modelspec.prediction_type" in source.metadata
    return Objective("epsilon", False) if marked else Objective(None, None)


def conversion(trained_as: TrainedAs, source: LocalModel, *, convert: bool) -> dict[str, Any] | None:
    """What the stage teaches anew, as its lineage records it: {"from": ..., "to": ...}. None where it goes on.

    Raises Halt(MISMATCH) for another objective than the parent's without `convert`.
    """
    parent, own = stated(source), trained(trained_as)
    unlike = [
        key
        for key, name in (("loss.prediction", "prediction"), ("noise.zero_terminal_snr", "zero_terminal_snr"))
        if getattr(parent, name) not in (None, getattr(own, name))
    ]
    if not unlike:
        return None
    if not convert:
        keys = " and ".join(unlike)
        raise Halt(
            ExitCode.MISMATCH,
            f"model.init_from {source.path} was trained to predict {parent}, this stage trains {own}: set {keys} as the "
            "parent has it, or loss.convert=true if the model is to be taught anew",
        )
    return {"from": asdict(parent), "to": asdict(own)}


def unstated(trained_as: TrainedAs, source: LocalModel) -> str | None:
    """One line where the parent's files leave open what it predicts; None where they say it."""
    parent, own = stated(source), trained(trained_as)
    if parent.prediction is None:
        return f"{source.path} does not say what it predicts: taken as loss.prediction says, {own}"
    if parent.zero_terminal_snr is None:
        return (
            f"{source.path} predicts {parent.prediction} and does not say whether to zero terminal SNR: taken as "
            f"noise.zero_terminal_snr says, {str(own.zero_terminal_snr).lower()}"
        )
    return None


def told_scheduler(
    scheduler: Mapping[str, Any], *, v: bool, zero_terminal_snr: bool, flow_shift: float | None = None
) -> dict[str, Any]:
    """A scheduler config that says what the network predicts, whatever it said before; `flow_shift`: of rectified flow.

    With zero terminal SNR it starts where the training did, at t = 999: under SDXL's own "leading" spacing the network
    would first be asked at t = 946 (28 steps), and never see the pure noise that it was taught to begin with. SDXL's
    pipeline cannot run FlowMatchEuler, so flow names the one scheduler of diffusers' that it runs and that knows flow.
    """
    if flow_shift is not None:
        told = {key: sdxl.STANDARD["scheduler"][key] for key in ("beta_end", "beta_schedule", "beta_start", "num_train_timesteps")}
        return told | {"_class_name": "DPMSolverMultistepScheduler", "prediction_type": "flow_prediction",
                       "use_flow_sigmas": True, "flow_shift": flow_shift}  # fmt: skip
    scheduler = sdxl.STANDARD["scheduler"] if flow_shift_of(scheduler) is not None else scheduler
    told = {**scheduler, "prediction_type": "v_prediction" if v else "epsilon"}
    before = told.pop("rescale_betas_zero_snr", False)  # the parent's schedule need not be the one trained with
    if zero_terminal_snr:
        told |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    elif before:
        told |= {key: sdxl.STANDARD["scheduler"][key] for key in ("timestep_spacing", "steps_offset")}
    return told


def flow_shift_of(scheduler: Mapping[str, Any]) -> float | None:
    """The shift of a scheduler config of rectified flow, ours or another program's; None where it is of no such model."""
    matching = str(scheduler.get("_class_name", "")).startswith("FlowMatch")
    if not (matching or scheduler.get("prediction_type") == "flow_prediction"):
        return None
    return _positive(scheduler.get("shift" if matching else "flow_shift", 1.0))


def sampled_as(scheduler: Mapping[str, Any]) -> dict[str, Any]:
    """What a scheduler config says of sampling, by the names that `TrainedAs` and the samplers give it."""
    if (shift := flow_shift_of(scheduler)) is not None:
        return {"prediction": "flow", "flow_shift": shift}
    if str(scheduler.get("prediction_type", "")).startswith("v"):
        return {"prediction": "v", "zero_terminal_snr": bool(scheduler.get(ENDS_AT_ZERO))}
    return {}


def _positive(value: Any) -> float:
    """A number above 0 that anybody may have written, else 1."""
    try:
        return float(value) if 0 < float(value) < 1000 else 1.0
    except (TypeError, ValueError):
        return 1.0


def configs_of(metadata: Mapping[str, str], names: Collection[str], whose: str) -> sdxl.Configs:
    """The configs that a single file carries in its metadata, else SDXL's own; `names` are those of its tensors."""
    text = metadata.get(sdxl.CONFIGS_KEY)
    if not text:
        said = metadata.get("modelspec.prediction_type", "")
        v, shift = sdxl.V_MARK in names or said.startswith("v"), _positive(metadata.get(FLOW_SHIFT_KEY))
        scheduler = told_scheduler(sdxl.STANDARD["scheduler"], v=v, zero_terminal_snr=v and sdxl.ZERO_SNR_MARK in names,
                                   flow_shift=shift if said == "flow" and not v else None)  # fmt: skip
        return {**sdxl.STANDARD, "unet": sdxl.drawn_at(sdxl.STANDARD["unet"], _side_px(metadata)), "scheduler": scheduler}
    try:
        stored = json.loads(text)
        return {name: dict(stored[name]) for name in (*sdxl.NETWORKS, "scheduler")}
    except (ValueError, TypeError, KeyError, RecursionError):
        raise Halt(ExitCode.MISMATCH, f"{whose}: its metadata entry {sdxl.CONFIGS_KEY} is damaged") from None


def _side_px(metadata: Mapping[str, str]) -> int:
    """Side of the square that a file names as its resolution, SDXL's own where it names none."""
    named = re.fullmatch(r"(\d{2,4})x(\d{2,4})", metadata.get("modelspec.resolution", ""))
    return int(named[1]) if named and named[1] == named[2] and int(named[1]) >= 64 else 1024
