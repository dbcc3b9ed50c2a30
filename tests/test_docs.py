"""The documents: links lead somewhere, the Python reference names what can be imported, and the site builds."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TOP = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "examples/README.md")
PAGES = [*(ROOT / name for name in TOP), *sorted((ROOT / "docs").rglob("*.md"))]
LINK = re.compile(r"""\]\(([^)\s]+)\)|(?:src|href)="([^"]+)\"""")
PACKAGES = ("", "ops", "optim", "models", "data", "weights", "evaluate", "transfer")


def without_code(text: str) -> str:
    return re.sub(r"(?ms)^( *)```.*?^\1```", "", text)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and the site make them, and those written as HTML."""
    text = without_code(page.read_text(encoding="utf-8"))
    headings = re.findall(r"(?m)^#+ +(.+?) *$", text)
    slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    return slugs | set(re.findall(r'id="([^"]+)"', text))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_link_leads_somewhere(page: Path) -> None:
    dead = []
    for found in LINK.findall(without_code(page.read_text(encoding="utf-8"))):
        link = next(filter(None, found))
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if not target.is_file() or (anchor and anchor not in anchors(target)):
            dead.append(link)
    assert dead == []


def reference() -> list[str]:
    """The names that the pages of the Python reference document."""
    pages = (ROOT / "docs/api").glob("*.md")
    return [name for page in pages for name in re.findall(r"(?m)^::: (\S+)$", page.read_text(encoding="utf-8"))]


def test_the_reference_names_what_can_be_imported() -> None:
    names = reference()
    assert len(names) > 60 and len(set(names)) == len(names)
    for name in names:
        module, _, attribute = name.rpartition(".")
        documented = getattr(importlib.import_module(module), attribute)
        assert documented.__doc__, name


def test_the_reference_holds_every_public_name() -> None:
    documented = {id(_found(name)) for name in reference()}
    missing = []
    for package in PACKAGES:
        module = importlib.import_module(f"scrl_fast.{package}".rstrip("."))
        public = {f"{package}.{name}": getattr(module, name) for name in module.__all__}
        missing += [name for name, each in public.items() if callable(each) and id(each) not in documented]
    assert missing == []


def _found(name: str) -> object:
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def test_every_page_is_in_the_site_s_navigation() -> None:
    listed = set(re.findall(r"[\w/]+\.md", (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("nav:")[2]))
    pages = {page.relative_to(ROOT / "docs").as_posix() for page in (ROOT / "docs").rglob("*.md")}
    assert pages - listed == set()


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    if not all(importlib.util.find_spec(name) for name in ("mkdocs", "material", "mkdocstrings")):
        pytest.skip("no mkdocs (pip install 'scrl-fast[docs]', from Python 3.11 on)")
    arguments = ["build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run([sys.executable, "-m", "mkdocs", *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    page = (tmp_path / "site/api/ops/index.html").read_text(encoding="utf-8")
    assert "<li><code>sampling_ratio</code>: samples a bin and axis" in page


def messages() -> list[str]:
    """The texts in the package's code but docstrings; what a message takes from variables is a line end."""
    found = []
    for file in (ROOT / "scrl_fast").rglob("*.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        inside = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
        docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "\n" for part in node.values]
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inside | docstrings:
                found.append(node.value)
    return found


def test_quoted_messages_exist_in_the_code() -> None:
    page = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    known = messages()
    quoted = [text for row in re.findall(r"(?m)^\| (.+?) \| ", page) for text in re.findall(r"`([^`]+)`", row)]
    fragments = [part.strip(" ':;") for text in quoted for part in text.split("...")]
    fragments = [part for part in fragments if len(part) > 3 and part not in ("log.txt", "nohup")]
    assert len(fragments) > 35
    assert [part for part in fragments if not any(part in message for message in known)] == []


def test_readme_s_figures_stand_in_the_evidence() -> None:
    section = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Is it worth it on your data?")[2]
    rows = re.findall(r"(?m)^\| (?:random|BYOL|SCRL|ImageNet).*$", section.partition("\n## ")[0])
    evidence = (ROOT / "docs/evidence.md").read_text(encoding="utf-8")
    figures = re.findall(r"(?<=\| )\d[^|]*(?= \|)", "\n".join(rows))
    assert len(rows) == 4 and len(figures) == 14
    assert [figure for figure in figures if f"| {figure} |" not in evidence] == []
