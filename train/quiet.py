"""What other libraries say at every start and nobody can act on does not reach the terminal. Standard library only.

Each notice is named by its speaker and its words; whatever else the same library says is heard.
"""

from __future__ import annotations

import logging
import re
import warnings

_LOGGED = {  # logger: words
    # The image processors of pipelines that nothing here uses; Pillow's are taken, as everywhere in this project.
    "transformers.utils.import_utils": r"requires torchvision \(not installed\); falling back",
    # A list of modules to be kept in float32 that is empty.
    "diffusers.models.modeling_utils": r"should be kept in float32: \[\]",
}
_WARNED = (
    # The number of workers is the config's; machines with few cores are warned of at each of them.
    r"This DataLoader will create \d+ worker processes",
    r"'pin_memory' argument is set as true but no accelerator is found",
)


def hush() -> None:
    """Leave the known notices out, before or after their libraries are imported. A second call does nothing."""
    for name, words in _LOGGED.items():
        logger = logging.getLogger(name)
        if not any(isinstance(one, _Without) for one in logger.filters):
            logger.addFilter(_Without(words))
    for words in _WARNED:
        warnings.filterwarnings("ignore", message=words, category=UserWarning)
    # Says at every start on a CPU that an optional kernel for 4-bit inference is missing, which nothing here uses.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


class _Without(logging.Filter):
    """Lets every record pass but those that hold the words."""

    def __init__(self, words: str) -> None:
        super().__init__()
        self._words = re.compile(words)

    def filter(self, record: logging.LogRecord) -> bool:
        return self._words.search(record.getMessage()) is None
