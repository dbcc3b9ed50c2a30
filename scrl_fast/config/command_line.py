"""From recipes, YAML files and the command line to a `Config`, with errors that name the nearest valid option.

The command line wins over files whatever the order, and a later ``--config`` over an earlier one. Nothing here
imports torch: a misspelt option is answered at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast, overload

import yaml

from scrl_fast.config import kakaobrain as compat
from scrl_fast.config import recipes
from scrl_fast.config.schema import Config
from scrl_fast.config.validation import field_types, in_words
from scrl_fast.errors import UsageError, did_you_mean
from scrl_fast.run import paths as run_folder

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

FLAGS = ("config", "debug", "help", "print_config")
Options = TypeVar("Options")


@dataclasses.dataclass
class Settings:
    """A part of the options from one place: a nested dict, the place's name, and what there is to say about it.

    published: by dotted name, the values of the published implementation's options that these were translated from.
    """

    options: dict[str, Any]
    origin: str = ""
    notes: tuple[str, ...] = ()
    published: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Request:
    """What a command line asks for."""

    config: Config
    notes: list[str]
    print_config: bool


@functools.cache
def option_kinds(cls: type = Config) -> dict[str, Any]:
    """Every option of a dataclass by its dotted name, with its type."""
    kinds: dict[str, Any] = {}
    for name, kind in field_types(cls).items():
        if dataclasses.is_dataclass(kind):
            inner = field_types(cast(type, kind))
            kinds |= {f"{name}.{field}": inner[field] for field in inner}
        else:
            kinds[name] = kind
    return kinds


@functools.cache
def sections(cls: type = Config) -> dict[str, tuple[str, ...]]:
    """The groups of options, each with the names of what it holds."""
    groups: dict[str, tuple[str, ...]] = {}
    for option in option_kinds(cls):
        section, _, field = option.rpartition(".")
        if section:
            groups[section] = (*groups.get(section, ()), field)
    return groups


def parse(argv: Sequence[str], *, prog: str) -> Request:
    """The request of a command line; without ``--config`` the demo recipe is the base.

    Raises UsageError, or SystemExit(0) after printing the help.
    """
    names, tokens, print_config = _split(argv)
    parser = _parser(prog)
    if "--help" in tokens:
        parser.print_help()
        raise SystemExit(0)
    files = [read_settings(name) for name in names]
    published = {name: value for file in files for name, value in file.published.items()}
    tokens, notes = _checked_tokens(tokens, published=published)
    files = files or [_base_settings(tokens)]
    if folder := _folder_of_run(names, files, tokens):
        tokens = [*tokens, f"--run.dir={folder}"]
    config = build(*files, tokens=tokens, parser=parser)
    return Request(config, [note for file in files for note in file.notes] + notes, print_config)


def _base_settings(tokens: Sequence[str]) -> Settings:
    """Without ``--config``: the options of the run that is resumed, else the demo's."""
    found, origin = run_folder.own_options(*(run_folder.value_of(tokens, name) for name in ("resume", "run.dir")))
    if found is None:
        return read_settings(recipes.DEFAULT)
    settings = read_settings(str(found)) if isinstance(found, Path) else Settings(found, origin)
    once = {"resume": "", "init": "", "init_momentum": False}  # what the run was started with, not what goes on
    settings = dataclasses.replace(settings, options=settings.options | once)
    return dataclasses.replace(settings, notes=(*settings.notes, f"options of the run that goes on: {origin}"))


def _folder_of_run(names: Sequence[str], files: Sequence[Settings], tokens: Sequence[str]) -> str:
    """The run folder where the command line does not say it, and the run has been moved or copied since; or ''."""
    resume = run_folder.value_of(tokens, "resume")
    if not resume or run_folder.value_of(tokens, "run.dir"):
        return ""
    if resume != "auto" and Path(resume).exists():
        return str(run_folder.folder_of(resume) or "")
    section = files[-1].options.get("run")
    named = section.get("dir") if isinstance(section, dict) else None
    return run_folder.moved_to(names[-1], str(named)) if names and named else ""


def parse_as(
    cls: type[Options], argv: Sequence[str], *, prog: str, description: str, base: Sequence[Settings] = ()
) -> Options:
    """Options of another command than the trainer, which a dataclass holds like `Config`, from its command line.

    cls: its fields are options, and its fields that are dataclasses are sections; ``--config FILE`` reads YAML.
    base: settings beneath those of files and command line.
    Raises UsageError, or SystemExit(0) after printing the help or, for ``--print_config``, the options.
    """
    names, tokens, print_config = _split(argv)
    parser = _parser(prog, cast(Any, cls), description)
    if "--help" in tokens:
        parser.print_help()
        raise SystemExit(0)
    files = [*base, *(read_settings(name, recipe_names=()) for name in names)]
    options = build(*files, tokens=_checked_tokens(tokens, cls)[0], parser=parser, cls=cls)
    if print_config:
        print(dump(dataclasses.asdict(cast(Any, options))), end="")
        raise SystemExit(0)
    return options


