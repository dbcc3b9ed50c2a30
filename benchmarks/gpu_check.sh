#!/usr/bin/env bash
# Everything that needs a GPU: builds for it, runs the operations' and the trainer's tests there, times the training step,
# trains the demo, takes every benchmark of the operations, runs them under compute-sanitizer. Every step has a limit and
# all together stop after ten minutes; what comes first matters most. That all fits into them is an estimate, it has not
# been run on a GPU yet.
# Needs an NVIDIA GPU, a CUDA build of PyTorch, nvcc, a C++ compiler, and setuptools>=77 ninja pybind11 numpy pytest
# hypothesis scikit-image beside torch; for the trainer jsonargparse, too. Without a network, what is missing may lie as
# wheels in $WHEELS.
#   benchmarks/gpu_check.sh [FOLDER]      where results and logs go (gpu_check)
#   ONLY='build|test|demo|check_' benchmarks/gpu_check.sh      only steps whose names match: what must be right, and then
#   ONLY='build|bench|rival' benchmarks/gpu_check.sh           what is measured, with ten minutes for each: where
# steps take all that they may, the operations in float32 and what stands behind them get none.
# Goes on after a failure; the last lines say what failed, and so does the exit code.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2
out=${1:-gpu_check}
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 2
python=${PYTHON:-python}
failed=""

say() { printf '\n== %s (%d s)\n' "$*" "$SECONDS"; }
step() { # step NAME LIMIT_S COMMAND...: its output goes to the log NAME, its end to the screen
  local name=$1 limit=$2
  shift 2
  [[ $name =~ ${ONLY:-.} ]] || return 0
  local left=$((590 - SECONDS))
  [ "$limit" -gt $left ] && limit=$left
  if [ "$limit" -lt 5 ]; then
    echo "$name: no time left"
    failed="$failed $name(no_time)"
    return 1
  fi
  say "$name"
  timeout --kill-after=10 "$limit" "$@" >"$out/$name.log" 2>&1
  local code=$?
  tail -n 4 "$out/$name.log"
  [ $code -eq 0 ] || { failed="$failed $name($code)"; echo "$name failed with $code, see $out/$name.log"; }
  return $code
}

"$python" -c 'import torch' 2>/dev/null || { echo "gpu_check: $python has no torch" >&2; exit 2; }
"$python" - <<'PY' || exit 2
import sys, torch
if torch.version.cuda is None:
    sys.exit(f"gpu_check: torch {torch.__version__} was built without CUDA")
if not torch.cuda.is_available():
    sys.exit("gpu_check: PyTorch finds no CUDA device on this machine; nothing to check here")
print(torch.cuda.get_device_name(), "compute capability", torch.cuda.get_device_capability(), "torch", torch.__version__)
PY

if [ -n "${WHEELS:-}" ]; then
  ONLY='' step wheels 60 "$python" -m pip install -q --no-index --no-deps --upgrade --target "$out/site" "$WHEELS"/*.whl
  export PYTHONPATH="$out/site${PYTHONPATH:+:$PYTHONPATH}"
fi
# The package from this tree and nothing else: packages that this machine lacks are left out, with what needs them.
capability=$("$python" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())')
export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$capability} SCRL_FAST_EXT=require MAX_JOBS=${MAX_JOBS:-$(nproc)}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
if ! step build 180 "$python" -m pip install --no-build-isolation --no-deps -e .; then
  failed=${failed%" build("*} # without pip, or with an older setuptools than an installation wants
  step build_in_place 180 "$python" setup.py -q build_ext --inplace || exit 1
fi
step info 30 "$python" -m scrl_fast.info
"$python" - <<'PY' || failed="$failed missing_library"
from scrl_fast import _native
reasons = {name: _native.load_failure(name) for name in ("_ops", "_cpu", "_cuda", "_host")}
print({name: reason or "loaded" for name, reason in reasons.items()})
raise SystemExit(bool(reasons["_cuda"]))
PY

# What runs on the CPU is left to CI.
step tests_of_operations 150 "$python" -m pytest -q -p no:cacheprovider --continue-on-collection-errors -k "not cpu-" \
  tests/test_{roi_align,normalized_mse_loss,ema_update,lars_step}*.py \
  tests/test_{augment_views_triton,backends,optim,cuda_graphs}.py
if "$python" -c "import jsonargparse" 2>/dev/null; then
  step tests_of_training 100 env CUBLAS_WORKSPACE_CONFIG=:4096:8 "$python" -m pytest -q -p no:cacheprovider \
    tests/test_{trainer_gpu,data_gpu,data_transfer}.py

  # The step of record beside its floor and the plain one, then compiled; what train.deterministic costs.
  step_bench() { # step_bench NAME LIMIT_S OPTIONS...
    local name=$1 limit=$2 file=$out/results/${1#bench_}_cuda_bfloat16
    shift 2
    step "$name" "$limit" "$python" benchmarks/step_bench.py --device cuda --dtype bfloat16 --batch 256 --seconds 15 \
      "$@" --json "$file.json" --csv "$file.csv" --plot "$file.png"
  }
  step_bench bench_step 120

  # The whole path from pictures to a checkpoint, then on from there, on the GPU.
  [[ train_demo =~ ${ONLY:-.} ]] && rm -rf "$out/demo" # of an earlier check
  step train_demo 60 "$python" -m scrl_fast.train --config demo --train.device=cuda --train.max_steps=8 \
    --run.dir="$out/demo" &&
    step resume_demo 60 "$python" -m scrl_fast.train --resume="$out/demo" --train.device=cuda --train.max_steps=12
else
  echo "jsonargparse is missing: the trainer was neither tested nor timed"
  failed="$failed no_jsonargparse"
fi

export RESULTS="$out/results"
bench_operations() { # bench_operations DTYPE
  step "bench_operations_$1" 80 benchmarks/run_all.sh --device cuda --dtype "$1" --seconds 0.5
}
bench_operations bfloat16

# Slow, so only some tests: clean memory, empty input, the same bits. Without the allocator's cache, so that the end of
# every tensor is the end of an allocation.
sanitizer=$(command -v compute-sanitizer || ls "${CUDA_HOME:-/usr/local/cuda}"/bin/compute-sanitizer 2>/dev/null)
if [ -n "$sanitizer" ]; then
  for tool in memcheck racecheck; do
    for backend in native triton; do
      step "check_${tool}_$backend" 40 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$sanitizer" --tool "$tool" --error-exitcode 99 \
        --target-processes all "$python" -m pytest -q -x -p no:cacheprovider \
        tests/test_{roi_align,normalized_mse_loss,ema_update,lars_step}*.py \
        -k "cuda-$backend and (own or empty or bits)"
    done
  done
else
  echo "compute-sanitizer is not here: memcheck and racecheck were not run"
  failed="$failed no_compute_sanitizer"
fi

if "$python" -c "import jsonargparse" 2>/dev/null; then
  step_bench bench_step_compiled 150 --compile --rival-batch 0
  step_bench bench_step_deterministic 60 --deterministic --rival-batch 0
fi
bench_operations float32

# torchvision's deterministic path: what memory it takes. It compiles itself, so last.
step rival_deterministic 60 "$python" benchmarks/roi_align_bench.py --device cuda --dtype float32 --deterministic \
  --batch 128 --boxes 10 --layout nchw --only record --seconds 0.2 --json "$RESULTS/roi_align_deterministic.json"

say "results are in $out"
[ -z "$failed" ] && echo "all green" && exit 0
echo "failed:$failed" >&2
exit 1
