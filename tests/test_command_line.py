"""The command line: precedence, refusals and their messages, and the exit codes.

This file is long because every kind of argument has a case of its own.
"""

from __future__ import annotations

import dataclasses
import errno
import os
import re
import subprocess
import sys
import types
from importlib import import_module
from pathlib import Path

import pytest
import torch

from scrl_fast import train
from scrl_fast.config import command_line
from scrl_fast.config.files import Settings
from scrl_fast.config.run_folder import folder_of
from scrl_fast.config.schema import load_recipe
from scrl_fast.config.validation import at_least, check_fields
from scrl_fast.config.yaml_text import dump
from scrl_fast.errors import UsageError, did_you_mean, exit_code, friendly_errors, nearest, one_line


def parse(*argv: str):
    return command_line.parse(argv, prog="x").config


@pytest.fixture
def yaml_file(tmp_path):
    def write(text: str, name: str = "options.yaml") -> str:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def test_default_is_the_demo():
    assert parse() == load_recipe("demo") == parse("--config", "demo")


@pytest.mark.parametrize("spelling", [["--train.epochs=3"], ["--train.epochs", "3"], ["--train/epochs=3"]])
def test_command_line_wins_whatever_the_order(yaml_file, spelling):
    path = yaml_file("train: {epochs: 7, batch_size: 8}\n")
    for argv in ([*spelling, "--config", path], [f"--config={path}", *spelling]):
        config = parse(*argv)
        assert (config.train.epochs, config.train.batch_size) == (3, 8)


def test_later_files_and_later_options_win(yaml_file):
    one = yaml_file("train: {epochs: 7, batch_size: 8}\nviews: {scale: [0.5, 1]}\n", "one.yaml")
    two = yaml_file("train: {epochs: 9}\n", "two.yaml")
    config = parse("--config", one, "--config", two)
    assert (config.train.epochs, config.train.batch_size, config.views.scale) == (9, 8, (0.5, 1.0))
    assert parse("--config", two, "--config", one).train.epochs == 7
    assert parse("--train.epochs=1", "--train.epochs=2").train.epochs == 2


def test_a_file_may_be_partial_or_empty_or_dotted(yaml_file):
    assert parse("--config", yaml_file("")).train.epochs == 200
    config = parse("--config", yaml_file("train.epochs: 3\ntrain:\n  seed: 5\n"))
    assert (config.train.epochs, config.train.seed) == (3, 5)
    assert parse("--config", "scrl_200ep").optim.lr == 0.45


def test_values_as_people_write_them(yaml_file):
    config = parse("--config", yaml_file("optim: {weight_decay: 1e-6, lr: 1}\ntrain: {compile: on}\n"))
    assert (config.optim.weight_decay, config.optim.lr, config.train.compile) == (1e-6, 1.0, True)
    config = parse("--optim.weight_decay=1e-6", "--train.compile=yes", "--views.scale=[0.3, 0.9]", "--run.dir=1e3")
    assert (config.optim.weight_decay, config.train.compile) == (1e-6, True)
    assert (config.views.scale, config.run.dir) == ((0.3, 0.9), "1e3")
    assert parse("--run.dir=null").run.dir == "null"
    assert parse("--resume=").resume == ""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("trian: {epochs: 3}", "unknown option 'trian.epochs'; did you mean 'train.epochs'"),
        ("train: {epoch: 3}", "unknown option 'train.epoch'; did you mean 'train.epochs'"),
        ("lr: 3", "unknown option 'lr'; did you mean 'optim.lr'"),
        ("train: {}\nzzz: {}", "unknown option 'zzz'"),
        ("train: {epochs: {a: 3}}", "train.epochs=.*: must be a whole number"),
        ("train: null", "'train' must hold options .*not null"),
        ("train: 3", "'train' must hold options .*batch_size"),
        ("train: {epochs: }", "'train.epochs' has no value"),
        ("train: {epochs: lots}", "train.epochs=lots: must be a whole number"),
        ("train: {epochs: 3.5}", "train.epochs=3.5: must be a whole number"),
        ("run: {dir: 2024}", "run.dir=2024: must be text"),
        ("views: {scale: [0.2]}", "views.scale=.*: must be a list of 2 numbers"),
        ("data: {source: s3}", "data.source=s3: must be one of demo, folder"),
        ("train: {epochs: 3}\ntrain: {seed: 1}", "line 2: 'train' stands twice"),
        ("train:\n  seed: 3\n  seed: 4\n", "line 3: 'seed' stands twice"),
        ("train: !!python/object/apply:os.getcwd []", "line 1: could not determine a constructor"),
        ("train: [1,", "options.yaml line"),
        ("- 1", "must hold options .*not a list"),
        ("\x00", "options.yaml"),
    ],
)
def test_files_that_are_wrong(yaml_file, text, message):
    with pytest.raises(UsageError, match=message) as caught:
        parse("--config", yaml_file(text))
    assert "options.yaml" in str(caught.value)


