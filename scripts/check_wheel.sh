#!/usr/bin/env bash
# Source distribution -> wheel, compiled in a clean folder -> its libraries loaded from elsewhere, one operation of each.
# Wants torch and the package `build` in $PYTHON's environment. KEEP=DIR: leave both distributions there.
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD python=${PYTHON:-python} made=$(mktemp -d)
trap 'rm -rf "$made"' EXIT

"$python" -m build -q --sdist --outdir "$made/dist" "$root"
cd "$made"
SCRL_FAST_CUDA=0 SCRL_FAST_EXT=require "$python" -m pip wheel -q --no-deps --wheel-dir "$made/dist" "$made"/dist/*.tar.gz
"$python" "$root/scripts/check_wheel.py" "$made"/dist/*.whl
"$python" -m pip install -q --no-deps --target "$made/site" "$made"/dist/*.whl
cp "$root/scripts/check_wheel.py" "$made/check_wheel.py"
PYTHONPATH="$made/site" "$python" "$made/check_wheel.py"
if [ -n "${KEEP:-}" ]; then mkdir -p "$KEEP" && cp "$made"/dist/* "$KEEP"; fi
