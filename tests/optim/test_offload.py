"""Masters in host memory against the plain path: here card and host are one device, so all is compared to the bit."""

from __future__ import annotations

import json
import math
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import tinysdxl
import torch
from launches import launch
from stages import Stage, opened, result
from updates import gradients, one_update

from train.base.errors import ExitCode, Halt
from train.config.stage import load_stage
from train.engine.refusals import refuse_processes
from train.engine.session import offload_lacks
from train.model import memory
from train.observe.cards import GPUS
from train.optim import offload
from train.tools.estimate.estimate import memory_report
from train.tools.estimate.images import Images

HOST = "optimizer.offload=host"
TRAINS_TEXT = ("model.train_text_encoders=true", "optimizer.text_encoder_lr=5e-4")
GIB = 2**30


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tinysdxl.write(tmp_path_factory.mktemp("base") / "model", "two levels")


def the_same(one: Path, other: Path) -> None:
    """Every number of every update, and every byte of the last checkpoint."""
    left, right = result(one), result(other)
    for found in (left, right):
        for line in found["metrics"]:
            for timed in ("images_per_s", "data_wait_s", "seconds", "mfu", "time", "peak_bytes"):
                line.pop(timed, None)
    assert [(m["step"], m["loss"], m["grad_norm"], m["lr_unet"]) for m in left["metrics"]] == [
        (m["step"], m["loss"], m["grad_norm"], m["lr_unet"]) for m in right["metrics"]
    ]
    assert {k: left[k] for k in left if k != "metrics"} == {k: right[k] for k in right if k != "metrics"}
    seen = [{path.name: path.read_bytes() for path in output.glob("samples/step-00000010/*.png")} for output in (one, other)]
    assert seen[0] == seen[1]
    lines = [output / "validation.jsonl" for output in (one, other)]
    told = [[json.loads(line)["losses"] for line in path.read_text().splitlines()] if path.exists() else [] for path in lines]
    assert told[0] == told[1]


@pytest.mark.long
@pytest.mark.parametrize(
    "changes",
    [
        ("optimizer.name=adamw", *TRAINS_TEXT, "ema.decay=0.9", "validation.share=0.2", "validation.every_steps=5", "sampling.every_steps=10",
         "optimizer.groups=[{match: 'unet.conv_in.*', lr: 0}, {match: 'unet.mid_block.*', lr: 2e-4}]"),
        ("optimizer.name=adafactor", "optimizer.weight_decay=0"),
    ],
    ids=["adamw", "adafactor"],
)  # fmt: skip
def test_a_run_is_the_plain_one_bit_by_bit_and_either_goes_on_from_the_other(
    changes: tuple[str, ...], model: Path, dataset: Path, tmp_path: Path
) -> None:
    """20 updates of 3 tiles in 2 parts; another is killed in a forward, in a step and in a save, fails, is stopped, and goes on as the other."""
    (tmp_path / "prompts.yaml").write_text("steps: 2\nprompts:\n  - {text: 1girl, width: 64, height: 64, seed: 3}\n")
    changes = (
        *changes, "precision=fp32", "batch.effective=6", "batch.split=2", "epochs=8", "max_updates=20", "tracking.trace=true",
        "noise.offset=0.03", "checkpoint.every_steps=3", f"sampling.prompts={tmp_path / 'prompts.yaml'}",
    )  # fmt: skip
    plain, host, mixed = (Stage(tmp_path / name, dataset, model) for name in ("plain", "host", "mixed"))
    assert plain.run(*changes) == 0, plain.message
    assert host.run(*changes, HOST) == 0, host.message
    the_same(host.output, plain.output)
    assert launch(mixed, 1, *changes, fault="forward@4:kill") == [-signal.SIGKILL], mixed.message
    assert launch(mixed, 1, *changes, HOST, fault="optimizer@7:kill") == [-signal.SIGKILL], mixed.message
    assert launch(mixed, 1, *changes, fault="snapshot@12:kill") == [-signal.SIGKILL], mixed.message
    assert mixed.run(*changes, HOST, ANIX_FAULT="forward@13:oom") == ExitCode.OUT_OF_MEMORY, mixed.message
    assert mixed.run(*changes, HOST, ANIX_FAULT="clip@15:term") == ExitCode.STOPPED, mixed.message
    assert mixed.run(*changes) == 0, mixed.message
    the_same(mixed.output, plain.output)


