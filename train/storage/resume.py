"""Whether a checkpoint may continue under the present settings, key by key. Loads no torch.

free: the result cannot change. warn: the result may differ in its bits or its length, the run goes on.
refuse: it would be another run; `resume.accept` overrides by name and the acceptance is recorded. Which class a key
has stands at the key, in `train/config/stage.py`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import Any

from train.base.errors import ExitCode, Halt
from train.base.secrets import mask_settings
from train.config.key import Resume
from train.config.stage import OVER_THE_RUN, resume_classes

_SPECIAL_ACCEPTS = {"attempts", "data", "plan", "parent"}  # beside the config's own keys and sections
LENGTH = ("epochs", "max_updates")  # the keys that make a run longer
_SHOWN = 6  # names per kind in a message
_CLASSES = resume_classes()
# Keys of the first schema that are gone, with their defaults: its checkpoints do not say which of theirs were not at
# the default, later ones do. Who takes a key out of train/config/stage.py writes it here.
_GONE: dict[str, Any] = {}


@dataclass(frozen=True)
class Difference:
    """One setting or fact that is not what the checkpoint was written under."""

    key: str
    saved: Any
    now: Any
    why: str = ""

    def __str__(self) -> str:
        saved, now = self.saved, self.now
        if isinstance(saved, list) and isinstance(now, list) and saved and now and isinstance((saved + now)[0], dict):  # what differs, in whole
            kept = [entry for entry in saved if entry in now]
            saved, now = ([entry for entry in entries if entry not in kept] for entries in (saved, now))
        return f"{self.key}: checkpoint {_short(saved)}, now {_short(now)}{self.why and f' ({self.why})'}"


@dataclass(frozen=True)
class Comparison:
    """Differences by class; `accepted` are those that `resume.accept` names."""

    refused: tuple[Difference, ...] = ()
    warned: tuple[Difference, ...] = ()
    accepted: tuple[Difference, ...] = ()
    free: tuple[Difference, ...] = ()

    def table(self) -> str:
        """One line per difference, the worst first."""
        classes = (("refuse", self.refused), ("accepted", self.accepted), ("warn", self.warned), ("free", self.free))
        return "\n".join(f"  {name:8}  {difference}" for name, found in classes for difference in found)


@dataclass(frozen=True)
class Expectations:
    """What a checkpoint must have been written under; `to_state` is what the next checkpoint says about itself.

    config: the flat config. held: for keys that are paths, the hash of what they hold, compared instead of the
    path. defaults: what each key holds where nobody sets it. facts: hashes that must be equal; the keys "dataset", "plan" and "parent" can be accepted by the names
    data, plan and parent. notes: worth a warning (canary, threads, versions). tensors: group -> name -> spec, or
    None for a group whose tensors are not known before the first step.
    """

    stage: str
    config: Mapping[str, Any]
    held: Mapping[str, str] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, Mapping[str, Any] | None] = field(default_factory=dict)
    accept: Sequence[str] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)

    def to_state(self) -> dict[str, Any]:
        """The part of `state.json` that a later `compare` reads."""
        return {
            "stage": self.stage, "config": _plain(self.config), "held": _plain(self.held),
            "facts": _plain(self.facts), "notes": _plain(self.notes), "set": sorted(self._set()),
        }  # fmt: skip

    def _set(self) -> list[str]:
        """Keys that are not at their default: what a version without one of them must know of it."""
        now, defaults = _plain(self.config), _plain(self.defaults)
        return [key for key in now if key not in defaults or now[key] != defaults[key]]


def key_class(key: str) -> Resume:
    """Class of a flat config key, such as `batch.micro`, as it stands at the key; of one that is gone, `refuse`."""
    return _CLASSES.get(key, "refuse")


def without_secrets(flat: Mapping[str, Any]) -> dict[str, Any]:
    """A flat config for state.json. What the environment holds may be masked only where a resume compares nothing."""
    return {key: mask_settings(value, None if key_class(key) == "free" else {}) for key, value in flat.items()}


def check_accept(accept: Iterable[str], config: Mapping[str, Any]) -> None:
    """Halt(USAGE) for a name in `resume.accept` that is neither a key, a section, nor one of the special names."""
    known = set(config) | {key.partition(".")[0] for key in config} | _SPECIAL_ACCEPTS
    for name in accept:
        if name not in known:
            close = get_close_matches(name, sorted(known), n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise Halt(ExitCode.USAGE, f"resume.accept: {name!r} is not a key, a section, or one of "
                       f"{', '.join(sorted(_SPECIAL_ACCEPTS))}{hint}")  # fmt: skip


def compare(state: Mapping[str, Any], now: Expectations) -> Comparison:
    """Sort every difference between a checkpoint's `state.json` and the present settings into its class."""
    found: dict[str, list[Difference]] = {"refuse": [], "warn": [], "free": [], "accepted": []}
    for difference in _config_differences(state, now):
        kind = key_class(difference.key)
        if difference.key in LENGTH and (shares := _shares_of_the_run(now.config)):
            kind, difference = "refuse", replace(difference, why=f"{shares} would have been another up to here")
        if kind == "refuse" and _is_accepted(difference.key, now.accept):
            kind = "accepted"  # type: ignore[assignment]
        found[kind].append(difference)
    saved_facts, saved_notes = state.get("facts", {}), state.get("notes", {})
    for key in sorted(set(saved_facts) | set(now.facts)):
        difference = Difference(key, saved_facts.get(key), _plain(now.facts.get(key)))
        if difference.saved != difference.now and not (key == "plan" and _plan_is_explained(state, now, found)):
            name = {"dataset": "data"}.get(key, key)
            accepted = name in now.accept or (name == "parent" and _is_accepted("model.init_from", now.accept))
            found["accepted" if accepted else "refuse"].append(difference)
    for key in sorted(set(saved_notes) & set(now.notes)):
        if saved_notes[key] != _plain(now.notes[key]):
            found["warn"].append(Difference(key, saved_notes[key], _plain(now.notes[key])))
    return Comparison(tuple(found["refuse"]), tuple(found["warn"]), tuple(found["accepted"]), tuple(found["free"]))


