"""Defaults of variables that libraries read while they are loaded; what the user has set stays."""

from __future__ import annotations

import os
from collections.abc import MutableMapping

# torch reads the first of these that is set, and nothing of the others.
ALLOCATOR = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF", "PYTORCH_ALLOC_CONF")


def settle(variables: MutableMapping[str, str] = os.environ) -> None:
    """Set what a training needs. Call before torch is imported, in the process itself: launchers pass on what they like."""
    # Notebook: 1 CPU thread per process. More threads than idle cores turn a step of 0.2 s into 10 s.
    variables.setdefault("OMP_NUM_THREADS", "1")
    # Segments that grow: buckets of 33 shapes in random order leave gaps in fixed ones, near the card's limit too many.
    if not any(name in variables for name in ALLOCATOR):
        variables[ALLOCATOR[0]] = "expandable_segments:True"
