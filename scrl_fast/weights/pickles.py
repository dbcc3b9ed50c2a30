"""Reads pickles as data: their opcodes are interpreted here, and no class or function that they name is called.

Python's own unpickler imports and calls what a file asks for, and even an allow-list is not safe: NumPy follows a dtype
state from the file as a pointer. This reader knows containers, numbers, text and a table of constructors of ours
(`scrl_fast.weights.pickled_arrays`, `scrl_fast.weights.pickled_tensors`). Work and memory are bounded by the size of
the file.
"""

from __future__ import annotations

import io
import pickletools
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch

from scrl_fast.weights.skipped_classes import SKIPPED

MAX_OPCODES = 1_500_000
"""Opcodes of one pickle: two seconds of work; a list of 1.3 million numbers passes."""
MAX_DEPTH = 64
"""Containers inside containers."""
MAX_INTEGER_BYTES, MAX_TUPLE_KEYS = 256, 10_000
"""Tuples and frozensets as keys or in sets; Python's hash of these can be made to collide."""
MAX_KEY_ITEMS, MAX_KEYS_ITEMS = 64, 80_000
"""Values in one of them, and in all together."""

_DICTS = (dict, OrderedDict)

Constructor = Callable[["PickleReader", tuple[Any, ...]], Any]


class PickleError(ValueError):
    """A pickle that is damaged, or asks for more than this reader gives."""


class ForeignObjectError(PickleError):
    """A pickle that holds an object of a class that is not read; ``name`` is the class."""

    def __init__(self, name: str) -> None:
        self.name = name.encode("utf-8", "backslashreplace").decode()  # a pickle may spell surrogates
        super().__init__(f"it asks for {self.name}, and only NumPy arrays, tensors and plain values are read")


class Named:
    """A class or function by name, as the pickle spells it; never imported."""

    def __init__(self, name: str) -> None:
        self.name = name


