"""A stage that trains an adapter: against a straight loop over peft, stopped and resumed, on two processes, and what it leaves."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tinysdxl
import torch
from launches import launch
from stages import Stage, losses, opened, result, weights

from train.base.errors import ExitCode, Halt
from train.diffusion.objective import image_losses
from train.model import layouts, source
from train.model.adapters import layers, reading, training
from train.model.networks import Networks, trained_parameters
from train.observe import anymodel
from train.storage.state_files import to_tensor
from train.tools.quality import loss
from train.tools.quality.record import write_quality
from train.tools.report.page import write_page
from train.tools.show import model as show_model

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
EVERYTHING = 'adapter.targets=["unet.*.attentions.*","unet.*.resnets.*","unet.*samplers*","text_encoder*.self_attn.*","text_encoder*.mlp.*"]'
LORA = ("adapter.type=lora", "adapter.rank=4", "adapter.alpha=2", EVERYTHING)


def by_peft(kind: str, model: Path, *, text: bool) -> Networks:
    """The networks with peft's own layers on everything that this stage adapts, by suffix instead of by name."""
    from peft import LoHaConfig, LoKrConfig, LoraConfig, inject_adapter_in_model

    networks = Networks(
        tinysdxl.load_components(model, with_vae=False), train_text_encoders=text, context="stitched", pooled_projection="correct"
    )
    unet = r".*(to_[qkv]|to_out\.0|proj_in|proj_out|net\.0\.proj|net\.2|conv1|conv2|conv_shortcut|time_emb_proj|samplers\.0\.conv)"
    encoder = r".*(q_proj|k_proj|v_proj|out_proj|fc1|fc2)"
    made = {
        "lora": lambda t: LoraConfig(r=4, lora_alpha=2, target_modules=t), "dora": lambda t: LoraConfig(r=4, lora_alpha=2, target_modules=t, use_dora=True),
        "loha": lambda t: LoHaConfig(r=4, alpha=2, target_modules=t), "lokr": lambda t: LoKrConfig(r=4, alpha=2, target_modules=t),
    }[kind]  # fmt: skip
    networks.requires_grad_(False)
    inject_adapter_in_model(made(unet), networks.unet)
    if text:
        inject_adapter_in_model(made(rf"(?!.*layers\.2\.){encoder}"), networks.text_encoder)  # its last layer is not read
        inject_adapter_in_model(made(encoder), networks.text_encoder_2)
    return networks


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", *(pytest.param(kind, marks=pytest.mark.long) for kind in ("dora", "loha", "lokr"))])
def test_twenty_updates_equal_a_straight_loop_over_peft(kind: str, base_model: Path, dataset: Path, tmp_path: Path) -> None:
    text = kind == "lora"
    changes = (
        *LORA, f"adapter.type={kind}", "max_updates=20", "epochs=9", f"model.train_text_encoders={str(text).lower()}",
        *(() if text else ("optimizer.text_encoder_lr=null",)),
    )  # fmt: skip
    stage = Stage(tmp_path, dataset, base_model)
    plain = by_peft(kind, base_model, text=text)
    theirs = trained_parameters(plain)
    with opened(stage, *changes) as session:
        ours = session.trained.parameters
        assert ours.keys() == theirs.keys()
        with torch.no_grad():
            for name, parameter in theirs.items():
                parameter.copy_(ours[name])
        plain.train()
        groups = [
            {"params": [p for n, p in theirs.items() if n.startswith(f"{group}.")], "group": group}
            for group in ("unet", "text_encoder", "text_encoder_2") if any(n.startswith(f"{group}.") for n in theirs)
        ]  # fmt: skip
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.01)
        seen = []
        for update in range(20):
            found = torch.cat([image_losses(plain, batch, session.trained.diffusion) for batch in session.data.loader.next_update()])
            found.mean().backward()
            torch.nn.utils.clip_grad_norm_(theirs.values(), 1.0)
            rates = session.trained.rates_at(update)
            for group in optimizer.param_groups:
                group["lr"] = rates[group["group"]]
            optimizer.step()
            optimizer.zero_grad()
            seen.append(float(found.detach().double().mean()))
    assert stage.run(*changes) == ExitCode.DONE, stage.message
    assert losses(stage.output) == pytest.approx(seen, rel=1e-6)
    got = weights(stage.output)
    assert got.keys() == theirs.keys()
    moved = sum(float((got[name] - 0).square().sum()) for name in got)
    apart = sum(float((got[name] - theirs[name].detach()).square().sum()) for name in got)
    assert (apart / moved) ** 0.5 < 1e-5
    assert any(got[name].abs().max() > 1e-3 for name in got if "lora_B" in name or "w2_b" in name or name.endswith("lokr_w1.default"))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_adapter_that_has_not_learnt_changes_no_bit(precision: str, base_model: Path, dataset: Path, tmp_path: Path) -> None:
    stage, plain = Stage(tmp_path / "a", dataset, base_model), Stage(tmp_path / "b", dataset, base_model)
    more = (f"precision={precision}", "model.train_text_encoders=false", "optimizer.text_encoder_lr=null")
    found = []
    for one, changes in ((stage, LORA), (plain, ())):
        with opened(one, *changes, *more) as session, torch.no_grad():
            networks = session.trained.gradients.model
            if not changes:  # as it lies beneath an adapter
                networks.to(getattr(torch, {"fp32": "float32", "bf16": "bfloat16"}[precision]))
            found.append(image_losses(networks, next(iter(session.data.loader.next_update())), session.trained.diffusion))
    assert torch.equal(*found)


