"""Pickle files that hold arrays: read without running anything that they bring along.

A pickle is a program: it names functions and calls them. Here every name but those that NumPy's own
arrays need is refused before anything is imported, and behind those few names stand functions of
this module that check what they are given. So a file can yield numbers, strings, bytes, None,
lists, tuples, dicts, sets and NumPy arrays, and can do nothing else. NumPy's own reconstruction is
not exposed: it trusts a pickled dtype's flags, which a crafted file can use to corrupt memory.
"""

import math
import os
import pickle
import pickletools
from collections.abc import Callable
from typing import Any, BinaryIO, Literal

import numpy as np

from rollingq_jax.errors import DataError

# Kinds of dtype that hold their values in the array's own memory.
_PLAIN_KINDS = ("b", "i", "u", "f", "c", "S", "U")
MAX_VISITS = 1_000_000  # of parts of keys, beyond one for each key
_SIZES = {"b": (1,), "i": (1, 2, 4, 8), "u": (1, 2, 4, 8), "f": (2, 4, 8), "c": (8, 16)}


def load_pickle(path: str | os.PathLike) -> Any:
    """Reads the object that a pickle file holds; see `read_pickle`."""
    try:
        with open(path, "rb") as file:
            return read_pickle(file, name=os.fspath(path))
    except OSError as error:
        raise DataError(f"pickle {path}: cannot be read ({error.strerror})") from None


def read_pickle(file: BinaryIO, name: str = "(stream)") -> Any:
    """The object in a pickle stream, of plain containers and NumPy arrays.

    8-bit strings of Python 2 become str, each byte one character. Arrays may be read-only: they
    share the stream's bytes, which keeps a file of gigabytes in memory once.

    Args:
      file: an open binary file that can be read twice.
      name: for the error messages.

    Raises:
      DataError: the stream names anything else (nothing of it has been run then), or is damaged.
    """
    try:
        start = file.tell()
        _check_keys(file)
        file.seek(start)
        return _plain(_Unpickler(file, encoding="latin1").load())
    except _RefusedError as error:
        raise DataError(f"pickle {name}: refused, {error}; nothing in it was executed") from None
    except Exception as error:  # damaged streams raise almost any type
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise DataError(f"pickle {name}: damaged or not a pickle ({reason})") from None