class Skipped:
    """The place of an object that is not made; its arguments, its items and its state are dropped.

    name: of its class. An object that weights do not need, such as an ``argparse.Namespace``, stays such a place.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return f"<{self.name}, not read>"


class Foreign(Skipped):
    """The place of an object of any other class: an error, unless a `Skipped` object drops it."""


class Pending:
    """A value that a later opcode fills; `PickleReader.load` replaces it by ``value()``."""

    def build(self, reader: PickleReader, state: Any) -> None:
        """Take the state of the BUILD opcode."""
        raise NotImplementedError

    def value(self) -> Any:
        """The finished value."""
        raise NotImplementedError


class PickleReader:
    """Reads one pickle after another from memory.

    data: the bytes of a file, or of its first part.
    constructors: functions by the name that a pickle gives, called with the reader and the pickle's arguments.
    constants: values by the name that a pickle gives.
    persistent: called for the persistent ids of torch's storages.
    Raises PickleError for anything else, and whatever damaged arguments raise in between.
    """

    def __init__(
        self,
        data: bytes,
        constructors: Mapping[str, Constructor],
        constants: Mapping[str, Any] | None = None,
        persistent: Callable[[Any], Any] | None = None,
    ) -> None:
        self.file = io.BytesIO(data)  # a length beyond the end costs no memory
        self.budget = 4 * len(data) + (1 << 20)
        self.constructors = {**CONTAINERS, **constructors}
        self.constants = constants or {}
        self.persistent = persistent
        self.tuple_keys = self.key_items = 0
        self.copies: list[tuple[Any, Any]] = []  # (copy, view of a storage that may be filled after the pickle)

    def spend(self, amount: int) -> None:
        """Count bytes that a constructor makes, so that a small file cannot ask for the same bytes a million times."""
        self.budget -= amount
        if self.budget < 0:
            raise PickleError("its objects, made from shared bytes, are many times larger than the file")

    def load(self) -> Any:
        """The value of the next pickle in the file."""
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.count = 0
        for opcode, argument, _ in pickletools.genops(self.file):
            action = _ACTIONS.get(opcode.name)
            if action is None or self.count == MAX_OPCODES:
                refused = f"opcode {opcode.name} is not read" if action is None else f"more than {MAX_OPCODES} opcodes"
                raise PickleError(refused)
            self.count += 1
            action(self, argument)
        return _Finished().value(self.stack.pop())

    # ---- opcodes ----

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def push_integer(self, value: int) -> None:
        if value.bit_length() > 8 * MAX_INTEGER_BYTES:
            raise PickleError(f"an integer of {value.bit_length() // 8} bytes")
        self.stack.append(value)

    def mark(self, _: Any) -> None:
        self.marks.append(self.stack)
        self.stack = []

    def since_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.marks.pop()
        return items

    def pop_mark(self, _: Any) -> None:
        self.since_mark()

    def pop(self, _: Any) -> None:
        self.take(1)

    def put(self, index: int | None) -> None:
        index = len(self.memo) if index is None else index
        if index in self.memo or not 0 <= index <= self.count:
            raise PickleError(f"memo entry {index} is {'defined twice' if index in self.memo else 'out of order'}")
        self.memo[index] = self.stack[-1]

    def get(self, index: int) -> None:
        if index not in self.memo:
            raise PickleError(f"memo entry {index} is missing")
        self.stack.append(self.memo[index])

    def take(self, count: int) -> list[Any]:
        items = self.stack[-count:]
        if len(items) < count:
            raise PickleError("its stack is empty")
        del self.stack[-count:]
        return items

    def add_to_dict(self, pairs: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, Skipped):
            return
        if type(target) not in _DICTS:
            raise PickleError("it sets items of something that is no dict")
        target.update(self.kept(zip(pairs[::2], pairs[1::2], strict=True)))

    def kept(self, pairs: Iterable[tuple[Any, Any]]) -> Iterator[tuple[Any, Any]]:
        """The pairs whose keys can be read; a class as key, as in old logs of callbacks, is no name of a tensor."""
        return ((key, value) for key, value in pairs if self.is_readable(key))

    def is_readable(self, key: Any) -> bool:
        """False for a key with a class or a foreign object in it.

        Raises PickleError for keys whose hash costs more than their length, or that could be made to collide.
        """
        items, readable = [key], True
        for item in items:
            if type(item) in (tuple, frozenset):
                if len(items) + len(item) > MAX_KEY_ITEMS:
                    raise PickleError(f"it has dict keys of more than {MAX_KEY_ITEMS} values")
                items += item
            elif isinstance(item, (Named, Skipped)):
                readable = False
            elif not (
                item is None
                or type(item) in (str, bytes, bool, float, torch.dtype)
                or (type(item) is int and abs(item) < 1 << 60)
            ):
                raise PickleError("it has dict keys other than text and numbers")
        if type(key) in (tuple, frozenset):
            self.tuple_keys += 1
            self.key_items += len(items)
            if self.tuple_keys > MAX_TUPLE_KEYS or self.key_items > MAX_KEYS_ITEMS:
                raise PickleError(f"it has more than {MAX_TUPLE_KEYS} tuples as dict keys, or very long ones")
        return readable

    def add_to_list(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, Skipped):
            return
        if type(target) is not list:
            raise PickleError("it appends to something that is no list")
        target.extend(items)

    def add_to_set(self, items: list[Any]) -> None:
        if not isinstance(self.stack[-1], Skipped):
            self.stack[-1] |= self.new_set(items)

    def new_set(self, items: Iterable[Any]) -> set[Any]:
        return {item for item in items if self.is_readable(item)}

    def name(self, text: str) -> None:
        name = text.replace(" ", ".")
        self.stack.append(self.constants.get(name, Named(name)))

    def name_from_stack(self, _: Any) -> None:
        module, name = self.take(2)
        self.name(f"{module} {name}" if type(module) is type(name) is str else "?")

    def reduce(self, _: Any) -> None:
        function, arguments = self.take(2)
        self.stack.append(self.call(function, arguments))

    def call(self, function: Any, arguments: Any) -> Any:
        """The value of a constructor of the table, `Skipped` for classes that weights do not need, or `Foreign`."""
        if isinstance(function, Skipped):  # what a foreign function returned
            return Foreign(function.name)
        if type(function) is not Named or type(arguments) is not tuple:
            raise PickleError("it calls something that is no name")
        if function.name in _OBJECT_MAKERS and arguments and type(arguments[0]) is Named:
            function, arguments = arguments[0], ()
        if function.name in SKIPPED:
            return Skipped(function.name)
        if function.name not in self.constructors:
            return Foreign(function.name)
        for argument in arguments[:8]:  # as many as a constructor takes; that of a defaultdict is never used
            if isinstance(argument, Skipped) and function.name != "collections.defaultdict":
                return Foreign(argument.name)
        return self.constructors[function.name](self, arguments)

    def new_object(self, count: int) -> None:
        cls, arguments, *_ = self.take(count)
        self.stack.append(self.call(cls, arguments))

    def build(self, _: Any) -> None:
        target, state = self.stack[-2], self.stack.pop()
        if isinstance(target, Pending):
            target.build(self, state)
        elif not isinstance(target, (Skipped, OrderedDict)):  # its state is the attribute _metadata of a state dict
            raise PickleError(f"it sets the state of a {type(target).__name__}")

    def persistent_id(self, _: Any) -> None:
        if self.persistent is None:
            raise PickleError("it has persistent ids, as torch's files have")
        self.stack.append(self.persistent(self.stack.pop()))


def _containers() -> dict[str, Constructor]:
    """Python's own containers and values, as protocols 0 to 5 spell them."""

    def dict_of(reader: PickleReader, arguments: tuple[Any, ...]) -> OrderedDict[Any, Any]:
        pairs = list(arguments[0].items() if type(arguments[0]) in _DICTS else arguments[0]) if arguments else []
        reader.spend(64 * len(pairs))
        return OrderedDict(reader.kept(pairs))

    def set_of(reader: PickleReader, arguments: tuple[Any, ...]) -> set[Any]:
        reader.spend(64 * len(arguments[0]) if arguments else 0)
        return reader.new_set(*arguments)

    def encoded(reader: PickleReader, arguments: tuple[Any, ...]) -> bytes:
        """``_codecs.encode(text, "latin1")``, by which protocol 2 spells bytes, and ``bytearray(bytes)``."""
        text, encoding = (*arguments, "latin1")[:2] if arguments else ("", "latin1")
        if type(text) is bytes:
            reader.spend(len(text))
            return bytes(text)
        if type(text) is not str or encoding not in ("latin1", "latin-1"):
            raise PickleError("bytes in an unknown spelling")
        reader.spend(len(text))
        return text.encode("latin-1")

    def number(reader: PickleReader, arguments: tuple[Any, ...]) -> complex:
        if any(type(part) not in (int, float) for part in arguments):
            raise PickleError("a complex number of other parts than numbers")
        return complex(*arguments)

    table: dict[str, Constructor] = {
        "collections.OrderedDict": dict_of,
        "collections.Counter": dict_of,
        "collections.defaultdict": lambda reader, arguments: {},
        "_codecs.encode": encoded,
    }
    made: dict[str, Constructor] = {"set": set_of, "complex": number, "bytes": encoded, "bytearray": encoded}
    made["frozenset"] = lambda reader, arguments: frozenset(set_of(reader, arguments))
    return table | {f"{module}.{name}": make for module in ("__builtin__", "builtins") for name, make in made.items()}


