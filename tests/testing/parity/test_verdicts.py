"""What a difference is called: equal within a tolerance, known up to what is documented, else DIFFERENT."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from train.base.errors import ExitCode, Halt
from train.testing.parity import data_rows, inputs, number_rows, table, verdicts
from train.testing.parity.checkout import Checkout
from train.testing.parity.verdicts import Known

KNOWN = Known(0.5, "docs say so")


@pytest.mark.parametrize(("difference", "known", "verdict"), [
    (0.0, None, "equal"), (0.1, None, "equal"), (0.2, None, "DIFFERENT"), (0.2, KNOWN, "known"), (0.6, KNOWN, "DIFFERENT"),
    (math.nan, KNOWN, "DIFFERENT"), (math.inf, None, "DIFFERENT"),
])  # fmt: skip
def test_verdicts(difference: float, known: Known | None, verdict: str) -> None:
    assert verdicts.row("x", difference, 0.1, "why", known=known).verdict == verdict


def test_distances() -> None:
    ones, off = torch.ones(4), torch.tensor([1.0, 1.0, 1.0, 1.5])
    assert verdicts.farthest(off, ones) == 0.5
    assert verdicts.relative(off, ones) == 0.25
    assert math.isinf(verdicts.relative(ones, torch.ones(3)))
    assert verdicts.relative(ones, torch.zeros(4)) == 2.0


def test_one_of_many_that_is_not_the_same_is_named() -> None:
    row = verdicts.counted("ids", ["k-on!"], 13, "whole numbers")
    assert (row.verdict, row.measured) == ("DIFFERENT", "12 of 13 the same; first: k-on!")
    assert verdicts.counted("ids", [], 13, "whole numbers").verdict == "equal"


def report(*rows: verdicts.Row) -> table.Report:
    return table.Report(Checkout(Path("sd"), Path("py"), "a" * 40, "2024-03-20"), "tiny", "as_run", rows)


def test_the_page_says_what_the_table_says_and_nothing_of_it_is_markup() -> None:
    made = report(verdicts.row("a <b>", 1.0, 0.0, "x & y"), verdicts.row("c", 0.0, 0.0, "z"))
    assert made.different == 1
    assert "1 DIFFERENT, 1 equal" in table.headline(made)
    assert "a &lt;b&gt;" in table.page(made) and "x &amp; y" in table.page(made) and "<b>" not in table.page(made)
    assert "DIFFERENT  a <b>: 1" in table.describe(made)


def test_full_size_is_refused_where_it_cannot_fit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(table, "_free_gib", lambda: 17.9)
    with pytest.raises(Halt, match="18 are free: use --size tiny") as halted:
        table.compare(inputs.switches("configs/as_run/pretrain.yaml"), report().checkout, tmp_path, size="full", settings="", say=print)
    assert halted.value.code == ExitCode.MISMATCH


@pytest.mark.parametrize(("embedding", "their_shift", "verdict"), [
    ("sd_scripts", 1, "equal"), ("correct", 1, "DIFFERENT"), ("sd_scripts", 0, "known"), ("correct", 0, "equal"),
])  # fmt: skip
def test_the_timestep_switch_is_one_row(embedding: str, their_shift: int, verdict: str) -> None:
    """The released fork has shift 1, later versions 0; only a switch that is not the fork's is a surprise."""
    both = {f"embedding.{shift}": number_rows.timestep_embedding(kind) for shift, kind in ((0, "correct"), (1, "sd_scripts"))}  # type: ignore[arg-type]
    theirs = {**both, "embedding.unet": both[f"embedding.{their_shift}"], "size_embedding": torch.zeros(0)}
    config = inputs.switches("configs/as_run/pretrain.yaml", [f"model.timestep_embedding={embedding}"])
    first, _ = number_rows.embeddings(config, number_rows.given(), theirs)
    assert first.verdict == verdict


def test_a_shuffled_caption_is_held_by_its_parts() -> None:
    one = {"text": "a, ||| b, c", "shuffle": True, "warmup_min": 1, "warmup_steps": 0, "step": 5}
    mine = data_rows.drawn(one)
    assert data_rows.same_caption(one, mine, "a, c, b") and data_rows.same_caption(one, mine, "a, b, c")
    assert not data_rows.same_caption(one, mine, "b, a, c") and not data_rows.same_caption(one, mine, "a, b, b")


def test_inputs_are_the_same_in_every_run_and_reach_the_edges() -> None:
    assert inputs.sizes() == inputs.sizes() and len(set(inputs.sizes())) > 500
    assert inputs.captions() == inputs.captions()
    assert {one["shuffle"] for one in inputs.captions()} == {True, False}
