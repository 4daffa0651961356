#!/usr/bin/env bash
# On a machine with a CUDA device, each under 8 minutes; results go to $OUT (default: runs/gpu).
#
#   bash benchmarks/gpu.sh           every claim of speed, correctness first: the tests with real
#                                    kernels, the same inputs 200 times, the losses against their
#                                    peers, a RetinaNet-R50 training step with each, plots, and the
#                                    verdicts. Needs torch, triton, numpy, pytest, pytest-timeout and
#                                    hypothesis; torchvision for the step, matplotlib for the plots,
#                                    pytest-xdist for speed. What fails is noted and the rest goes
#                                    on; the exit status is 1 if anything failed. Rows that $OUT has
#                                    already, of this code on this machine, are not measured again;
#                                    EARLIER names a folder to take such rows from.
#   bash benchmarks/gpu.sh tune      which grid suits each pass of GHM-C; a minute
#   bash benchmarks/gpu.sh train     the study of all methods, on the blood cells under BCCD_ROOT and
#                                    on digits, six trainings at a time; options of benchmarks.study
#                                    may follow, such as --jobs 4 or --only bins. Needs torchvision,
#                                    faster-coco-eval, scikit-learn, matplotlib, pillow, tqdm and
#                                    pyyaml as well. Runs already in $OUT/study.jsonl or
#                                    benchmarks/results/study.jsonl are not repeated: call it until
#                                    nothing is left.
set -euo pipefail
cd "$(dirname "$0")/.."

OUT=${OUT:-runs/gpu}
PYTHON=${PYTHON:-python3}
BUDGET=${BUDGET:-465} # seconds for everything
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
  cp -n benchmarks/results/study.jsonl "$OUT/" 2>/dev/null || true
  timeout -k 5 465 "$PYTHON" -m benchmarks.study benchmarks/study/grids/gpu.yaml --seconds 440 \
    --jobs 6 --out "$OUT/study.jsonl" "${@:2}" 2>&1 | tee -a "$OUT/study.txt"
  exit
fi

if [ "${1:-kernels}" = tune ]; then
  timeout 300 "$PYTHON" -m benchmarks.tune --out "$OUT/tune.jsonl" 2>&1 | tee "$OUT/tune.txt"
  exit
fi

if [ -n "${EARLIER:-}" ]; then
  cp -n "$EARLIER"/{losses,repeat,step}.jsonl "$OUT/" 2>/dev/null || true
fi
outcome=""

# left RESERVE: the seconds that remain, less those that later stages need; at least 1.
left() {
  local remain=$((BUDGET - SECONDS - $1))
  echo $((remain > 1 ? remain : 1))
}

# stage NAME SECONDS LOG COMMAND...: a command that may fail or run out of time.
stage() {
  local name=$1 limit=$2 log=$3 start=$SECONDS status=0
  shift 3
  echo "== $name, at most $limit s"
  timeout -k 5 "$limit" "$@" 2>&1 | tee -a "$OUT/$log" || status=$?
  case $status in
    0) outcome+="$name: passed" ;;
    124 | 137) outcome+="$name: OUT OF TIME" ;;
    *) outcome+="$name: FAILED ($status)" ;;
  esac
  outcome+=" after $((SECONDS - start)) s"$'\n'
  return "$status"
}

workers=$("$PYTHON" -c 'import xdist; print("-n 12")' 2>/dev/null || true)
# shellcheck disable=SC2086 # -n 12 are two words
stage tests 150 tests.log "$PYTHON" -m pytest -q -p no:cacheprovider $workers \
  -m "kernels or gpu" tests/ghm_triton tests/benchmarks/test_timing.py \
  --ignore=tests/ghm_triton/detection --ignore=tests/ghm_triton/integrations \
  --ignore=tests/ghm_triton/test_demo.py --continue-on-collection-errors || true

stage repeat 50 log.txt "$PYTHON" -m benchmarks.repeat --device cuda --limit 35 \
  --out "$OUT/repeat.jsonl" || true

# 75: a loss spoiled the device, and a new process goes on without it.
for _ in 1 2 3 4; do
  status=0
  stage losses "$(left 115)" log.txt "$PYTHON" -m benchmarks.losses --device cuda \
    --limit "$(left 130)" --out "$OUT/losses.jsonl" || status=$?
  [ "$status" = 75 ] || break
done

stage step "$(left 25)" log.txt "$PYTHON" -m benchmarks.step --device cuda \
  --limit "$(left 30)" --out "$OUT/step.jsonl" || true

stage plots 15 log.txt "$PYTHON" -m benchmarks.plot_losses "$OUT/losses.jsonl" --out "$OUT" || true

files=()
for name in losses step repeat; do
  [ -e "$OUT/$name.jsonl" ] && files+=("$OUT/$name.jsonl")
done
stage claims 15 log.txt "$PYTHON" -m benchmarks.claims "${files[@]}" \
  --device cuda --out "$OUT/claims.jsonl" || true
printf '%s' "$outcome" | tee -a "$OUT/log.txt"
[[ $outcome != *FAILED* && $outcome != *"OUT OF TIME"* ]]
