"""FSDP2 on gloo: against DDP over 20 updates, from engine to engine, and what looks on beside it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import tinysdxl
import torch
from forked import run_ranks
from launches import launch
from PIL import Image
from stages import Stage, losses, weights

from train.base.errors import ExitCode, Halt
from train.config.stage import load_stage
from train.engine.refusals import refuse_foreign_engines
from train.model import memory
from train.observe.cards import GPUS
from train.optim.collectives import Place, check_replicas
from train.optim.fsdp2 import FullShards, open_mesh, shard
from train.recipe.order import share_of

TWENTY = (
    "epochs=8", "max_updates=20", "checkpoint.every_steps=8", "tracking.trace=true",
    # the recipe's: at the fixture's 1e-3 AdamW turns the last bits of gradients near 0 into steps
    "optimizer.unet_lr=1e-5", "optimizer.text_encoder_lr=5e-6", "schedule.min_lr=1e-6",
)  # fmt: skip
NEAR = 1e-5  # relative; sums are taken in another order


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not the least one: there a norm's group is one channel, the gradients of what lies in front of it are rounding
    errors, and Adafactor makes whole steps of them."""
    return tinysdxl.write(tmp_path_factory.mktemp("base") / "model", "two levels")


def far(one: Path, other: Path, group: str = "model") -> float:
    """Relative L2 distance of all tensors of a group of the last checkpoints."""
    left, right = weights(one, group), weights(other, group)
    assert left.keys() == right.keys()
    assert {n: (t.shape, t.dtype) for n, t in left.items()} == {n: (t.shape, t.dtype) for n, t in right.items()}
    apart = sum(float((left[n].double() - right[n].double()).square().sum()) for n in left)
    return (apart / sum(float(right[n].double().square().sum()) for n in right)) ** 0.5


def held_out(output: Path) -> list[dict[str, float]]:
    """Losses by image of every line of validation.jsonl."""
    return [json.loads(line)["losses"] for line in (output / "validation.jsonl").read_text().splitlines()]


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def same_run(one: Path, other: Path) -> None:
    assert (one / "trace.txt").read_bytes() == (other / "trace.txt").read_bytes()
    assert losses(one) == pytest.approx(losses(other), rel=NEAR)
    assert far(one, other) < NEAR
    assert far(one, other, "optimizer") < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", pytest.param("adafactor", marks=pytest.mark.long)])
def test_twenty_updates_are_those_of_ddp(optimizer: str, model: Path, dataset: Path, tmp_path: Path) -> None:
    """Beside previews, held-out loss, an average, tiles in parts and short tiles: whoever gathers, all do."""
    prompts = tmp_path / "prompts.yaml"
    prompts.write_text("steps: 2\nprompts:\n  - {text: 1girl, width: 64, height: 64, seed: 3}\n")
    looks = ("validation.share=0.2", "validation.every_steps=10", "sampling.every_steps=10", f"sampling.prompts={prompts}")
    # Adafactor makes whole steps of gradients that are rounding errors, unless its first eps is above their squares
    eps = ("optimizer.eps=[1e-10,1e-3]",) if optimizer == "adafactor" else ()
    changes = (*TWENTY, *looks, *eps, f"optimizer.name={optimizer}", "batch.split=2", "ema.decay=0.9")
    ddp, shared = (Stage(tmp_path / name, dataset, model) for name in ("ddp", "shared"))
    assert launch(ddp, 2, *changes) == [0, 0], ddp.message
    assert launch(shared, 2, *changes, "optimizer.sharding=fsdp2") == [0, 0], shared.message
    same_run(shared.output, ddp.output)
    assert far(shared.output, ddp.output, "ema") < NEAR
    for one, other in zip(*(held_out(stage.output) for stage in (shared, ddp)), strict=True):
        assert one == pytest.approx(other, rel=NEAR)
    for name in ("00.png", "00-ema.png"):
        mine, theirs = (pixels(stage.output / "samples/step-00000010" / name) for stage in (shared, ddp))
        assert np.abs(mine - theirs).max() <= 1


