#!/usr/bin/env bash
# Everything that needs a GPU, in three calls that follow each other, each of at most nine minutes:
#   benchmarks/gpu_check.sh 1 [FOLDER]   builds; benchmarks of the operations; tests of the operations
#   benchmarks/gpu_check.sh 2 [FOLDER]   tests of training; the step of record; the demo, stopped and resumed
#   benchmarks/gpu_check.sh 3 [FOLDER]   compute-sanitizer; the compiled and the deterministic step; what is left
# What is worth most comes first in each call. A step that fails or runs out of time never stops the next one. FOLDER
# (gpu_check) gets a log of every step, and results/ the rows; call N packs both into FOLDER/gpu_check_N.tgz at its end,
# also when it is cut off by SIGTERM. The last line says what failed, and so does the exit code.
#
# Needs an NVIDIA GPU, a CUDA build of PyTorch, nvcc, a C++ compiler, and setuptools>=77 ninja pybind11 numpy pytest
# hypothesis scikit-image scikit-learn beside torch; for the trainer jsonargparse docstring_parser typeshed_client tqdm,
# too. Without a network, what is missing may lie as wheels in $WHEELS. pytest-xdist, where it is there, runs the tests on $JOBS (8)
# processes. SCRL_FAST_COMMIT names the commit in every row where the tree travels without its .git.
# DEVICE=cpu is a dry run of the same steps on small sizes, to see that each call works within its limits.
# That all fits into the limits on a GPU is an estimate: it has not been run on one yet.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2
call=${1:-}
[[ $call =~ ^[123]$ ]] || { sed -n '2,6p' "$0"; exit 2; }
out=${2:-gpu_check} device=${DEVICE:-cuda} budget=${BUDGET:-540} jobs=${JOBS:-8}
mkdir -p "$out/results" && out=$(cd "$out" && pwd) || exit 2
python=${PYTHON:-$(command -v python3 || command -v python)}
export RESULTS="$out/results" SCRL_FAST_COMMIT=${SCRL_FAST_COMMIT:-$(git rev-parse --short HEAD 2>/dev/null || true)}
[ -n "$SCRL_FAST_COMMIT" ] || unset SCRL_FAST_COMMIT
failed=""

pack() { tar -C "$out" -czf "$out/gpu_check_$call.tgz" --exclude='*.tgz' --exclude=demo --exclude=site . 2>/dev/null; }
child=""
trap '[ -n "$child" ] && kill "$child" 2>/dev/null; pack; exit 143' TERM INT
say() { printf '\n== %s (%d s)\n' "$*" "$SECONDS"; }
step() { # step NAME LIMIT_S COMMAND...: its output goes to the log NAME, its end to the screen
  local name=$1 limit=$2 left=$((budget - SECONDS)) code
  shift 2
  [ "$limit" -gt $left ] && limit=$left
  if [ "$limit" -lt 5 ]; then
    echo "$name: no time left"
    failed="$failed $name(no_time)"
    return 1
  fi
  say "$name"
  timeout --kill-after=10 "$limit" "$@" >"$out/$name.log" 2>&1 &
  child=$!  # bash answers a signal while it waits, not while a command in the foreground runs
  wait "$child"
  code=$?
  child=""
  tail -n 4 "$out/$name.log"
  [ $code -eq 0 ] || { failed="$failed $name($code)"; echo "$name failed with $code, see $out/$name.log"; }
  return $code
}
has() { "$python" -c "import $1" 2>/dev/null; }
tests() { # tests NAME LIMIT_S OPTIONS...: what runs on the CPU is left to CI
  local name=$1 limit=$2 parallel=()
  shift 2
  has xdist && parallel=(-n "$jobs")
  step "$name" "$limit" "$python" -m pytest -q -o addopts= -p no:cacheprovider --continue-on-collection-errors \
    ${parallel[@]+"${parallel[@]}"} "$@"
}

has torch || { echo "gpu_check: $python has no torch" >&2; exit 2; }
if [ "$device" = cuda ]; then
  "$python" - <<'PY' || exit 2
import sys, torch
if torch.version.cuda is None:
    sys.exit(f"gpu_check: torch {torch.__version__} was built without CUDA")
if not torch.cuda.is_available():
    sys.exit("gpu_check: PyTorch finds no CUDA device on this machine; nothing to check here")
print(torch.cuda.get_device_name(), "compute capability", torch.cuda.get_device_capability(), "torch", torch.__version__)
PY
  capability=$("$python" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())')
  export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$capability}
else
  export SCRL_FAST_CUDA=0
