"""Animagine XL 3.1's three-stage SDXL recipe. `run.py` is one stage of it; CONTRIBUTING says which package holds what."""

import importlib
import sys
from types import ModuleType

from train.base import errors

# Before the packages every room lay here. Scripts of other people that open model files by the old names go on.
_EARLIER = {"sdxl": "train.model.sdxl", "singlefile": "train.model.single_file", "weightfile": "train.storage.tensor_files"}
sys.modules[f"{__name__}.exits"] = errors


def __getattr__(name: str) -> ModuleType:
    if name not in _EARLIER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module(_EARLIER[name])
