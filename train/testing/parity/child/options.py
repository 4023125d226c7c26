"""The trainer's command line as one object: an option that nobody names is None, as argparse leaves it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any


class Options(SimpleNamespace):
    """`args` of the trainer's functions."""

    def __getattr__(self, name: str) -> Any:
        """None for what was not given; Python asks for no other reason."""
        if name.startswith("__"):
            raise AttributeError(name)
        return None


NOTEBOOK: dict[str, Any] = {  # the released notebook's, as far as functions here ask for them
    "max_token_length": 225, "max_train_steps": 90_990, "lr_scheduler": "cosine_with_restarts", "lr_scheduler_num_cycles": 10, "lr_warmup_steps": 0, "lr_decay_steps": 0,
    "learning_rate": 1e-5, "max_grad_norm": 1.0, "min_timestep": 0, "max_timestep": 1000, "loss_type": "l2", "optimizer_type": "AdamW",
    "gradient_accumulation_steps": 1,
}  # fmt: skip


def of_notebook(**others: Any) -> Options:
    """The notebook's options with some of them changed."""
    return Options(**{**NOTEBOOK, **others})
