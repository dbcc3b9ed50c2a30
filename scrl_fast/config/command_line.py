"""From a command line to a dataclass of options, with errors that name the nearest valid option.

The command line wins over files whatever the order, and a later ``--config`` over an earlier one. Nothing here
imports torch: a misspelt option is answered at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, NoReturn, TypeVar, cast, get_args, get_origin

from scrl_fast.config import kakaobrain
from scrl_fast.config.files import (
    DEFAULT_RECIPE,
    TRAINER_DESCRIPTION,
    Settings,
    build,
    make_parser,
    option_kinds,
    read_settings,
    recipe_names,
    renamed_options,
    renaming_notes,
    sections,
    under_present_names,
)
from scrl_fast.config.run_folder import CHECKPOINTS, CONFIG, folder_of, moved_to
from scrl_fast.config.schema import Config
from scrl_fast.config.validation import clean_path, to_plain
from scrl_fast.config.yaml_text import as_yaml, dump, shortened
from scrl_fast.errors import UsageError, did_you_mean, tell

DEBUG_NOTE = (
    "--debug  ->  --train.max_steps=4: two epochs of two batches in the published implementation; here it shows the "
    "traceback of an error as well"
)
FLAGS = ("config", "debug", "help", "print_config")
Options = TypeVar("Options")
ReadConfig = Callable[[str], dict[str, Any]]


@dataclasses.dataclass
class Request(Generic[Options]):
    """What a command line asks for.

    config: the checked options. notes: lines for the user. print_config: only print the options.
    named: by `parse_as`, dotted names of the options that files or the command line give.
    """

    config: Options
    notes: list[str]
    print_config: bool
    named: frozenset[str] = frozenset()

    def options(self) -> Options:
        """The options, once the notes are on stderr. Raises SystemExit(0) after printing them for --print_config."""
        if os.environ.get("RANK", "0") == "0":
            for note in self.notes:
                tell(note)
        if self.print_config:
            print(dump(to_plain(self.config)), end="")
            raise SystemExit(0)
        return self.config


def parse(argv: Sequence[str], *, prog: str, checkpoint_config: ReadConfig | None = None) -> Request[Config]:
    """The trainer's command line; without ``--config`` the demo recipe, or the run that is resumed, is the base.

    checkpoint_config: reads the options out of a checkpoint, or of the newest one of a run folder, for a run whose
        config file is not there.
    Raises UsageError, or SystemExit(0) after printing the help.
    """
    recipes = recipe_names()
    names, tokens, print_config = _split(argv, recipes)
    parser = make_parser(prog, Config, TRAINER_DESCRIPTION, recipes)
    _help_if_asked(parser, tokens)
    files = [read_settings(name, recipes) for name in names]
    published = {name: value for file in files for name, value in file.published.items()}
    tokens, notes = _checked_tokens(tokens, Config, published)
    if "--debug" in argv and published:
        tokens, notes = ["--train.max_steps=4", *tokens], [*notes, DEBUG_NOTE]
    files = files or [_base_settings(tokens, checkpoint_config)]
    if folder := _folder_of_run(names, files, tokens):
        tokens = [*tokens, f"--run.dir={folder}"]
    config = build(Config, *files, tokens=tokens, parser=parser)
    return Request(config, [*_notes_of(Config, files), *notes], print_config)


def parse_as(
    cls: type[Options],
    argv: Sequence[str],
    *,
    prog: str,
    description: str,
    base: Sequence[Settings] = (),
    recipes: Mapping[str, Settings] | None = None,
) -> Request[Options]:
    """The command line of another command than the trainer.

    cls: a dataclass whose fields are options, and whose fields that are dataclasses are sections.
    base: settings beneath those of files and command line. recipes: settings that ``--config`` takes by name.
    Raises UsageError, or SystemExit(0) after printing the help.
    """
    recipes = recipes or {}
    names, tokens, print_config = _split(argv, tuple(recipes))
    parser = make_parser(prog, cast(Any, cls), description, tuple(recipes))
    _help_if_asked(parser, tokens)
    given = [_recipe_or_file(name, recipes) for name in names]
    files = [*base, *given]
    tokens, notes = _checked_tokens(tokens, cls)
    config = build(cls, *files, tokens=tokens, parser=parser)
    options = {token[2:].partition("=")[0] for token in tokens if token.startswith("--")}
    options |= {name for each in given for name in _dotted(under_present_names(cls, each.options))}
    return Request(config, [*_notes_of(cls, files), *notes], print_config, frozenset(options))


def _dotted(options: Mapping[str, Any], section: str = "") -> Iterator[str]:
    for name, value in options.items():
        yield from _dotted(value, f"{section}{name}.") if isinstance(value, dict) else (f"{section}{name}",)


def _recipe_or_file(name: str, recipes: Mapping[str, Settings]) -> Settings:
    """The settings that ``--config`` names. Raises UsageError, with the recipe that a misspelt name may mean."""
    if name in recipes:
        return recipes[name]
    hint = "" if Path(clean_path(name)).exists() else did_you_mean(name, recipes)
    if hint:
        raise UsageError(f"--config={name} is neither a recipe ({', '.join(recipes)}) nor a file{hint}")
    return read_settings(name)


def take_task(argv: list[str], tasks: Mapping[str, str], usage: str) -> str:
    """The task, taken out of the arguments.

    tasks: each with a line about it. usage: the line that ``--help`` shows in front of them.
    Raises UsageError for none or an unknown one, SystemExit(0) after printing the tasks for --help alone.
    """
    known = ", ".join(tasks)
    named = next((place for place, word in enumerate(argv) if word != "--debug"), None)
    if named is None or argv[named].startswith("-"):
        if {"--help", "-h"} & set(argv):
            width = max(map(len, tasks))
            print(f"usage: {usage}\n\ntasks (each has its own --help):")
            print("\n".join(f"  {name:{width}}  {line}".rstrip() for name, line in tasks.items()))
            raise SystemExit(0)
        raise UsageError(f"the task comes first: {usage.partition(' [')[0]}, one of {known}")
    task = argv.pop(named)
    if task not in tasks:
        near = did_you_mean(task.replace("_", "-"), tasks) or did_you_mean(task, tasks)
        raise UsageError(f"unknown task '{task}'{near or f'; there are {known}'}")
    return task


def lists_from_commas(tokens: Sequence[str], cls: type) -> list[str]:
    """The arguments with values like ``--shares=0.1,1`` as the lists that the parser takes.

    cls: the options. A single value is a list where the option takes any number of them. Square brackets are taken as
    well. The value of an option that is a text or a list is left as it is.
    Raises UsageError for an empty part.
    """
    lists = {f"--{name}": get_args(kind) for name, kind in option_kinds(cls).items() if get_origin(kind) is tuple}
    result: list[str] = []
    before = ""  # a flag of a list whose value is the next word
    for word in tokens:
        if before and word.startswith("--"):
            result.append(before)  # without a value, which the parser refuses
            before = ""
        flag, equals, value = (before, "=", word) if before else word.partition("=")
        before = flag if flag in lists and not equals else ""
        if before:
            continue
        if flag in lists and value and not value.startswith("[") and ("," in value or lists[flag][-1] is Ellipsis):
            parts = [part.strip() for part in value.split(",")]
            if "" in parts:
                raise UsageError(
                    f"{flag[2:]}={value}: must not hold an empty {'name' if lists[flag][0] is str else 'value'}"
                )
            value = json.dumps(parts, ensure_ascii=False) if lists[flag][0] is str else f"[{','.join(parts)}]"
        result.append(f"{flag}{equals}{value}")
    return [*result, before] if before else result


class CommandParser(argparse.ArgumentParser):
    """Command line of a command with few options: ``--debug`` everywhere, mistakes as UsageError."""

    def __init__(self, *, prog: str, description: str) -> None:
        super().__init__(prog=prog, description=description, allow_abbrev=False)
        self.add_argument("--debug", action="store_true", help="show the traceback of an error")

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """The values. Raises UsageError naming what is wrong, SystemExit(0) after printing the help."""
        known = [flag for action in self._actions for flag in action.option_strings]
        for word in argv:
            name = word.partition("=")[0]
            if name.startswith("--") and name != "--" and name not in known:
                raise UsageError(f"unknown option '{name}'{did_you_mean(name, known)}")
        return self.parse_args(argv)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see --help)")


def last_flag_value(tokens: Sequence[str], option: str) -> str:
    """The value that ``--option=value`` or ``--option value`` gave last among the tokens; '' without one."""
    value = ""
    for place, token in enumerate(tokens):
        if token.startswith(f"--{option}="):
            value = token.partition("=")[2]
        elif token == f"--{option}" and place + 1 < len(tokens):
            value = tokens[place + 1]
    return value


def load_run_config(resume: str, run_dir: str, checkpoint_config: ReadConfig | None = None) -> Settings | None:
    """The options of the run that ``resume`` goes on with, or None where no run can be told.

    They are the base of a resumed run for which no ``--config`` was given: the demo's would make another run of it.
    """
    folder = folder_of(resume) if resume not in ("", "auto") else Path(run_dir) if resume and run_dir else None
    if folder is not None and (folder / CONFIG).is_file():
        settings = read_settings(str(folder / CONFIG))
        if settings.options:  # else it was lost to a full disk; each checkpoint holds the options as well
            notes = (*settings.notes, *_reaches(settings.options, settings.origin))
            return dataclasses.replace(settings, notes=notes)
    outside = Path(resume).is_dir() and folder is None  # a folder of checkpoints that were copied away
    checkpoint = resume if resume not in ("", "auto") and (outside or Path(resume).is_file()) else ""
    if not checkpoint and folder is not None and any((folder / CHECKPOINTS).glob("*.pt")):
        checkpoint = str(folder)
    if checkpoint and checkpoint_config is not None:
        return _of_checkpoint(checkpoint_config(checkpoint), checkpoint)
    return None


def _of_checkpoint(options: dict[str, Any], origin: str) -> Settings:
    """The options in a checkpoint without its run's config, but those by which the file would choose where to write."""
    if not isinstance(options, dict):
        raise UsageError(f"{origin}: its options are a {type(options).__name__}, not a dict")
    options = {name: dict(value) if isinstance(value, dict) else value for name, value in options.items()}
    run = options.get("run")
    taken = {name: run.pop(name, "") for name in ("dir", "wandb")} if isinstance(run, dict) else {}
    notes = [f"{origin}: its run.{name}={value} is not taken" for name, value in taken.items() if value]
    return Settings(options, origin, (*notes, *_reaches(options, origin)))


