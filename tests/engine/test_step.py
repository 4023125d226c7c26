"""One update: against the definition written out here, cut in any way, in every precision, and when it goes wrong."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import synthetic
import torch
import torch.distributed as dist
from diffusers import UNet2DConditionModel
from forked import run_ranks
from safetensors.torch import load_file
from stages import Stage, opened
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer
from updates import gradients, one_update, relative

from train.base.errors import ExitCode, Halt
from train.diffusion.objective import image_losses
from train.engine import loop, trial
from train.engine.session import Session
from train.engine.step import TileBackward, bad_step, may_apply
from train.optim import optimizers
from train.recipe import rng
from train.recipe.order import Tile
from train.recipe.rng import Stream
from train.storage import rundir


class Reference:
    """The recipe for single images, written from its description with the stock libraries alone."""

    def __init__(self, model: Path, data: Path, *, offset: float) -> None:
        self.unet = UNet2DConditionModel.from_pretrained(model / "unet")
        self.one = CLIPTextModel.from_pretrained(model / "text_encoder")
        self.two = CLIPTextModelWithProjection.from_pretrained(model / "text_encoder_2")
        self.tokenizer = CLIPTokenizer.from_pretrained(model / "tokenizer")
        self.data, self.offset = data, offset
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
        self.alphas = torch.cumprod(1 - betas, 0)

    def loss(self, session: Session, tile: Tile, slot: int) -> torch.Tensor:
        index, seed = session.data.loader.dataset.index, session.data.seed
        row, uid, epoch = int(tile.rows[slot]), int(tile.uids[slot]), int(tile.epochs[slot])
        shard, place = index.latent(row)
        latent = load_file(self.data / shard)["latents"][place].float() * 0.13025
        noise = torch.from_numpy(rng.normals(seed, Stream.NOISE, uid, epoch, tuple(latent.shape)))
        channel = torch.from_numpy(rng.normals(seed, Stream.NOISE_OFFSET, uid, epoch, (4,)))
        noise = noise + self.offset * channel[:, None, None]
        t = int(rng.timesteps(seed, np.array([uid], np.uint64), np.array([epoch]), 0, 1000)[0])
        a = float(self.alphas[t])
        noisy = (a**0.5 * latent + (1 - a) ** 0.5 * noise)[None]
        context, pooled = self.text(*index.caption(row), seed=seed, uid=uid, epoch=epoch)
        top, left = int(index.crop_top[row]), int(index.crop_left[row])
        size = [int(index.orig_h[row]), int(index.orig_w[row]), top, left, tile.height, tile.width]
        added = {"text_embeds": pooled, "time_ids": torch.tensor([size], dtype=torch.float32)}
        predicted = self.unet(noisy, t, encoder_hidden_states=context, added_cond_kwargs=added).sample
        return (predicted[0] - noise).square().mean()

    def text(
        self, fixed: list[str], flex: list[str], *, seed: int, uid: int, epoch: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        tags = [*fixed, *rng.shuffled(flex, seed, uid, epoch)]
        content = self.tokenizer(", ".join(tags), add_special_tokens=False)["input_ids"][:225]
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        pieces, pooled = [], None
        for k in range(3):
            part = content[k * 75 : (k + 1) * 75]
            first = torch.tensor([[bos, *part, *[eos] * (76 - len(part))]])
            second = torch.tensor([[bos, *part, eos, *[0] * (75 - len(part))]])
            out = self.two(second, output_hidden_states=True)
            hidden = torch.cat(
                [self.one(first, output_hidden_states=True).hidden_states[-2], out.hidden_states[-2]], dim=-1
            )
            pooled = out.text_embeds if pooled is None else pooled
            pieces += [hidden[:, 0:1]] * (k == 0) + [hidden[:, 1:76]] + [hidden[:, 76:77]] * (k == 2)
        assert pooled is not None
        return torch.cat(pieces, dim=1), pooled


def test_an_update_equals_its_definition(base_model: Path, dataset: Path, tmp_path: Path) -> None:
    stage = Stage(tmp_path, dataset, base_model)
    reference = Reference(base_model, dataset, offset=0.1)
    with opened(stage, "data.max_tokens=225", "noise.offset=0.1") as session:
        outcome, tiles = one_update(session), session.data.plan.update(0)
        wanted = [reference.loss(session, tile, slot) for tile in tiles for slot in range(len(tile.rows))]
        assert torch.allclose(outcome.losses_G, torch.stack(wanted).double(), rtol=2e-6, atol=0)
        mean = torch.stack(wanted).mean()
        assert outcome.mean_loss == pytest.approx(mean.item(), rel=1e-6)
        mean.backward()
        theirs = {f"unet.{name}": p.grad for name, p in reference.unet.named_parameters()}
        for encoder, name in ((reference.one, "text_encoder"), (reference.two, "text_encoder_2")):
            for key, p in encoder.named_parameters():
                prefix = "" if key.startswith(("text_model.", "text_projection")) else "text_model."
                theirs[f"{name}.{prefix}{key}"] = p.grad
        ours = gradients(session)
        assert {name for name, grad in theirs.items() if grad is not None} >= set(ours)
        idle = {name for name, grad in theirs.items() if grad is not None and name not in ours and grad.any()}
        assert not idle, "a parameter that has a gradient must be trained"
        assert relative(ours, {name: theirs[name] for name in ours}) < 2e-6


@pytest.fixture(scope="module")
def plain(
    base_model: Path, dataset: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Losses and gradients of the first update in tiles of 4, executed in the plainest way."""
    with opened(Stage(tmp_path_factory.mktemp("plain"), dataset, base_model), "batch.micro=4") as session:
        return one_update(session).losses_G, gradients(session)


