"""Taking up an interrupted run: what its checkpoint must have been written under, its state, and its files cut back."""

from __future__ import annotations

import logging
import platform
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch

from train.base.errors import ExitCode, Halt
from train.config.derived import Identity
from train.data.index import Index
from train.data.selection import changes_since, save_selection
from train.engine import finished
from train.engine.setup import Data, Execution
from train.model.networks import Networks, overlay, trained_parameters
from train.model.source import LocalModel
from train.observe import metrics
from train.optim import optimizers
from train.optim.ema import Ema
from train.recipe import rng
from train.storage import checkpoint, resume, state_files
from train.storage.rundir import RunDir, remove_leftovers

if TYPE_CHECKING:
    from train.optim.fsdp2 import FullShards
    from train.optim.offload import HostMasters

log = logging.getLogger("anix")
SELECTION = "selection.safetensors"  # beside config.yaml: which images and captions this run trains on


def expectations(
    identity: Identity, data: Data, source: LocalModel, parameters: Mapping[str, torch.nn.Parameter], ema: Ema | None
) -> resume.Expectations:
    """What a checkpoint of this run must have been written under, and what the next one says about itself."""
    model = state_files.specs(parameters)
    return resume.Expectations(
        stage=identity.stage,
        config=resume.without_secrets(identity.flat),
        held={
            "data.path": f"{data.index.fingerprint}/{data.index.selection_hash}",
            "model.init_from": source.sha256,
            "model.vae": data.vae,
            # Pins: a wrong one was refused before, a right one changes nothing.
            "model.init_sha256": source.sha256,
            "model.vae_sha256": data.vae,
            "model.tokenizers": data.tokenizer.identity(),
        },
        facts={"dataset": data.index.fingerprint, "plan": data.fingerprint, "parent": source.sha256},
        notes={"canary": rng.canary(identity.seed), "threads": torch.get_num_threads(), "versions": versions()},
        tensors={"model": model, "optimizer": None} | ({"ema": state_files.specs(ema.average)} if ema is not None else {}),  # fp32 beside 16-bit weights
        accept=identity.accept,
        defaults=identity.defaults,
    )


def versions() -> dict[str, str]:
    """What decides a run's last bits beside the hardware."""
    import diffusers
    import transformers

    found = {"python": platform.python_version(), "torch": torch.__version__}
    return found | {"diffusers": diffusers.__version__, "transformers": transformers.__version__}


def restore(
    run: RunDir,
    expected: resume.Expectations,
    networks: Networks,
    optimizer: torch.optim.Optimizer,
    ema: Ema | None,
    index: Index,
    shards: FullShards | None,
    masters: HostMasters | None,
    *,
    name: str,
    verify: str,
    is_main: bool,
) -> checkpoint.Loaded | None:
    """Load the newest sound checkpoint into the networks, the optimizer `name` and the average; None for a new run."""
    resume.check_accept(expected.accept, expected.config)
    changes = changes_since(run.path / SELECTION, index)
    try:
        loaded = checkpoint.load_newest(run, expected, verify=verify)
    except Halt as halt:
        raise Halt(halt.code, halt.message + (f"\nThe dataset changed: {changes}" if changes else "")) from halt
    if loaded is None:
        if is_main:
            begin(run, index, None)
        return None
    if loaded.progress.updates and loaded.manifest.files["optimizer.safetensors"].tensors == 0:
        raise Halt(ExitCode.MISMATCH, f"{loaded.path}: {loaded.progress.updates} updates, and no optimizer state")
    parameters = trained_parameters(networks) if masters is None else masters.parameters
    whole, average = loaded.tensors("model"), loaded.tensors("ema") if ema is not None else {}
    if shards is not None:  # this process's parts alone
        whole, average = shards.cut(whole, parameters), shards.cut(average, parameters)
    overlay(networks, whole, loaded.path / "model.safetensors")
    if masters is not None:
        masters.load(whole)
    optimizers.load_state_tensors(
        optimizer, parameters, loaded.tensors("optimizer"), name=name, source=loaded.path,
        cut=None if shards is None else shards.cut_state,
    )  # fmt: skip
    if ema is not None:
        ema.load(average)
    if is_main:
        begin(run, index, loaded)
        log.info("resuming after update %d from %s", loaded.progress.step, loaded.path)
        if loaded.comparison.warned or loaded.comparison.accepted:
            log.warning("settings changed since the checkpoint:\n%s", loaded.comparison.table())
    return loaded


def begin(run: RunDir, index: Index, loaded: checkpoint.Loaded | None) -> None:
    """The first writes of a start, once nothing can refuse it any more: what an earlier start left over is cleared.

    A run killed before its first checkpoint has logged updates that will come again.
    """
    step = loaded.progress.step if loaded else 0
    remove_leftovers(run.path)
    save_selection(run.path / SELECTION, index)
    metrics.cut(run.metrics, step)
    metrics.cut(run.path / "validation.jsonl", step if loaded else -1)  # that of before the first update comes again too
    metrics.cut_trace(run.path / metrics.TRACE, step)


def state_of(
    config_hash: str,
    expected: resume.Expectations,
    loaded: checkpoint.Loaded | None,
    world: int,
    execution: Execution,
    done: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """What state.json says beside progress and loss scale: settings, hashes, and where the run was (re)started."""
    earlier = loaded.state.get("history", []) if loaded else []
    # Those of earlier resumes too: the checkpoint that is loaded next knows the new settings only.
    accepted = list(loaded.state.get("accepted", [])) if loaded else []
    accepted += [f"step {loaded.progress.step}: {found}" for found in loaded.comparison.accepted] if loaded else []
    extended = list(loaded.state.get("extended", [])) if loaded else []
    extended += finished.went_on(loaded.progress.step, done, loaded.comparison) if loaded else []
    return expected.to_state() | {
        "history": [*earlier, [loaded.progress.step if loaded else 0, world]],
        "config_hash": config_hash,
        "accepted": accepted,
        "extended": extended,
        "execution": asdict(execution),  # what auto picked
    }