def test_a_stop_and_a_rerun_equal_the_straight_run(base_model: Path, dataset: Path, tmp_path: Path) -> None:
    straight, stopped = (Stage(tmp_path / name, dataset, base_model) for name in ("straight", "stopped"))
    more = (*LORA, "ema.decay=0.9")
    assert straight.run(*more) == ExitCode.DONE, straight.message
    assert stopped.run(*more, ANIX_FAULT="control@6:term") == ExitCode.STOPPED
    assert stopped.run(*more) == ExitCode.DONE, stopped.message
    assert result(stopped.output) == result(straight.output)
    assert all(training.part_of(name) is not None for name in weights(straight.output)), "checkpoints hold the adapter alone"
    assert stopped.run(*LORA[:1], "adapter.rank=2", *LORA[2:], "ema.decay=0.9") == ExitCode.MISMATCH and "adapter.rank" in stopped.message


SHARED = [
    (("optimizer.name=adamw",), True),
    pytest.param(("optimizer.name=adafactor", "optimizer.weight_decay=0"), True, marks=pytest.mark.long),
    pytest.param(("optimizer.name=adamw8bit",), False, marks=pytest.mark.long),
    pytest.param(("optimizer.name=adamw", "optimizer.sharding=zero1"), False, marks=pytest.mark.long),
    pytest.param(("optimizer.name=prodigy", "optimizer.unet_lr=1", "optimizer.text_encoder_lr=1"), True, marks=pytest.mark.long),
    pytest.param(("optimizer.name=schedulefree",), True, marks=pytest.mark.long),
    pytest.param(("optimizer.name=came",), True, marks=pytest.mark.long),
    pytest.param(("optimizer.name=lion",), True, marks=pytest.mark.long),
    pytest.param(("optimizer.name=lion8bit",), False, marks=pytest.mark.long),
]


@pytest.mark.slow
@pytest.mark.parametrize(("changes", "strict_too"), SHARED)
def test_two_processes_equal_one(changes: tuple[str, ...], strict_too: bool, base_model: Path, dataset: Path, tmp_path: Path) -> None:
    """In strict mode bit for bit; fast to the last digits. Moments of 8 bits need tensors of 4,096 values: a larger model."""
    model = tinysdxl.write(tmp_path / "model", "like SDXL") if any("8bit" in change for change in changes) else base_model
    more = (*LORA, *changes, "max_updates=5", *(("adapter.rank=64",) if model != base_model else ()))
    for mode in ("strict", "fast") if strict_too else ("fast",):
        alone, both = (Stage(tmp_path / mode / name, dataset, model) for name in ("alone", "both"))
        assert alone.run(*more, f"batch.determinism={mode}") == ExitCode.DONE, alone.message
        assert launch(both, 2, *more, f"batch.determinism={mode}") == [0, 0], both.message
        if mode == "strict":
            assert result(both.output) == result(alone.output)
        else:
            assert losses(both.output) == pytest.approx(losses(alone.output), rel=1e-6 if model == base_model else 1e-4)


@pytest.mark.long
@pytest.mark.parametrize("optimizer", ["adamw", "prodigy"])
def test_a_run_goes_on_on_another_number_of_processes(optimizer: str, base_model: Path, dataset: Path, tmp_path: Path) -> None:
    rates = ("optimizer.unet_lr=1", "optimizer.text_encoder_lr=1") if optimizer == "prodigy" else ()
    more = (*LORA, "batch.determinism=strict", f"optimizer.name={optimizer}", *rates, "max_updates=6", "ema.decay=0.9")
    alone, moved = (Stage(tmp_path / name, dataset, base_model) for name in ("alone", "moved"))
    assert alone.run(*more) == ExitCode.DONE, alone.message
    assert launch(moved, 4, *more, fault="control@1:2:term") == [85] * 4, moved.message
    assert launch(moved, 2, *more, fault="control@3:1:term") == [85] * 2, moved.message
    assert moved.run(*more) == ExitCode.DONE, moved.message
    assert result(moved.output) == result(alone.output)