@pytest.mark.parametrize("changes", [
    ("batch.split=2",), ("batch.split=4", "model.gradient_checkpointing=partial"),
    ("model.gradient_checkpointing=full",), ("batch.determinism=strict", "data.workers=1"),
])  # fmt: skip
def test_execution_does_not_change_the_update(
    changes: tuple[str, ...],
    plain: tuple[torch.Tensor, dict[str, torch.Tensor]],
    base_model: Path,
    dataset: Path,
    tmp_path: Path,
) -> None:
    losses, grads = plain
    with opened(Stage(tmp_path, dataset, base_model), "batch.micro=4", *changes) as session:
        assert torch.allclose(one_update(session).losses_G, losses, rtol=1e-6, atol=0)
        assert relative(gradients(session), grads) < 1e-6


def test_tiles_accumulate_to_the_gradient_of_one_batch(base_model: Path, tmp_path: Path) -> None:
    data = synthetic.make_dataset(tmp_path / "set", (8,), buckets=((64, 64),))
    with opened(Stage(tmp_path / "a", data, base_model), "batch.micro=8") as session:
        whole = one_update(session)
        keys = session.data.plan.update(0)[0].uids
        at_once = gradients(session)
    with opened(Stage(tmp_path / "b", data, base_model)) as session:
        assert len(session.data.plan.update(0)) == 4
        parts = one_update(session)
        in_tiles = gradients(session)
        order = [list(keys).index(uid) for tile in session.data.plan.update(0) for uid in tile.uids]
    # epoch 0 holds every image once, whatever the tiles: the same images with the same noise
    assert torch.allclose(parts.losses_G, whole.losses_G[order], rtol=1e-6, atol=0)
    assert parts.mean_loss == pytest.approx(whole.mean_loss, rel=1e-6)
    assert relative(in_tiles, at_once) < 1e-6


