"""What all commands have in common: help and mistakes are answered at once, in the same words, with the same codes."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from scrl_fast.export import training_commit

COMMANDS = {
    "train": ("--train.epoch=3", "unknown option '--train.epoch'; did you mean 'train.epochs'?"),
    "evaluate knn": ("--chekpoint=x", "unknown option '--chekpoint'; did you mean 'checkpoint'?"),
    "evaluate linear": ("--data.rot=x", "unknown option '--data.rot'; did you mean 'data.root'?"),
    "evaluate roi-linear": ("--pol_size=1", "unknown option '--pol_size'; did you mean 'pool_size'?"),
    "evaluate dense-consistency": ("--view.size=96", "unknown option '--view.size'; did you mean 'views.size'?"),
    "evaluate rank": ("--images=many", "--images=many: must be a whole number"),
    "transfer detection": ("--data.rot=x", "unknown option '--data.rot'; did you mean 'data.root'?"),
    "transfer instance": ("--optim.rl=1", "unknown option '--optim.rl'; did you mean 'optim.lr'?"),
    "transfer keypoints": ("--inti=x", "unknown option '--inti'; did you mean 'init'?"),
    "transfer coco10": ("--train.step=1", "unknown option '--train.step'; did you mean 'train.steps'?"),
    "transfer voc": (
        "--model.short_side=192",
        "--model.short_side=192: must be a list of 2 whole numbers, such as [1, 2]",
    ),
    "transfer cityscapes": ("--jsn=x", "unknown option '--jsn'; did you mean 'json'?"),
    "export": ("--too=onnx", "unknown option '--too'; did you mean '--to'?"),
    "info": ("--jsn", "unknown option '--jsn'; did you mean '--json'?"),
    "data.pack": ("--sorce=x", "unknown option '--sorce'; did you mean '--source'?"),
}
PROGRAM = """
import importlib, sys
name, *argv = sys.argv[1:]
try:
    importlib.import_module(name).main(argv)
    code = "no exit"
except SystemExit as stop:
    code = stop.code
