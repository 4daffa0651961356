#!/usr/bin/env bash
# Correctness with real kernels, then the benchmarks, on a machine with a CUDA device: under 8
# minutes. Nothing needs to be installed but torch, triton, numpy, pytest, pytest-timeout and
# hypothesis. Results go to $OUT (default: runs/gpu).
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

workers=$("$PYTHON" -c 'import xdist; print("-n 8")' 2>/dev/null || true)
# shellcheck disable=SC2086 # -n 8 are two words
timeout 270 "$PYTHON" -m pytest -q -p no:cacheprovider $workers \
  --ignore=tests/ghm_triton/ops/test_compile.py \
  tests/ghm_triton/ops tests/ghm_triton/reference \
  tests/ghm_triton/test_{backend,density,functional,inputs,losses,schedule}.py \
  2>&1 | tee "$OUT/tests.log"

timeout 190 "$PYTHON" -m benchmarks.losses --device cuda --out "$OUT/losses.jsonl" \
  2>&1 | tee "$OUT/losses.txt"