CONTAINERS = _containers()
_OBJECT_MAKERS = ("copyreg._reconstructor", "copy_reg._reconstructor", "copyreg.__newobj_ex__")  # of a class


def _collect(make: Callable[[PickleReader, list[Any]], Any]) -> Callable[[PickleReader, Any], None]:
    """An opcode that replaces the items behind the mark by one container."""

    def action(reader: PickleReader, _: Any) -> None:
        items = reader.since_mark()
        reader.stack.append(make(reader, items))

    return action


def _new_dict(reader: PickleReader, items: list[Any]) -> dict[Any, Any]:
    return dict(reader.kept(zip(items[::2], items[1::2], strict=True)))


_ACTIONS: dict[str, Callable[[PickleReader, Any], None]] = {
    **dict.fromkeys(("PROTO", "FRAME", "STOP"), lambda reader, _: None),
    **dict.fromkeys(("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4"), PickleReader.push_integer),
    **dict.fromkeys(("FLOAT", "BINFLOAT", "STRING", "BINSTRING", "SHORT_BINSTRING"), PickleReader.push),
    **dict.fromkeys(("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"), PickleReader.push),
    **dict.fromkeys(("BINBYTES", "SHORT_BINBYTES", "BINBYTES8"), PickleReader.push),
    "BYTEARRAY8": lambda reader, value: reader.push(bytes(value)),
    "NONE": lambda reader, _: reader.push(None),
    "NEWTRUE": lambda reader, _: reader.push(True),
    "NEWFALSE": lambda reader, _: reader.push(False),
    "EMPTY_LIST": lambda reader, _: reader.push([]),
    "EMPTY_TUPLE": lambda reader, _: reader.push(()),
    "EMPTY_DICT": lambda reader, _: reader.push({}),
    "EMPTY_SET": lambda reader, _: reader.push(set()),
    "MARK": PickleReader.mark,
    "POP_MARK": PickleReader.pop_mark,
    "POP": PickleReader.pop,
    "DUP": lambda reader, _: reader.push(reader.stack[-1]),
    "LIST": _collect(lambda reader, items: items),
    "TUPLE": _collect(lambda reader, items: tuple(items)),
    "DICT": _collect(_new_dict),
    "FROZENSET": _collect(lambda reader, items: frozenset(reader.new_set(items))),
    "TUPLE1": lambda reader, _: reader.push(tuple(reader.take(1))),
    "TUPLE2": lambda reader, _: reader.push(tuple(reader.take(2))),
    "TUPLE3": lambda reader, _: reader.push(tuple(reader.take(3))),
    "APPEND": lambda reader, _: reader.add_to_list(reader.take(1)),
    "APPENDS": lambda reader, _: reader.add_to_list(reader.since_mark()),
    "SETITEM": lambda reader, _: reader.add_to_dict(reader.take(2)),
    "SETITEMS": lambda reader, _: reader.add_to_dict(reader.since_mark()),
    "ADDITEMS": lambda reader, _: reader.add_to_set(reader.since_mark()),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"), PickleReader.put),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), PickleReader.get),
    "GLOBAL": PickleReader.name,
    "STACK_GLOBAL": PickleReader.name_from_stack,
    "REDUCE": PickleReader.reduce,
    "NEWOBJ": lambda reader, _: reader.new_object(2),
    "NEWOBJ_EX": lambda reader, _: reader.new_object(3),
    "BUILD": PickleReader.build,
    "BINPERSID": PickleReader.persistent_id,
}


