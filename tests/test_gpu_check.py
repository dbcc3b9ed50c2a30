"""benchmarks/gpu_check.sh with a played Python: the order of its steps, its limits, what is kept when it is cut off."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import tarfile
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PYTHON = """#!/usr/bin/env bash
# Plays Python: notes its arguments; benchmarks write a row as the harness does, then do as $PLAY says.
[ "$1" = - ] && { cat >/dev/null; exit 0; }
[ "$1" = -c ] && case $2 in *xdist*) exit 1 ;; *) exit 0 ;; esac
echo "${SCRL_FAST_COMMIT:-none} ${SCRL_FAST_BACKEND:-} $*" >>"$CALLS"
rows=; previous=
for argument in "$@"; do [ "$previous" = --json ] && rows=$argument; previous=$argument; done
[ -n "$rows" ] && echo '[{"case": "environment"}]' >"$rows"
case "$PLAY:$*" in
  slow:*ema_update_bench*) sleep 60 ;;
  fails:*lars_step_bench*) exit 1 ;;
esac
exit 0
"""

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")


class Checked:
    def __init__(self, folder: Path) -> None:
        self.out, self.calls = folder / "out", folder / "calls"
        (folder / "python3").write_text(PYTHON)
        (folder / "python3").chmod(0o755)
        path = os.pathsep.join((str(folder), os.environ["PATH"]))  # found under this name: images have no `python`
        self.environment = {**os.environ, "PATH": path, "CALLS": str(self.calls), "DEVICE": "cpu", "PLAY": ""}
        self.environment |= {"SCRL_FAST_COMMIT": "abc1234"}
        for name in ("PYTHON", "WHEELS", "BUDGET", "PYTHONPATH"):
            self.environment.pop(name, None)

    def start(self, call: int, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["bash", ROOT / "benchmarks/gpu_check.sh", str(call), self.out],
            env=self.environment | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def steps(self) -> list[str]:
        return self.calls.read_text().splitlines()

    def packed(self, call: int) -> list[str]:
        with tarfile.open(self.out / f"gpu_check_{call}.tgz") as archive:
            return [Path(name).name for name in archive.getnames()]


@pytest.fixture
def checked(tmp_path: Path) -> Checked:
    return Checked(tmp_path)


@pytest.mark.parametrize("call", [1, 2, 3])
def test_every_call_packs_its_rows_and_names_the_commit(checked: Checked, call: int) -> None:
    process = checked.start(call)
    said, errors = process.communicate()
    assert process.returncode == 0, said + errors
    steps = checked.steps()
    assert all(step.startswith("abc1234 ") for step in steps)
    rows = [Path(word).name for step in steps for word in step.split() if word.endswith(".json")]
    assert rows and set(rows) <= set(checked.packed(call)), "each result file comes back in the archive"
    logs = [name for name in checked.packed(call) if name.endswith(".log")]
    assert len(logs) >= len(rows)


def test_what_is_worth_most_comes_first(checked: Checked) -> None:
    checked.start(1).communicate()
    steps = " ".join(checked.steps())
    places = [steps.index(name) for name in ("build_ext", "roi_align_bench", "lars_step_bench", "ema_update_bench")]
    places += [steps.index("normalized_mse_loss_bench"), steps.index("-m pytest"), steps.index("--dtype float32")]
    assert places == sorted(places), "built, the operations in bfloat16, their tests, then float32"


def test_tests_of_every_kernel_run_there(checked: Checked) -> None:
    """Those that ask for the interpreter alone would be skipped on a GPU; they take `conftest.triton_devices`."""
    checked.start(1).communicate()
    named = " ".join(checked.steps())
    texts = {path.name: path.read_text() for path in (ROOT / "tests").glob("test_*.py") if path != Path(__file__)}
    files = [name for name, text in texts.items() if "triton_devices()" in text]
    assert "test_roi_align_matmul.py" in files
    assert [name for name in files if f"tests/{name}" not in named] == []


def test_a_step_that_fails_costs_only_itself(checked: Checked) -> None:
    process = checked.start(1, PLAY="fails")
    _, errors = process.communicate()
    assert process.returncode == 1 and "bench_lars_step_bfloat16(1)" in errors
    assert any("normalized_mse_loss_bench" in step for step in checked.steps())
    assert "lars_step_cpu_bfloat16.json" in checked.packed(1), "the rows that it had"


def test_the_budget_holds_and_what_has_no_time_is_named(checked: Checked) -> None:
    started = time.monotonic()
    process = checked.start(1, PLAY="slow", BUDGET="8")
    _, errors = process.communicate()
    assert process.returncode == 1 and time.monotonic() - started < 50
    assert "bench_ema_update_bfloat16(124)" in errors and "(no_time)" in errors
    assert "ema_update_cpu_bfloat16.json" in checked.packed(1)


def test_cut_off_from_outside_it_still_packs(checked: Checked) -> None:
    process = checked.start(1, PLAY="slow")
    while not (checked.calls.exists() and any("ema_update_bench" in step for step in checked.steps())):
        time.sleep(0.05)
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)  # what calls the script need not know of its steps
    process.communicate(timeout=20)  # the step itself would take 30 s
    assert {"roi_align_cpu_bfloat16.json", "lars_step_cpu_bfloat16.json"} <= set(checked.packed(1))


def test_every_file_it_names_is_there():
    """pytest ends without a single test where one of its files is missing."""
    lines = re.findall(r"(?:tests|benchmarks)/[\w{},*]+\.(?:py|sh)", (ROOT / "benchmarks/gpu_check.sh").read_text())
    assert len(lines) > 5
    expanded = subprocess.run(["bash", "-c", f"echo {' '.join(lines)}"], cwd=ROOT, capture_output=True, text=True)
    missing = [name for name in expanded.stdout.split() if not (ROOT / name).exists()]
    assert not missing
