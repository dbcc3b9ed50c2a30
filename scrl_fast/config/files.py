"""Options in files: recipes, YAML of ours and of the published implementation, and what becomes of them.

Every function takes the dataclass that holds the options, so that the commands share one way: its fields are options,
and its fields that are dataclasses are sections. A class attribute ``renamed`` may map old dotted names to new ones.
Nothing here imports torch.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from scrl_fast.config import kakaobrain
from scrl_fast.config.backbones import check_code_is_asked_for
from scrl_fast.config.validation import clean_path, field_types, type_description
from scrl_fast.config.yaml_text import MAX_DEPTH, as_yaml, is_small, read_yaml, shortened
from scrl_fast.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

Options = TypeVar("Options")

RECIPES = Path(__file__).parent / "recipes"
DEFAULT_RECIPE = "demo"

TRAINER_DESCRIPTION = (
    "Without --config it runs the demo recipe, or with --resume what that run was; with it, the defaults below hold "
    "for all that the file leaves out. "
    "Options on the command line win over those of files."
)


@dataclasses.dataclass
class Settings:
    """A part of the options from one place: a nested dict, the place's name, and notes for the user about it.

    published: by dotted name, the values of the published implementation's options that these were translated from.
    """

    options: dict[str, Any]
    origin: str = ""
    notes: tuple[str, ...] = ()
    published: dict[str, Any] = dataclasses.field(default_factory=dict)


def recipe_names() -> tuple[str, ...]:
    """The recipes' names, as ``--config`` takes them."""
    return tuple(sorted(path.stem for path in RECIPES.glob("*.yaml")))


@functools.cache
def option_kinds(cls: type) -> dict[str, Any]:
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
def sections(cls: type) -> dict[str, tuple[str, ...]]:
    """The groups of options, each with the names of its options."""
    groups: dict[str, tuple[str, ...]] = {}
    for option in option_kinds(cls):
        section, _, field = option.rpartition(".")
        if section:
            groups[section] = (*groups.get(section, ()), field)
    return groups


def build(
    cls: type[Options], *settings: Settings, tokens: Sequence[str] = (), parser: ArgumentParser | None = None
) -> Options:
    """Options of the defaults, then each of ``settings`` in turn, then the command line's ``tokens``.

    Raises UsageError naming an option that is unknown, ill-typed or out of range.
    """
    parser = parser or make_parser("scrl_fast", cast(Any, cls))
    merged: dict[str, Any] = {}
    parsed = None
    for part in settings:
        options = checked(cls, part.options, part.origin)
        # one by one, so that an error can name its file
        parsed = _parsed(parser, options, [], f"{part.origin}: " if part.origin else "", cls)
        _merge(merged, options)
    if any(part.origin for part in settings):
        check_code_is_asked_for(merged, tokens, [part.origin for part in settings])
    if len(settings) != 1 or tokens:
        parsed = _parsed(parser, merged, tokens, "--", cls)
    values = parser.instantiate(parsed)
    return cls(**{name: values[name] for name in field_types(cls)})


def read_settings(name: str, recipes: Sequence[str] = ()) -> Settings:
    """The options of a recipe (by name) or a YAML file (by path), ours or the published implementation's.

    recipes: the names that are recipes. Only the trainer has any; it alone takes the published implementation's YAML.
    Raises UsageError when there is neither, and for YAML that cannot be read or gives a key twice.
    """
    path = RECIPES / f"{name}.yaml" if name in recipes else Path(clean_path(name))
    if path.is_dir():
        raise UsageError(f"--config={name} is a folder; for the config of a run give {path / 'config.yaml'}")
    try:
        document = read_yaml(path)
    except FileNotFoundError:
        if not recipes:
            raise UsageError(f"--config={name}: there is no such file") from None
        hint = did_you_mean(name, recipes)
        raise UsageError(f"--config={name} is neither a recipe ({', '.join(recipes)}) nor a file{hint}") from None
    if document is None:
        document = {}
    if not isinstance(document, dict):
        raise UsageError(f"{path}: must hold options such as 'train: {{epochs: 3}}', not a {type(document).__name__}")
    if recipes and kakaobrain.is_published(document):
        options, notes = kakaobrain.translate(document, str(path))
        return Settings(options, str(path), notes, kakaobrain.leaves(document))
    return Settings(document, str(path))


