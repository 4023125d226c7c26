"""What an adapter adds to a weight, against peft's own layers and against formulas written out; names against sd-scripts' table."""

from __future__ import annotations

import json
from pathlib import Path

import adapters
import pytest
import tinysdxl
import torch

from train.model import sdxl
from train.model.adapters import layers, names, reading
from train.storage.tensor_files import Blob

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
GOLDEN = Path(__file__).parents[1] / "golden/adapters/sd_scripts_names_48d368f.json"


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> sdxl.Configs:
    folder = tinysdxl.write(tmp_path_factory.mktemp("base") / "model", "like SDXL")
    return tinysdxl_configs(folder)


def tinysdxl_configs(folder: Path) -> sdxl.Configs:
    from train.model import layouts

    return layouts.read_configs(folder)


@pytest.mark.slow
def test_kohyas_names_are_those_that_sd_scripts_gives_to_sdxl() -> None:
    golden = json.loads(GOLDEN.read_text())["modules"]
    known = names.names_of(sdxl.STANDARD)
    ours = {m.kohya: [m.shape[1], m.shape[0], m.shape[2] if len(m.shape) == 4 else 0] for m in known.modules.values() if m.usual}
    assert len(ours) == 788 + 264
    assert ours == golden
    assert all(known.module(module.kohya) == name and known.module(name) == name for name, module in known.modules.items())


@pytest.mark.parametrize("kind", ["lora", "dora", "rslora", "loha", "lokr", "lokr whole", "loha tucker", "lokr tucker"])
def test_layers_add_what_pefts_add(kind: str, configs: sdxl.Configs, tmp_path: Path) -> None:
    """Through a folder as peft saves it; convolutions and matrices. Of DoRA the whole weight is compared."""
    options = {
        "dora": {"use_dora": True}, "rslora": {"use_rslora": True}, "loha tucker": {"use_effective_conv2d": True},
        "lokr": {"r": 1}, "lokr tucker": {"r": 1, "use_effective_conv2d": True}, "lokr whole": {"r": 99, "alpha": 99},
    }.get(kind, {})  # fmt: skip
    name = {"dora": "lora", "rslora": "lora"}.get(kind, kind.split(" ")[0])
    unet = tinysdxl.build("like SDXL").unet
    weights = {n: m.weight.detach().clone() for n, m in unet.named_modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)}
    adapters.injected(unet, name, **options)
    adapter = reading.open_adapter(adapters.peft_folder(tmp_path / "unet", unet), configs)
    expected = adapters.deltas(unet)
    assert {f"unet.{module}" for module in expected} == set(adapter.layers) and len(expected) > 30
    assert any(len(layer.shape) == 4 for layer in adapter.layers.values())
    for module, layer in adapter.layers.items():
        key = module.removeprefix("unet.")
        base = weights[key]
        if kind == "dora":
            magnitude = dict(unet.named_modules())[key].lora_magnitude_vector["default"].weight
            whole = base + expected[key]
            sizes = whole.flatten(1).norm(dim=1)
            wanted = whole * (magnitude.flatten() / sizes).reshape(-1, *[1] * (base.ndim - 1)) - base
        else:
            wanted = expected[key].reshape(base.shape)
        torch.testing.assert_close(layers.delta(layer, base), wanted.detach(), rtol=1e-5, atol=1e-6)


def blob(values: torch.Tensor) -> Blob:
    data = values.contiguous().numpy().tobytes()
    return Blob("F32", tuple(values.shape), lambda: iter([memoryview(data)]))


def test_a_lora_by_hand() -> None:
    parts = {"down": blob(torch.tensor([[1.0, 2.0]])), "up": blob(torch.tensor([[3.0], [4.0], [5.0]]))}
    made = layers.delta(layers.Layer("lora", parts, 0.5, (3, 2)))
    assert made.tolist() == [[1.5, 3.0], [2.0, 4.0], [2.5, 5.0]]
    assert layers.delta(layers.Layer("lora", parts, None, (3, 2))).tolist() == [[3.0, 6.0], [4.0, 8.0], [5.0, 10.0]]


def test_a_kernel_between_two_matrices_by_hand() -> None:
    """Tucker: out[o,i,k,l] = sum up[o,r] mid[r,s,k,l] down[s,i]."""
    generator = torch.Generator().manual_seed(1)
    up, mid, down = (torch.randn(s, generator=generator) for s in ((4, 2, 1, 1), (2, 2, 3, 3), (2, 5, 1, 1)))
    layer = layers.Layer("lora", {"up": blob(up), "mid": blob(mid), "down": blob(down)}, None, (4, 5, 3, 3))
    assert layers.problem(layer) is None
    wanted = torch.stack([up[:, :, 0, 0] @ mid[:, :, k, w] @ down[:, :, 0, 0] for k in range(3) for w in range(3)], -1).reshape(4, 5, 3, 3)
    torch.testing.assert_close(layers.delta(layer), wanted)


@pytest.mark.parametrize("shape", [(6, 6), (4, 6), (6, 6, 3, 3)])
def test_dora_by_columns_as_onetrainer_writes_it_of_a_square_too(shape: tuple[int, ...], tmp_path: Path) -> None:
    """Its scale is [1, I, ...]; by ComfyUI's rule the first side decides. Written in kohya's names it stays so."""
    generator = torch.Generator().manual_seed(2)
    base, wanted = torch.randn(shape, generator=generator), torch.arange(1.0, 7.0)
    parts = {"down": torch.randn(2, *shape[1:], generator=generator), "up": torch.randn(shape[0], 2, *[1] * (len(shape) - 2), generator=generator),
             "dora": wanted.reshape(1, 6, *[1] * (len(shape) - 2))}  # fmt: skip
    layer = layers.Layer("lora", {name: blob(value) for name, value in parts.items()}, 1.0, shape)
    assert layers.problem(layer) is None and layer.by_input
    whole = base + layers.delta(layer, base)
    torch.testing.assert_close(whole.transpose(0, 1).flatten(1).norm(dim=1), wanted)
    rows = layers.Layer("lora", {**layer.parts, "dora": layers.as_vector(blob(torch.ones(1, shape[0])))}, 1.0, shape)
    torch.testing.assert_close((base + layers.delta(rows, base)).flatten(1).norm(dim=1), torch.ones(shape[0]))


def test_dora_gives_rows_the_length_of_its_scale() -> None:
    generator = torch.Generator().manual_seed(2)
    base = torch.randn(4, 6, generator=generator)
    parts = {"down": torch.randn(2, 6, generator=generator), "up": torch.randn(4, 2, generator=generator), "dora": torch.tensor([[1.0], [2.0], [3.0], [4.0]])}
    layer = layers.Layer("lora", {name: blob(value) for name, value in parts.items()}, 1.0, (4, 6))
    whole = base + layers.delta(layer, base)
    torch.testing.assert_close(whole.norm(dim=1), torch.tensor([1.0, 2.0, 3.0, 4.0]))