@pytest.mark.parametrize(("value", "reason"), [(".inf", "finite"), (".nan", "finite"), ("-1", "above 0")])
def test_numbers_out_of_range_in_a_file(yaml_file, value, reason):
    with pytest.raises(ValueError, match=rf"optim.lr=.*{reason}"):
        parse("--config", yaml_file(f"optim: {{lr: {value}}}"))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--train.epoch=3"], "unknown option '--train.epoch'; did you mean 'train.epochs'"),
        (["--optm.lr", "3"], "unknown option '--optm.lr'; did you mean 'optim.lr'"),
        (["--learning_rate=3"], "unknown option '--learning_rate'"),
        (["--confg=demo"], "did you mean 'config'"),
        (["--train.epochs=lots"], "--train.epochs=lots: must be a whole number"),
        (["--data.workers=1.5"], "--data.workers=1.5: must be a whole number or auto"),
        (["--data.workers=true"], "--data.workers=true: must be a whole number or auto"),
        (["--train.epochs"], "--train.epochs needs a value"),
        (["--train={epochs: 3}"], "--train holds several options: --train.batch_size"),
        (["--optim.lr=null"], "--optim.lr=None: must be a number"),
        (["--data.source=s3"], "--data.source=s3: must be one of demo"),
        (["--views.scale=0.2"], "--views.scale=0.2: must be a list of 2 numbers"),
        (["train.epochs=3"], "what is 'train.epochs=3'"),
        (["-x"], "what is '-x'"),
        (["--config"], "--config needs a recipe"),
        (["--config", "--debug"], "--config needs a recipe"),
        (["--config=nothing.yaml"], "--config=nothing.yaml is neither a recipe .* nor a file"),
        (["--config=."], "is a folder; for the config of a run give config.yaml"),
    ],
)
def test_command_lines_that_are_wrong(argv, message):
    with pytest.raises(UsageError, match=message):
        parse(*argv)


def run(*argv: str, capsys) -> tuple[int, str, str]:
    try:
        code = train.main(argv)
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture
def trainer(monkeypatch, tmp_path):
    """Stands in for `scrl_fast.trainer`: its ``fit`` does what the test asks for."""
    module = types.ModuleType("scrl_fast.trainer")

    class SCRLTrainer:
        fit = staticmethod(dict)

        def __init__(self, config) -> None:
            self.config = config
            self.folder = tmp_path

    module.SCRLTrainer = SCRLTrainer
    monkeypatch.setitem(sys.modules, "scrl_fast.trainer", module)
    return SCRLTrainer


def raising(error: BaseException):
    def fit():
        raise error

    return staticmethod(fit)


def test_exit_codes(trainer, capsys, tmp_path):
    assert run(capsys=capsys) == (0, "", "")
    for error, code, said in [
        (UsageError("data.root: nothing there"), 2, "scrl_fast.train: data.root: nothing there\n"),
        (
            FileNotFoundError(2, "No such file or directory", "/x"),
            2,
            "scrl_fast.train: No such file or directory: /x\n",
        ),
        (RuntimeError("two\nlines"), 1, f"RuntimeError: two lines (traceback in {tmp_path / 'log.txt'})\n"),
        (ValueError("not one of ours"), 1, "ValueError: not one of ours (traceback"),
        (KeyboardInterrupt(), 1, "interrupted\n"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried 3 GiB"), 1, "lower --train.batch_size"),
        (MemoryError(), 1, "--train.checkpoint_activations=true"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 1, "lower --train.batch_size"),
        (RuntimeError("std::bad_alloc"), 1, "out of memory (std::bad_alloc)"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), 1, "lower --train.batch_size"),
    ]:
        trainer.fit = raising(error)
        got, out, err = run(capsys=capsys)
        assert (got, out) == (code, "") and said in err and err.count("\n") == 1, err
    assert "in fit" in (tmp_path / "log.txt").read_text()


