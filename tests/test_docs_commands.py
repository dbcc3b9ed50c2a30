"""Every command and every line of Python in README and docs: options that exist, names that can be imported.

This file reads each line as it stands with the command's own parser, and stops there. The lines in RUN_AS_IT_STANDS are
run by test_docs_lines.py. Each option of the others occurs in a test of RUN_BY, which runs the command for real, or the
line is in NOT_RUN_LINES with the reason.
"""

from __future__ import annotations

import ast
import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from scrl_fast.commands import COMMANDS, main
from scrl_fast.config.command_line import CommandParser, Request
from scrl_fast.transfer.compare.config import CompareConfig
from scrl_fast.transfer.config import TransferConfig

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
OURS = re.compile(r"(?:-m scrl_fast\.([\w.]+)|\bscrl-fast +(\w+))(.*)")
RUN_BY = {
    "train": ("test_command_line.py", "test_train_on_photographs.py", "test_weights_zoo.py", "test_encoders_own.py"),
    "evaluate": (
        *("test_evaluate.py", "test_evaluate_finetune.py", "test_encoders_own.py"),
        *("test_evaluate_labelled.py", "test_evaluate_compare.py"),
    ),
    "transfer": (
        *("test_transfer_custom.py", "test_transfer_tasks.py", "test_transfer_predict.py", "test_transfer_export.py"),
        *("test_transfer_compare.py", "test_encoders_own.py", "tiny_transfer.py"),
    ),
    "export": ("test_export.py", "test_encoders_own.py"),
    "info": ("test_info.py",),
    "pack": ("test_data_pack.py",),
}
"""The tests that run a command for real, on small data. Lines with torchrun: test_torchrun.py."""
RUN_AS_IT_STANDS = {
    tuple(line.split())
    for line in (
        "train --config scrl_200ep --data.source=folder --data.root=PICTURES --train.batch_size=64 --run.dir=runs/mine",
        "evaluate pca --checkpoint=runs/mine --beside=random --data.root=PICTURES --plot=features.png",
        "transfer custom --data.root=LABELLED --init=runs/mine --run.dir=runs/detector",
        "transfer predict --detector=runs/detector --images=PICTURES --out=found",
        "transfer compare custom --data.root=LABELLED --inits=random,torchvision,runs/mine --shares=0.1,1 --seeds=3",
        "evaluate compare --data.root=LABELLED --checkpoints=random,torchvision,runs/mine --shares=0.1,1",
        "evaluate rank --checkpoint=RUN",
        "pack DIR OUT --shorter-side 512",
        "pack DIR OUT",
        "info",
        "info --json",
    )
}
"""Lines that test_docs_lines.py runs, with small sizes behind them."""
NOT_RUN_LINES = {
    "train --config=continue --init=timm": "downloads weights; test_weights_zoo.py has stand-ins",
    "train --config scrl_200ep --data.source=folder --data.root=PICTURES --model.backbone=resnet18": "two minutes; "
    "test_docs_lines.py runs the line without its sizes",
    "train --train.keep_memory=false": "the whole demo; test_build.py holds what the option does",
    "train --config config/scrl_200ep.yaml --dataset/root": "wants the published files; test_kakaobrain.py",
    "transfer instance --config=small --data.root=SIX": "minutes; results/overfit_instance_cpu.json",
}
"""Lines with an option that no test of their command gives, by their beginning, with the reason."""
NOT_RUN = {
    "pip install": "the machine that runs .ci/run does README's second line with more extras; others download",
    "pip wheel": "tests/test_packaging.py calls the same hooks of the build backend",
    "python -m venv": "it makes an environment",
    "make": "its targets are what .ci/run does",
    "pre-commit": "it changes the checkout",
    "pytest": "it is this run",
    "python benchmarks/": "minutes to hours; tests/test_harness.py and others call the scripts' functions",
    "python examples/": "tests/test_examples.py runs them",
    "torchrun": "tests/test_torchrun.py starts small runs",
    "git clone": "it needs a network",
}
"""Lines that no test runs as they stand, by their beginning, with the reason or the test that comes close."""
PLACEHOLDERS = {"--data.source=SOURCE": "--data.source=folder"}
TASK = {"evaluate": "linear", "transfer": "detection"}
"""A task of a command, for lines that hold for all."""


class Line(NamedTuple):
    page: str
    text: str


def shell_lines() -> list[Line]:
    """The lines of all blocks of shell, and our commands in running text, each once."""
    found: dict[Line, None] = {}
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for block in re.findall(r"(?ms)^ *```(?:sh|bash|console)\n(.*?)^ *```", text):
            lines = block.replace("\\\n", " ").splitlines()
            found |= {Line(page.name, re.sub(" +", " ", line).strip()): None for line in lines if line.strip()}
        rest = re.sub(r"(?ms)^ *```.*?^ *```", "", text)
        for span in re.findall(r"`([^`]+)`", rest):
            if OURS.search(span) and "\n\n" not in span:
                found[Line(page.name, " ".join(span.split()))] = None
    return list(found)


