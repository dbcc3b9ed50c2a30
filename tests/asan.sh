#!/usr/bin/env bash
# The compiled operations under AddressSanitizer and UBSan: builds a copy of the package in build/asan, then runs the
# operations' tests against it. Tensors come from the sanitizer's allocator, so reading one element beyond any of them
# stops the run with file and line. Arguments go to pytest: tests/asan.sh tests/test_roi_align.py -k backward
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD copy=$PWD/build/asan
python=${PYTHON:-python} cxx=${CXX:-g++}

mkdir -p "$copy/scrl_fast"
for part in csrc kernels setup.py build_backend.py pyproject.toml README.md; do ln -sfn "$root/$part" "$copy/$part"; done
for part in scrl_fast/*; do
  case $part in *.so | *_build_info.json | *__pycache__) ;; *) ln -sfn "$root/$part" "$copy/$part" ;; esac
done
ln -sfn "$root/kernels" "$copy/scrl_fast/kernels"

# One instruction set, the processor's own, is enough: multiversioned functions are one source. The vptr check wants type
# information across libraries.
sanitize="-fsanitize=address,undefined -fno-sanitize=vptr -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g1 -march=native"
(
  cd "$copy"
  CFLAGS="$sanitize -DSCRL_NO_MULTIVERSION" LDFLAGS="$sanitize" SCRL_FAST_CUDA=0 SCRL_FAST_EXT=require \
    "$python" setup.py -q build_ext --inplace
)

library() { "$cxx" -print-file-name="$1"; }
export LD_PRELOAD="$(library libasan.so) $(library libubsan.so) $(library libstdc++.so.6)"
export ASAN_OPTIONS="detect_leaks=0:abort_on_error=0${ASAN_OPTIONS:+:$ASAN_OPTIONS}" # Python leaks at exit by design
export UBSAN_OPTIONS="print_stacktrace=1${UBSAN_OPTIONS:+:$UBSAN_OPTIONS}"
export PYTHONPATH="$copy${PYTHONPATH:+:$PYTHONPATH}"
if [ $# -eq 0 ]; then
  for operation in roi_align normalized_mse_loss ema_update lars_step sample_box_pairs augment_views ops; do
    set -- "$@" $(ls tests/test_${operation}*.py 2>/dev/null)
  done
fi
cd "$copy" # python puts the working directory before PYTHONPATH
"$python" -c "from scrl_fast.ops import _native; assert 'asan' in str(_native._FOLDER), _native._FOLDER
for library in ('_ops', '_cpu', '_host'): assert not _native.load_failure(library), _native.load_failure(library)"
# what compiles or interprets other code is slow here and runs none of ours
exec "$python" -m pytest -p no:cacheprovider --rootdir "$root" \
  -k "not triton and not compiles and not opcheck" "${@/#tests/$root/tests}"
