"""Other libraries' idle notices stay out of the terminal, their other messages do not."""

from __future__ import annotations

import logging
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from train.quiet import hush

ROOT = Path(__file__).resolve().parents[1]
IDLE = [
    ("transformers.utils.import_utils", "`CLIPImageProcessor` requires torchvision (not installed); falling back to `X`"),
    ("diffusers.models.modeling_utils", "There are modules in AutoencoderKL that should be kept in float32: []. Casting"),
]
TELLING = [
    ("transformers.utils.import_utils", "`X` requires the package y"),
    ("diffusers.models.modeling_utils", "There are modules in AutoencoderKL that should be kept in float32: ['norm']. Casting"),
]


def test_known_notices_alone_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    hush()
    hush()
    for name, message in [*IDLE, *TELLING]:
        logger = logging.getLogger(name)
        logger.addHandler(caplog.handler)  # the libraries' own loggers do not pass on to the root
        logger.warning(message)
        logger.removeHandler(caplog.handler)
    assert {record.getMessage() for record in caplog.records} == {message for _, message in TELLING}


def test_warnings_too() -> None:
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        hush()
        warnings.warn("This DataLoader will create 4 worker processes in total. Our suggested max number", stacklevel=1)
        warnings.warn("something else about the DataLoader", stacklevel=1)
    assert [str(one.message) for one in heard] == ["something else about the DataLoader"]


@pytest.mark.slow
def test_importing_the_pipelines_says_nothing() -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from train.exits import log_to_stderr; log_to_stderr()\n"
        "import bitsandbytes\nfrom diffusers import StableDiffusionXLPipeline\n"
        "from transformers import CLIPImageProcessor"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