@pytest.mark.parametrize("average", ["images", "micro_batches"])
def test_what_a_short_tile_weighs(average: str, base_model: Path, tmp_path: Path) -> None:
    data = synthetic.make_dataset(tmp_path / "set", (5,), buckets=((64, 64),))
    changes = ("batch.remainder=keep", "batch.micro=4", f"loss.average={average}")
    with opened(Stage(tmp_path, data, base_model), *changes) as session:
        tiles = []
        for number in (0, 1):
            batch = session.data.loader.dataset[0, number]
            session.trained.gradients.clear()
            image_losses(session.trained.gradients.model, batch, session.trained.diffusion).mean().backward()
            tiles.append((len(batch.slots_B), gradients(session)))
        assert sorted(count for count, _ in tiles) == [1, 4]
        one_update(session)
        (n, first), (m, second) = tiles
        share = (n / 5, m / 5) if average == "images" else (0.5, 0.5)
        wanted = {name: share[0] * first[name] + share[1] * second[name] for name in first}
        assert relative(gradients(session), wanted) < 1e-6


def outside_the_buckets(rank: int, world: int, folder: str, data: str, model: str, overrides: list[str]) -> list[list[int]]:
    """For each of three updates, how many gradients lie in none of DDP's buckets after each backward (in a forked process)."""
    stage = Stage(Path(folder, str(rank)), Path(data), Path(model))
    with opened(stage, "batch.effective=12", "batch.split=2", "data.workers=0", *overrides) as session:
        buckets: list[tuple[int, int]] = []
        addresses: list[list[int]] = []
        trained, backward = session.trained, TileBackward.__call__

        def noted(_: None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
            buffer = bucket.buffer()
            buckets.append((buffer.data_ptr(), buffer.data_ptr() + buffer.nbytes))
            return dist.all_reduce(buffer.div_(world), async_op=True).get_future().then(lambda done: done.value()[0])

        def looked_at(self: TileBackward, *args: Any, **kwargs: Any) -> None:
            backward(self, *args, **kwargs)
            addresses.append([0 if p.grad is None else p.grad.data_ptr() for p in trained.parameters.values()])

        noted.__annotations__ = {}  # DDP checks those of a hook, and ours are text
        trained.gradients.model.register_comm_hook(None, noted)
        TileBackward.__call__ = looked_at  # type: ignore[method-assign]
        calls, places = [], [p.grad.data_ptr() for p in trained.parameters.values() if p.grad is not None]
        trained.gradients.model.register_forward_hook(lambda *_: calls.append(1))
        assert trained.gradients.model.bucket_bytes_cap == 100 * 2**20
        trial.check(session)
        assert calls, "what is tried before the first update runs through DDP"
        assert not buckets, "and talks to nobody"
        assert [p.grad.data_ptr() for p in trained.parameters.values() if p.grad is not None] == places
        assert not any(p.grad.any() for p in trained.parameters.values() if p.grad is not None)
        found = []
        for step in range(3):  # DDP makes its buckets anew between the first and the second
            optimizers.set_lrs(trained.optimizer, trained.rates_at(step))
            one_update(session, step, tiles_here=3)
            trained.step(step)
            found.append([sum(not any(a <= at < b for a, b in buckets) for at in after) for after in addresses])
            buckets.clear()
            addresses.clear()
    return found


@pytest.mark.parametrize("overrides", [[], ["model.weights=bf16", "precision=bf16", "model.channels_last=true"]])
def test_gradients_lie_in_the_buckets_from_the_first_backward_on(
    overrides: list[str], base_model: Path, dataset: Path, tmp_path: Path
) -> None:
    """2 processes x 3 tiles x 2 parts: beside them the buckets would hold every gradient a second time."""
    names = (str(tmp_path / "runs"), str(dataset), str(base_model), overrides)
    assert run_ranks(2, outside_the_buckets, tmp_path, *names) == [[[0] * 6] * 3] * 2


def generator_states() -> list[bytes]:
    kind, words, *rest = np.random.get_state()
    return [torch.get_rng_state().numpy().tobytes(), repr((kind, words.tobytes(), rest)).encode(),
            repr(random.getstate()).encode()]  # fmt: skip


@pytest.mark.parametrize("workers", [0, 1])
def test_updates_leave_the_global_generators_alone(
    workers: int, base_model: Path, dataset: Path, tmp_path: Path
) -> None:
    with opened(Stage(tmp_path, dataset, base_model), "max_updates=2", f"data.workers={workers}") as session:
        before = generator_states()
        loop.run_updates(session)
        assert generator_states() == before


@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp16", marks=pytest.mark.slow)])
def test_half_precision_follows_fp32(
    precision: str, base_model: Path, dataset: Path, tmp_path: Path, straight: Path
) -> None:
    half = Stage(tmp_path, dataset, base_model)
    assert half.run("max_updates=3", f"precision={precision}") == 0, half.message
    for a, b in zip(synthetic.metrics(straight)[:3], synthetic.metrics(half.output), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=0.03)
        assert a["loss"] != b["loss"]
        assert (b["skipped"], b["update"]) == (0, b["step"])


def test_overflow_skips_the_update_and_not_the_plan(
    base_model: Path, dataset: Path, tmp_path: Path, straight: Path
) -> None:
    stage = Stage(tmp_path, dataset, base_model)
    assert stage.run("precision=fp16", "max_updates=5", ANIX_FAULT="loss@2:scale=1e30") == 0, stage.message
    lines = synthetic.metrics(stage.output)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert [line["update"] for line in lines] == [1, 2, 2, 3, 4]
    assert [line["skipped"] for line in lines] == [0, 0, 1, 1, 1]
    assert [line["loss_scale"] for line in lines] == [65536.0] * 2 + [32768.0] * 3
    assert lines[3]["lr_unet"] == lines[2]["lr_unet"] != lines[1]["lr_unet"]
    undisturbed = synthetic.metrics(straight)
    assert [line["lr_unet"] for line in lines[3:]] == [line["lr_unet"] for line in undisturbed[2:4]]
    trace = (stage.output / "trace.txt").read_text().splitlines()
    assert trace == (straight / "trace.txt").read_text().splitlines()[: len(trace)]


@pytest.mark.slow
def test_twenty_overflows_in_a_row_end_the_run(base_model: Path, dataset: Path, tmp_path: Path) -> None:
    stage = Stage(tmp_path, dataset, base_model)
    overrides = ("precision=fp16", "epochs=8", "batch.effective=2")
    assert stage.run(*overrides, ANIX_FAULT="loss@*:scale=1e30") == ExitCode.NON_FINITE
    assert json.loads((stage.output / "exit.json").read_text())["update"] == 20


def test_under_fp16_a_loss_that_is_not_finite_skips_its_update_and_is_named(
    base_model: Path, dataset: Path, tmp_path: Path, straight: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """As the original's scaler did; what is drawn for an update is the same at every start, so stopping would stop for ever."""
    stage = Stage(tmp_path, dataset, base_model)
    assert stage.run("precision=fp16", "max_updates=5", ANIX_FAULT="loss@2:nan") == 0, stage.message
    lines = synthetic.metrics(stage.output)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert [line["update"] for line in lines] == [1, 2, 2, 3, 4]
    assert [line["skipped"] for line in lines] == [0, 0, 1, 1, 1]
    assert [line["loss"] == "nan" for line in lines] == [False, False, True, False, False]
    assert [line["loss_scale"] for line in lines] == [65536.0] * 2 + [32768.0] * 3
    assert lines[3]["lr_unet"] == lines[2]["lr_unet"], "the schedule goes by updates applied"
    alerts = [line for line in capfd.readouterr().err.splitlines() if "WARNING: update 2 skipped" in line]
    assert len(alerts) == 1 and "not finite" in alerts[0]
    trace = (stage.output / "trace.txt").read_text().splitlines()
    uids = [word for line in trace if line.startswith("2 ") for word in line.split() if len(word) == 16]
    assert len(uids) == 8 and all(f"{uid}@0" in alerts[0] for uid in uids)
    assert trace == (straight / "trace.txt").read_text().splitlines()[: len(trace)]


def test_under_fp16_losses_that_stay_so_end_the_run(
    base_model: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train.optim.loss_scale.MAX_SKIPS_IN_A_ROW", 3)
    with opened(Stage(tmp_path, dataset, base_model), "precision=fp16", "epochs=8") as session:
        before = {name: p.detach().clone() for name, p in session.trained.parameters.items()}
        monkeypatch.setenv("ANIX_FAULT", "loss@*:nan")
        with pytest.raises(Halt, match=r"update 2: the loss of \d+ images is not finite") as halted:
            loop.run_updates(session)
        assert halted.value.code == ExitCode.NON_FINITE
        assert (session.run.progress.step, session.run.progress.updates, session.run.progress.skipped) == (3, 0, 3)
        assert all(torch.equal(before[name], p) for name, p in session.trained.parameters.items())


@pytest.mark.parametrize(("fault", "precision"), [("nan", "fp32"), ("inf", "fp32"), ("nan", "bf16")])
def test_a_loss_that_is_not_finite_changes_nothing(
    fault: str, precision: str, base_model: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(Stage(tmp_path, dataset, base_model), f"precision={precision}") as session:
        before = {name: p.detach().clone() for name, p in session.trained.parameters.items()}
        monkeypatch.setenv("ANIX_FAULT", f"loss@0:{fault}")
        with pytest.raises(Halt) as halted:
            loop.run_updates(session)
        assert halted.value.code == ExitCode.NON_FINITE
        assert not session.trained.optimizer.state
        assert all(torch.equal(before[name], p) for name, p in session.trained.parameters.items())
        assert session.run.progress.step == 0
        record = json.loads((session.run.folder.path / "bad_step.json").read_text())
        assert record["step"] == 0
        text = json.dumps(record)
        for tile in session.data.plan.update(0):
            assert all(f"{uid:016x}" in text for uid in tile.uids)


def two_tiles():
    def tile(number, rows):
        n = len(rows)
        return Tile(64, 96, number, np.array(rows), np.arange(n, dtype=np.uint64) + number, np.zeros(n, np.int64))

    return [tile(0, [3, 4]), tile(1, [7])]


def test_bad_step_is_json_and_exact(tmp_path):
    run = rundir.open_run_dir(tmp_path, "s")
    losses = [float(np.float32(0.1)), float("nan"), float("-inf")]
    numbers = {"timesteps": np.array([1, 22, 333]), "losses": losses, "grad_norm": float("inf"), "scale": 2.0}
    halt = bad_step(run, step=7, updates=6, tiles=two_tiles(), **numbers)
    assert halt.code == ExitCode.NON_FINITE
    assert "update 7" in halt.message
    assert "0000000000000001@0 t 22 (nan)" in halt.message
    assert "t 1 (" not in halt.message
    back = json.loads((tmp_path / "bad_step.json").read_text(), parse_constant=pytest.fail)
    assert back["grad_norm"] == "inf"
    assert [s["loss"] for s in back["slots"]] == [losses[0], "nan", "-inf"]
    assert [(s["tile"], s["row"], s["t"]) for s in back["slots"]] == [(0, 3, 1), (0, 4, 22), (1, 7, 333)]
    run.close()


def test_only_rank_0_leaves_the_file(tmp_path):
    run = rundir.open_run_dir(tmp_path, "s", rank=1)
    halt = bad_step(
        run, step=1, updates=1, tiles=two_tiles(), timesteps=[0] * 3, losses=[0.0] * 3, grad_norm=float("nan")
    )
    assert "the gradient" in halt.message
    assert not (tmp_path / "bad_step.json").exists()


@pytest.mark.parametrize(
    ("losses", "norm", "expected"),
    [(True, 1.0, True), (False, 1.0, False), (True, float("inf"), False), (True, float("nan"), False)],
)
def test_weights_change_only_when_everything_is_finite(losses, norm, expected):
    assert may_apply(losses, norm) is expected