def _check_keys(file: BinaryIO) -> None:
    """Refuses keys that take long to hash: a tuple of tuples that are shared, each with its parts.

    Such a tuple is small in the stream and in memory, but its hash visits every path through it.
    The stream's operations are gone through with a number in each object's place: how many objects
    its hash visits.
    """
    stack: list[int | None] = []  # None where the stream sets a mark
    memo: dict[Any, int] = {}
    visits = 0
    for op, argument, _ in pickletools.genops(file):
        before, items = op.stack_before, []
        if op.name in ("PUT", "BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1] or 1
        elif op.name == "MEMOIZE":
            memo[len(memo)] = stack[-1] or 1
            continue
        elif pickletools.markobject in before:
            while (item := stack.pop()) is not None:
                items.append(item)
            items.reverse()
            before = before[: before.index(pickletools.markobject)]
        below = [stack.pop() or 1 for _ in before][::-1]
        if op.name in ("SETITEM", "SETITEMS", "DICT"):
            keys = below[1:2] if op.name == "SETITEM" else items[::2]
        else:
            keys = items if op.name in ("ADDITEMS", "FROZENSET") else []
        visits += sum(keys) - len(keys)
        if visits > MAX_VISITS:
            raise _RefusedError("it has keys that would take too long to hash")
        weight = 1
        if "TUPLE" in op.name:
            weight = min(1 + sum(items) + sum(below), 2 * MAX_VISITS)
        elif op.name in ("GET", "BINGET", "LONG_BINGET"):
            weight = memo.get(argument, 1)
        elif op.name == "DUP":
            weight = below[0]
        stack += [None if part is pickletools.markobject else weight for part in op.stack_after]


class _RefusedError(Exception):
    """The stream asks for something that is not admitted."""


class _Marker:
    """Stands for `numpy.ndarray` in the stream: nothing that could be called or changed."""

    __slots__ = ()


class _Dtype:
    """A dtype under construction: REDUCE makes it, BUILD sets its byte order."""

    __slots__ = ("value",)

    def __init__(self, code: Any) -> None:
        kind, size = (code[:1], code[1:]) if isinstance(code, str) else ("", "")
        plain = kind in _PLAIN_KINDS and size.isdecimal() and int(size) > 0
        if not (plain or kind == "O") or (kind in _SIZES and int(size) not in _SIZES[kind]):
            raise _RefusedError(f"it holds an array of dtype {str(code)[:40]!r}")
        self.value = np.dtype(object if kind == "O" else code)

    def __setstate__(self, state: Any) -> None:
        # (version, byte order, subdtype, names, fields, ...): only the byte order is taken.
        if not isinstance(state, tuple) or len(state) < 5 or state[1] not in ("<", ">", "|", "="):
            raise _RefusedError("it holds a dtype in an unknown form")
        if any(part is not None for part in state[2:5]):
            raise _RefusedError("it holds an array of structured dtype")
        if state[1] in "<>" and self.value.kind != "O":
            self.value = self.value.newbyteorder(state[1])


class _Array:
    """An array under construction: REDUCE makes it empty, BUILD fills it in."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value: np.ndarray | None = None

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) != 5:
            raise _RefusedError("it holds an array in an unknown form")
        _, shape, dtype, fortran, data = state
        self.value = _make_array(shape, dtype, "F" if fortran else "C", data)


def _make_array(shape: Any, dtype: Any, order: Literal["C", "F"], data: Any) -> np.ndarray:
    """An array of its own from raw bytes, or from a list of objects."""
    if not isinstance(dtype, _Dtype):
        raise _RefusedError("it holds an array without a dtype")
    if not isinstance(shape, tuple) or not all(type(n) is int and n >= 0 for n in shape):
        raise _RefusedError("it holds an array without a shape")
    count = math.prod(shape)
    if dtype.value.kind == "O":
        if not isinstance(data, list) or len(data) != count:
            raise _RefusedError("it holds an object array in an unknown form")
        array = np.empty(count, object)
        for position, item in enumerate(data):
            array[position] = item
        return array.reshape(shape, order=order)
    raw = data.encode("latin1") if isinstance(data, str) else data
    if not isinstance(raw, bytes | bytearray) or len(raw) != count * dtype.value.itemsize:
        raise _RefusedError("it holds an array whose data do not fit its shape")
    if not raw:
        return np.empty(shape, dtype.value, order=order)
    return np.frombuffer(raw, dtype.value).reshape(shape, order=order)


class _Function:
    """A function that the stream may call; without attributes that it could set."""

    __slots__ = ()


def _function(call: Callable[..., Any]) -> _Function:
    """A `_Function` of a class of its own, whose call this is."""
    members = {"__slots__": (), "__call__": staticmethod(call)}
    return type(call.__name__, (_Function,), members)()


@_function
def _reconstruct(subtype: Any, shape: Any, code: Any) -> _Array:
    if not isinstance(subtype, _Marker):
        raise _RefusedError("it holds an array of a class of its own")
    return _Array()


@_function
def _from_buffer(data: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
    return _make_array(shape, dtype, "F" if order == "F" else "C", data)


@_function
def _scalar(dtype: Any, data: Any) -> Any:
    return _make_array((), dtype, "C", data)[()]


@_function
def _make_dtype(code: Any, align: Any = False, copy: Any = True) -> _Dtype:
    return _Dtype(code)


@_function
def _encode(text: Any, encoding: Any = "latin1") -> bytes:
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise _RefusedError("it holds bytes in an unknown form")
    return text.encode("latin1")


@_function
def _empty_bytes() -> bytes:
    return b""


_ADMITTED: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): _Marker(),
    ("numpy", "dtype"): _make_dtype,
    ("_codecs", "encode"): _encode,
    ("builtins", "bytes"): _empty_bytes,
    ("__builtin__", "bytes"): _empty_bytes,
}
for _module in ("numpy.core", "numpy._core"):  # before and since NumPy 2
    _ADMITTED[_module + ".multiarray", "_reconstruct"] = _reconstruct
    _ADMITTED[_module + ".multiarray", "scalar"] = _scalar
    _ADMITTED[_module + ".numeric", "_frombuffer"] = _from_buffer


class _Unpickler(pickle.Unpickler):
    """Resolves the admitted names to this module's functions, and no others."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ADMITTED[module, name]
        except KeyError:
            raise _RefusedError(f"it asks for {module}.{name}"[:120]) from None

    def persistent_load(self, pid: Any) -> Any:
        raise _RefusedError("it asks for an object outside of the file")


def _plain(value: Any) -> Any:
    """The value with arrays instead of those under construction; containers are made anew."""
    done: dict[int, Any] = {}
    kept: list[Any] = []  # an id is only good while its object lives

    def convert(item: Any, depth: int) -> Any:
        if isinstance(item, _Array):
            if item.value is None:
                raise _RefusedError("it holds an array that is never filled in")
            return convert(item.value, depth)
        if isinstance(item, _Dtype | _Function | _Marker):
            raise _RefusedError("it holds a function or type")
        objects = isinstance(item, np.ndarray) and item.dtype.kind == "O"
        if not objects and not isinstance(item, dict | list | tuple | set | frozenset):
            return item
        if depth > 50:
            raise _RefusedError("it is nested more than 50 deep, or in itself")
        if id(item) not in done:
            kept.append(item)
            done[id(item)] = rebuild(item, depth + 1)
        return done[id(item)]

    def rebuild(item: Any, depth: int) -> Any:
        if isinstance(item, dict):
            return {convert(k, depth): convert(v, depth) for k, v in item.items()}
        if isinstance(item, np.ndarray):
            array = np.empty(item.shape, object)
            for index in np.ndindex(item.shape):
                array[index] = convert(item[index], depth)
            return array
        return type(item)(convert(element, depth) for element in item)

    return convert(value, 0)
