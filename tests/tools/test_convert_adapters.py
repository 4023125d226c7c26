"""convert.py with adapters: merging, extraction, sums, both file forms, and the lineage of each; asked as a user asks."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import adapters
import pytest
import tinysdxl
import torch
from safetensors.torch import load_file, save_file

from train.base.errors import ExitCode, Halt
from train.model import layouts, networks, source
from train.model.adapters import bases, layers, names, reading
from train.storage.state_files import to_tensor
from train.tools.commands import convert

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def ask(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str | Path) -> str:
    monkeypatch.setattr(sys, "argv", ["convert.py", *map(str, words)])
    assert convert.main() == ExitCode.DONE
    return capsys.readouterr().out


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tinysdxl.write(tmp_path_factory.mktemp("base") / "model", "two levels", clip=True)


@pytest.fixture(scope="module")
def known(base: Path) -> names.Names:
    return names.names_of(layouts.read_configs(base))


@pytest.fixture(scope="module")
def usual(known: names.Names) -> list[str]:
    return [name for name, module in known.modules.items() if module.usual]


def weights(path: Path) -> dict[str, torch.Tensor]:
    opened = source.open_folder(path) if path.is_dir() else source.open_single_file(path)
    return {name: to_tensor(blob) for name, blob in opened.weights.items()}


def lora(path: Path, known: names.Names, modules: list[str], **options: float) -> Path:
    told = adapters.kohya(known, modules, **options)  # type: ignore[arg-type]
    save_file(told, path)
    return path


def test_a_merge_adds_each_times_its_weight_and_names_its_parents(
    base: Path, known: names.Names, usual: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = lora(tmp_path / "one.safetensors", known, usual[::2], seed=1), lora(tmp_path / "two.safetensors", known, usual[::3], seed=2, rank=3)
    told = ask(monkeypatch, capsys, "merge", base, f"{one}:0.5", f"{two}:-2", tmp_path / "out")
    assert "times 0.5" in told and "times -2" in told
    ask(monkeypatch, capsys, "merge", base, f"{one}:0.5", f"{two}:-2", tmp_path / "out.safetensors")
    before, after = weights(base), weights(tmp_path / "out")
    read = [(reading.open_adapter(path, layouts.read_configs(base)), times) for path, times in ((one, 0.5), (two, -2.0))]
    for name, value in before.items():
        wanted = value.double()
        for adapter, times in read:
            if (layer := adapter.layers.get(name.removesuffix(".weight"))) is not None and name.endswith(".weight"):
                wanted = wanted + times * layers.delta(layer).double()
        torch.testing.assert_close(after[name].double(), wanted, rtol=1e-6, atol=1e-6)
        assert torch.equal(after[name], weights(tmp_path / "out.safetensors")[name]) if name == "unet.conv_in.weight" else True
    lineage = json.loads((tmp_path / "out/lineage.json").read_text())
    assert lineage["stage"] == "merge" and [m["weight"] for m in lineage["merged"]] == [0.5, -2.0]
    assert lineage["parent"]["sha256"] == source.open_folder(base).sha256
    assert networks.build(source.open_folder(tmp_path / "out")) is not None  # opens like any model


def test_a_merge_of_weight_zero_is_the_base_bit_for_bit(
    base: Path, known: names.Names, usual: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one = lora(tmp_path / "one.safetensors", known, usual)
    ask(monkeypatch, capsys, "merge", base, f"{one}:0", tmp_path / "out")
    before, after = weights(base), weights(tmp_path / "out")
    assert before.keys() == after.keys() and all(torch.equal(value, after[name]) for name, value in before.items())


def test_in_half_precision_sums_are_rounded_once(
    base: Path, known: names.Names, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two halves of a difference that a sum in fp16 would lose one by one."""
    half = tinysdxl.write(tmp_path / "half", "two levels", dtype=torch.float16, clip=True)
    module = known.modules["unet.conv_out"]
    value = weights(half)["unet.conv_out.weight"]
    step = torch.nextafter(value.half(), torch.full_like(value, 99).half()).float() - value
    save_file({f"{module.kohya}.diff": step * 0.3}, tmp_path / "a.safetensors")
    ask(monkeypatch, capsys, "merge", half, tmp_path / "a.safetensors", tmp_path / "once")
    ask(monkeypatch, capsys, "merge", half, tmp_path / "a.safetensors", tmp_path / "a.safetensors", tmp_path / "twice")
    assert torch.equal(weights(tmp_path / "once")["unet.conv_out.weight"], value)
    assert not torch.equal(weights(tmp_path / "twice")["unet.conv_out.weight"], value)