print("exit", code, "torch" if "torch" in sys.modules else "light")
"""


def run(command: str, *argv: str) -> tuple[str, str]:
    """The last line of stdout, which tells exit code and imports, and stderr."""
    name, *task = command.split()
    module = f"scrl_fast.{name}.__main__" if task or name in ("evaluate", "transfer") else f"scrl_fast.{name}"
    arguments = [sys.executable, "-c", PROGRAM, module, *task, *argv]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    return (done.stdout.splitlines() or [""])[-1], done.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_a_mistake_is_answered_without_torch(command):
    option, answer = COMMANDS[command]
    last, said = run(command, option)
    assert last == "exit 2 light"
    assert said == f"scrl_fast.{command.partition(' ')[0]}: {answer}\n"


@pytest.mark.parametrize("command", [*COMMANDS, "evaluate", "transfer"])
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_comes_without_torch(command, flag):
    assert run(command, flag) == ("exit 0 light", "")


@pytest.mark.parametrize(
    ("command", "names"),
    [
        ("transfer", "average_precision build_detector detect fine_tune"),
        ("evaluate", "DenseResult LabelledRegions RoILinearResult demo_roi_linear dense_consistency roi_linear"),
        ("data", "BadImage Batch DemoScenes Loader LoaderStalled PackedBatch Source TooManyBadImages make_source"),
    ],
)
def test_public_names_are_loaded_when_used(command, names):
    program = (
        f"import sys, scrl_fast.{command} as package; assert 'torch' not in sys.modules\n"
        f"from scrl_fast.{command} import *\n"
        f"for name in {names.split()}: assert getattr(package, name) is globals()[name] and name in vars(package)\n"
        "try: package.nonsense\nexcept AttributeError as error: assert 'nonsense' in str(error)\n"
        "else: raise SystemExit(1)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", ["evaluate", "transfer"])
@pytest.mark.parametrize("argv", [[], ["--debug"], ["--data.root=x", "knn"]])
def test_the_task_comes_first(command, argv, capsys):
    from scrl_fast.evaluate.__main__ import main as evaluate
    from scrl_fast.transfer.__main__ import main as transfer

    with pytest.raises(SystemExit) as stop:
        {"evaluate": evaluate, "transfer": transfer}[command](argv)
    assert stop.value.code == 2
    assert f"the task comes first: python -m scrl_fast.{command} TASK" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["evaluate knn", "transfer detection"])
def test_a_result_that_cannot_be_written_is_told_before_the_work(command, tmp_path):
    given = {"evaluate knn": "--checkpoint=random", "transfer detection": "--data.root=x"}[command]
    last, said = run(command, given, f"--json={tmp_path}/")
    assert last == "exit 2 light" and f"json={tmp_path}: is a folder; give the name of a file in it" in said


def test_paths_are_read_as_a_shell_user_writes_them(monkeypatch, tmp_path):
    """In every option of every command that is a path; ``--init=~/x`` reaches a program as it is typed."""
    from scrl_fast.config.command_line import parse
    from scrl_fast.data.pack import main as pack
    from scrl_fast.evaluate.config import TASK_OPTIONS
    from scrl_fast.export import main as export
    from scrl_fast.transfer.config import TransferConfig, TransferDataConfig

    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "my.yaml").write_text("data: {root: ~/images/}\n")
    config = parse(["--config=~/my.yaml", "--run.dir='~/run'", "--init=~/w.pt"], prog="x").config
    assert (config.data.root, config.run.dir, config.init) == tuple(
        f"{tmp_path}/{name}" for name in ("images", "run", "w.pt")
    )
    assert parse(["--resume=~/run/"], prog="x").config.resume == f"{tmp_path}/run"
    transfer = TransferConfig(data=TransferDataConfig(root="~/coco/"), json="~/r.json", init="~/w", resume="~/r")
    found = transfer.data.root, transfer.json, transfer.init, transfer.resume
    assert found == tuple(f"{tmp_path}/{name}" for name in ("coco", "r.json", "w", "r"))
    for options in TASK_OPTIONS.values():
        made = options(checkpoint="~/w/", json="'~/r.json'")
        assert (made.checkpoint, made.json) == (f"{tmp_path}/w", f"{tmp_path}/r.json")
    for main, argv in ((pack, ["~/images/", "~/out"]), (export, ["~/w.pt", "--to=timm", "~/missing/out.pth"])):
        with pytest.raises(SystemExit) as stop:
            main(argv)
        assert stop.value.code == 2


@pytest.mark.parametrize(
    "content", [None, "", "[" * 100_000, "[]", '{"scrl_fast": 3}', '{"scrl_fast": {"commit": null}}']
)
def test_a_foreign_environment_file_names_no_commit(tmp_path, content):
    """A pipe would be waited for, and deep nesting ended in a RecursionError."""
    (tmp_path / "checkpoints").mkdir()
    path = tmp_path / "env.json"
    os.mkfifo(path) if content is None else path.write_text(content)
    assert training_commit(str(tmp_path / "checkpoints" / "last.pt")) == ""


def test_a_commit_is_read_from_the_run(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "env.json").write_text('{"scrl_fast": {"commit": "1234abc"}}')
    assert training_commit(str(tmp_path / "checkpoints" / "last.pt")) == "1234abc"


@pytest.mark.parametrize("place, told", [("file/a.json", "is no folder"), ("file/new/a.json", "is no folder"),
                                         ("link/a.json", "is no folder")])  # fmt: skip
def test_a_place_where_no_file_can_be_made_is_told_before_the_work(place, told, tmp_path, monkeypatch):
    from scrl_fast.config.validation import check_writable
    from scrl_fast.errors import UsageError

    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UsageError, match=f"^json=.*{place}: .* {told}"):
        check_writable("json", str(tmp_path / place))
    check_writable("json", str(tmp_path / "new" / "deep" / "a.json"))  # its folders are made when it is written
    monkeypatch.chdir(tmp_path)
    check_writable("json", "a.json")
    monkeypatch.setattr("os.access", lambda *_: False)  # a file system that may only be read
    with pytest.raises(UsageError, match=f"json=a.json: the folder {tmp_path} cannot be written to"):
        check_writable("json", "a.json")