def _reaches(options: Mapping[str, Any], origin: str) -> Iterator[str]:
    """A line for what a run from elsewhere would read, and for where it would send its metrics."""
    data, run = options.get("data"), options.get("run")
    if isinstance(data, dict) and data.get("root"):
        yield f"{origin}: it reads the images of data.root={shortened(data['root'])}"
    if isinstance(run, dict) and run.get("wandb"):
        yield f"{origin}: it sends options and metrics to W&B's project run.wandb={shortened(run['wandb'])}"


def _base_settings(tokens: Sequence[str], checkpoint_config: ReadConfig | None) -> Settings:
    """Without ``--config``: the options of the run that is resumed, else the demo's."""
    resume, run_dir = (clean_path(last_flag_value(tokens, name)) for name in ("resume", "run.dir"))
    settings = load_run_config(resume, run_dir, checkpoint_config)
    if settings is None:
        return read_settings(DEFAULT_RECIPE, recipe_names())
    once = {"resume": "", "init": "", "init_momentum": False}  # how the run was started, not how it goes on
    notes = (*settings.notes, f"options of the run that goes on: {settings.origin}")
    return dataclasses.replace(settings, options=settings.options | once, notes=notes)


def _folder_of_run(names: Sequence[str], files: Sequence[Settings], tokens: Sequence[str]) -> str:
    """The run folder where the command line does not say it, and the run has been moved or copied since; or ''."""
    resume = clean_path(last_flag_value(tokens, "resume"))
    if not resume or last_flag_value(tokens, "run.dir"):
        return ""
    if resume != "auto" and Path(resume).exists():
        return str(folder_of(resume) or "")
    section = files[-1].options.get("run")
    named = section.get("dir") if isinstance(section, dict) else None
    return moved_to(clean_path(names[-1]), str(named)) if names and named else ""


