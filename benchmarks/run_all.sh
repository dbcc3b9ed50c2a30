#!/usr/bin/env bash
# Every benchmark of the operations, one after the other: rows, CSV and plot of each, and the tables of README and docs from them.
#   benchmarks/run_all.sh [--device cuda] [--dtype bfloat16] ...      arguments go to every benchmark
# RESULTS is where results go (benchmarks/results), BENCHES which benchmarks run, OMP_NUM_THREADS how many CPU threads.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-python} results=${RESULTS:-benchmarks/results}
benches=${BENCHES:-roi_align normalized_mse_loss ema_update lars_step sample_box_pairs}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

device=$("$python" -c 'import torch; print("cuda" if torch.cuda.is_available() else "cpu")')
dtype=""
previous=""
for argument in "$@"; do
  [ "$previous" = --device ] && device=$argument
  [ "$previous" = --dtype ] && dtype=_$argument
  previous=$argument
done

mkdir -p "$results"
failed=""
for bench in $benches; do
  arguments=("$@")
  [ "$bench" = sample_box_pairs ] && arguments=(--device cpu) # drawn on the host, whatever the device
  file=$results/${bench}_$device$dtype
  started=$SECONDS
  "$python" "benchmarks/${bench}_bench.py" ${arguments[@]+"${arguments[@]}"} \
    --json "$file.json" --csv "$file.csv" --plot "$file.png" || failed="$failed $bench"
  echo "$bench took $((SECONDS - started)) s"
done
if [ "$device$dtype" = cpu ] && [ "$results" = benchmarks/results ]; then
  "$python" benchmarks/summary.py --write README.md docs/operations.md || failed="$failed summary"
fi
[ -z "$failed" ] || { echo "failed:$failed" >&2; exit 1; }