@pytest.fixture(scope="module")
def tuned(base: Path, known: names.Names, usual: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base with a difference of rank 8 in every layer that an adapter reaches."""
    folder = tmp_path_factory.mktemp("tuned") / "model"
    pipeline = tinysdxl.build("two levels", clip=True)
    values, generator = weights(base), torch.Generator().manual_seed(4)
    for network in names.NETWORKS:
        module = getattr(pipeline, network)
        for name, parameter in module.named_parameters():
            canonical = networks.canonical(network, name)
            parameter.data = values[canonical]
            if canonical.removesuffix(".weight") in usual and canonical.endswith(".weight"):
                o, i = parameter.shape[0], parameter[0].numel()
                low = torch.randn(o, min(8, o, i), generator=generator) @ torch.randn(min(8, o, i), i, generator=generator) * 0.02
                parameter.data = parameter.data + low.reshape(parameter.shape)
    pipeline.vae.load_state_dict({n.removeprefix("vae."): v for n, v in values.items() if n.startswith("vae.")})
    pipeline.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("options", [("--rank", "8"), ("--rank", "99"), ("--energy", "1")])
def test_what_is_extracted_and_merged_again_is_the_model(
    options: tuple[str, str], base: Path, tuned: Path, usual: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told = ask(monkeypatch, capsys, "extract", tuned, tmp_path / "x.safetensors", "--base", base, "--dtype", "fp32", *options)
    assert f"total: {len(usual)} layers" in told and "left out" not in told
    ask(monkeypatch, capsys, "merge", base, tmp_path / "x.safetensors", tmp_path / "again")
    wanted, got = weights(tuned), weights(tmp_path / "again")
    for name, value in wanted.items():
        torch.testing.assert_close(got[name], value, rtol=0, atol=2e-6)


def test_full_rank_reproduces_a_random_difference_to_fp16_and_the_rest_is_told(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tinysdxl.write(tmp_path / "other", "two levels", seed=9, clip=True)
    told = ask(monkeypatch, capsys, "extract", other, tmp_path / "x.safetensors", "--base", base, "--rank", "999")
    assert "left out" in told and "norms, biases, embeddings" in told and "taken along whole" in told
    ask(monkeypatch, capsys, "merge", base, tmp_path / "x.safetensors", tmp_path / "again")
    wanted, got = weights(other), weights(tmp_path / "again")
    far = {name for name in wanted if (got[name] - wanted[name]).norm() > 2e-3 * wanted[name].norm() and not name.startswith("vae.")}
    assert far == {name for name in wanted if "embeddings." in name or "text_projection" in name}
    plain = ask(monkeypatch, capsys, "extract", other, tmp_path / "y.safetensors", "--base", base, "--rank", "4", "--matrices-only")
    assert "taken along" not in plain and not any(".diff" in key or "_norm" in key for key in load_file(tmp_path / "y.safetensors"))
    adapter = reading.open_adapter(tmp_path / "x.safetensors", layouts.read_configs(base))
    one, two = weights(base), weights(other)
    for name, layer in adapter.layers.items():
        difference = two[f"{name}.weight"] - one[f"{name}.weight"]
        assert layer.rank == 0 or (layers.delta(layer) - difference).norm() < 2e-3 * difference.norm()  # fp16 keeps 11 bits of each factor


def test_what_was_only_rounded_did_not_train(
    base: Path, tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run's export holds in fp16 what the stage left alone."""
    half = tmp_path / "half"
    opened, changed = source.open_folder(base), weights(tuned)
    pipeline = tinysdxl.build("two levels", clip=True)
    for network in names.NETWORKS:
        for name, parameter in getattr(pipeline, network).named_parameters():
            key = networks.canonical(network, name)
            trained = network == "unet"
            parameter.data = (changed[key] if trained else to_tensor(opened.weights[key]).half().float())
    pipeline.save_pretrained(half)
    for network in names.NETWORKS[1:]:
        file = half / network / "model.safetensors"
        save_file({name: value.half() for name, value in load_file(file).items()}, file)
    told = ask(monkeypatch, capsys, "extract", half, tmp_path / "x.safetensors", "--base", base, "--rank", "2")
    assert not any(name.startswith("text_encoder") for name in reading.open_adapter(tmp_path / "x.safetensors", layouts.read_configs(base)).layers)
    assert "left out" not in told


def test_less_rank_says_what_it_loses(base: Path, tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    told = ask(monkeypatch, capsys, "extract", tuned, tmp_path / "x", "--base", base, "--rank", "2", "--format", "diffusers")
    adapter = reading.open_adapter(tmp_path / "x", layouts.read_configs(base))
    one, two = weights(base), weights(tuned)
    squares = left = 0.0
    for name, layer in adapter.layers.items():
        assert layer.rank <= 2
        difference = two[f"{name}.weight"] - one[f"{name}.weight"]
        best = torch.linalg.svdvals(difference.flatten(1))[2:].square().sum()  # Eckart and Young
        missed = (layers.delta(layer) - difference).square().sum()
        assert missed <= best * 1.01 + 1e-6
        squares, left = squares + float(difference.square().sum()), left + float(missed)
    stated = float(told.split("error ")[-1].split(" ")[0])
    assert stated == pytest.approx((left / squares) ** 0.5, rel=0.01) and 0.1 < stated < 1


def test_large_matrices_in_a_random_subspace_lose_no_more() -> None:
    from train.model.adapters import extraction

    generator = torch.Generator().manual_seed(0)
    u, v = torch.linalg.qr(torch.randn(400, 300, generator=generator)).Q, torch.linalg.qr(torch.randn(320, 300, generator=generator)).Q
    matrix = (u * torch.logspace(0, -3, 300)) @ v.T
    assert extraction.LARGE * (4 + extraction.OVERSAMPLED) < 320
    up, down = extraction.factors(matrix, rank=4, energy=None, name="a")
    best = torch.logspace(0, -3, 300)[4:].square().sum()
    assert (matrix - up @ down).square().sum() <= best * 1.001
    assert torch.equal(extraction.factors(matrix, rank=4, energy=None, name="a")[0], up)


def test_merge_then_extract_returns_the_adapter_up_to_rotation(
    base: Path, known: names.Names, usual: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one = lora(tmp_path / "one.safetensors", known, usual, rank=2, alpha=2.0)
    ask(monkeypatch, capsys, "merge", base, one, tmp_path / "merged")
    ask(monkeypatch, capsys, "extract", tmp_path / "merged", tmp_path / "back.safetensors", "--base", base, "--rank", "2", "--dtype", "fp32")
    first, back = (reading.open_adapter(tmp_path / f"{name}.safetensors", layouts.read_configs(base)) for name in ("one", "back"))
    for name in usual:
        torch.testing.assert_close(layers.delta(back.layers[name]), layers.delta(first.layers[name]), rtol=1e-4, atol=2e-6)


def test_a_sum_of_models(base: Path, tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    other = tinysdxl.write(tmp_path / "other", "two levels", seed=9, clip=True)
    ask(monkeypatch, capsys, "add", other, tuned, base, tmp_path / "sum", "--times", "0.5")
    a, b, c, got = weights(other), weights(tuned), weights(base), weights(tmp_path / "sum")
    for name, value in got.items():
        wanted = a[name] if name.startswith("vae.") else a[name] + 0.5 * (b[name] - c[name])
        torch.testing.assert_close(value, wanted, rtol=1e-6, atol=1e-7)
    lineage = json.loads((tmp_path / "sum/lineage.json").read_text())
    assert lineage["formula"] == "a + 0.5 (b - c)" and [p["role"] for p in lineage["parents"]] == ["a", "b", "c"]


def test_an_adapter_says_its_base_and_another_one_is_noticed(
    base: Path, tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ask(monkeypatch, capsys, "extract", tuned, tmp_path / "x.safetensors", "--base", base, "--rank", "2")
    adapter = reading.open_adapter(tmp_path / "x.safetensors", layouts.read_configs(base))
    assert bases.remark(adapter, source.open_folder(base)) is None
    said = bases.remark(adapter, source.open_folder(tuned))
    assert said is not None and "was made for the base" in said
    assert adapter.metadata["ss_network_dim"] == "2" and adapter.metadata["ss_new_sd_model_hash"] == source.open_folder(base).sha256
    assert str(tmp_path) not in json.dumps(dict(adapter.metadata))
    told = ask(monkeypatch, capsys, "merge", tuned, tmp_path / "x.safetensors", tmp_path / "wrong")
    assert "was made for the base" in told


def test_both_forms_of_an_adapter(
    base: Path, known: names.Names, usual: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file without configs belongs to SDXL's own sizes, so --config names this base; what is written carries them."""
    one = lora(tmp_path / "one.safetensors", known, usual)
    with pytest.raises(Halt, match=r"belong to no module|make no"):
        ask(monkeypatch, capsys, one, tmp_path / "folder")
    assert "diffusers folder" in ask(monkeypatch, capsys, one, tmp_path / "folder", "--config", base)
    assert "kohya's names" in ask(monkeypatch, capsys, tmp_path / "folder", tmp_path / "back.safetensors")
    first, back = load_file(one), load_file(tmp_path / "back.safetensors")
    assert first.keys() == back.keys() and all(torch.equal(value, back[name]) for name, value in first.items())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("extract", "{base}", "{out}.safetensors", "--base", "{base}"), "give --rank N or --energy"),
        (("extract", "{base}", "{out}.safetensors", "--base", "{base}", "--rank", "2"), "do not differ"),
        (("extract", "{base}", "{out}", "--base", "{base}", "--rank", "2"), "writes a .safetensors file"),
        (("extract", "{base}", "{out}.safetensors", "--base", "{base}", "--energy", "2"), "--energy 2.0"),
        (("merge", "{base}", "{nowhere}.safetensors", "{out}"), "does not exist"),
        (("merge", "{base}", "{base}", "{out}"), "holds no pytorch_lora_weights"),
        (("merge", "{base}", "{nowhere}.safetensors:nan", "{out}"), "not between"),
        (("add", "{base}", "{base}", "{base}", "{out}", "--times", "inf"), "--times"),
        (("merge", "{base}", "{nowhere}.safetensors", "{base}"), "nothing is written over"),
    ],
)
def test_what_cannot_be_is_refused_by_name(
    words: tuple[str, ...], said: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told = [word.format(base=base, out=tmp_path / "out", nowhere=tmp_path / "nowhere") for word in words]
    with pytest.raises(Halt, match=said):
        ask(monkeypatch, capsys, *told)
    assert not list(tmp_path.iterdir())


def test_show_tells_what_an_adapter_is(base: Path, known: names.Names, usual: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    one = lora(tmp_path / "one.safetensors", known, usual, rank=2, alpha=1.0)
    ask(monkeypatch, capsys, one, tmp_path / "told.safetensors", "--config", base)
    from train.tools.show import model

    report = model.report(tmp_path / "told.safetensors")
    assert report["kind"] == "adapter" and report["layers"] == len(usual)
    unet = report["networks"]["unet"]
    assert unet["ranks"] == {"2": unet["layers"]} and unet["alphas"] == {"1": unet["layers"]} and unet["convolutions"] > 3
    assert report["ss"]["ss_network_module"] == "networks.lora" and report["ss"]["ss_network_dim"] == "2"
    damaged = load_file(one)
    next(value for name, value in damaged.items() if "lora_up" in name)[0] = float("nan")
    save_file(damaged, tmp_path / "nan.safetensors", {"anix.configs": reading.open_adapter(tmp_path / "told.safetensors", layouts.read_configs(base)).metadata["anix.configs"]})
    with pytest.raises(Halt, match="not finite"):
        model.report(tmp_path / "nan.safetensors")