def _shares_of_the_run(config: Mapping[str, Any]) -> str:
    """Keys whose values up to any update depend on the length of the run; empty where none does."""
    found = ["schedule.name"] if config.get("schedule.name") in OVER_THE_RUN else []
    steps = ("schedule.warmup_steps", "data.token_warmup_steps")
    found += [f"until of optimizer.groups {group['match']}" for group in config.get("optimizer.groups", ()) if group["until"] is not None]
    return ", ".join(found + [key for key in steps if 0 < config.get(key, 0) < 1])


def tensor_differences(
    saved: Mapping[str, Mapping[str, Any]], wanted: Mapping[str, Mapping[str, Any] | None]
) -> list[str]:
    """Groups, names, shapes and dtypes that the checkpoint has otherwise than the model; [] when equal."""
    lines = [f"{group}: not in the checkpoint" for group in sorted(set(wanted) - set(saved))]
    lines += [f"{group}: in the checkpoint, not wanted by this config" for group in sorted(set(saved) - set(wanted))]
    for group in sorted(set(saved) & set(wanted)):
        expected = wanted[group]
        if expected is None:
            continue
        there = saved[group]
        lines += _named(f"{group}: missing in the checkpoint", sorted(set(expected) - set(there)))
        lines += _named(f"{group}: not in this model", sorted(set(there) - set(expected)))
        other = [n for n in sorted(set(there) & set(expected)) if there[n] != expected[n]]
        lines += _named(f"{group}: other shape", [f"{n} {there[n]}, model {expected[n]}" for n in other])
    return lines


def _config_differences(state: Mapping[str, Any], now: Expectations) -> list[Difference]:
    saved, current = state.get("config", {}), _plain(now.config)
    saved_held = state.get("held", {})
    differences = []
    if state.get("stage") != now.stage:
        differences.append(Difference("stage", state.get("stage"), now.stage))
    for key in sorted((set(saved) | set(current)) - {"stage"}):
        if key in saved_held and key in now.held:  # a path: what it holds counts, not where it lies
            if saved_held[key] != now.held[key]:
                differences.append(Difference(f"{key} (content)", saved_held[key], now.held[key]))
        elif not _agree(key, state, saved, current, now.defaults):
            differences.append(Difference(key, saved.get(key, _plain(now.defaults).get(key)), current.get(key)))
    return differences


def _agree(
    key: str, state: Mapping[str, Any], saved: Mapping[str, Any], current: Mapping[str, Any], defaults: Mapping[str, Any]
) -> bool:
    """Whether checkpoint and config mean the same by `key`; one of them may be of a version that does not know it."""
    if key in saved and key in current:
        return bool(saved[key] == current[key])
    if key in current:  # it came later: a checkpoint without it was written under its default
        return key in defaults and bool(current[key] == _plain(defaults)[key])
    if isinstance(state.get("set"), list):  # it is gone: whoever set it cannot have it any more
        return key not in state["set"]
    return key in _GONE and bool(saved[key] == _GONE[key])


def _plan_is_explained(state: Mapping[str, Any], now: Expectations, found: Mapping[str, list[Difference]]) -> bool:
    """The plan's hash covers seed, batch and data: a change of those is listed by its own name already."""
    by_config = any(
        d.key == "seed" or d.key.startswith(("batch.", "data.")) for d in found["refuse"] + found["accepted"]
    )
    return by_config or state.get("facts", {}).get("dataset") != _plain(now.facts.get("dataset"))


def _is_accepted(key: str, accept: Sequence[str]) -> bool:
    bare = key.removesuffix(" (content)")
    parent = bare == "model.init_from" and "parent" in accept
    return parent or bare in accept or bare.partition(".")[0] in accept


def _named(title: str, names: list[str]) -> list[str]:
    if not names:
        return []
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return [f"{title} ({len(names)}): {', '.join(names[:_SHOWN])}{more}"]


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    most = 300 if isinstance(value, list) else 70
    return text if len(text) <= most else text[: most - 3] + "..."


def _plain(value: Any) -> Any:
    """As JSON gives it back: tuples become lists, enum strings become strings."""
    return json.loads(json.dumps(dict(value) if isinstance(value, Mapping) else value))
