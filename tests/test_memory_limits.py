"""What a process may allocate: the least of the machine's memory, its control groups' and its own limits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from scrl_fast import ops
from scrl_fast.ops import _arguments

GIB = 1 << 30


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.mark.parametrize(
    ("membership", "files", "limits"),
    [
        ("0::/job/task\n", {"job/memory.max": "max\n", "job/task/memory.max": f"{GIB}\n"}, [GIB]),
        ("0::/job/task\n", {"job/memory.max": f"{GIB}\n", "memory.max": f"{3 * GIB}\n"}, [GIB, 3 * GIB]),
        ("5:cpu,memory:/job\n3:cpuset:/\n", {"memory/job/memory.limit_in_bytes": f"{GIB}\n"}, [GIB]),
        ("0::/\n", {"memory.max": "max\n"}, []),
        ("garbage\n", {}, []),
    ],
)
def test_control_groups_of_both_versions(tmp_path, membership, files, limits):
    write(tmp_path / "cgroup", membership)
    for name, text in files.items():
        write(tmp_path / "mounted" / name, text)
    assert list(_arguments._group_limits(str(tmp_path / "cgroup"), str(tmp_path / "mounted"))) == limits
    assert list(_arguments._group_limits(str(tmp_path / "nothing"), str(tmp_path))) == []


def test_limits_of_the_process():
    resource = pytest.importorskip("resource")
    before, limit = resource.getrlimit(resource.RLIMIT_DATA), 1 << 42  # more than the process has
    if resource.RLIM_INFINITY != before[1] < limit:
        pytest.skip("a hard limit is lower")
    resource.setrlimit(resource.RLIMIT_DATA, (limit, before[1]))
    try:
        assert limit in _arguments._process_limits()
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def test_what_is_beyond_the_limit_is_refused(monkeypatch):
    _arguments._memory.cache_clear()
    monkeypatch.setattr(_arguments, "_process_limits", lambda: [GIB])
    try:
        with pytest.raises(ValueError, match="bytes are more than memory holds"):
            _arguments.check_room("views", GIB, 4)
    finally:
        _arguments._memory.cache_clear()


def test_tracing_is_no_allocation():
    boxes = torch.tensor([[0.0, 0, 0, 4, 4]])
    traced = torch.jit.trace(lambda features: ops.roi_align(features, boxes, 2), torch.ones(1, 3, 4, 4))
    assert traced(torch.ones(1, 3, 8, 8)).shape == (1, 3, 2, 2)