@pytest.mark.parametrize(
    ("command", "place", "said"),
    [
        (
            "scrl_fast.evaluate.__main__ knn --checkpoint=random",
            "scrl_fast.evaluate.__main__.run",
            "lower --batch_size",
        ),
        ("scrl_fast.data.pack a b", "scrl_fast.data.sources.factory.make_source", "lower --workers"),
        ("scrl_fast.export a b --to timm", "scrl_fast.export.export", "nothing was written"),
        ("scrl_fast.transfer.__main__ detection", "scrl_fast.transfer.__main__.parse", "--model.long_side"),
        ("scrl_fast.transfer.__main__ predict", "scrl_fast.transfer.commands.CommandParser.parse", "lower --workers"),
    ],
)
def test_want_of_memory_names_the_options_of_its_command(command, place, said, monkeypatch, capsys):
    module, *arguments = command.split()

    def fail(*_, **__):
        raise MemoryError

    monkeypatch.setattr(place, fail)
    with pytest.raises(SystemExit) as end:
        import_module(module).main(arguments)
    error = capsys.readouterr().err
    assert end.value.code == 1 and "out of memory" in error and said in error and error.count("\n") == 1, error
    assert "accumulate" not in error  # an option of pre-training


def test_debug_shows_the_traceback(trainer, capsys):
    trainer.fit = raising(RuntimeError("boom"))
    code, _, err = run("--debug", capsys=capsys)
    assert code == 1 and "Traceback" in err and err.endswith("scrl_fast.train: RuntimeError: boom\n")
    code, _, err = run("--train.epoch=3", "--debug", capsys=capsys)
    assert code == 2 and "Traceback" in err


def test_our_checks_are_input_and_our_slips_are_not():
    from scrl_fast.config import schema as config

    for wrong, code in [
        (lambda: config.TrainConfig(epochs=0), 2),  # a `raise` of ours
        (lambda: config.TrainConfig(nonsense=1), 1),  # a TypeError that Python raised at our caller
        (lambda: config.at_least("x").contains(3), 1),  # a TypeError inside our code that nobody wrote down
        (lambda: int("x"), 1),
    ]:
        with pytest.raises((TypeError, ValueError)) as caught:
            wrong()
        assert exit_code(caught.value) == code, caught.value


PRINTS = "from scrl_fast.errors import friendly_errors\nwith friendly_errors('x'):\n    print('line', flush=True)"


def test_broken_pipe_is_silent():
    """Where the reader of the output has ended, as `head` does."""
    read, write = os.pipe()
    os.close(read)
    result = subprocess.run([sys.executable, "-c", PRINTS], stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (result.returncode, result.stderr) == (1, "")


def test_a_result_that_stdout_does_not_take_is_on_stderr():
    """A full disk behind ``> file``: what was asked for is lost there, so the command fails, but nothing else is."""
    program = (
        "from scrl_fast.errors import friendly_errors, tell_result\n"
        "with friendly_errors('x'):\n    tell_result('top-1 12.00%')"
    )
    with open("/dev/full", "w") as full:
        result = subprocess.run([sys.executable, "-c", program], stdout=full, stderr=subprocess.PIPE, text=True)
    said = "x: the work is done, but its result cannot be printed: No space left on device: stdout"
    said += " (--debug shows the traceback)"
    assert result.returncode == 1 and result.stderr.splitlines() == ["top-1 12.00%", said]


def test_a_broken_pipe_of_another_origin_is_told(capfd):
    with pytest.raises(SystemExit) as stop, friendly_errors("x"):
        raise BrokenPipeError(32, "Broken pipe")
    assert stop.value.code == 1
    assert "x: BrokenPipeError: [Errno 32] Broken pipe" in capfd.readouterr().err


def test_notes_that_nobody_reads_end_nothing():
    program = (
        "from scrl_fast.config.command_line import Request; from scrl_fast.errors import friendly_errors\n"
        "with friendly_errors('x'): print(Request(3, ['a note', 'another'], False).options())"
    )
    read, write = os.pipe()
    os.close(read)
    result = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=write, text=True)
    os.close(write)
    assert (result.returncode, result.stdout) == (0, "3\n")


def test_missing_root_is_found_before_the_trainer(trainer, capsys):
    code, _, err = run("--config=scrl_200ep", capsys=capsys)
    assert (code, err) == (2, "scrl_fast.train: data.source=imagenet needs --data.root, the folder of the images\n")


def test_print_config_is_a_config(capsys, tmp_path):
    code, out, err = run("--config=byol_200ep", "--train.seed=7", "--print_config", capsys=capsys)
    assert (code, err) == (0, "")
    path = tmp_path / "config.yaml"
    path.write_text(out)
    assert parse("--config", str(path)) == parse("--config=byol_200ep", "--train.seed=7")