@overload
def build(*files: Settings, tokens: Sequence[str] = (), parser: ArgumentParser | None = None) -> Config: ...


@overload
def build(
    *files: Settings, tokens: Sequence[str] = (), parser: ArgumentParser | None = None, cls: type[Options]
) -> Options: ...


def build(*files: Settings, tokens: Sequence[str] = (), parser: ArgumentParser | None = None, cls: Any = Config) -> Any:
    """Config (or ``cls``) of the defaults, then each of ``files`` in turn, then the command line's ``tokens``.

    Raises UsageError for what is unknown or ill-typed; values out of range raise ValueError.
    """
    parser = parser or _parser("scrl_fast", cls)
    merged: dict[str, Any] = {}
    parsed = None
    for file in files:
        options = checked(file.options, file.origin, cls)
        # one by one, so that an error can name its file
        parsed = _parsed(parser, options, [], f"{file.origin}: " if file.origin else "", cls)
        _merge(merged, options)
    if len(files) != 1 or tokens:
        parsed = _parsed(parser, merged, tokens, "--", cls)
    values = parser.instantiate(parsed)
    return cls(**{field.name: values[field.name] for field in dataclasses.fields(cls)})


def read_settings(name: str, recipe_names: Sequence[str] | None = None) -> Settings:
    """The options of a recipe (by name) or a YAML file (by path), ours or the published implementation's.

    recipe_names: those that may be asked for, by default all; another command than the trainer has none.

    Raises UsageError when there is neither, and for YAML that cannot be read or says something twice.
    """
    known = recipes.names() if recipe_names is None else recipe_names
    path = recipes.FOLDER / f"{name}.yaml" if name in known else Path(name)
    if path.is_dir():
        raise UsageError(f"--config={name} is a folder; for the config of a run give {path / 'config.yaml'}")
    try:
        document = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except FileNotFoundError:
        if not known:
            raise UsageError(f"--config={name}: there is no such file") from None
        hint = did_you_mean(name, known)
        raise UsageError(f"--config={name} is neither a recipe ({', '.join(known)}) nor a file{hint}") from None
    except yaml.MarkedYAMLError as error:
        line = f" line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UsageError(f"{path}{line}: {error.problem or error.context}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not YAML: {error}") from error
    if document is None:
        document = {}
    if not isinstance(document, dict):
        raise UsageError(f"{path}: must hold options such as 'train: {{epochs: 3}}', not a {type(document).__name__}")
    if compat.is_published(document):
        options, notes = compat.translate(document, str(path))
        return Settings(options, str(path), notes, compat.leaves(document))
    return Settings(document, str(path))


def dump(options: dict[str, Any]) -> str:
    """YAML of nested options, in their order, one a line."""
    return yaml.dump(options, Dumper=_Dumper, sort_keys=False, default_flow_style=False, width=120, allow_unicode=True)


def checked(options: dict[str, Any], origin: str = "", cls: type = Config) -> dict[str, Any]:
    """The same options, dotted names nested, once each is known and has a value. Raises UsageError."""
    where = f"{origin}: " if origin else ""
    nested: dict[str, Any] = {}
    for name, value in _leaves(options, cls):
        if name in sections(cls):
            inner = ", ".join(sections(cls)[name])
            raise UsageError(f"{where}'{name}' must hold options ({inner}), not {_shown(value)}")
        if name not in option_kinds(cls):
            raise UsageError(f"{where}unknown option '{name}'{did_you_mean(name, option_kinds(cls))}")
        if value is None:
            raise UsageError(f"{where}'{name}' has no value: give one, or remove the line")
        section, _, field = name.rpartition(".")
        (nested.setdefault(section, {}) if section else nested)[field] = value
    return nested


