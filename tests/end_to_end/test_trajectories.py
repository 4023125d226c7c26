"""Twenty updates with each speed or memory option against the plain path: what each may change, and that it does not more.

`loss`: largest relative difference of an update's loss. `weights`: distance from the plain run's final weights over the
distance those have travelled; 0 means the same bits. The limits are train/tools/estimate/tolerances.py's; the table stands in
docs/speed.md. `optimizer.sharding: zero1`
(same bits, two processes) stands in test_sharding.py.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import synthetic
import tinysdxl
import torch
from stages import Stage, losses, weights

from train.engine import setup
from train.model import speed
from train.model.networks import Networks, trained_parameters
from train.testing.chaos.ranks import Ranks, warm_up
from train.tools.estimate.tolerances import COARSE, REORDERED, RETILED, ROUNDED, SAME_BITS, Tolerance

RUN = ("batch.micro=16", "batch.effective=16", "epochs=8", "max_updates=20", "checkpoint.every_steps=20")
BF16 = "precision=bf16"


OPTIONS: dict[str, tuple[tuple[str, ...], Tolerance]] = {
    "batch.split 2": (("batch.split=2",), RETILED),
    "batch.split 4": (("batch.split=4",), RETILED),
    "checkpointing full": (("model.gradient_checkpointing=full",), SAME_BITS),
    "checkpointing partial": (("model.gradient_checkpointing=partial",), SAME_BITS),
    "auto": (("model.gradient_checkpointing=auto", "batch.split=auto"), SAME_BITS),
    "channels_last": (("model.channels_last=true",), REORDERED),
    "attention math": (("model.attention=math",), REORDERED),
    "strict": (("batch.determinism=strict",), SAME_BITS),
    "data workers": (("data.workers=1",), SAME_BITS),
    "bf16": ((BF16,), ROUNDED),
    "bf16, channels_last, partial": ((BF16, "model.channels_last=true", "model.gradient_checkpointing=partial"), ROUNDED),
    "bf16, attention flash": ((BF16, "model.attention=flash"), ROUNDED),
    "bf16 weights": ((BF16, "model.weights=bf16"), COARSE),
    "bf16 weights, split": ((BF16, "model.weights=bf16", "batch.split=2"), COARSE),
}
BY_HAND = {"batch.split 4", "auto", "attention math", "strict", "data workers", "bf16 weights, split"}
# Moments of 8 bits need tensors of 4,096 values, which the least model hardly has; float8 needs sides of 16.
LARGER: dict[str, tuple[tuple[str, ...], Tolerance]] = {
    "adamw8bit": (("optimizer.name=adamw8bit",), ROUNDED),
    "adamw8bit, bf16 weights": (("optimizer.name=adamw8bit", BF16, "model.weights=bf16"), COARSE),
}


class Plain(NamedTuple):
    folder: Path
    model: Path
    data: Path
    losses: list[float]
    weights: dict[str, torch.Tensor]
    travelled: float


def straight_run(folder: Path, variant: str) -> Plain:
    model = tinysdxl.write(folder / "model", variant)
    data = synthetic.make_dataset(folder / "set", (32, 16), buckets=((64, 64), (64, 96)))
    run = Stage(folder / "plain", data, model)
    assert run.run(*RUN) == 0, run.message
    networks = Networks(tinysdxl.load_components(model, with_vae=False), train_text_encoders=True, context="stitched",
                        pooled_projection="correct")  # fmt: skip
    start = {name: parameter.detach() for name, parameter in trained_parameters(networks).items()}
    return Plain(folder, model, data, losses(run.output), weights(run.output), distance(weights(run.output), start))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Plain:
    return straight_run(tmp_path_factory.mktemp("least"), "least")


@pytest.fixture(scope="module")
def larger(tmp_path_factory: pytest.TempPathFactory) -> Plain:
    return straight_run(tmp_path_factory.mktemp("larger"), "like SDXL")


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return sum(float((one[name].double() - other[name].double()).square().sum()) for name in one) ** 0.5


def drift(run: Stage, plain: Plain) -> Tolerance:
    """What this run's losses and weights differ by."""
    found = losses(run.output)
    assert len(found) == len(plain.losses) == 20
    by_loss = max(abs(a - b) / b for a, b in zip(found, plain.losses, strict=True))
    return Tolerance(by_loss, distance(weights(run.output), plain.weights) / plain.travelled)


def follows(plain: Plain, folder: Path, changes: tuple[str, ...], tolerance: Tolerance) -> Stage:
    run = Stage(folder, plain.data, plain.model)
    assert run.run(*RUN, *changes) == 0, run.message
    found = drift(run, plain)
    assert found.loss <= tolerance.loss and found.weights <= tolerance.weights, found
    return run


