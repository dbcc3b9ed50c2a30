"""The order of the house: allowed imports, the number of modules at the top, the length of files and functions."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {"scrl_fast": "scrl_fast.", "kernels": "scrl_fast.kernels.", "benchmarks": "benchmarks."}

FLOORS = (
    ("errors", "_version", "_lazy", "atomic_files"),
    ("kernels",),
    ("config",),
    ("ops",),
    ("schedules", "metrics", "optim"),
    ("distributed",),
    ("models",),
    ("weights",),
    ("data",),
    ("run",),
    ("info",),
    ("build",),
    ("evaluate",),
    ("trainer", "transfer"),
    ("train", "api", "export", "transfer.__main__", "evaluate.__main__", "data.pack"),
    ("commands",),
    ("scrl_fast",),  # the package's own __init__, which hands out the public names: for users only
    ("benchmarks",),
)
"""Lowest first. A module imports from lower floors, or from its own package on its own floor."""

LAZY_CIRCLES: dict[tuple[str, ...], str] = {}
"""Circles that imports inside functions close, each with its reason; the names are sorted."""

UPWARD_TYPES: dict[tuple[str, str], str] = {}
"""(module, what it imports under ``TYPE_CHECKING`` from a higher floor): why it must name that type."""


class Import(NamedTuple):
    source: str
    target: str
    kind: str
    """module: when the module is imported; lazy: inside a function, or by its name for import_module; typing."""
    place: str


# ---- reading ----


@cache
def modules() -> dict[str, Path]:
    """Every module of the three folders by its dotted name."""
    found = {}
    for folder, prefix in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            name = prefix + ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            found[name.rstrip(".")] = path
    return found


@cache
def imports() -> tuple[Import, ...]:
    return tuple(found for name, path in modules().items() for found in imports_of(name, path.read_text(), path))


def imports_of(module: str, text: str, path: Path) -> Iterator[Import]:
    """Imports of the house's own modules in one file, itself left out."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    names_count = any(word in text for word in ("import_module", "__import__", "loader_of"))
    for node, kind in statements(ast.parse(text), "module"):
        if isinstance(node, ast.Constant) and not names_count:
            continue
        for target in targets(node, package):
            if target != module:
                yield Import(module, target, kind, f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}")


def statements(node: ast.AST, kind: str) -> Iterator[tuple[ast.AST, str]]:
    """Every node beneath this one and when it runs."""
    for name, value in ast.iter_fields(node):
        guarded = name == "body" and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        within = "typing" if guarded else kind
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                is_function = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
                when = "lazy" if within == "module" and isinstance(child, ast.Constant) else within
                yield child, when
                yield from statements(child, "lazy" if is_function and within == "module" else within)


def targets(node: ast.AST, package: str) -> Iterator[str]:
    """The house's modules that a node imports or, as the whole of a string, names for a later import."""
    if isinstance(node, ast.Import):
        yield from (known(alias.name, package) for alias in node.names if known(alias.name, package))
    elif isinstance(node, ast.ImportFrom):
        base = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
        base = ".".join(filter(None, (base, node.module)))
        for alias in node.names:
            if target := known(f"{base}.{alias.name}", package) or known(base, package):
                yield target
    elif isinstance(node, ast.Constant) and node.value in modules() and node.value != "scrl_fast":
        yield str(node.value)


def known(name: str, package: str) -> str:
    """The module of that name; benchmarks import each other without their folder's name. '' for a foreign one."""
    if name in modules():
        return name
    return f"benchmarks.{name}" if package == "benchmarks" and f"benchmarks.{name}" in modules() else ""


def floor_of(module: str) -> int:
    """The floor of the longest name above that the module is or lies in; above all where it has none."""
    name = module.removeprefix("scrl_fast.") if module != "scrl_fast" else module
    while name:
        for floor, names in enumerate(FLOORS):
            if name in names:
                return floor
        name = name.rpartition(".")[0]
    return len(FLOORS)


def package_of(module: str) -> str:
    return module.removeprefix("scrl_fast.").partition(".")[0]


def is_upward(found: Import) -> bool:
    above, below = floor_of(found.source), floor_of(found.target)
    return below > above or (below == above and package_of(found.source) != package_of(found.target))


def circles(edges: set[tuple[str, str]]) -> list[tuple[str, ...]]:
    """Groups of modules each of which reaches all others of the group, sorted."""
    ahead: dict[str, set[str]] = {}
    for source, target in edges:
        ahead.setdefault(source, set()).add(target)

    def reach(start: str) -> set[str]:
        seen: set[str] = set()
        todo = [start]
        while todo:
            for following in ahead.get(todo.pop(), set()) - seen:
                seen.add(following)
                todo.append(following)
        return seen

    reached = {module: reach(module) for module in ahead}
    groups = {tuple(sorted(m for m in seen if start in reached.get(m, ()))) for start, seen in reached.items()}
    return sorted(group for group in groups if group)


# ---- the tests ----


def test_every_module_has_a_floor() -> None:
    homeless = [name for name in modules() if floor_of(name) == len(FLOORS)]
    assert not homeless, "give them a floor in FLOORS"
    places = {name for names in FLOORS for name in names}
    existing = {name.removeprefix("scrl_fast.") for name in modules()} | {"benchmarks"}
    assert places <= existing, f"floors for modules that are gone: {places - existing}"


def test_imports_run_downward() -> None:
    upward = [i for i in imports() if i.kind != "typing" and is_upward(i)]
    found = [f"{i.place}: {i.source} imports {i.target}" for i in upward]
    assert not found, "\n".join(sorted(found))


