#!/usr/bin/env bash
# On a machine with a CUDA device, each under 8 minutes; results go to $OUT (default: runs/gpu).
#
#   bash benchmarks/gpu.sh           correctness with real kernels, then the losses against their
#                                    peers; needs torch, triton, numpy, pytest, pytest-timeout and
#                                    hypothesis
#   bash benchmarks/gpu.sh train     the blood cells under BCCD_ROOT, to convergence; needs
#                                    torchvision, faster-coco-eval, pillow and tqdm as well. Runs
#                                    already in benchmarks/results/bccd.jsonl are not repeated.
set -euo pipefail
cd "$(dirname "$0")/.."

OUT=${OUT:-runs/gpu}
PYTHON=${PYTHON:-python3}
mkdir -p "$OUT"
export PYTHONPATH=. PYTHONUNBUFFERED=1
unset TRITON_INTERPRET

"$PYTHON" - <<'PYTHON'
import sys, torch
if not torch.cuda.is_available():
    sys.exit("no CUDA device: the kernels' tests run in the interpreter with `make test`")
print(torch.cuda.get_device_name(), "torch", torch.__version__)
PYTHON

if [ "${1:-kernels}" = train ]; then
  cp benchmarks/results/bccd.jsonl "$OUT/" 2>/dev/null || true
  timeout 460 "$PYTHON" -m benchmarks.strength --data "voc:$BCCD_ROOT" --train-split trainval \
    --image-size 256x320 --channels 96 --flips 0.5 --batch-size 8 --steps 3000 --seeds 0 1 2 \
    --settings "strength 0.25, falling to 0" "focal + smooth L1" "strength 0.25" \
    --out "$OUT/bccd.jsonl" 2>&1 | tee "$OUT/bccd.txt"
  exit
fi

workers=$("$PYTHON" -c 'import xdist; print("-n 8")' 2>/dev/null || true)
# shellcheck disable=SC2086 # -n 8 are two words
timeout 270 "$PYTHON" -m pytest -q -p no:cacheprovider $workers \
  --ignore=tests/ghm_triton/ops/test_compile.py \
  tests/ghm_triton/functional tests/ghm_triton/ops tests/ghm_triton/reference \
  tests/ghm_triton/test_{backend,density,inputs,losses,schedule}.py \
  2>&1 | tee "$OUT/tests.log"

timeout 190 "$PYTHON" -m benchmarks.losses --device cuda --out "$OUT/losses.jsonl" \
  2>&1 | tee "$OUT/losses.txt"
