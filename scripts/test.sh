#!/usr/bin/env bash
# Lint, types and tests. Without arguments: all but the slow tests. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/install.sh dev
# More OpenMP threads than idle cores turn a 0.2 s step into 10 s.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 WANDB_MODE=offline
.venv/bin/ruff check train scripts tests
.venv/bin/mypy
if [ "$#" -eq 0 ]; then
  set -- -m "not slow and not gpu"
fi
# Two test processes, a file to one of them; `-n 0` after it runs all in this process, as a debugger wants.
exec .venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=40 --durations-min=8 "$@"