def test_types_from_above_have_a_reason() -> None:
    upward = {(i.source, i.target) for i in imports() if i.kind == "typing" and is_upward(i)}
    assert upward == set(UPWARD_TYPES)


def test_no_circles_when_modules_are_imported() -> None:
    assert circles({(i.source, i.target) for i in imports() if i.kind == "module"}) == []


def test_circles_by_lazy_imports_have_a_reason() -> None:
    assert circles({(i.source, i.target) for i in imports() if i.kind != "typing"}) == sorted(LAZY_CIRCLES)


def test_options_are_read_without_torch() -> None:
    """A wrong option is answered before torch is imported: config/ knows the errors and no other floor."""
    assert {i.target for i in imports() if package_of(i.source) == "config"} <= {
        "scrl_fast.errors",
        *(name for name in modules() if package_of(name) == "config"),
    }
    for name, path in modules().items():
        if package_of(name) == "config":
            found = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, (ast.Import, ast.ImportFrom))]
            roots = [a.name for n in found if isinstance(n, ast.Import) for a in n.names]
            roots += [n.module or "" for n in found if isinstance(n, ast.ImportFrom)]
            assert not {"torch", "torchvision"} & {root.partition(".")[0] for root in roots}, path


def test_few_modules_stand_at_the_top() -> None:
    top = [name for name in modules() if name.count(".") == 1 and modules()[name].name != "__init__.py"]
    top = [name for name in top if name.startswith("scrl_fast.") and modules()[name].parent.name == "scrl_fast"]
    assert len(top) <= 13, top  # 12 modules and _version; with __init__ 14 files


def python_files() -> list[Path]:
    folders = ("scrl_fast", "kernels", "benchmarks", "tests")
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))] + sorted(ROOT.glob("*.py"))


LONG_KERNELS = {"update_chunk", "row_losses"}
"""Triton kernels of two operations: one pass over memory each, whose values stay in registers from load to store."""


def test_functions_are_short() -> None:
    long = [
        f"{path.relative_to(ROOT)}:{node.lineno}: {node.name} has {node.end_lineno - node.lineno + 1} lines"
        for path in python_files()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.end_lineno - node.lineno >= 60
        if not (path.parent.name == "kernels" and node.name in LONG_KERNELS)
    ]
    assert not long, "\n".join(long)


def test_long_files_say_why() -> None:
    """Above 400 lines the docstring, or the comment at the top of a C++ file, says "this file is long" and why."""
    sources = [path for pattern in ("*.h", "*.cpp", "*.cu", "*.cuh") for path in (ROOT / "csrc").rglob(pattern)]
    silent = []
    for path in [*python_files(), *sources]:
        lines = path.read_text().splitlines()
        head = ast.get_docstring(ast.parse("\n".join(lines))) if path.suffix == ".py" else "\n".join(lines[:12])
        if len(lines) > 400 and not re.search(r"this file is (a )?long", " ".join((head or "").lower().split())):
            silent.append(f"{path.relative_to(ROOT)}: {len(lines)} lines")
    assert not silent, "\n".join(silent)


# ---- that the reading above reads ----


@pytest.mark.parametrize(
    "text, expected",
    [
        ("import scrl_fast.errors", [("scrl_fast.errors", "module")]),
        ("from scrl_fast import errors, Config", [("scrl_fast.errors", "module"), ("scrl_fast", "module")]),
        ("from . import loader", [("scrl_fast.data.loader", "module")]),
        ("from ..errors import UsageError", [("scrl_fast.errors", "module")]),
        ("def f():\n    from scrl_fast.run import log", [("scrl_fast.run.log", "lazy")]),
        ("class A:\n    from scrl_fast import errors", [("scrl_fast.errors", "module")]),
        ("try:\n    from scrl_fast import errors\nexcept ImportError: pass", [("scrl_fast.errors", "module")]),
        ("if TYPE_CHECKING:\n    from scrl_fast import train\nelse:\n    import scrl_fast.info",
         [("scrl_fast.train", "typing"), ("scrl_fast.info", "module")]),
        ("NAMES = {'x': 'scrl_fast.trainer'}\nimport_module(NAMES[name])", [("scrl_fast.trainer", "lazy")]),
        ("__getattr__ = loader_of(__name__, {'x': 'scrl_fast.trainer'})", [("scrl_fast.trainer", "lazy")]),
        ("COMMAND = 'scrl_fast.trainer'", []),
        ("import torch, scrl_fast_other\nfrom numpy import errors", []),
    ],
)  # fmt: skip
def test_an_import_is_found(text: str, expected: list[tuple[str, str]]) -> None:
    found = imports_of("scrl_fast.data.batch", text, ROOT / "scrl_fast/data/batch.py")
    assert [(i.target, i.kind) for i in found] == expected


def test_a_circle_is_found() -> None:
    assert circles({("a", "b"), ("b", "c"), ("c", "a"), ("c", "d"), ("e", "f"), ("f", "e")}) == [
        ("a", "b", "c"),
        ("e", "f"),
    ]


def test_upward_is_told_from_downward() -> None:
    def upward(source: str, target: str) -> bool:
        return is_upward(
            Import(f"scrl_fast.{source}", target if target == "scrl_fast" else f"scrl_fast.{target}", "", "")
        )

    assert upward("data.loader", "run.log") and upward("schedules", "optim") and upward("trainer", "transfer.config")
    assert upward("transfer.trainer", "transfer.__main__") and upward("run.log", "scrl_fast")
    assert not upward("data.pack", "data.loader") and not upward("data.loader", "data.batch")
    assert not upward("trainer", "run.log")
