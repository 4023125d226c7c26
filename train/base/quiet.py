"""Warnings of other libraries that a user of these commands cannot act on stay off the terminal. Standard library only.

Each is named by where it comes from and by its words, so that whatever else that library says is still heard.
"""

from __future__ import annotations

import logging
import re
import warnings

_WARNINGS = (  # (beginning of the message, category)
    # data.workers is asked for; more of them than cores wait for the disk, which is what they are for.
    (r"This DataLoader will create \d+ worker processes", UserWarning),
    (r"'pin_memory' argument is set as true but no accelerator is found", UserWarning),
    # fp32 sums stay fp32 on purpose: see precision.
    (r"\s*TensorFloat32 tensor cores for float32 matrix multiplication available but not enabled", UserWarning),
)
_LOGGED = {  # logger: what of its messages is dropped
    # torchvision is left out on purpose: a build that does not match torch breaks diffusers.
    "transformers.utils.import_utils": r"requires torchvision \(not installed\); falling back",
    # Said of every network that is cast, although its list is empty.
    "diffusers.models.modeling_utils": r"that should be kept in float32: \[\]",
    # Of torch.compile, about a mode that nothing here asks for.
    "torch._inductor.utils": r"Not enough SMs to use max_autotune_gemm mode",
}


class _Dropped(logging.Filter):
    def __init__(self, pattern: str) -> None:
        super().__init__()
        self._pattern = re.compile(pattern)

    def filter(self, record: logging.LogRecord) -> bool:
        return self._pattern.search(record.getMessage()) is None


def install() -> None:
    """From now on, in this process. A second call changes nothing that is seen."""
    for message, category in _WARNINGS:
        warnings.filterwarnings("ignore", message, category)
    for name, pattern in _LOGGED.items():
        logger = logging.getLogger(name)
        if not any(isinstance(known, _Dropped) for known in logger.filters):
            logger.addFilter(_Dropped(pattern))
    # Says at every start on a CPU that an optional kernel for 4-bit inference is missing, which nothing here uses.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