class _Finished:
    """Copies a tree with every `Pending` replaced; refuses cycles, depth, and trees that sharing makes too large."""

    def __init__(self) -> None:
        self.known: dict[int, tuple[Any, int, int]] = {}

    def value(self, root: Any) -> Any:
        value, count, _ = self.visit(root, 0)
        if count > MAX_OPCODES:
            raise PickleError(f"its containers share so much that they hold more than {MAX_OPCODES} values")
        return value

    def visit(self, value: Any, depth: int) -> tuple[Any, int, int]:
        """(the finished value, values in it when nothing is shared, height)."""
        if isinstance(value, Pending):
            return value.value(), 1, 0
        if type(value) not in (dict, OrderedDict, list, tuple):
            if isinstance(value, (Named, Foreign)):
                raise ForeignObjectError(value.name)
            return value, 1, 0
        if depth > MAX_DEPTH:
            raise PickleError(f"its containers are nested more than {MAX_DEPTH} deep")
        if id(value) not in self.known:
            keyed = type(value) in _DICTS
            children = [self.visit(child, depth + 1) for child in (value.values() if keyed else value)]
            items = [child for child, _, _ in children]
            made = type(value)(zip(value, items, strict=True) if keyed else items)
            height = 1 + max((height for _, _, height in children), default=0)
            self.known[id(value)] = made, 1 + sum(count for _, count, _ in children), height
        if depth + self.known[id(value)][2] > MAX_DEPTH + 1:
            raise PickleError(f"its containers are nested more than {MAX_DEPTH} deep")
        return self.known[id(value)]
