"""Griffe extension: the lines ``name: meaning`` of a docstring become a list in the API reference."""

from __future__ import annotations

import re
from typing import Any

import griffe

ENTRY = re.compile(r"[a-z_]\w*(?:, [a-z_]\w*)*: ")
LONGEST = 40
"""Characters of the names in front of a colon; a sentence with a colon is longer."""


class ArgumentLists(griffe.Extension):
    """Marks each line ``name: ...`` or ``name, name: ...``, and the lines indented below it, as a list's item."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called for every object that is read."""
        if obj.docstring is not None:
            obj.docstring.value = with_lists(obj.docstring.value)


def with_lists(text: str) -> str:
    """The text with a Markdown list in place of each run of such lines.

    >>> with_lists("Sum.\\n\\na: first\\nb, c: others,\\n    of any size\\nRaises ValueError.")
    'Sum.\\n\\n- `a`: first\\n- `b`, `c`: others,\\n    of any size\\n\\nRaises ValueError.'
    """
    lines: list[str] = []
    inside = False
    for line in text.splitlines():
        match = ENTRY.match(line)
        if match and len(match[0]) <= LONGEST:
            if not inside and lines and lines[-1]:
                lines.append("")
            names = ", ".join(f"`{name}`" for name in match[0][:-2].split(", "))
            line, inside = f"- {names}: {line[match.end() :]}", True
        elif inside and not line.startswith("    "):
            if line:
                lines.append("")
            inside = False
        lines.append(line)
    return "\n".join(lines)