@pytest.mark.slow
def test_a_run_goes_from_engine_to_engine(model: Path, dataset: Path, tmp_path: Path) -> None:
    """fsdp2 on 2, stopped; one process, stopped; hsdp on 4, stopped; zero1 on 2 to the end: near the straight run."""
    straight, moved = (Stage(tmp_path / name, dataset, model) for name in ("straight", "moved"))
    assert launch(straight, 2, *TWENTY) == [0, 0], straight.message
    assert launch(moved, 2, *TWENTY, "optimizer.sharding=fsdp2", fault="control@5:1:term") == [85, 85]
    assert launch(moved, 1, *TWENTY, fault="control@9:term") == [85]
    hsdp = ("optimizer.sharding=hsdp", "optimizer.shard_group=2")
    assert launch(moved, 4, *TWENTY, *hsdp, fault="control@14:3:term") == [85] * 4
    assert launch(moved, 2, *TWENTY, "optimizer.sharding=zero1") == [0, 0], moved.message
    same_run(moved.output, straight.output)


def _one_replica_turns(rank: int, world: int) -> str:
    """4 processes, 2 replicas of 2 halves; the weights of rank 3 change by one bit."""
    network = torch.nn.Linear(6, 4, bias=False)
    with torch.no_grad():
        network.weight.copy_(torch.arange(24.0).view(4, 6))
    place = Place(rank, world, torch.device("cpu"))
    shards = FullShards(open_mesh("hsdp", place, 2, world), place, plain_state=False)
    shard(network, shards.mesh, "fp32")
    alike, group = shards.replicas({"weight": network.weight})
    check_replicas(alike, 7, group)
    if rank == 3:
        network.weight.to_local().view(torch.int32)[0, 0] += 1
    try:
        check_replicas(alike, 7, group)
    except Halt as halt:
        return f"{int(halt.code)} {halt.message}"
    return "nothing found"


def test_weights_that_differ_between_replicas_are_found_by_all(tmp_path: Path) -> None:
    for said in run_ranks(4, _one_replica_turns, tmp_path):
        assert said.startswith("9 update 7: the processes hold different weights in 1 of 1 tensors, such as weight")


@pytest.mark.parametrize(
    ("world", "group", "local"), [(4, 3, 4), (4, 4, 4), (4, None, 4), (2, None, 1), (6, 4, 2)]
)
def test_groups_that_do_not_divide_the_processes_are_refused(world: int, group: int | None, local: int) -> None:
    with pytest.raises(Halt, match=r"optimizer\.shard_group") as caught:
        open_mesh("hsdp", Place(0, world, torch.device("cpu")), group, local)
    assert caught.value.code == ExitCode.MISMATCH


REFUSED = {
    "batch.determinism: strict": "batch.determinism=strict", "model.channels_last": "model.channels_last=true",
    "model.compile": "model.compile=true", "model.float8": "model.float8=true",
    "optimizer.name: adamw8bit": "optimizer.name=adamw8bit",
    "ema.device: cpu": "ema.device=cpu", "model.weights: bf16": "model.weights=bf16",
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("sharding", ["fsdp2", "hsdp"])
def test_what_was_not_shown_together_is_refused_by_both_names(sharding: str, name: str) -> None:
    with pytest.raises(Halt, match=rf"optimizer\.sharding: {sharding} refuses .*{name}") as caught:
        load_stage(["configs/pretrain.yaml"], [f"optimizer.sharding={sharding}", REFUSED[name], "ema.decay=0.9", "precision=bf16"])
    assert caught.value.code == ExitCode.USAGE


def test_keys_that_sharding_alone_reads() -> None:
    for change, words in (("optimizer.gather=bf16", r"optimizer\.gather"), ("optimizer.shard_group=2", r"optimizer\.shard_group")):
        with pytest.raises(Halt, match=words):
            load_stage(["configs/pretrain.yaml"], [change])


def test_the_launch_files_first_line_is_a_stage_that_its_processes_can_run() -> None:
    text = Path("configs/launch/fsdp2.yaml").read_text()
    words = text.splitlines()[0].removeprefix("# ").split()
    config = load_stage([words[words.index("--config") + 1]], words[words.index("--config") + 2 :])
    processes = int(text.split("num_processes: ")[1].split()[0])
    assert config.optimizer.sharding == "fsdp2"
    assert share_of(config.batch, processes)[0] >= 1
    predicted = memory.predict(memory.setup_of(config.running, processes), (1024, 1024), config.batch.micro, 0)
    assert predicted.total < GPUS["RTX-4090"].free_gib * memory.GIB


def test_a_launch_config_that_asks_for_fsdp_needs_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(Halt, match=r"add optimizer\.sharding=fsdp2"):
        refuse_foreign_engines("none")
    refuse_foreign_engines("fsdp2")
    assert "ACCELERATE_USE_FSDP" not in os.environ  # accelerate's plugin would wrap the model too, or silently not