@pytest.mark.parametrize(("precision", "beside"), [("fp32", False), ("bf16", False), ("fp16", False), ("bf16", True)])
def test_gradients_and_norm_are_those_of_the_plain_path(
    precision: str, beside: bool, model: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over four tiles in two parts, both encoders trained; what the card holds is 16 bit where autocast casts, and no gradient.

    `beside`: by the thread that copies beside a card's computing, here without a card's streams.
    """
    monkeypatch.setattr(offload, "beside", lambda device: beside)
    found = []
    for extra in ((), (HOST,)):
        stage = Stage(tmp_path / f"run{len(extra)}", dataset, model)
        with opened(stage, f"precision={precision}", "batch.split=2", *TRAINS_TEXT, *extra) as session:
            outcome = one_update(session)
            found.append((outcome.losses_G, outcome.grad_norm, gradients(session)))
            if extra:
                masters = session.trained.masters
                assert masters is not None and all(p.grad is None for p in masters.working.values())
                assert all(p.dtype == torch.float32 for p in masters.parameters.values())
                kinds = {p.dtype for p in masters.working.values()}
                assert kinds == ({torch.float32} if precision == "fp32" else {torch.float32, getattr(torch, {"bf16": "bfloat16", "fp16": "float16"}[precision])})
    (plain_losses, plain_norm, plain), (losses, norm, host) = found
    assert torch.equal(losses, plain_losses) and math.isfinite(norm)
    assert plain.keys() == host.keys()
    assert [name for name in plain if not torch.equal(plain[name], host[name])] == []
    assert norm == plain_norm


def test_several_processes_are_refused() -> None:
    refuse_processes("host", 1)
    refuse_processes("none", 2)
    with pytest.raises(Halt, match="host on 2 processes") as raised:
        refuse_processes("host", 2)
    assert raised.value.code == ExitCode.USAGE


def test_a_host_that_is_too_small_is_said() -> None:
    assert offload_lacks(0) is None
    assert "1000000.0 GB of host memory" in str(offload_lacks(10**15))


def test_what_the_card_and_the_host_hold_is_predicted() -> None:
    """By the issue's counts: 9.2 GiB for one image of stage 1, 15.1 for eight; 54 and 21 GB on the host."""
    stage = load_stage(["configs/pretrain.yaml"], [HOST, "sampling.every_steps=0"])
    setup = memory.setup_of(stage.running)
    one, eight = (memory.predict(setup, (1024, 1024), images, 0) for images in (1, 8))
    assert (one.gradients, one.optimizer, one.casts) == (0, 0, 0)
    assert one.total / GIB == pytest.approx(9.2, rel=0.05)
    assert eight.total / GIB == pytest.approx(15.1, rel=0.10)
    assert memory.host_bytes(setup) / 1e9 == pytest.approx(54, rel=0.02)
    finetune = memory.setup_of(load_stage(["configs/ft1.yaml"], [HOST]).running)
    assert memory.host_bytes(finetune) / 1e9 == pytest.approx(21, rel=0.05)
    assert memory.host_bytes(replace(setup, offload=False)) == 0
    start = load_stage(["configs/pretrain.yaml"], [HOST, "sampling.every_steps=0", "batch.split=auto"]).start
    report = memory_report(start, 1, Images(100, "given", None, None), GPUS["RTX-4090"], "given")
    assert report["fits"] and report["host_gb"] == pytest.approx(54, rel=0.02)