def test_nearest_names():
    assert nearest("train.epoch", ["train.epochs", "optim.lr"]) == "train.epochs"
    assert nearest("weight_decay", ["optim.weight_decay", "optim.lr"]) == "optim.weight_decay"
    assert nearest("qqq", ["train.epochs"]) is None
    assert did_you_mean("qqq", ["train.epochs"]) == ""
    assert one_line(UsageError()) == "UsageError"


def test_a_wrong_option_is_answered_before_torch_is_imported():
    argv = [sys.executable, "-X", "importtime", "-m", "scrl_fast.train", "--train.epoch=3"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    said = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert done.returncode == 2
    assert said == ["scrl_fast.train: unknown option '--train.epoch'; did you mean 'train.epochs'?"]
    assert " torch\n" not in done.stderr and " numpy\n" not in done.stderr


def test_importing_the_package_is_light():
    code = (
        "import sys, scrl_fast; assert scrl_fast.__version__ == '0.1.0'; scrl_fast.load_recipe('scrl_200ep');"
        "assert 'SCRLTrainer' in dir(scrl_fast); assert 'torch' not in sys.modules;"
        "assert scrl_fast.ops.roi_align and scrl_fast.models.SCRL and scrl_fast.optim.LARS;"
        "assert callable(scrl_fast.load_encoder) and scrl_fast.SCRLTrainer;"
        "\ntry: scrl_fast.nonsense\nexcept AttributeError as e: assert 'nonsense' in str(e)"
        "\nelse: raise SystemExit('no error')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@dataclasses.dataclass
class OtherSection:
    names: tuple[float, ...] = (1.0,)
    """Numbers, as many as wanted."""


@dataclasses.dataclass
class Other:
    """Options of another command."""

    k: int = 3
    """A number."""
    part: OtherSection = dataclasses.field(default_factory=OtherSection)
    """A section."""

    def __post_init__(self):
        check_fields(self, "", k=at_least(1))
        check_fields(self.part, "part", names=at_least(0))


def parse_other(*argv: str, **options):
    return command_line.parse_as(Other, argv, prog="x", description="Does something else.", **options).options()


def test_other_commands_have_the_same_manner(yaml_file, capsys):
    path = yaml_file("k: 5\npart: {names: [1, 2, 3]}\n")
    other = parse_other("--k=4", f"--config={path}")
    assert (other.k, other.part.names) == (4, (1.0, 2.0, 3.0))
    below = Settings({"k": 9, "part": {"names": [7]}})
    assert parse_other("--config", path, base=[below]).k == 5 and parse_other("--k=2", base=[below]).part.names == (7,)
    with pytest.raises(SystemExit):
        parse_other("--k=7", "--print_config")
    assert capsys.readouterr().out == "k: 7\npart:\n  names: [1.0]\n"
    with pytest.raises(SystemExit):
        parse_other("--help")
    said = capsys.readouterr().out
    assert "Does something else." in said and "A number." in said and "recipe" not in said


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--kk=3"], "unknown option '--kk'; did you mean 'k'?"),
        (["--k=much"], "--k=much: must be a whole number"),
        (["--k=0"], "k=0: must be at least 1"),
        (["--part.names=[]"], "part.names=(): must be a list of numbers"),
        (["--part.name=[1]"], "did you mean 'part.names'?"),
        (["--train.epochs=3"], "unknown option '--train.epochs'"),
        (["--optim/lr=3"], "unknown option '--optim/lr'"),
    ],
)
def test_other_commands_refuse_in_the_same_words(argv, says):
    with pytest.raises((UsageError, ValueError, TypeError), match=re.escape(says)):
        parse_other(*argv)


# ---- going on with a run ----


def write_run(folder: Path, named: Path | None = None, **train: object) -> Path:
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints" / "step_00000002.pt").touch()
    options = {"optim": {"lr": 0.125}, "train": train, "run": {"dir": str(named or folder)}}
    (folder / "config.yaml").write_text(dump(options))
    return folder


@pytest.mark.parametrize("place", ["", "checkpoints", "checkpoints/step_00000002.pt"])
def test_resume_without_config_takes_the_options_of_the_run(tmp_path: Path, place: str) -> None:
    run = write_run(tmp_path / "run", batch_size=7)
    request = command_line.parse([f"--resume={run / place}", "--train.epochs=9"], prog="train")
    config = request.config
    assert (config.optim.lr, config.train.batch_size, config.train.epochs) == (0.125, 7, 9)
    assert (config.run.dir, config.init) == (str(run), "")
    assert request.notes == [f"options of the run that goes on: {run / 'config.yaml'}"]
    assert command_line.parse(["--resume=auto", f"--run.dir={run}"], prog="train").config.optim.lr == 0.125