NF4 = (*LORA, "adapter.base=nf4", "sampling.every_steps=3")


@pytest.mark.long
def test_a_base_in_4_bit_is_near_the_whole_one_and_resumes_bit_by_bit(dataset: Path, tmp_path: Path) -> None:
    """The matrices are packed (most of the model's bytes), what is learnt on them is added to the whole weights afterwards."""
    model = tinysdxl.write(tmp_path / "model", "two levels")
    straight, stopped, whole = (Stage(tmp_path / name, dataset, model) for name in ("straight", "stopped", "whole"))
    prompts = tmp_path / "prompts.yaml"
    prompts.write_text("prompts: [{text: smile, width: 64, height: 64}]\nsteps: 2\n")
    more = (*NF4, f"sampling.prompts={prompts}", "max_updates=6", "ema.decay=0.9")
    with opened(straight, *more) as session:
        packed = [p for p in session.trained.gradients.model.parameters() if p.dtype == torch.uint8]
        assert len(packed) > 50 and all(not p.requires_grad for p in packed)
    assert straight.run(*more) == ExitCode.DONE, straight.message
    assert stopped.run(*more, ANIX_FAULT="control@4:term") == ExitCode.STOPPED
    assert stopped.run(*more) == ExitCode.DONE, stopped.message
    assert result(stopped.output) == result(straight.output)
    assert (straight.output / "samples/step-00000006").is_dir() and "no previews" not in (straight.output / "metrics.jsonl").read_text()
    assert whole.run(*LORA, "max_updates=6") == ExitCode.DONE
    assert losses(straight.output) == pytest.approx(losses(whole.output), rel=0.05)
    assert losses(straight.output) != losses(whole.output)


@pytest.fixture(scope="module")
def run(base_model: Path, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Stage:
    """A finished stage of an adapter over U-Net, convolutions and encoders."""
    stage = Stage(tmp_path_factory.mktemp("adapter"), dataset, base_model)
    assert stage.run(*LORA, "export.dtype=fp32", 'adapter.rank_pattern={"*.conv1": 2}') == ExitCode.DONE, stage.message
    return stage


def test_it_leaves_the_adapter_in_both_forms_and_no_model(run: Stage, base_model: Path) -> None:
    names = {path.name for path in run.output.iterdir()}
    assert {"pretrain-lora.safetensors", "lora", "lineage.json", "DONE"} <= names
    assert not names & {"model", "pretrain.safetensors"}
    configs = layouts.read_configs(base_model)
    one, two = (reading.open_adapter(run.output / name, configs) for name in ("pretrain-lora.safetensors", "lora"))
    assert one.layers.keys() == two.layers.keys()
    for name, layer in one.layers.items():
        assert torch.equal(layers.delta(layer), layers.delta(two.layers[name]))
        assert layer.rank == (2 if name.endswith("conv1") else 4) and layer.alpha == 2.0
    assert one.metadata["ss_new_sd_model_hash"] == source.model_sha256(base_model)
    assert json.loads(one.metadata["ss_tag_frequency"])["pretrain"]["1girl"] == 26
    assert one.metadata["ss_network_dim"] == "4" and one.metadata["anix.stage"] == "pretrain"
    whole = json.dumps(dict(one.metadata)) + (run.output / "lora/lineage.json").read_text()
    assert str(run.output.parent) not in whole, "no private path goes along"
    assert show_model.report(run.output)["kind"] == "adapter"
    lineage = json.loads((run.output / "lineage.json").read_text())
    assert lineage["adapter"]["base"]["sha256"] == lineage["parent"]["sha256"]


def test_the_run_opens_as_its_base_with_the_adapter_added(run: Stage, base_model: Path, dataset: Path, tmp_path: Path) -> None:
    """By hand: base + alpha / rank x up x down; and the same loss as the networks that were trained."""
    base = {name: to_tensor(blob) for name, blob in source.open_folder(base_model).weights.items()}
    for place in (run.output, max((run.output / "checkpoints").glob("step-????????"))):
        found = {name: to_tensor(blob) for name, blob in anymodel.open_any(place).weights.items()}
        kept = weights(run.output)
        for name, value in base.items():
            module = name.removesuffix(".weight")
            if (down := kept.get(f"{module}.lora_A.default.weight")) is not None:
                up = kept[f"{module}.lora_B.default.weight"]
                value = value + (2.0 / down.shape[0]) * (up.flatten(1) @ down.flatten(1)).reshape(value.shape)
            torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-7)
    merged = Stage(tmp_path, dataset, run.output)
    with opened(merged) as session, torch.no_grad():
        batch = next(iter(session.data.loader.next_update()))
        by_hand = image_losses(session.trained.gradients.model, batch, session.trained.diffusion)
    with opened(Stage(tmp_path / "again", dataset, run.output), *LORA, 'adapter.rank_pattern={"*.conv1": 2}') as session, torch.no_grad():
        trained = image_losses(session.trained.gradients.model, batch, session.trained.diffusion)
    torch.testing.assert_close(trained, by_hand, rtol=1e-6, atol=1e-6)


