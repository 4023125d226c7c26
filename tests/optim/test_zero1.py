"""ZeRO-1: shares, the wire, and stages on two processes that must equal one process to the last bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import run_ranks
from hypothesis import given
from hypothesis import strategies as st
from stages import Stage, result
from torch import nn

from train.base.errors import ExitCode, Halt
from train.config.stage import load_stage
from train.engine import session
from train.model.memory import setup_of
from train.optim.collectives import Place
from train.optim.zero1 import Shares, assign
from train.recipe.order import Plan
from train.storage.rundir import open_run_dir
from train.testing.chaos.ranks import Ranks, warm_up

OPTIMIZERS = {
    "adamw": (),
    "adafactor": ("optimizer.name=adafactor",),
    "adamw8bit": ("optimizer.name=adamw8bit",),
}
TWENTY = ("epochs=8", "max_updates=20", "checkpoint.every_steps=8")


@given(st.dictionaries(st.text(min_size=1), st.integers(0, 10_000), min_size=1, max_size=40), st.integers(1, 6))
def test_every_parameter_has_one_owner_and_shares_are_even(sizes: dict[str, int], world: int) -> None:
    if world > len(sizes):
        with pytest.raises(Halt, match="zero1") as halt:
            assign(sizes, world)
        assert halt.value.code == ExitCode.MISMATCH
        return
    owners = assign(sizes, world)
    assert owners.keys() == sizes.keys()
    loads = [sum(sizes[name] for name, owner in owners.items() if owner == rank) for rank in range(world)]
    assert max(loads) - min(loads) <= max(sizes.values())
    assert assign(dict(reversed(sizes.items())), world) == owners, "the order of the names does not matter"


def test_shares_by_hand() -> None:
    # largest first: a -> 0, b -> 1, c joins the lighter b, d joins a (a tie goes to the lower rank)
    assert assign({"d": 1, "c": 2, "b": 3, "a": 5}, 2) == {"a": 0, "b": 1, "c": 1, "d": 0}


def _parameters(rank: int) -> dict[str, nn.Parameter]:
    """Of several formats and dtypes; every process starts with its own numbers."""
    generator = torch.Generator().manual_seed(rank)
    image = torch.randn(8, 4, 3, 3, generator=generator).to(memory_format=torch.channels_last)
    return {
        "image": nn.Parameter(image),
        "turned": nn.Parameter(torch.randn(6, 5, generator=generator).t()),
        "half": nn.Parameter(torch.randn(7, generator=generator).bfloat16()),
        "last": nn.Parameter(torch.randn(3, generator=generator)),
    }


def _spread_and_gather(rank: int, world: int) -> dict[str, Any]:
    parameters = _parameters(rank)
    shares = Shares(parameters, Place(rank, world, torch.device("cpu")))
    shares.spread(parameters)
    expected = {name: _parameters(owner)[name] for name, owner in shares.owners.items()}
    state = {}
    for name in shares.mine(parameters):
        state[f"{name}/exp_avg"] = expected[name].detach() * 2
        state[f"{name}/step"] = torch.tensor(40 + rank, dtype=torch.int64)
        state[f"{name}/code"] = torch.arange(5, dtype=torch.uint8).flip(0)
    whole = shares.gather(state)
    if rank == 0:
        for name, owner in shares.owners.items():
            assert torch.equal(whole[f"{name}/exp_avg"], expected[name] * 2)
            assert whole[f"{name}/exp_avg"].dtype == expected[name].dtype
            assert whole[f"{name}/step"].tolist() == 40 + owner
            assert whole[f"{name}/code"].tolist() == [4, 3, 2, 1, 0]
    return {
        "spread": all(torch.equal(parameters[name], expected[name]) for name in parameters),
        "formats": all(parameters[name].stride() == expected[name].stride() for name in parameters),
        "gathered": len(whole),
        "mine": sorted(shares.mine(parameters)),
    }


def test_weights_spread_and_state_gathers_bit_by_bit(tmp_path: Path) -> None:
    first, second, third = run_ranks(3, _spread_and_gather, tmp_path)
    assert all(found["spread"] and found["formats"] for found in (first, second, third))
    assert first["gathered"] == 4 * 3 and second["gathered"] == third["gathered"] == 0
    assert sorted(first["mine"] + second["mine"] + third["mine"]) == ["half", "image", "last", "turned"]


def test_state_of_another_share_is_refused() -> None:
    shares = Shares(_parameters(0), Place(0, 2, torch.device("cpu")))
    own = next(name for name, owner in shares.owners.items() if owner == 1)
    other = next(name for name, owner in shares.owners.items() if owner == 0)
    assert shares._offered(1, json.dumps({f"{own}/step": ["I64", []]}).encode()) == {f"{own}/step": (torch.int64, [])}
    for name in (f"{other}/step", "stranger/step", own):
        with pytest.raises(RuntimeError, match=f"rank 1 sends {name}"):
            shares._offered(1, json.dumps({name: ["I64", []]}).encode())


# --- stages --------------------------------------------------------------------------------------------


def launched(stage: Stage, *overrides: str, world: int = 2, fault: str = "", codes: tuple[int, ...] = ()) -> str:
    """Run the stage on forked processes; what they printed."""
    warm_up()
    env = {"ANIX_FAULT": fault} if fault else {}
    launch = Ranks(stage.arguments(*overrides), stage.output.parent / "logs", world=world, env=env)
    assert tuple(launch.wait()) == (codes or (0,) * world), launch.text()
    return launch.text()


def of_the_run(found: dict[str, Any]) -> dict[str, Any]:
    """Without the order in which losses are logged as text: numbers, trace and the bytes of the tensors."""
    return {key: found[key] for key in ("metrics", "trace", "checkpoint", "model.safetensors", "optimizer.safetensors")}


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_twenty_updates_equal_those_of_an_unsharded_run(
    optimizer: str, base_model: Path, dataset: Path, tmp_path: Path
) -> None:
    changes = (*TWENTY, *OPTIMIZERS[optimizer], "batch.determinism=strict")
    whole, shared = (Stage(tmp_path / name, dataset, base_model) for name in ("whole", "shared"))
    launched(whole, *changes)
    background = ("checkpoint.background=true", "checkpoint.when_busy=wait", "checkpoint.every_steps=3")
    launched(shared, *changes, "optimizer.sharding=zero1", *(background if optimizer == "adamw" else ()))
    assert of_the_run(result(shared.output)) == of_the_run(result(whole.output))
    steps = {path.name for path in (shared.output / "checkpoints").glob("step-*")}
    assert steps >= ({"step-00000018", "step-00000020"} if optimizer == "adamw" else {"step-00000016", "step-00000020"})


@pytest.mark.slow
def test_the_number_of_processes_may_change_between_launches(
    base_model: Path, dataset: Path, tmp_path: Path
) -> None:
    """zero1 on 2, stopped; unsharded on 1, stopped; zero1 on 2 to the end: the straight run's bits."""
    changes = (*TWENTY, "batch.determinism=strict", "ema.decay=0.9")
    straight, moved = (Stage(tmp_path / name, dataset, base_model) for name in ("straight", "moved"))
    launched(straight, *changes, world=1)
    sharded = (*changes, "optimizer.sharding=zero1")
    launched(moved, *sharded, fault="control@5:1:term", codes=(85, 85))
    launched(moved, *changes, world=1, fault="control@11:term", codes=(85,))
    launched(moved, *sharded)
    assert result(moved.output) == result(straight.output)


