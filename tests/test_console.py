"""``scrl-fast``: one word in front of the commands that ``python -m`` starts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import scrl_fast
from scrl_fast.commands import COMMANDS, main

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"


def test_the_console_script_is_declared():
    text = PYPROJECT.read_text()
    assert '[project.scripts]\nscrl-fast = "scrl_fast.commands:main"' in text and '"scrl_fast.commands"' in text


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_that_of_python_m(name, capsys):
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0 and "usage: " in capsys.readouterr().out.lower()


def test_help_version_and_mistakes(capsys):
    assert main([]) == main(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(f"\n  {name}" in said for name in COMMANDS) and main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == scrl_fast.__version__
    with pytest.raises(SystemExit) as ended:
        main(["trian"])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.startswith("scrl-fast: unknown command 'trian'; did you mean 'train'?")


def test_a_misspelt_command_is_answered_without_torch():
    code = "import sys; from scrl_fast.commands import main\ntry: main(['info2'])\n"
    code += "finally: assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