def checked(cls: type, options: dict[str, Any], origin: str = "") -> dict[str, Any]:
    """The same options nested and under their present names, once each is known and has a value. Raises UsageError."""
    where = f"{origin}: " if origin else ""
    nested: dict[str, Any] = {}
    for given, value in _leaves(options, cls):
        name = renamed_options(cls).get(given, given)
        if name in sections(cls) and is_small(value):
            inner = ", ".join(sections(cls)[name])
            raise UsageError(f"{where}'{name}' must hold options ({inner}), not {shortened(as_yaml(value))}")
        if name not in option_kinds(cls):
            raise UsageError(f"{where}unknown option '{shortened(name)}'{did_you_mean(name, option_kinds(cls))}")
        if not is_small(value):
            raise UsageError(f"{where}'{name}' holds more than an option can")
        if value is None:
            raise UsageError(f"{where}'{name}' has no value: give one, or remove the line")
        section, _, field = name.rpartition(".")
        group = nested.setdefault(section, {}) if section else nested
        if field in group:
            raise UsageError(f"{where}'{name}' stands twice, as '{given}' as well")
        group[field] = value
    return nested


def renamed_options(cls: type) -> dict[str, str]:
    """Old dotted names of options and their present ones."""
    return getattr(cls, "renamed", {})


def under_present_names(cls: type, options: dict[str, Any]) -> dict[str, Any]:
    """A copy of nested options, as a checkpoint of an earlier release holds them, under their present names."""
    copy = {name: dict(value) if isinstance(value, dict) else value for name, value in options.items()}
    for old, new in renamed_options(cls).items():
        (section, field), (new_section, new_field) = (_split_name(name) for name in (old, new))
        group = copy.get(section) if section else copy
        if not isinstance(group, dict) or field not in group:
            continue
        target = copy.setdefault(new_section, {}) if new_section else copy
        if isinstance(target, dict):
            target[new_field] = group.pop(field)
    return copy


def _split_name(name: str) -> tuple[str, str]:
    """Section, or '', and field of a dotted name."""
    section, _, field = name.rpartition(".")
    return section, field


def renaming_notes(cls: type, options: dict[str, Any], origin: str) -> list[str]:
    """A line for every option that these settings give under an old name."""
    new = renamed_options(cls)
    return [f"{origin}: {name} is now called {new[name]}" for name, _ in _leaves(options, cls) if name in new]


def _leaves(options: dict[Any, Any], cls: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in options.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and name not in option_kinds(cls) and name.count(".") < MAX_DEPTH:
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


@functools.cache  # making one takes longer than all that a configuration is parsed for
def make_parser(prog: str, cls: type, description: str = "", recipes: tuple[str, ...] = ()) -> ArgumentParser:
    """The parser of a command whose options a dataclass holds; its docstrings are the help."""
    import jsonargparse

    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    source = "RECIPE|FILE" if recipes else "FILE"
    parser = jsonargparse.ArgumentParser(
        prog=prog,
        usage=f"{prog} [--config {source}]... [--SECTION.OPTION=VALUE]...",
        description=description,
        exit_on_error=False,
        allow_abbrev=False,
    )
    known = f"recipe ({', '.join(recipes)}) or YAML file" if recipes else "YAML file"
    parser.add_argument("--config", metavar=source, help=f"{known}; may be repeated, the last one wins")
    parser.add_argument("--print_config", action="store_true", help="print the resulting config as YAML and stop")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_class_arguments(cls, None)
    for action in parser._actions:
        if action.dest in sections(cls):
            action.help = argparse.SUPPRESS  # `--train FILE` would be a second way to say `--config FILE`
    return parser


def _parsed(
    parser: ArgumentParser, options: dict[str, Any], tokens: Sequence[str], prefix: str, cls: type
) -> Namespace:
    """jsonargparse's namespace; ``prefix`` stands in front of the option that an error names."""
    from jsonargparse import ArgumentError

    try:
        values = parser.parse_object(options)
        return parser.parse_args(list(tokens), namespace=values) if tokens else values
    except ArgumentError as error:
        raise UsageError(_reworded(str(error), prefix, cls)) from error


def _reworded(message: str, prefix: str, cls: type) -> str:
    """jsonargparse's message in the words of this package."""
    if match := re.search(r'key "([^"]+)".*?(?:Got value: (.*))?$', message, re.DOTALL):
        name, value = match.groups()
        if given := re.search(r"\n *Given value: (.*)$", message, re.DOTALL):  # of a union, with an error for each type
            value = given[1]
        if name in option_kinds(cls):
            return f"{prefix}{name}={shortened(value)}: must be {type_description(option_kinds(cls)[name])}"
    if match := re.search(r"argument (\S+): expected one argument", message):
        return f"{match[1]} needs a value, as in {match[1]}=..."
    if match := re.search(r"[Uu]nrecognized arguments: (.*)", message):
        return f"what is '{match[1]}'? An option looks like --train.epochs=3"
    return shortened(message, 400)