@pytest.mark.slow
@pytest.mark.parametrize("name", [
    pytest.param(name, marks=pytest.mark.long) if name in BY_HAND else name for name in OPTIONS
])  # fmt: skip
def test_option_follows_the_plain_path(name: str, plain: Plain, tmp_path: Path) -> None:
    follows(plain, tmp_path, *OPTIONS[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGER)
def test_8_bit_moments_follow_the_plain_path(name: str, larger: Plain, tmp_path: Path) -> None:
    run = follows(larger, tmp_path, *LARGER[name])
    moments = weights(run.output, "optimizer")
    assert any(tensor.dtype == torch.uint8 for name, tensor in moments.items() if name.endswith("state1"))


@pytest.mark.slow
def test_a_slightly_wrong_run_is_told_from_a_right_one(plain: Plain, tmp_path: Path) -> None:
    """One per cent of learning rate is outside of every fp32 tolerance, so the tests above can fail."""
    run = Stage(tmp_path, plain.data, plain.model)
    assert run.run(*RUN, "optimizer.unet_lr=1.01e-3", "optimizer.text_encoder_lr=5.05e-4") == 0, run.message
    found = drift(run, plain)
    assert found.loss > REORDERED.loss and found.weights > REORDERED.weights


@pytest.mark.slow
def test_an_average_on_the_host_is_that_on_the_device(plain: Plain, tmp_path: Path) -> None:
    runs = []
    for device in ("same", "cpu"):
        changes = ("ema.decay=0.9", f"ema.device={device}")
        runs.append(follows(plain, tmp_path / device, changes, SAME_BITS))
    assert distance(weights(runs[0].output, "ema"), weights(runs[1].output, "ema")) == 0


@pytest.mark.slow
def test_fused_adamw_follows_the_plain_one(plain: Plain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU `make_optimizer` asks for the fused kernel; the CPU has one too."""
    plain_class = torch.optim.AdamW
    asked: list[bool] = []

    def fused(*args: object, **kwargs: object) -> torch.optim.Optimizer:
        asked.append(True)
        return plain_class(*args, **{**kwargs, "fused": True})  # type: ignore[arg-type]

    monkeypatch.setattr(torch.optim, "AdamW", fused)
    follows(plain, tmp_path, (), REORDERED)
    assert asked


@pytest.mark.slow
def test_adafactor_by_shape_follows_the_class_s_own_step(plain: Plain, tmp_path: Path) -> None:
    """`strict` runs transformers' own; files of both hold the same names, shapes and dtypes.

    With an epsilon above rounding noise: some biases before norms have no other gradient, and with 1e-30 Adafactor makes of
    noise updates of full size, which no two ways of summing agree on.
    """
    adafactor = (*RUN, "optimizer.name=adafactor", "optimizer.eps=[1e-10, 1e-3]")
    own, batched = (Stage(tmp_path / name, plain.data, plain.model) for name in ("own", "batched"))
    for run, changes in ((own, ("batch.determinism=strict",)), (batched, ())):
        assert run.run(*adafactor, *changes) == 0, run.message
    for tensors in ("model", "optimizer"):
        ours, theirs = weights(batched.output, tensors), weights(own.output, tensors)
        assert {n: (t.shape, t.dtype) for n, t in ours.items()} == {n: (t.shape, t.dtype) for n, t in theirs.items()}
    found = drift(batched, plain._replace(losses=losses(own.output), weights=weights(own.output)))
    assert 0 < found.weights <= RETILED.weights and found.loss <= RETILED.loss, found


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.filterwarnings("ignore")  # inductor's own, which only a forked process inherits as errors
@pytest.mark.parametrize("more", [(), ("model.channels_last=true",)])
def test_compiled_blocks_follow_the_plain_path(more: tuple[str, ...], plain: Plain, tmp_path: Path) -> None:
    """With inductor and its C++ compiler, in a process of its own: compiled code and limits stay behind."""
    run = Stage(tmp_path, plain.data, plain.model)
    warm_up()
    env = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    launch = Ranks(run.arguments(*RUN, "model.compile=true", *more), tmp_path / "logs", env=env)
    assert launch.wait(900) == [0], launch.text()
    found = drift(run, plain)
    assert found.loss <= REORDERED.loss and found.weights <= REORDERED.weights, found
    assert list((tmp_path / "cache").rglob("*.cpp")), "inductor compiled nothing"


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="needs the extra `fast`")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_float8_linears_follow_the_plain_path(larger: Plain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Emulated: values are rounded to float8 and multiplied in fp32, so only the numerics are tested, not the kernel."""
    swapped: list[int] = []

    def emulated(unet: torch.nn.Module) -> None:
        swapped.append(speed.swap_float8(unet, emulate=True))

    monkeypatch.setattr(setup.speed, "to_float8", emulated)
    follows(larger, tmp_path, (BF16, "model.float8=true"), COARSE)
    assert swapped[0] > 10
    assert "torchao" in sys.modules


def test_the_table_names_every_option_that_the_documentation_promises() -> None:
    text = (Path(__file__).parents[2] / "docs" / "speed.md").read_text()
    for key in ("batch.split", "model.gradient_checkpointing", "model.channels_last", "model.compile", "model.attention",
                "model.float8", "model.weights", "optimizer.sharding", "ema.device", "adamw8bit"):  # fmt: skip
        assert key in text, key
    for tolerance in (RETILED, REORDERED, ROUNDED, COARSE):
        assert f"| {tolerance.loss:g} | {tolerance.weights:g} |" in text, tolerance
