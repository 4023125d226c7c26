#!/usr/bin/env bash
# The whole recipe on a laptop CPU: draws a tiny world, prepares it, trains the three stages, samples. Safe to run again.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/install.sh
# Two processes of one thread each: the tiny model's operations are too small to share among threads.
processes=$(getconf _NPROCESSORS_ONLN | awk '{print ($1 > 1) ? 2 : 1}')
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
python=.venv/bin/python
started=$(date +%s)

$python scripts/tiny_world.py --out data/tiny_world
if [ -f runs/tiny/ft2/DONE ]; then
  echo "All three stages are already trained; nothing to do. Delete runs/tiny to train again."
else
  $python scripts/prepare.py all --config configs/tiny/dataset.yaml
  $python scripts/recipe.py --configs configs/tiny/pretrain.yaml configs/tiny/ft1.yaml configs/tiny/ft2.yaml \
    --processes "$processes"
fi
if [ ! -f runs/tiny/samples/grid.png ]; then
  $python scripts/sample.py --model runs/tiny/ft2/model --prompts configs/tiny/prompts.yaml --out runs/tiny/samples
fi
$python scripts/report.py runs/tiny/pretrain runs/tiny/ft1 runs/tiny/ft2 --out runs/tiny/report.html
$python scripts/tiny_world.py --summary runs/tiny
echo
echo "samples  runs/tiny/samples/grid.png"
echo "report   runs/tiny/report.html   (open it in a browser: the base and every stage side by side, held-out loss, curves)"
echo "dataset  data/tiny/report.html   (pictures and captions to search and to correct)"
echo "model    runs/tiny/ft2/model   (diffusers folder)"
echo "         runs/tiny/ft2/ft2.safetensors   (single file)"
echo "took     $(($(date +%s) - started)) s, install not counted"
