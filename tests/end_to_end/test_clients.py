"""`pytest -m clients`: the programs that open our files, each with its own code in its own Python.

    COMFYUI_DIR=~/ComfyUI COMFYUI_PYTHON=~/ComfyUI/venv/bin/python pytest -n 0 -m clients tests/end_to_end/test_clients.py

Also FORGE_, INVOKEAI_, SDSCRIPTS_ (checkout `_DIR`, its Python `_PYTHON`), and DIFFUSERS_PYTHONS, any number of Pythons
with stock diffusers, separated as in PATH. What is not named is skipped. SDXL is known by its sizes, so each objective is
written once at full size: 7 GB on disk, 10 GB of memory, minutes. docs/clients.md says what was run.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fullsize
import numpy as np
import pytest
import tinysdxl
from safetensors.torch import save_file

from train.config.stage import ExportConfig
from train.engine import export
from train.observe import anymodel

pytestmark = pytest.mark.clients

DRIVERS = Path(__file__).parents[1] / "support/clients"
TEXT = "1girl, red hair, smile"  # without "!", which encoder 2's tokenizer folder makes id 0 of (docs/clients.md)
TIMEOUT_S = 3600
KINDS = {  # what a stage trained: prediction, zero terminal SNR. A new objective is a line here and in each table below
    "epsilon": ("epsilon", False),
    "v": ("v", False),
    "v zero SNR": ("v", True),
}
MARKS: dict[str, list[str]] = {"epsilon": [], "v": ["v_pred"], "v zero SNR": ["v_pred", "ztsnr"]}
EPSILON, V = dict.fromkeys(KINDS, "epsilon"), {"epsilon": "epsilon", "v": "v_prediction", "v zero SNR": "v_prediction"}
WEBUI = {"epsilon": "EPS", "v": "V_PREDICTION", "v zero SNR": "V_PREDICTION"}
ENDS = {"epsilon": False, "v": False, "v zero SNR": True}
# Of encoder 1, which no SDXL file holds and nothing of SDXL reads.
NO_PROJECTION_1 = ["clip missing: ['clip_l.logit_scale', 'clip_l.transformer.text_projection.weight']"]


@dataclass(frozen=True)
class Client:
    """A program, what it says of each kind of single file (by KINDS, or one for all), and what it may not find."""

    name: str
    facts: Mapping[str, Any]
    left_over: Mapping[str, list[str]] = field(default_factory=lambda: {kind: [] for kind in KINDS})
    missing: tuple[str, ...] = ()
    pooled: str = "pooled"

    @property
    def script(self) -> Path:
        """Its program."""
        return DRIVERS / f"ask_{self.name}.py"

    def place(self) -> Path | None:
        """Its checkout."""
        named = os.environ.get(f"{self.name.upper()}_DIR")
        return Path(named) if named else None

    def python(self) -> str:
        """Its Python."""
        return os.environ.get(f"{self.name.upper()}_PYTHON", sys.executable)


CLIENTS = (
    Client("comfyui", {"architecture": "SDXL", "prediction": WEBUI, "zero_terminal_snr": ENDS}, MARKS, tuple(NO_PROJECTION_1)),
    Client("forge", {"architecture": "SDXL", "prediction": WEBUI, "sampled_as": V, "zero_terminal_snr": ENDS}),
    # It reads every SDXL file as epsilon, and its loader takes the hub's scheduler: docs and model card say so.
    Client("invokeai", {"architecture": "sdxl main checkpoint", "record": EPSILON, "prediction": EPSILON}),
    # --v_parameterization is its user's to say; its text_projection is not transposed (docs/as_run.md).
    Client("sdscripts", {"architecture": "SDXL"}, pooled="pooled_untransposed"),
)


def ask(script: Path, python: str, place: Path, asked: Mapping[str, Any], out: Path, **environment: str) -> tuple[dict[str, Any], Mapping[str, Any]]:
    """(facts, arrays) that a program answers."""
    (out / "asked.json").write_text(json.dumps(asked))
    own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [python, str(script), str(out / "asked.json"), str(out / "answer.json")], cwd=place, check=False,
        env={**own, "HF_HUB_OFFLINE": "1", **environment}, capture_output=True, text=True, timeout=TIMEOUT_S,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return json.loads((out / "answer.json").read_text()), np.load(out / "answer.npz")


def near(ours: Any, theirs: Any) -> float:
    """Largest difference relative to the largest value."""
    assert ours.shape == theirs.shape
    return float(np.abs(ours - theirs).max() / np.abs(ours).max())


@pytest.fixture(scope="module", params=KINDS)
def full(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path, fullsize.Text]]:
    """(kind, single file of SDXL's own size, what our encoders say); one file at a time on the disk."""
    if not any(client.place() for client in CLIENTS):
        pytest.skip("no COMFYUI_DIR, FORGE_DIR, INVOKEAI_DIR or SDSCRIPTS_DIR")
    file = tmp_path_factory.mktemp("full") / "full.safetensors"
    fullsize.write(file, *KINDS[request.param])
    yield request.param, file, fullsize.encoded(file, TEXT)
    file.unlink()


@pytest.mark.parametrize("client", CLIENTS, ids=lambda client: client.name)
def test_single_file(client: Client, full: tuple[str, Path, fullsize.Text], tmp_path: Path) -> None:
    """Known for what it is, no key missing or left over, both encoders equal, two steps finite."""
    place = client.place()
    if place is None:
        pytest.skip(f"{client.name.upper()}_DIR names no checkout")
    kind, file, ours = full
    asked = {"file": str(file), "text": ours.caption, "side_px": 128, "ids_1": ours.ids[0].tolist(), "ids_2": ours.ids[1].tolist()}
    facts, arrays = ask(client.script, client.python(), place, asked, tmp_path, HF_HOME=str(fullsize.hub(tmp_path / "hub")))
    known = {name: value[kind] if isinstance(value, dict) else value for name, value in client.facts.items()}
    assert {name: facts[name] for name in known} == known
    assert facts["left_over"] == client.left_over[kind]
    assert facts["missing"] == list(client.missing)
    assert near(ours.context, arrays["context"]) < 1e-5
    assert near(getattr(ours, client.pooled), arrays[client.pooled]) < 1e-5
    assert facts["finite"]
    assert np.abs(arrays["sample"]).max() > 0


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """(kind, the folder that a tiny stage of this objective exports)."""
    if not os.environ.get("DIFFUSERS_PYTHONS"):
        pytest.skip("no DIFFUSERS_PYTHONS")
    place = tmp_path_factory.mktemp("run")
    (place / "config.yaml").write_text("output_dir: run\n")
    source = anymodel.open_any(tinysdxl.write(place / "base", clip=True))
    save_file({"unet.conv_in.bias": tinysdxl.build(clip=True).unet.conv_in.bias.detach() + 1}, place / "trained.safetensors")
    prediction, zero = KINDS[request.param]
    record = {**fullsize.RECORD, "parent": {"stage": None, "sha256": source.sha256, "title": "base"}}
    export.export_stage(
        place, place / "trained.safetensors", source, record, ExportConfig(license="CC0-1.0", dtype="fp32"),
        prediction=prediction, zero_terminal_snr=zero,
    )  # fmt: skip
    return request.param, place / "model"


@pytest.mark.parametrize("number", range(5))
def test_stock_diffusers_opens_the_folder(number: int, folder: tuple[str, Path], tmp_path: Path) -> None:
    """Of any generation, with the transformers it was used with."""
    named = [python for python in os.environ.get("DIFFUSERS_PYTHONS", "").split(os.pathsep) if python]
    if number >= len(named):
        pytest.skip(f"DIFFUSERS_PYTHONS names {len(named)} Pythons")
    kind, model = folder
    ours = fullsize.encoded(model, TEXT)
    facts, arrays = ask(DRIVERS / "ask_diffusers.py", named[number], tmp_path, {"folder": str(model), "text": TEXT, "side_px": 32}, tmp_path)
    assert (facts["prediction"], facts["zero_terminal_snr"]) == (V[kind], ENDS[kind])
    assert facts["missing"] == []
    assert near(ours.context, arrays["context"]) < 1e-5
    assert near(ours.pooled, arrays["pooled"]) < 1e-5
    assert facts["finite"]
    print(facts["versions"])


@pytest.mark.parametrize("kind", KINDS)
def test_invokeai_knows_the_folder(kind: str, tmp_path: Path) -> None:
    """Where it asks the folder's own scheduler; it looks at no weights for that."""
    client = CLIENTS[2]
    place = client.place()
    if place is None:
        pytest.skip("INVOKEAI_DIR names no checkout")
    folder = fullsize.without_weights(tmp_path / "model", *KINDS[kind])
    facts, _ = ask(client.script, client.python(), place, {"folder": str(folder)}, tmp_path)
    assert facts == {"architecture": "sdxl main diffusers", "record": V[kind]}


def test_comfyui_finds_a_weight_for_every_key_of_an_adapter(tmp_path: Path) -> None:
    """LoRA, DoRA, LoHa and LoKr over all that we name of SDXL, U-Net, convolutions and both encoders."""
    client = CLIENTS[0]
    place = client.place()
    if place is None:
        pytest.skip("COMFYUI_DIR names no checkout")
    files, layers = fullsize.adapters(tmp_path)
    facts, _ = ask(DRIVERS / "ask_comfyui_adapter.py", client.python(), place, {"files": {name: str(file) for name, file in files.items()}}, tmp_path)
    assert {name: one["left_over"] for name, one in facts.items()} == {name: [] for name in files}
    assert {one["weights"] for one in facts.values()} == {layers}