def ours(line: str) -> Iterator[list[str]]:
    """The calls of our commands in a line, as arguments of ``scrl-fast``; what stands for more is left out."""
    for part in line.split("&&"):
        if match := OURS.search(part):
            name = (match[1] or match[2]).removeprefix("data.")
            words = [word for word in shlex.split(match[3], comments=True) if word != "..." and word[:3] != "[--"]
            if name in COMMANDS and (words or name == "info"):
                yield [name, *(TASK[name] if word == "TASK" else PLACEHOLDERS.get(word, word) for word in words)]


class Parsed(BaseException):
    """The options are right; nothing else happens."""


@pytest.fixture
def only_parsed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Commands end once their options are read."""

    def stop(*_: object) -> None:
        raise Parsed

    parse = CommandParser.parse
    monkeypatch.setattr(Request, "options", stop)
    for config in (TransferConfig, CompareConfig):  # the pages' folders are not there
        monkeypatch.setattr(config, "check_ready", lambda self: None)
    monkeypatch.setattr(CommandParser, "parse", lambda self, argv: stop(parse(self, argv)))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_takes_its_options(page: Path, only_parsed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for line in shell_lines():
        for argv in ours(line.text) if line.page == page.name else ():
            if "/root" in " ".join(argv):
                continue  # the published implementation's flags go with its YAML files: tests/test_kakaobrain.py
            if "--help" in argv:
                with pytest.raises(SystemExit, match=r"^0$"):
                    main(argv)
                continue
            for word in argv:
                if word.startswith("--config=") and word.endswith(".yaml"):
                    file = only_parsed / word.partition("=")[2]
                    file.parent.mkdir(parents=True, exist_ok=True)
                    file.write_text("{}")
            try:
                main(argv)
            except Parsed:
                continue
            except SystemExit as ended:
                pytest.fail(f"{line}: exit {ended.code}: {capsys.readouterr().err}")
            pytest.fail(f"{line}: nothing was parsed")


def test_every_shell_line_is_run_by_a_test_or_has_a_reason() -> None:
    unknown = []
    for line in shell_lines():
        for part in re.split(r"&&", line.text):
            command = OURS.search(part)
            name = ((command[1] or command[2]).removeprefix("data.")) if command else ""
            known = name in RUN_BY or part.strip().startswith(("#", *NOT_RUN))
            unknown += [] if known else [line]
    assert unknown == []
    assert set(RUN_BY) == set(COMMANDS)


def untested_options(argv: list[str]) -> list[str]:
    """The options of a line, recipes and tasks included, that no test of its command gives."""
    sources = "\n".join((ROOT / "tests" / name).read_text(encoding="utf-8") for name in RUN_BY[argv[0]])
    words = {word.partition("=")[0].lstrip("-") for word in argv if word.startswith("--")}
    words |= {argv[1]} if argv[0] in TASK and not argv[1].startswith("-") else set()
    # a test may write an option as of the command line, as an argument (train__epochs) or as a field (train.epochs)
    return [word for word in sorted(words) if not re.search(re.escape(word).replace(r"\.", r"(\.|__)"), sources)]


def test_every_line_of_ours_is_run_with_its_options_or_has_a_reason() -> None:
    missing, used = {}, set()
    for line in shell_lines():
        for argv in ours(line.text):
            text = " ".join(argv)
            reason = next((start for start in NOT_RUN_LINES if text.startswith(start)), None)
            used.add(reason)
            if tuple(argv) not in RUN_AS_IT_STANDS and not reason and (untested := untested_options(argv)):
                missing[text] = untested
    assert missing == {}
    assert set(NOT_RUN_LINES) == used - {None}  # no reason outlives its line


def test_an_option_that_no_test_gives_would_be_found() -> None:
    assert untested_options(["train", "--data.root=x", "--data.never_given=3"]) == ["data.never_given"]


def test_a_wrong_option_would_be_found(only_parsed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (argv,) = ours("torchrun --nproc-per-node=8 -m scrl_fast.train --train.epoch=3 ...  # a comment")
    with pytest.raises(SystemExit, match=r"^2$"):
        main(argv)
    assert "did you mean 'train.epochs'?" in capsys.readouterr().err


def python_blocks() -> list[tuple[str, str]]:
    return [
        (page.name, block)
        for page in PAGES
        for block in re.findall(r"(?ms)^```python\n(.*?)^```", page.read_text(encoding="utf-8"))
    ]


def test_python_blocks_import_what_exists() -> None:
    assert len(python_blocks()) > 8
    for page, block in python_blocks():
        for node in ast.walk(ast.parse(block, page)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("scrl_fast"):
                module = importlib.import_module(node.module or "")
                for name in node.names:
                    assert hasattr(module, name.name) or importlib.import_module(f"{node.module}.{name.name}")
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "scrl_fast":
                assert hasattr(importlib.import_module("scrl_fast"), node.attr), (page, node.attr)
