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
    rows = re.findall(r"(?m)^\| (?:random|BYOL|SCRL|ImageNet|\.\.\. continued).*$", section.partition("\n## ")[0])
    evidence = (ROOT / "docs/evidence.md").read_text(encoding="utf-8")
    figures = re.findall(r"(?<=\| )\d[^|]*(?= \|)", "\n".join(rows))
    assert len(rows) == 5 and len(figures) == 26
    assert [figure for figure in figures if not re.search(rf"\| {re.escape(figure)} (\(\d+\) )?\|", evidence)] == []


def limits_of_files() -> dict[str, int]:
    """What `docs/files_from_elsewhere.md` says in words, and the number in the code that it means."""
    from scrl_fast.config import yaml_text
    from scrl_fast.data import image_headers, jpeg
    from scrl_fast.data.sources import annotation_files, coco_document, files, shards, tar, voc, yolo, yolo_layout
    from scrl_fast.transfer import trained
    from scrl_fast.weights import files as weight_files
    from scrl_fast.weights import (
        load,
        onnx_files,
        pickled_tensors,
        pickles,
        safetensors_files,
        training_state,
        zip_archive,
    )

    return {
        "{} segments": jpeg._MOST_SEGMENTS,
        "{} chunks": image_headers.MOST_CHUNKS,
        "a PNM's header of {}": image_headers.LONGEST_PNM_HEADER,
        "a PNM in text of {}": image_headers.MOST_PNM_TEXT,
        "{} comments": image_headers.MOST_PNM_COMMENTS,
        "tags that claim {}": image_headers.MOST_TAG_BYTES,
        "names of {}": tar._LONGEST_NAME,
        "{} of pax records": tar._LARGEST_PAX,
        "| Python's JSON | {} |": shards._LARGEST_MANIFEST,
        "| text | {} |": files._LARGEST_LIST,
        "| Python's JSON | {};": coco_document._LARGEST_FILE,
        "{} for a list of names": yolo_layout._LARGEST_NAMES,
        "{} for the labels of an image": yolo._LARGEST_LABELS,
        "{} classes": annotation_files.MOST_CLASSES,
        "| {}, no entities": voc._LARGEST_XML,
        "{} entries": zip_archive.MAX_ENTRIES,
        "{} levels; tensors": pickles.MAX_DEPTH,
        "at most {} times the file's bytes": pickled_tensors.MAX_SHARING,
        "a header of {}": safetensors_files.MAX_HEADER,
        "| sizes against the file's; {}, a million fields": onnx_files.MAX_BYTES,
        "{} dimensions": onnx_files.MAX_DIMENSIONS,
        "| Python's JSON | {} |\n| weights in the cache": weight_files.MAX_CONFIG,
        "images of at most {} pixels": trained.MAX_RESIZED,
        "{} boxes of an image": trained.MOST_FOUND,
        "sides of {}": trained.LARGEST_SIDE,
        "| PyYAML's safe loader | {}": yaml_text.MAX_BYTES,
        "{} levels, 10,000 values": yaml_text.MAX_DEPTH,
        "{} values with aliases": yaml_text.MAX_VALUES,
        "whole numbers of {} digits": yaml_text.MAX_DIGITS,
        "views of {} pixels": load.LARGEST_VIEW,
        "{} threads": training_state.LARGEST_THREADS,
    }


def test_the_table_of_limits_is_that_of_the_code() -> None:
    from dataclasses import fields

    from scrl_fast.config.image_limits import ImageLimitOptions
    from scrl_fast.weights import onnx_files, pickles

    text = (ROOT / "docs" / "files_from_elsewhere.md").read_text(encoding="utf-8")
    for words, value in limits_of_files().items():
        binary = next((f"{value >> bits} {unit}" for bits, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB"))
                       if value >= 1 << bits and value % (1 << bits) == 0), "")  # fmt: skip
        assert words.format(f"{value:,}") in text or words.format(binary) in text, (words, value)
    assert onnx_files.MAX_FIELDS == 1_000_000 and pickles.MAX_OPCODES == 1_500_000 and "1.5 million opcodes" in text
    for field in fields(ImageLimitOptions):
        assert f"| `data.{field.name}` | " in text, field.name