def _notes_of(cls: type, files: Iterable[Settings]) -> Iterator[str]:
    for file in files:
        yield from file.notes
        yield from renaming_notes(cls, file.options, file.origin)


def _help_if_asked(parser: Any, tokens: Sequence[str]) -> None:
    if "--help" in tokens:
        parser.print_help()
        raise SystemExit(0)


def _split(argv: Sequence[str], recipes: Sequence[str] = ()) -> tuple[list[str], list[str], bool]:
    """The names after ``--config``, the other tokens, and whether ``--print_config`` is among them."""
    names: list[str] = []
    tokens: list[str] = []
    rest = iter(argv)
    for token in rest:
        if token == "--config":
            name = next(rest, "")
            if not name or name.startswith("--"):
                wanted = f"a recipe ({', '.join(recipes)}) or a file" if recipes else "a file"
                raise UsageError(f"--config needs {wanted}")
            names.append(name)
        elif token.startswith("--config="):
            names.append(token.partition("=")[2])
        elif token in ("-h", "--help"):
            tokens.append("--help")
        elif token not in ("--debug", "--print_config"):
            tokens.append(token)
    return names, tokens, "--print_config" in argv


def _checked_tokens(
    tokens: Sequence[str], cls: type, published: dict[str, Any] | None = None
) -> tuple[list[str], list[str]]:
    """The tokens with every option known and under its present name, and notes on what was translated.

    published: the values that files gave to the published implementation's options, by dotted name, to which those of
    its flags are added; None where its spellings are not taken.
    """
    given = {} if published is None else published
    result: list[str] = []
    notes: list[str] = []
    rest = iter(tokens)
    for token in rest:
        if not token.startswith("--"):
            result.append(token)
            continue
        spelled, equals, value = token[2:].partition("=")
        name = spelled.replace("/", ".")
        if name in option_kinds(cls):
            result.append(f"--{name}{equals}{value}")
        elif new := renamed_options(cls).get(name):
            result.append(f"--{new}{equals}{value}")
            notes.append(f"--{name} is now called --{new}")
        elif published is not None and name in kakaobrain.FIELDS:
            options, said = _translated(spelled, value if equals else None, rest, given)
            result += options
            notes += said
        else:
            raise _unknown(spelled, cls, published is not None)
    kakaobrain.check_scale(given)
    return lists_from_commas(result, cls), notes


def _translated(
    spelled: str, value: str | None, rest: Iterator[str], given: dict[str, Any]
) -> tuple[list[str], list[str]]:
    """Our tokens for a flag of the published implementation, and notes; its value may be the next of ``rest``."""
    name = spelled.replace("/", ".")
    if value is None:
        value = "true" if name in kakaobrain.SWITCHES else next(rest, "--")
    if value.startswith("--"):
        raise UsageError(f"--{spelled} needs a value, as in --{spelled}=...")
    options, notes = kakaobrain.translate_flag(name, value, given)
    return [f"--{option}={as_yaml(new)}" for option, new in options.items()], notes


def _unknown(spelled: str, cls: type, trainer: bool) -> UsageError:
    if spelled in sections(cls):
        inner = ", ".join(f"--{spelled}.{field}" for field in sections(cls)[spelled])
        return UsageError(f"--{spelled} holds several options: {inner}")
    known = [*option_kinds(cls), *FLAGS]
    if trainer and "/" in spelled:
        known = [field.replace(".", "/") for field in kakaobrain.FIELDS]
    return UsageError(f"unknown option '--{spelled}'{did_you_mean(spelled, known)}")
