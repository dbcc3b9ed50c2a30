"""YAML from elsewhere is data: bombs, devices and odd tags are refused by name, quickly and in little memory."""

from __future__ import annotations

import os
import resource
import subprocess
import sys

import pytest

from scrl_fast.config.command_line import parse
from scrl_fast.config.files import Settings, build, read_settings
from scrl_fast.config.schema import Config
from scrl_fast.config.validation import clean_path
from scrl_fast.config.yaml_text import MAX_BYTES, as_yaml, dump, parse_yaml, read_text, read_yaml, shortened
from scrl_fast.errors import UsageError


def laughs(levels: int, times: int = 9) -> str:
    """A list of lists of lists ..., each level the one before it ``times`` times, in a few hundred bytes."""
    text = "a0: &a0 [" + ", ".join(["lol"] * times) + "]\n"
    for k in range(1, levels):
        text += f"a{k}: &a{k} [" + ", ".join([f"*a{k - 1}"] * times) + "]\n"
    return text


def nested_laughs() -> str:
    """The one whose message once took 40 s and 2.7 GB."""
    text = "&a [lol,lol,lol,lol,lol,lol,lol,lol,lol]"
    for letter in "bcdefghi":
        text = f"&{letter} [{text}," + ",".join([f"*{chr(ord(letter) - 1)}"] * 8) + "]"
    return f"data:\n  root: {text}\n"


def merged_laughs(levels: int) -> str:
    text = "m0: &m0 {x: 1}\n"
    for k in range(1, levels):
        text += f"m{k}: &m{k} {{<<: [" + ", ".join([f"*m{k - 1}"] * 9) + "]}\n"
    return text


def long_chain(levels: int) -> str:
    """Aliases of aliases: shallow as written, deep as meant."""
    return "a0: &a0 [1]\n" + "".join(f"a{k}: &a{k} [*a{k - 1}]\n" for k in range(1, levels))


BAD = {
    "laughs": (laughs(9), "aliases stand for more than 10000 values"),
    "nested laughs": (nested_laughs(), "more than 10000 values"),
    "merged laughs": (merged_laughs(9), "aliases stand for more than 10000 values"),
    "a chain of aliases": (long_chain(2000), "aliases stand for more than 10000 values"),
    "deep lists": ("x: " + "[" * 100_000, "nested more than 16 deep in line 1"),
    "deep mappings": ("".join(" " * k + "a:\n" for k in range(600)), "nested more than 16 deep in line 17"),
    "deep flow mappings": ("x: " + "{a: " * 50_000, "nested more than 16 deep"),
    "itself": ("a: &a [*a]", "line 1 names what it lies in"),
    "itself in a merge": ("a: &a {<<: *a}", "line 1 names what it lies in"),
    "many values": ("x: [" + "1," * 20_000 + "]", "more than 10000 values"),
    "a long number": (f"train: {{seed: {'9' * 5000}}}", "line 1: a number of 5000 digits"),
    "a long hexadecimal number": (f"train: {{seed: 0x{'f' * 5000}}}", "line 1: a number of 5002 digits"),
    "a number of base 60": (f"train: {{seed: {'1:' * 3000}1}}", "line 1: a number of 6001 digits"),
    "an impossible day": ("run: {dir: 2026-02-31}", "a value that YAML cannot read: day is out of range"),
    "an empty number": ("a: !!int ''", "a value that YAML cannot read"),
    "a truth that is none": ("a: !!bool 7", "a value that YAML cannot read"),
    "a float that is none": ("a: !!float x", "a value that YAML cannot read"),
    "a time that is none": ("a: !!timestamp x", "a value that YAML cannot read"),
    "binary that is none": ("a: !!binary '\u00e9'", "failed to convert|cannot read"),
    "a list as a key": ("? [1, 2]\n: 3\n", "line 1: found unhashable key"),
    "a mapping as a key": ("? {a: 1}\n: 3\n", "line 1: found unhashable key"),
    "code": ("a: !!python/object/apply:os.system ['true']", "line 1: could not determine a constructor"),
    "a name": ("a: !!python/name:os.system", "line 1: could not determine a constructor"),
    "two documents": ("a: 1\n---\nb: 2\n", "line 2: but found another document"),
    "an unknown alias": ("a: *b", "line 1: found undefined alias"),
    "a tab": ("a:\n\tb: 1", "line 2: found character"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_yaml_is_refused_by_name(name):
    text, message = BAD[name]
    with pytest.raises(UsageError, match=message) as caught:
        parse_yaml(text, "some.yaml")
    assert str(caught.value).startswith("some.yaml") and len(str(caught.value)) < 300


def test_all_of_them_take_little_time_and_memory(tmp_path):
    """By the processor's own clock, in a process that may take 1 GB."""
    for number, (text, _) in enumerate(BAD.values()):
        (tmp_path / f"{number}.yaml").write_text(text)
    program = (
        "import resource, sys, pathlib\n"
        "from scrl_fast.config.command_line import parse\n"
        "for path in sorted(pathlib.Path(sys.argv[1]).iterdir()):\n"
        "    try: parse([f'--config={path}'], prog='x')\n"
        "    except ValueError as error: assert str(path) in str(error) and len(str(error)) < 500, error\n"
        "    else: raise SystemExit(f'{path} was taken')\n"
        "spent = resource.getrusage(resource.RUSAGE_SELF)\n"
        "assert spent.ru_utime < 60, spent\n"
    )
    limit = 1 << 30
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", None),
        ("# nothing\n", None),
        (
            "base: &b {seed: 3}\ntrain:\n  <<: *b\n  epochs: 2\n",
            {"base": {"seed": 3}, "train": {"seed": 3, "epochs": 2}},
        ),
        ("a: &x [1, 2]\nb: *x\n", {"a": [1, 2], "b": [1, 2]}),
        ("\ufeffa: 1\r\nb: 2\r\n", {"a": 1, "b": 2}),
        ("a: 0x1f\nb: 1e-6\nc: 1_000\n", {"a": 31, "b": "1e-6", "c": 1000}),
    ],
)
def test_what_people_write_is_read(text, value):
    assert parse_yaml(text, "x") == value


