"""Which tensors train, in which group: the one matcher over canonical names.

A tensor belongs to the last of `optimizer.groups` whose pattern fits its name, else to its network. Everything that
speaks of what trains asks here: the networks (which freeze), the optimizer, memory, checkpoints, adapters. Standard library only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Protocol, TypeVar

from train.base.errors import ExitCode, Halt

if TYPE_CHECKING:
    from train.config.stage import GroupConfig, OptimizerConfig

NETWORKS = ("unet", "text_encoder", "text_encoder_2")  # in the order of the optimizer


def decided(names: Iterable[str], rules: Sequence[GroupConfig]) -> dict[str, list[str]]:
    """Pattern to the names that it decides, in the order of the rules; a name whose last match comes later is not there.

    Raises Halt(USAGE) for a pattern that decides nothing, with the nearest name, and where nothing is left to train.
    """
    names = list(names)
    found: dict[str, list[str]] = {rule.match: [] for rule in rules}
    for name in names:
        if (rule := rule_of(name, rules)) is not None:
            found[rule.match].append(name)
    if problems := [_idle(pattern, names, rules) for pattern, own in found.items() if not own]:
        raise Halt(ExitCode.USAGE, "; ".join(problems))
    if rules and not any(trains(name, rules) for name in names):
        raise Halt(ExitCode.USAGE, "optimizer.groups: lr 0 for every tensor leaves nothing to train")
    return found


class Rule(Protocol):
    """What decides about the names that its pattern fits."""

    @property
    def match(self) -> str:
        """The pattern."""
        ...


R = TypeVar("R", bound=Rule)


def rule_of(name: str, rules: Sequence[R]) -> R | None:
    """The rule that decides about a tensor, or about a module that an adapter may reach: the last that fits its name."""
    return next((rule for rule in reversed(rules) if fnmatchcase(name, rule.match)), None)


def trains(name: str, rules: Sequence[GroupConfig]) -> bool:
    """Whether a tensor of a network that trains does so too; lr 0 freezes."""
    rule = rule_of(name, rules)
    return rule is None or rule.lr != 0


def group_of(name: str, rules: Sequence[GroupConfig]) -> str:
    """Name of the optimizer's group that a tensor is in."""
    network, rule = name.partition(".")[0], rule_of(name, rules)
    return network if rule is None else _named(rule, network)


def peaks(config: OptimizerConfig, networks: Mapping[str, float]) -> dict[str, float]:
    """Peak of every group that may be there. `networks`: peak of each network that trains."""
    found = dict(networks)
    for rule in config.groups:
        found |= {_named(rule, network): peak if rule.lr is None else rule.lr for network, peak in networks.items() if rule.lr != 0}
    return found


def ends(rules: Sequence[GroupConfig]) -> dict[str, float]:
    """Group to the share of the run after which its rate is 0, of those that end before the run does."""
    return {_named(rule, network): rule.until for rule in rules for network in NETWORKS if rule.until is not None}


def _named(rule: GroupConfig, network: str) -> str:
    return rule.match if rule.lr is not None else f"{network}: {rule.match}"


def _idle(pattern: str, names: Sequence[str], rules: Sequence[GroupConfig]) -> str:
    """Why a pattern decides about no tensor."""
    if any(fnmatchcase(name, pattern) for name in names):
        later = next(rule.match for rule in reversed(rules) if any(fnmatchcase(n, pattern) and fnmatchcase(n, rule.match) for n in names))
        return f"optimizer.groups: {pattern!r} decides nothing, because {later!r}, further down, fits all that it fits: the last that fits counts"
    close = get_close_matches(pattern.replace("*", ""), names, n=1, cutoff=0.0)
    return f"optimizer.groups: {pattern!r} fits no tensor that trains; the nearest is {close[0]!r}" if close else (
        f"optimizer.groups: {pattern!r} fits no tensor that trains")  # fmt: skip
