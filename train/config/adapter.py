"""The keys of an adapter (LoRA and its relatives) that a stage trains in place of the model's own weights."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Literal

from train.config.key import default_of, key

if TYPE_CHECKING:
    from train.config.stage import StageConfig

# What sd-scripts' own module reaches without its conv_dim: attention and feed-forward, of the encoders where they train.
TARGETS = ("unet.*.attentions.*", "text_encoder*.self_attn.*", "text_encoder*.mlp.*")


@dataclass(frozen=True)
class AdapterConfig:
    """What is trained beside frozen weights."""

    type: Literal["none", "lora", "dora", "lokr", "loha"] = key("none", "none = the model's own weights train; else a frozen model and an adapter of this kind (extra: lora)")
    rank: int = key(16, "inner width of every layer of the adapter", at_least=1, at_most=4096)
    alpha: float | None = key(None, "a layer is scaled by alpha / its rank; null = rank", above=0, at_most=10000)
    targets: tuple[str, ...] = key(TARGETS, "patterns (* and ?) of the modules that get a layer: unet.down_blocks.1.attentions.0.proj_in")
    rank_pattern: dict[str, int] = key(dict, "pattern of modules: another rank for them; the last that fits counts", at_least=1, at_most=4096)
    base: Literal["16bit", "nf4"] = key("16bit", "how the frozen weights lie: 16bit = as precision says (fp32 with fp32); nf4 = matrices in 4 bit (bitsandbytes), rounded")


def problems(config: StageConfig) -> str | None:
    """What of the adapter's own keys makes no sense; one sentence, None where all is well. What it does not go with: `combinations`."""
    adapter = config.adapter
    if adapter.type == "none":
        given = [field.name for field in fields(adapter) if getattr(adapter, field.name) != default_of(field)]
        return f"adapter.{', adapter.'.join(given)} is set but adapter.type is none: choose lora, dora, lokr or loha" if given else None
    if not adapter.targets:
        return "adapter.targets is empty: nothing would train"
    if any(group.lr == 0 for group in config.optimizer.groups):
        return f"adapter.type: {adapter.type} refuses optimizer.groups with lr 0 (adapter.targets chooses the layers): not tried together"
    return None