def test_the_report_and_the_plan_know_an_adapters_run(run: Stage, tmp_path: Path) -> None:
    from train.tools.estimate.estimate import _foreign_size

    file = run.output / "pretrain-lora.safetensors"
    page = write_page([run.output], tmp_path / "page.html", loras=[f"{file}:0.5"]).read_text()
    section = page.partition('id="adapters"')[2].partition("<section")[0]
    assert "pretrain-lora" in section and "0.5" in section and "2, 4" in section
    assert _foreign_size(str(run.output)) == [8, 16]


@pytest.mark.slow
def test_a_report_compares_base_adapter_and_full(run: Stage, base_model: Path, dataset: Path, tmp_path: Path) -> None:
    full = Stage(tmp_path / "full", dataset, base_model)
    assert full.run("max_updates=2", "validation.share=0.3", "validation.every_steps=2") == ExitCode.DONE, full.message
    file = run.output / "pretrain-lora.safetensors"
    record = loss.measure([f"base={base_model}", f"full={full.output}"], dataset, share=0.3, device="cpu", loras=[f"{file}:0.5"])
    write_quality(tmp_path / "loss.json", record)
    page = write_page([run.output, full.output], tmp_path / "page.html", losses=tmp_path / "loss.json", loras=[f"{file}:0.5"]).read_text()
    section = page.partition('id="held-out-loss"')[2].partition("<section")[0]
    name = f"base + {file.name}:0.5"
    assert list(record["models"]) == ["base", "full", name]
    for told in ("Model files on the same images", "<th>base</th>", f"base → {name}", "base → full", f"{record['models'][name]['loss']:.4f}"):
        assert told in section, told
    (tmp_path / "loss.json").write_text(json.dumps({"version": 1, "models": {"a": {}}, "changes": []}))
    with pytest.raises(Halt, match="--loss: no complete record"):
        write_page([run.output], tmp_path / "page.html", losses=tmp_path / "loss.json")


def test_a_stage_goes_on_with_its_parents_adapter(run: Stage, dataset: Path, tmp_path: Path) -> None:
    same = (*LORA, 'adapter.rank_pattern={"*.conv1": 2}')
    child = Stage(tmp_path / "child", dataset, run.output, "ft1")
    more = ("model.train_text_encoders=true", "optimizer.text_encoder_lr=1e-4")
    with opened(child, *same, *more) as session:
        start = {name: p.detach().clone() for name, p in session.trained.parameters.items()}
    assert start.keys() == weights(run.output).keys() and all(torch.equal(value, start[name]) for name, value in weights(run.output).items())
    assert child.run(*same, *more, "max_updates=2") == ExitCode.DONE, child.message
    lineage = json.loads((child.output / "lineage.json").read_text())
    assert [one["stage"] for one in lineage["ancestors"]] == ["pretrain"]
    assert lineage["adapter"]["base"] == json.loads((run.output / "lineage.json").read_text())["adapter"]["base"], "the base is the first one's"
    assert anymodel.open_any(child.output).kind == "run"
    other = Stage(tmp_path / "other", dataset, run.output, "ft1")
    assert other.run(*LORA, *more) == ExitCode.MISMATCH and "other layers" in other.message


def test_a_full_stage_starts_from_the_sum_and_finds_a_base_that_moved(run: Stage, base_model: Path, dataset: Path, tmp_path: Path) -> None:
    child = Stage(tmp_path / "child", dataset, run.output, "ft1")
    assert child.run("max_updates=1") == ExitCode.DONE, child.message
    assert (child.output / "model/model_index.json").is_file()
    copied = tmp_path / "copied"
    shutil.copytree(run.output, copied)
    text = (copied / "config.yaml").read_text()
    (copied / "config.yaml").write_text(text.replace(str(base_model), str(tmp_path / "gone")))
    lost = Stage(tmp_path / "lost", dataset, copied, "ft1")
    assert lost.run("max_updates=1") == ExitCode.MISMATCH and "its base" in lost.message and "gone" in lost.message
    (copied / "config.yaml").write_text(text.replace(str(base_model), str(tinysdxl.write(tmp_path / "another", "least", seed=5))))
    assert Stage(tmp_path / "wrong", dataset, copied, "ft1").run("max_updates=1") == ExitCode.MISMATCH


