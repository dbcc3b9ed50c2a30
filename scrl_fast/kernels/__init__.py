"""The Triton kernels, from the checkout's top-level folder ``kernels/``.

A wheel holds the kernels in this place. A checkout, installed in editable mode or not at all, finds them from here.
"""

from pathlib import Path

__path__.append(str(Path(__file__).resolve().parents[2] / "kernels"))
