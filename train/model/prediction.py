"""What a model predicts: what its files say of it, whether a stage goes on with it, and how an export tells it.

Two facts: the prediction (epsilon or v) and whether the noise schedule ends at a signal-to-noise ratio of zero. Files
say both, one or neither, each kind with marks of its own.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from train.base.errors import ExitCode, Halt
from train.config.derived import TrainedAs
from train.model import sdxl
from train.model.source import LocalModel

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