def _leaves(options: dict[Any, Any], cls: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in options.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and name not in option_kinds(cls):
            if value or name in sections(cls):
                yield from _leaves(value, cls, f"{name}.")
            else:
                yield name, value
        else:
            yield name, value


def _merge(base: dict[str, Any], more: dict[str, Any]) -> None:
    for name, value in more.items():
        if isinstance(value, dict):
            _merge(base.setdefault(name, {}), value)
        else:
            base[name] = value


def _split(argv: Sequence[str]) -> tuple[list[str], list[str], bool]:
    """The names after ``--config``, the other tokens, and whether ``--print_config`` is among them."""
    names: list[str] = []
    tokens: list[str] = []
    rest = iter(argv)
    for token in rest:
        if token == "--config":
            name = next(rest, "")
            if not name or name.startswith("--"):
                raise UsageError(f"--config needs a recipe ({', '.join(recipes.names())}) or a file")
            names.append(name)
        elif token.startswith("--config="):
            names.append(token.partition("=")[2])
        elif token in ("-h", "--help"):
            tokens.append("--help")
        elif token not in ("--debug", "--print_config"):
            tokens.append(token)
    return names, tokens, "--print_config" in argv


def _checked_tokens(
    tokens: Sequence[str], cls: type = Config, *, published: dict[str, Any] | None = None
) -> tuple[list[str], list[str]]:
    """The tokens with every option known and spelled our way, and notes on what was translated.

    published: what the files gave of the published implementation's options, by dotted name.
    """
    given = dict(published or {})
    result: list[str] = []
    notes: list[str] = []
    translated = cls is Config  # the published implementation's spellings are those of its trainer
    rest = iter(tokens)
    for token in rest:
        if not token.startswith("--"):
            result.append(token)
            continue
        spelled, equals, value = token[2:].partition("=")
        name = spelled.replace("/", ".")
        if name in option_kinds(cls):
            result.append(f"--{name}{equals}{value}")
        elif translated and name in compat.FIELDS:
            if not equals:
                value = "true" if name in compat.SWITCHES else next(rest, "--")
            if value.startswith("--"):
                raise UsageError(f"--{spelled} needs a value, as in --{spelled}=...")
            options, said = compat.translate_flag(name, value, given)
            result += [f"--{option}={_shown(new)}" for option, new in options.items()]
            notes += said
        elif name in sections(cls):
            raise UsageError(
                f"--{name} holds several options: {', '.join(f'--{name}.{x}' for x in sections(cls)[name])}"
            )
        else:
            known = (
                [f.replace(".", "/") for f in compat.FIELDS]
                if translated and "/" in spelled
                else [*option_kinds(cls), *FLAGS]
            )
            raise UsageError(f"unknown option '--{spelled}'{did_you_mean(spelled, known)}")
    return result, notes


def _shown(value: Any) -> str:
    if isinstance(value, str):
        return value
    return yaml.dump(value, Dumper=_Dumper, default_flow_style=True, width=1000).strip().removesuffix("\n...")


DESCRIPTION = (
    "Without --config it runs the demo recipe, or with --resume what that run was; with it, the defaults below hold "
    "for all that the file leaves out. "
    "Options on the command line win over those of files."
)


@functools.cache  # making one takes longer than all that a configuration is parsed for
def _parser(prog: str, cls: type = Config, description: str = DESCRIPTION) -> ArgumentParser:
    import jsonargparse

    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    source = "RECIPE|FILE" if cls is Config else "FILE"
    parser = jsonargparse.ArgumentParser(
        prog=prog,
        usage=f"{prog} [--config {source}]... [--SECTION.OPTION=VALUE]...",
        description=description,
        exit_on_error=False,
        allow_abbrev=False,
    )
    known = f"recipe ({', '.join(recipes.names())}) or YAML file" if cls is Config else "YAML file"
    parser.add_argument("--config", metavar=source, help=f"{known}; may be repeated, the last one wins")
    parser.add_argument("--print_config", action="store_true", help="print the resulting config as YAML and stop")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_class_arguments(cls, None)
    for action in parser._actions:
        if action.dest in sections(cls):
            action.help = argparse.SUPPRESS  # `--train FILE` would be a second way to say `--config FILE`
    return parser


def _parsed(parser: ArgumentParser, options: dict[str, Any], tokens: Sequence[str], prefix: str, cls: type) -> Any:
    """jsonargparse's namespace; ``prefix`` stands in front of the option that an error names."""
    from jsonargparse import ArgumentError

    try:
        values = parser.parse_object(options)
        return parser.parse_args(list(tokens), namespace=values) if tokens else values
    except ArgumentError as error:
        raise UsageError(_friendly(str(error), prefix, cls)) from error


def _friendly(message: str, prefix: str, cls: type) -> str:
    """jsonargparse's message in the words of this house."""
    if match := re.search(r'key "([^"]+)".*?(?:Got value: (.*))?$', message, re.DOTALL):
        name, value = match.groups()
        if name in option_kinds(cls):
            return f"{prefix}{name}={value}: must be {in_words(option_kinds(cls)[name])}"
    if match := re.search(r"argument (\S+): expected one argument", message):
        return f"{match[1]} needs a value, as in {match[1]}=..."
    if match := re.search(r"[Uu]nrecognized arguments: (.*)", message):
        return f"what is '{match[1]}'? An option looks like --train.epochs=3"
    return " ".join(message.split())


class _Loader(yaml.SafeLoader):
    """Safe YAML in which a key may stand once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen and isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, f"'{key.value}' stands twice", key.start_mark)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else "")
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Blocks for sections, ``[a, b]`` for lists."""


def _flow_list(dumper: yaml.SafeDumper, value: Any) -> yaml.Node:
    return dumper.represent_sequence("tag:yaml.org,2002:seq", value, flow_style=True)


_Dumper.add_representer(list, _flow_list)
_Dumper.add_representer(tuple, _flow_list)