def test_what_a_folder_from_elsewhere_reads_and_where_it_reports_is_told(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    config = run / "config.yaml"
    config.write_text(config.read_text() + "  wandb: stranger\ndata: {source: folder, root: /etc}\n")
    for arguments in ([f"--resume={run}"], ["--resume=auto", f"--run.dir={run}"]):
        assert command_line.parse(arguments, prog="train").notes == [
            f"{config}: it reads the images of data.root=/etc",
            f"{config}: it sends options and metrics to W&B's project run.wandb=stranger",
            f"options of the run that goes on: {config}",
        ]


@pytest.mark.parametrize("place", ["checkpoints", "checkpoints/model.pt"])
def test_a_folder_called_checkpoints_makes_no_run_of_the_one_around_it(tmp_path: Path, place: str) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "model.pt").touch()
    assert folder_of(tmp_path / place) is None
    path, inside = tmp_path / place, {"optim": {"lr": 0.25}, "run": {"dir": "elsewhere"}}
    request = command_line.parse([f"--resume={path}"], prog="train", checkpoint_config=lambda _: inside)
    assert (request.config.optim.lr, request.config.run.dir) == (0.25, "")
    for name in ("config.yaml", "metrics.jsonl"):
        (tmp_path / name).touch()
        assert folder_of(tmp_path / place) == tmp_path
        (tmp_path / name).unlink()


def test_a_run_that_was_moved_goes_on_where_it_is(tmp_path: Path) -> None:
    run = write_run(tmp_path / "new", named=tmp_path / "old")
    file = run / "config.yaml"
    with_config = [[f"--config={file}", f"--resume={which}"] for which in (run, "auto")]
    for arguments in ([f"--resume={run}"], *with_config):
        assert command_line.parse(arguments, prog="train").config.run.dir == str(run)
    assert command_line.parse([f"--resume={run}", "--run.dir=other"], prog="train").config.run.dir == "other"
    # as the base of a new run it is only a file of options
    assert command_line.parse([f"--config={file}"], prog="train").config.run.dir == str(tmp_path / "old")


def test_a_checkpoint_alone_brings_its_options_but_not_where_to_write(tmp_path: Path) -> None:
    path = tmp_path / "copied.pt"
    path.touch()
    inside = {
        **{"optim": {"lr": 0.25}, "init": "random", "data": {"source": "folder", "root": "/there"}},
        "run": {"dir": "another run", "wandb": "spy", "keep": 3},
    }
    request = command_line.parse([f"--resume={path}"], prog="train", checkpoint_config=lambda _: inside)
    config = request.config
    assert (config.optim.lr, config.init, config.run.keep) == (0.25, "", 3)
    assert (config.run.dir, config.run.wandb) == ("", "") and inside["run"]["dir"] == "another run"
    assert request.notes == [
        f"{path}: its run.dir=another run is not taken",
        f"{path}: its run.wandb=spy is not taken",
        f"{path}: it reads the images of data.root=/there",
        f"options of the run that goes on: {path}",
    ]


@pytest.mark.parametrize("config", [None, "", "# nothing\n"])
@pytest.mark.parametrize("arguments", [["--resume={}"], ["--resume=auto", "--run.dir={}"]])
def test_a_run_that_lost_its_config_has_its_options_in_its_checkpoints(tmp_path, config, arguments):
    """A write that failed once left it empty, and the run was then refused for the demo's batch size."""
    run = write_run(tmp_path / "run")
    (run / "config.yaml").unlink() if config is None else (run / "config.yaml").write_text(config)
    asked = []
    inside = {"optim": {"lr": 0.25}, "run": {"dir": "elsewhere"}}
    argv = [argument.format(run) for argument in arguments]
    request = command_line.parse(argv, prog="train", checkpoint_config=lambda path: asked.append(path) or inside)
    assert (request.config.optim.lr, request.config.run.dir, asked) == (0.25, str(run), [str(run)])


def test_a_crash_in_compiled_code_names_its_place():
    """Where stderr is a file; a notebook's or a closed one is no reason to fail."""
    program = (
        "import contextlib, faulthandler, sys; from scrl_fast.train import main; {}"
        "\nwith contextlib.suppress(SystemExit): main(['--print_config'])"
        "\nprint(faulthandler.is_enabled())"
    )
    for before, expected in (("pass", "True"), ("import io; sys.stderr = io.StringIO()", "False")):
        command = [sys.executable, "-c", program.format(before)]
        result = subprocess.run(command, capture_output=True, text=True, check=True)
        assert result.stdout.splitlines()[-1] == expected