fi
if [ -n "${WHEELS:-}" ] && [ ! -d "$out/site" ]; then
  step wheels 60 "$python" -m pip install -q --no-index --no-deps --no-compile --upgrade --target "$out/site" "$WHEELS"/*.whl
fi
[ -d "$out/site" ] && export PYTHONPATH="$out/site${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" SCRL_FAST_EXT=require MAX_JOBS=${MAX_JOBS:-$(nproc)}

# The package from this tree and nothing else. A later call finds the libraries of the first one.
loaded() {
  "$python" - "$device" <<'PY'
import sys

from scrl_fast.ops import _native

reasons = {name: _native.load_failure(name) for name in ("_ops", "_cpu", "_cuda", "_host")}
print({name: reason or "loaded" for name, reason in reasons.items()})
wanted = ("_ops", "_cpu", "_host", *(("_cuda",) if sys.argv[1] == "cuda" else ()))
raise SystemExit(any(reasons[name] for name in wanted))
PY
}
if [ "$call" = 1 ] || ! loaded >/dev/null 2>&1; then
  step build 180 "$python" setup.py -q build_ext --inplace || { pack; exit 1; }
fi
loaded || failed="$failed missing_library"

small=() seconds=15 # a dry run is short
[ "$device" = cpu ] && small=(--repeats 2) seconds=1
operations() { # operations NAME LIMIT_S DTYPE: each benchmark by itself, so that one that fails costs only itself
  local bench limit=$(($2 / 4)) dtype=$3 sizes
  [ "$device" = cpu ] && limit=$((2 * limit)) # two cores take longer to compile the rivals than the rows take
  for bench in roi_align lars_step ema_update normalized_mse_loss; do
    sizes=()
    [ "$device" = cpu ] && case $bench in
      roi_align) sizes=(--batch 2 --channels 64 --pyramid-boxes 4) ;;
      normalized_mse_loss) sizes=(--pairs 4 64) ;;
      *) sizes=(--backbones resnet10_tiny) ;;
    esac
    step "$1_${bench}_$dtype" "$limit" "$python" "benchmarks/${bench}_bench.py" --device "$device" --dtype "$dtype" \
      --seconds 0.5 ${small[@]+"${small[@]}"} ${sizes[@]+"${sizes[@]}"} --json "$RESULTS/${bench}_${device}_$dtype.json" \
      --csv "$RESULTS/${bench}_${device}_$dtype.csv" --plot "$RESULTS/${bench}_${device}_$dtype.png"
  done
}
train_step() { # train_step NAME LIMIT_S OPTIONS...
  local name=$1 limit=$2 file=$RESULTS/${1#bench_}_${device}_bfloat16
  local sizes=(--batch 256)
  shift 2
  [ "$device" = cpu ] && sizes=(--batch 4 --backbone resnet18 --size 64)
  step "$name" "$limit" "$python" benchmarks/step_bench.py --device "$device" --dtype bfloat16 --seconds $seconds \
    "${sizes[@]}" "$@" --json "$file.json" --csv "$file.csv" --plot "$file.png"
}

case $call in
  1)
    step info 30 "$python" -m scrl_fast.info
    operations bench 120 bfloat16
    tests tests_of_operations 180 -k "$([ "$device" = cuda ] && echo 'not cpu-' || echo 'cpu-native and bits')" \
      tests/test_{roi_align,normalized_mse_loss,ema_update,lars_step}*.py \
      tests/test_{augment_views_triton,sync_batch_norm_triton,backends,optim,cuda_graphs}.py
    operations bench 100 float32
    ;;
  2)
    for package in jsonargparse tqdm; do
      has $package || { echo "$package is missing: nothing of training can run"; failed="$failed no_$package"; }
    done
    train_step bench_step 150
    export CUBLAS_WORKSPACE_CONFIG=:4096:8
    tests tests_of_training 120 tests/test_{trainer_gpu,data_gpu,data_to_device}.py
    unset CUBLAS_WORKSPACE_CONFIG
    rm -rf "$out/demo" # the whole path from pictures to a checkpoint, then on from there
    step train_demo 60 "$python" -m scrl_fast.train --config demo --train.device="$device" --train.max_steps=8 \
      --run.dir="$out/demo" &&
      step resume_demo 60 "$python" -m scrl_fast.train --resume="$out/demo" --train.device="$device" --train.max_steps=12
    step bench_input 90 "$python" benchmarks/input_bench.py --device "$device" --seconds 0.5 \
      --json "$RESULTS/input_$device.json" --csv "$RESULTS/input_$device.csv" --plot "$RESULTS/input_$device.png"
    ;;
  3)
    # Slow, so only some tests: clean memory, empty input, the same bits. Without the allocator's cache, so that the end
    # of every tensor is the end of an allocation.
    sanitizer=$(command -v compute-sanitizer || ls "${CUDA_HOME:-/usr/local/cuda}"/bin/compute-sanitizer 2>/dev/null)
    if [ -n "$sanitizer" ] && [ "$device" = cuda ]; then
      for tool in memcheck racecheck; do
        for backend in native triton; do
          step "check_${tool}_$backend" 45 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$sanitizer" --tool "$tool" \
            --error-exitcode 99 --target-processes all "$python" -m pytest -q -o addopts= -x -p no:cacheprovider \
            tests/test_{roi_align,normalized_mse_loss,ema_update,lars_step}*.py \
            -k "cuda-$backend and (own or empty or bits)"
        done
      done
    else
      echo "compute-sanitizer was not run"
      [ "$device" = cuda ] && failed="$failed no_compute_sanitizer"
    fi
    [ "$device" = cuda ] && train_step bench_step_compiled 150 --compile --rival-batch 0
    train_step bench_step_deterministic 80 --deterministic --rival-batch 0
    # torchvision's deterministic path: what memory it takes. It compiles itself, so last.
    [ "$device" = cuda ] && step rival_deterministic 60 "$python" benchmarks/roi_align_bench.py --device cuda \
      --dtype float32 --deterministic --batch 128 --boxes 10 --layout nchw --only record --seconds 0.2 \
      --json "$RESULTS/roi_align_deterministic.json"
    ;;
esac

pack
say "results are in $out, packed in gpu_check_$call.tgz"
[ -z "$failed" ] && echo "all green" && exit 0
echo "failed:$failed" >&2
exit 1
