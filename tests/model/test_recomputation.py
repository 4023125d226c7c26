"""Which blocks recompute in each mode, and that recomputing changes no number."""

from __future__ import annotations

import pytest
import torch

from train.base.errors import ExitCode, Halt
from train.model.recomputation import CHECKPOINT_STEPS, exempt_steps_of, set_checkpointing
from train.testing.counts import loss_and_gradients, saved_bytes, tiny_inputs, tiny_unet

ALL_BLOCKS = {f"{way}_blocks.{level}" for way in ("down", "up") for level in range(3)} | {"mid_block"}


def test_steps_exempt_blocks_in_the_measured_order() -> None:
    unet = tiny_unet()
    expected = [
        ALL_BLOCKS,
        ALL_BLOCKS - {"mid_block"},
        ALL_BLOCKS - {"mid_block", "down_blocks.2"},
        {"down_blocks.0", "down_blocks.1", "up_blocks.1", "up_blocks.2"},
        {"down_blocks.0", "up_blocks.2"},
        set(),
    ]
    attentions = dict.fromkeys(ALL_BLOCKS, 0) | {"mid_block": 1, "down_blocks.1": 2, "down_blocks.2": 2}
    attentions |= {"up_blocks.0": 3, "up_blocks.1": 3}
    for steps, blocks in enumerate(expected):
        assert set_checkpointing(unet, "partial", steps) == steps
        # the attentions inside a block follow their block
        left = [name for name, module in unet.named_modules() if getattr(module, "gradient_checkpointing", False)]
        assert {name.split(".attentions")[0] for name in left} == blocks
        assert sum(".attentions." in name for name in left) == sum(attentions[block] for block in blocks)


def test_modes_are_names_for_steps() -> None:
    assert exempt_steps_of("full") == 0
    assert exempt_steps_of("partial") == 3
    assert exempt_steps_of("auto", 4) == 4
    assert exempt_steps_of("none") == len(CHECKPOINT_STEPS) == 5
    for mode, steps in (("auto", None), ("some", None), ("partial", 6)):
        with pytest.raises(Halt) as halt:
            exempt_steps_of(mode, steps)
        assert halt.value.code == ExitCode.USAGE


def test_recomputing_leaves_the_generators_states_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    unet, kwargs = tiny_unet(), tiny_inputs()
    set_checkpointing(unet, "full")
    reads = []
    monkeypatch.setattr(torch, "get_rng_state", lambda: reads.append(1))
    loss_and_gradients(unet, kwargs)
    assert reads == [], "two reads a block: on a card also a wait each"


def test_every_mode_gives_the_same_loss_and_gradients_and_keeps_more_memory() -> None:
    unet, kwargs = tiny_unet(), tiny_inputs()
    set_checkpointing(unet, "none")
    loss, reference = loss_and_gradients(unet, kwargs)
    kept = []
    for steps in range(6):
        set_checkpointing(unet, "partial", steps)
        loss_now, found = loss_and_gradients(unet, kwargs)
        assert loss_now == loss
        assert found.keys() == reference.keys()
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, reference[name], rtol=1e-6, atol=1e-7, msg=name)
        kept.append(saved_bytes(unet, lambda: unet(**kwargs).sample))
    assert kept == sorted(set(kept))  # strictly more with every step
