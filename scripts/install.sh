#!/usr/bin/env bash
# Makes .venv and installs the project into it; does nothing when that is already up to date.
# usage: scripts/install.sh [extra,extra...]      (default: no extras)
set -euo pipefail
cd "$(dirname "$0")/.."
extras="${1:-}"
want="$(cat pyproject.toml constraints.txt | sha256sum | cut -d' ' -f1) ${extras}"
if [ -x .venv/bin/python ] && [ "$(cat .venv/.installed 2>/dev/null)" = "$want" ]; then
  exit 0
fi
python=""
for candidate in python3.12 python3.11 python3; do
  if command -v "$candidate" >/dev/null 2>&1 &&
    "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    python="$candidate"
    break
  fi
done
[ -n "$python" ] || { echo "error: Python 3.11 or newer is needed" >&2; exit 2; }
echo "installing into .venv with $python (2-3 minutes)" >&2
[ -x .venv/bin/python ] || "$python" -m venv .venv
.venv/bin/python -m pip install --quiet --disable-pip-version-check -e ".${extras:+[$extras]}" -c constraints.txt
echo "$want" > .venv/.installed