@pytest.mark.slow
def test_bf16_weights_round_alike_however_they_are_shared(base_model: Path, dataset: Path, tmp_path: Path) -> None:
    changes = ("model.weights=bf16", "precision=bf16", "max_updates=6", "optimizer.name=adafactor")
    whole, shared = (Stage(tmp_path / name, dataset, base_model) for name in ("whole", "shared"))
    launched(whole, *changes)
    launched(shared, *changes, "optimizer.sharding=zero1")
    assert of_the_run(result(shared.output)) == of_the_run(result(whole.output))


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "codes"), [
    ("backward@11:1:raise=KeyError", (1, 1)),  # what the other found out
    ("optimizer@11:1:kill", (9, -9)),  # the other waits for weights that never come
])  # fmt: skip
def test_after_a_failure_the_last_checkpoint_remains_and_is_named(
    fault: str, codes: tuple[int, int], base_model: Path, dataset: Path, tmp_path: Path
) -> None:
    changes = (*TWENTY, "batch.determinism=strict", "optimizer.sharding=zero1")
    straight, failed = (Stage(tmp_path / name, dataset, base_model) for name in ("straight", "failed"))
    launched(straight, *changes)
    said = launched(failed, *changes, fault=fault, codes=codes)
    if codes[1] == -9:
        assert "rank 1 is gone" in said
    else:
        assert "update 11 cannot be saved after a failure: with optimizer.sharding: zero1" in said
    assert [path.name for path in (failed.output / "checkpoints").iterdir()] == ["step-00000008"]
    launched(failed, *changes)
    assert result(failed.output) == result(straight.output)
    thrown = (failed.output / "metrics.discarded.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in thrown] == [9, 10, 11]


def test_one_process_shards_nothing(base_model: Path, dataset: Path, tmp_path: Path, straight: Path) -> None:
    stage = Stage(tmp_path, dataset, base_model)
    assert stage.run("optimizer.sharding=zero1") == 0, stage.message
    assert result(stage.output) == result(straight)


def test_the_planner_counts_the_share() -> None:
    pretrain = load_stage([Path("configs/pretrain.yaml")], ["optimizer.sharding=zero1"]).running
    assert setup_of(pretrain, 2).shards == 2 and setup_of(pretrain, 1).shards == 1
    assert setup_of(load_stage([Path("configs/pretrain.yaml")], []).running, 2).shards == 1


def test_a_host_and_a_disk_too_small_are_refused_together_before_the_first_update(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config, parameters = load_stage([Path("configs/pretrain.yaml")], []), _parameters(0)
    wanted = (config.optimizer.name, config.checkpoint)
    run = open_run_dir(tmp_path, "pretrain")
    plan = Plan([1, 2], [64, 64], [64, 64], seed=1, tile_images=1, tiles_per_update=2, epochs=1)
    shares = Shares(parameters, Place(0, 2, torch.device("cpu")))
    monkeypatch.setattr(session, "available_host_bytes", lambda: 10)
    session.check_room(run, plan, parameters, None, *wanted, average=False)
    with pytest.raises(Halt, match="zero1 gathers") as halt:
        session.check_room(run, plan, parameters, shares, *wanted, average=False)
    assert halt.value.code == ExitCode.MISMATCH
    monkeypatch.setattr("train.storage.space.free_bytes", lambda path: 10)
    with pytest.raises(Halt, match=r"(?s)checkpoints need .*\n.*zero1 gathers"):
        session.check_room(run, plan, parameters, shares, *wanted, average=False)
    run.close()