def test_only_small_regular_files_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, message in [
        (tmp_path / "pipe", "pipe is a named pipe, not a file"),
        ("/dev/urandom", "/dev/urandom is a device, not a file"),
        ("/dev/zero", "/dev/zero is a device, not a file"),
        ("/dev/stdin", "not a file|UTF-8|No such"),
    ]:
        with pytest.raises((UsageError, OSError), match=message):
            read_settings(str(path))
    big = tmp_path / "big.yaml"
    with open(big, "wb") as file:
        file.truncate(40 << 30)  # sparse
    with pytest.raises(UsageError, match=rf"big\.yaml: {40 << 30} bytes are too many .* at most {MAX_BYTES}"):
        read_yaml(big)
    link = tmp_path / "link.yaml"
    link.symlink_to("/dev/zero")
    with pytest.raises(UsageError, match=r"link\.yaml is a device"):
        read_yaml(link)
    for content in (b"\xff\xfea\x00", b"\x80\x04}q\x00.", b"a: \xe9\n"):
        (tmp_path / "bytes.yaml").write_bytes(content)
        with pytest.raises(UsageError, match=r"bytes\.yaml is not YAML: no UTF-8 text from byte \d"):
            read_yaml(tmp_path / "bytes.yaml")
    (tmp_path / "mark.yaml").write_bytes(b"\xef\xbb\xbfa: 1\n")
    assert read_text(tmp_path / "mark.yaml") == "a: 1\n"


def test_long_values_are_shortened_in_errors():
    for options in (
        {"train": {"epochs": "x" * 10_000}},
        {"train": {"x" * 10_000: 1}},
        {"views": {"scale": [1] * 9000}},
    ):
        with pytest.raises(UsageError) as caught:
            Config.from_dict(options)
        assert len(str(caught.value)) < 300
    assert shortened("a  b\nc") == "a b c" and len(shortened("x" * 999)) < 130


def shared(levels: int) -> list:
    """A list that says itself to be 9 ** levels values long."""
    value: list = ["lol"] * 9
    for _ in range(levels):
        value = [value] * 9
    return value


def deep(levels: int, kind: type) -> object:
    value: object = 1
    for _ in range(levels):
        value = {"a": value} if kind is dict else [value]
    return value


@pytest.mark.parametrize(
    "options",
    [
        {"data": {"root": shared(9)}},
        {"data": shared(9)},
        {"nothing": shared(9)},
        {"data": {"root": deep(100_000, list)}},
        {"data": deep(100_000, dict)},
        {"train": {"seed": 1 << 100_000}},
        {"train": {"epochs": -(1 << 100_000)}},
        {"optim": {"lr": [1 << 100_000]}},
        {"views": {"scale": {"a": shared(9)}}},
        {7: {8: 9}},
        {"train": {None: 1}},
        {b"train": 1},
    ],
)
def test_options_out_of_a_checkpoint_are_data_too(options):
    with pytest.raises(UsageError) as caught:
        build(Config, Settings(options, "x.pt"))
    assert str(caught.value).startswith("x.pt: ") and len(str(caught.value)) < 400


@pytest.mark.parametrize("inside", [None, [], "x", 3])
def test_options_that_are_no_dict_are_refused_by_name(tmp_path, inside):
    (tmp_path / "x.pt").touch()
    with pytest.raises(UsageError, match=r"x\.pt: its options are a .*, not a dict"):
        parse([f"--resume={tmp_path / 'x.pt'}"], prog="x", checkpoint_config=lambda _: inside)


def test_dumped_values_come_back():
    options = {"a": {"b": [1.5e-7, 2.0], "c": "1e3", "d": ""}, "e": True, "f": "\u00fc: [x]"}
    assert parse_yaml(dump(options), "x") == options
    assert as_yaml([0.5, 1]) == "[0.5, 1]" and as_yaml(True) == "true" and as_yaml("a: b") == "a: b"


@pytest.mark.parametrize(
    ("typed", "path"),
    [
        ("~/x", "{home}/x"),
        ("~", "{home}"),
        ("~/x/", "{home}/x"),
        ("runs/x/", "runs/x"),
        ("runs//x///", "runs//x"),
        ("'runs/x y'", "runs/x y"),
        ('"~/x"', "{home}/x"),
        ("/", "/"),
        ("", ""),
        ("'", "'"),
        ("a'b'", "a'b'"),
        ("x~y", "x~y"),
        (" ~/x \n", "{home}/x"),
        ("$HOME/x/", "{home}/x"),
        ("'${HOME}/x'", "{home}/x"),
        ("a$HOME", "a$HOME"),
        ("$NO_SUCH_NAME/x", "$NO_SUCH_NAME/x"),
        ("owner/name:train", "owner/name:train"),
        ("~nobody-of-this-name/x", "~nobody-of-this-name/x"),
    ],
)
def test_paths_as_a_shell_user_writes_them(monkeypatch, typed, path):
    monkeypatch.setenv("HOME", "/home/of/me")
    assert clean_path(typed) == path.format(home="/home/of/me")
