"""What a stage will do and cost, before anything is spent: updates, learning rates, memory, disk, time. No torch."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from train import memory, schedule
from train.buckets import make_buckets
from train.checkpointing_modes import MODE_OF_STEPS
from train.config import StageConfig, config_hash
from train.exits import ExitCode, Halt
from train.memory import GIB, Choice, Setup
from train.plan import Plan, merge_small_buckets, tiles_per_update
from train.tools.plan_machines import IMPLIED_BY_CARD, Gpu, Speed, find_gpu, find_speed
