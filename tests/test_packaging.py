"""What is installed: the source distribution is complete, and the Triton kernels are found from every kind of install.

Nothing is compiled here, and nothing is fetched: the build backend's hooks are called as pip calls them.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(importlib.util.find_spec("setuptools") is None, reason="no setuptools")
GENERATED = {"PKG-INFO", "setup.cfg"}


def tracked() -> set[str]:
    git = shutil.which("git")
    listed = subprocess.run([git or "false", "ls-files", "-z"], capture_output=True, text=True, cwd=ROOT)
    if not git or listed.returncode:
        pytest.skip("not a checkout")
    return {name for name in listed.stdout.split("\0") if name and (ROOT / name).exists()}


def run_hook(hook: str, folder: Path, out: Path, **environment: str) -> Path:
    """A hook of build_backend.py, called in folder: the path of what it made in out."""
    program = f"import build_backend; print(build_backend.{hook}({str(out)!r}))"
    environment = {**os.environ, "SCRL_FAST_EXT": "0", "PYTHONPATH": str(folder), **environment}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=folder, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return out / done.stdout.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tracked files, so that no build touches this one."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in tracked():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def sdist(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    (checkout / "scrl_fast/_cpu.abi3.so").touch()  # as after an in-place build
    (checkout / "scrl_fast/_build_info.json").write_text("{}")
    made = run_hook("build_sdist", checkout, tmp_path_factory.mktemp("dist"))
    (checkout / "scrl_fast/_cpu.abi3.so").unlink()
    (checkout / "scrl_fast/_build_info.json").unlink()
    return made


@pytest.fixture(scope="module")
def unpacked(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (only,) = folder.iterdir()
    return only


def test_sdist_holds_every_tracked_file_and_nothing_built(unpacked: Path) -> None:
    held = {str(path.relative_to(unpacked)) for path in unpacked.rglob("*") if path.is_file()}
    made = {name for name in held if name in GENERATED or ".egg-info/" in name}
    assert tracked() - held == set()
    assert held - made - tracked() == set()


WITHOUT_OTHER_INSTALLS = """import site, sys
sys.meta_path[:] = [each for each in sys.meta_path if "__editable__" not in getattr(each, "__module__", "")]
for name in [name for name in sys.modules if name.startswith("__editable__")]:
    del sys.modules[name]
"""


def where_kernels_lie(*paths: Path, site: Path | None = None) -> Path:
    """Where `scrl_fast.kernels.roi_align` comes from in a process with these paths; site: read its .pth files, too."""
    program = (
        f"{WITHOUT_OTHER_INSTALLS}sys.path.insert(0, {str(site)!r}); site.addsitedir({str(site)!r})\n" if site else ""
    )
    program += "import scrl_fast.kernels.tensor_lists as kernels; print(kernels.__file__)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd="/", env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return Path(done.stdout.strip())


def test_the_readme_of_the_package_index_has_whole_links(unpacked: Path) -> None:
    text = (unpacked / "PKG-INFO").read_text(encoding="utf-8")
    links = re.findall(r"\[[^]]*\]\(([^)]*)\)", text)
    assert len(links) > 30 and all(re.match("https?://|#", link) for link in links), links
    assert "Description-Content-Type: text/markdown" in text
    assert any(re.match(r"https://raw\..*/main/docs/pictures/\w+\.png", link) for link in links)


def test_kernels_from_a_bare_checkout(checkout: Path) -> None:
    assert where_kernels_lie(checkout) == checkout / "kernels/tensor_lists.py"


def test_kernels_from_a_wheel_that_the_sdist_builds(unpacked: Path, tmp_path: Path) -> None:
    wheel = run_hook("build_wheel", unpacked, tmp_path)
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "site")
    python = {name for name in tracked() if name.startswith("scrl_fast/") and not name.startswith("scrl_fast/kernels/")}
    kernels = {f"scrl_fast/{name}" for name in tracked() if name.startswith("kernels/")}
    assert python | kernels <= set(names)
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"scrl_fast"}
    assert where_kernels_lie(tmp_path / "site") == tmp_path / "site/scrl_fast/kernels/tensor_lists.py"


def test_kernels_from_an_editable_install(checkout: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(run_hook("build_editable", checkout, tmp_path)) as archive:
        archive.extractall(tmp_path / "site")
    assert where_kernels_lie(site=tmp_path / "site") == checkout / "kernels/tensor_lists.py"


def commit_noted(root: Path) -> str | None:
    """What setup.py takes for the commit of a build in root."""
    source = (ROOT / "setup.py").read_text()
    (function,) = (node for node in ast.parse(source).body if getattr(node, "name", "") == "commit")
    names = {"subprocess": subprocess, "Path": Path, "ROOT": root}
    exec(ast.get_source_segment(source, function) or "", names)
    return names["commit"]()  # type: ignore[operator]


def test_a_build_without_git_notes_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Machine images for GPUs often have none; a source distribution inside another repository is not its commit."""
    tracked()  # skips where this is no checkout
    assert re.fullmatch("[0-9a-f]{7,}", commit_noted(ROOT) or "")
    inside = tmp_path / "other/package"
    inside.mkdir(parents=True)
    assert commit_noted(inside) is None
    subprocess.run(["git", "init", "-q", str(inside.parent)], check=True)
    assert commit_noted(inside) is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert commit_noted(ROOT) is None


@pytest.mark.parametrize("failing", [None, "pytest", "mypy", "wheel"])
def test_ci_ends_as_its_tools_do(failing: str | None, tmp_path: Path) -> None:
    """The clean-up once ended a green run with exit status 1; every tool is a stand-in here."""
    tracked()  # skips where this is no checkout: a distribution has no .ci
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("pip", "ruff", "mypy", "clang-format", "pytest", "git", "python3"):
        make_environment = 'mkdir -p "$3/bin" && touch "$3/bin/activate"' if name == "python3" else ""
        (tools / name).write_text(f"#!/bin/sh\n{make_environment or 'true'}\nexit {int(name == failing)}\n")
        (tools / name).chmod(0o755)
    for name, text in {
        ".ci/run": (ROOT / ".ci/run").read_text(),
        "scripts/check_wheel.sh": f"exit {failing == 'wheel':d}",
    }.items():
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("#!/usr/bin/env bash\n" + text)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "temporary").mkdir()
    environment = os.environ | {"PATH": f"{tools}:{os.environ['PATH']}", "TMPDIR": str(tmp_path / "temporary")}
    done = subprocess.run([tmp_path / ".ci/run"], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == int(failing is not None), done.stderr
    assert not list((tmp_path / "temporary").iterdir())
