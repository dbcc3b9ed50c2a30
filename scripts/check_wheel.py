"""Checks of a wheel: what it holds (``check_wheel.py WHEEL``), and that its compiled libraries run (no argument).

Without an argument the installed package is checked: it must not come from a source tree, every library for the CPU
must load, and one operation of each must give what plain PyTorch or NumPy gives.
"""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

LARGEST = 8_000_000  # bytes: CPU libraries without debug symbols take 2 MB, and a wheel of them 1.4 MB
LIBRARIES = ("_ops.abi3", "_cpu.abi3", "_host.")
SOURCES = (".cpp", ".cu", ".cuh", ".h", ".o", ".whl")


def check_content(wheel: Path) -> None:
    """Nothing lies outside the package, no library is missing, and none carries debug symbols."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if not name.endswith("/")]
        folders = {name.split("/")[0] for name in names if ".dist-info/" not in name}
        assert folders == {"scrl_fast"}, f"outside the package: {sorted(folders - {'scrl_fast'})}"
        assert not [name for name in names if name.endswith(SOURCES)], "sources in the wheel"
        assert "scrl_fast/kernels/roi_align.py" in names, "no Triton kernels"
        compiled = {name.removeprefix("scrl_fast/"): archive.read(name) for name in names if name.endswith(".so")}
    for library in LIBRARIES:
        assert any(name.startswith(library) for name in compiled), f"{library} is missing; there are {list(compiled)}"
    assert len(compiled) == len(LIBRARIES), f"other libraries: {list(compiled)}"
    with_symbols = [name for name, data in compiled.items() if b".debug_info" in data]
    assert not with_symbols, f"debug symbols in {with_symbols}"
    assert wheel.stat().st_size < LARGEST, f"{wheel.stat().st_size} bytes"
    print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.2f} MB, {len(names)} files, {', '.join(compiled)}")


def check_installed() -> None:
    """Every library of the CPU loads, and one operation of each gives what its reference gives."""
    import numpy as np
    import torch

    import scrl_fast
    from scrl_fast import ops
    from scrl_fast.ops import _native

    folder = Path(scrl_fast.__file__).parent
    assert not (folder.parent / "setup.py").exists(), f"{folder} is a source tree, not an installed wheel"
    for library in ("_ops", "_cpu", "_host"):
        assert not (why := _native.load_failure(library)), f"{library}: {why}"
    torch.manual_seed(0)
    features, boxes = torch.randn(2, 8, 16, 16), torch.tensor([[0, 1.5, 2, 11, 9], [1, 0, 0, 15, 15]])
    pooled, expected = (ops.roi_align(features, boxes, 7, backend=backend) for backend in ("native", "reference"))
    torch.testing.assert_close(pooled, expected)
    crops = np.array([[0, 0, 100, 100, 0], [20, 10, 90, 80, 1]], np.int64)
    drawn = [
        ops.sample_box_pairs(crops, crops[::-1], view_size=96, seed=1, step=2, backend=backend)
        for backend in ("native", "reference")
    ]
    for native, reference in zip(*drawn, strict=True):
        assert len(native) and np.allclose(native, reference), "sample_box_pairs differs from its reference"
    capability = torch.backends.cpu.get_cpu_capability()
    print(f"{folder}: libraries run under torch {torch.__version__}, {capability}, Python {sys.version.split()[0]}")


if __name__ == "__main__":
    if sys.argv[1:]:
        for path in sys.argv[1:]:
            check_content(Path(path))
    else:
        check_installed()
