"""MkDocs hook: README.md is the site's home page, and files outside docs/ that pages link to become part of the site.

The pages' links hold on GitHub as they stand. Here they are turned into links within the site, so that
``mkdocs build --strict`` checks every one of them.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
DOCS = "docs/"
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
    "examples/README.md": "examples.md",
}
"""Pages whose source is not in docs/: their place in the site."""
OUTSIDE = "repository/"
"""Folder of the site for the other files outside docs/."""
LINK = re.compile(r"""(?<=\]\()(?![a-z]+:|#)([^)#\s]+)|(?<=src=")(?![a-z]+:)([^"#]+)""")


def on_files(files: Any, config: Any) -> Any:
    """Add the pages of PAGES and every file that a page links to."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    pages = {file.src_uri: file.content_string for file in files if file.is_documentation_page()}
    linked = {target for page, text in pages.items() for target in links(page, text) if target.startswith(OUTSIDE)}
    for target in sorted(linked):
        files.append(File.generated(config, target, abs_src_path=str(ROOT / target[len(OUTSIDE) :])))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn links that hold in the repository into links that hold in the site."""
    here = page.file.src_uri

    def moved(match: re.Match[str]) -> str:
        return posixpath.relpath(place_of(here, match[0]), posixpath.dirname(here) or ".")

    return LINK.sub(moved, markdown)


def links(page: str, markdown: str) -> Iterator[str]:
    """The places in the site that a page links to."""
    return (place_of(page, match[0]) for match in LINK.finditer(markdown))


def place_of(page: str, link: str) -> str:
    """The place in the site of what a page links to by its path in the repository."""
    source = next((name for name, place in PAGES.items() if place == page), DOCS + page)
    target = posixpath.normpath(posixpath.join(posixpath.dirname(source), link))
    if target in PAGES:
        return PAGES[target]
    if target.startswith(DOCS):
        return target[len(DOCS) :]
    if (ROOT / target).is_file():
        return OUTSIDE + target
    return link  # MkDocs names the page and the link