def test_merged_leaves_the_whole_model_too(base_model: Path, dataset: Path, tmp_path: Path, run: Stage) -> None:
    stage = Stage(tmp_path, dataset, base_model)
    assert stage.run(*LORA, 'adapter.rank_pattern={"*.conv1": 2}', "export.merged=true", "export.dtype=fp32") == ExitCode.DONE, stage.message
    assert weights(stage.output).keys() == weights(run.output).keys()
    merged = {name: to_tensor(blob) for name, blob in source.open_folder(stage.output / "model").weights.items()}
    whole = {name: to_tensor(blob) for name, blob in anymodel.open_any(run.output).weights.items()}
    assert all(torch.equal(value, whole[name]) for name, value in merged.items())
    assert (stage.output / "pretrain.safetensors").is_file() and (stage.output / "pretrain-lora.safetensors").is_file()
    child = Stage(tmp_path / "child", dataset, stage.output, "ft1")
    with opened(child, "adapter.type=lora", "adapter.rank=8") as session:  # anew, whatever its parent's rank was
        assert all(not p.any() for n, p in session.trained.parameters.items() if "lora_B" in n)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (("adapter.rank=3",), "adapter.type is none"),
        (("export.merged=true",), "export.merged needs adapter.type"),
        ((*LORA, "adapter.targets=[]"), "nothing would train"),
        ((*LORA, 'adapter.targets=["unet.nowhere.*"]'), "unet.nowhere"),
        ((*LORA, 'adapter.rank_pattern={"unet.nowhere*": 4}'), "unet.nowhere"),
        ((*LORA, "model.weights=bf16", "precision=bf16"), "model.weights: bf16"),
        ((*LORA, "model.compile=true"), "model.compile"),
        ((*LORA, "model.float8=true", "precision=bf16"), "model.float8"),
        ((*LORA, "optimizer.sharding=fsdp2"), "optimizer.sharding: fsdp2"),
        ((*LORA, "optimizer.groups=[{match: unet.mid_block.*, lr: 0}]"), "optimizer.groups with lr 0"),
        ((*LORA, "adapter.rank=0"), "adapter.rank"),
        ((*LORA, "adapter.alpha=0"), "adapter.alpha"),
    ],
)
def test_what_does_not_go_together_is_refused_by_name(changes: tuple[str, ...], said: str, base_model: Path, dataset: Path, tmp_path: Path) -> None:
    stage = Stage(tmp_path, dataset, base_model)
    assert stage.run(*changes) == ExitCode.USAGE
    assert said in stage.message and not (stage.output / "DONE").exists()


def test_groups_give_layers_of_an_adapter_a_rate_of_their_own(base_model: Path, dataset: Path, tmp_path: Path) -> None:
    stage = Stage(tmp_path, dataset, base_model)
    with opened(stage, *LORA, "optimizer.groups=[{match: unet.mid_block.*, lr: 1e-4}]") as session:
        named = {id(p): n for n, p in session.trained.parameters.items()}
        groups = [[named[id(p)] for p in group["params"]] for group in session.trained.optimizer.param_groups]
    own = [names for names in groups if any(name.startswith("unet.mid_block.") for name in names)]
    assert len(own) == 1 and all(name.startswith("unet.mid_block.") for name in own[0])


def test_the_size_of_an_adapter_is_known_before_it_is_built(base_model: Path, dataset: Path, tmp_path: Path) -> None:
    from train.config.adapter import AdapterConfig

    for kind in ("lora", "dora", "loha", "lokr"):
        stage = Stage(tmp_path / kind, dataset, base_model)
        with opened(stage, *LORA, f"adapter.type={kind}") as session:
            built = sum(p.numel() for p in session.trained.parameters.values())
            modules = {training.part_of(n)[0] for n in session.trained.parameters}  # type: ignore[index]
        shapes = {n.removesuffix(".weight"): b.shape for n, b in source.open_folder(base_model).weights.items() if n.removesuffix(".weight") in modules}
        told = training.factors(AdapterConfig(type=kind, rank=4, targets=("*",)), shapes)  # type: ignore[arg-type]
        assert sum(torch.Size(shape).numel() for shape in told) == built
