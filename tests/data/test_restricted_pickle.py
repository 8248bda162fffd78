"""The unpickler gives back arrays and containers exactly; the rest is refused unexecuted."""

import io
import os
import pickle
import pickletools
import struct
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollingq_jax.data.restricted_pickle import load_pickle, read_pickle
from rollingq_jax.errors import DataError


def read(data: bytes):
    return read_pickle(io.BytesIO(data))


ARRAYS = {
    "float32": np.arange(24, dtype=np.float32).reshape(2, 3, 4),
    "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "big_endian": np.arange(4, dtype=">f8"),
    "half": np.float16([1.5, -np.inf]),
    "int64": np.arange(-3, 3),
    "uint8": np.uint8([[0, 255]]),
    "bool": np.array([True, False]),
    "complex": np.array([1 + 2j]),
    "bytes": np.array([b"ab", b"c"]),
    "text": np.array(["id[0]", "é"]),
    "object": np.array([["video", 1.5], [None, (2, 3)]], dtype=object),
    "empty": np.zeros((0, 5), np.float32),
    "scalar_array": np.array(3.0),
    "strided": np.arange(20.0)[::3],
}


@pytest.mark.parametrize("protocol", range(2, 6))
@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_come_back_exactly(name, protocol):
    array = ARRAYS[name]
    back = read(pickle.dumps({"x": array}, protocol))["x"]
    assert type(back) is np.ndarray
    assert back.dtype == array.dtype and back.shape == array.shape
    np.testing.assert_array_equal(back, array)


@pytest.mark.parametrize("protocol", range(6))
def test_plain_containers_come_back(protocol):
    value = {"train": [1, 2.5, None, True, "text", (1, (2,))], 3: {"nested": b"bytes", "none": b""}}
    assert read(pickle.dumps(value, protocol)) == value


def nested(depth, width):
    """A tuple whose hash visits more than width**depth objects, and whose stream is short."""
    value = ()
    for _ in range(depth):
        value = (value,) * width
    return value


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize(("depth", "width"), [(40, 2), (5, 60)])
def test_keys_that_take_long_to_hash_are_refused(protocol, depth, width):
    inner = pickle.dumps(nested(depth, width), protocol)
    assert len(inner) < 4000
    # Its stream without header and STOP, as the key of a dict or an element of a set.
    head = 0 if protocol < 2 else 2
    body = inner[head:-1]
    if protocol >= 4 and body[:1] == b"\x95":
        body = body[9:]
    started = time.monotonic()
    for stream in (
        inner[:head] + b"}" + body + b"K\x01s.",
        inner[:head] + b"}(" + body + b"K\x01u.",
        inner[:head] + b"(" + body + b"K\x01d.",
        inner[:head] + b"\x8f(" + body + b"\x90.",
        inner[:head] + b"(" + body + b"\x91.",
    ):
        with pytest.raises(DataError, match="refused, it has keys"):
            read(stream)
    assert time.monotonic() - started < 2


def test_nested_tuples_that_are_no_keys_are_read():
    value = read(pickle.dumps([nested(40, 2)]))[0]
    for _ in range(40):
        assert value[0] is value[1]
        value = value[0]
    assert value == ()


def test_tuples_may_be_keys():
    value = {("a", (1, 2)): 1, (3, 4): {("b",): 2}}
    assert read(pickle.dumps(value)) == value


def test_numpy_scalars_and_sets_come_back():
    value = read(pickle.dumps({"x": np.float32(1.5), "n": np.int64(-2), "s": {1, 2}}, 4))
    assert value == {"x": 1.5, "n": -2, "s": {1, 2}}
    assert value["x"].dtype == np.float32


def test_shared_arrays_stay_shared():
    array = np.arange(3)
    first, second = read(pickle.dumps([array, array]))
    np.testing.assert_array_equal(first, second)


def test_python_2_strings_become_text():
    # protocol 2 of Python 2: dict with a short 8-bit string key and value
    assert read(b"\x80\x02}U\x05trainU\x02\xe9bs.") == {"train": "éb"}


class _Runs:
    """Pickles as a call of ``function(*arguments)``."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def hostile_pickles(marker: str) -> dict[str, bytes]:
    """Streams that would create the file ``marker`` if anything in them ran."""
    command = f"open({marker!r}, 'w').close()"
    eval_code = pickle.dumps(_Runs(eval, command))
    dotted = (
        b"\x80\x04\x8c\x05numpy\x8c\x12_core.os.makedirs\x93\x8c"
        + bytes([len(marker)]) + marker.encode() + b"\x85R."
    )  # fmt: skip
    named = b"cnumpy\n_core.multiarray._reconstruct.__globals__\n."
    return {
        "os.system": pickle.dumps(_Runs(os.system, f"touch {marker}")),
        "eval": eval_code,
        "exec": pickle.dumps(_Runs(exec, command)),
        "subprocess": pickle.dumps(_Runs(subprocess.Popen, ["touch", marker])),
        "old protocol": pickle.dumps(_Runs(os.system, f"touch {marker}"), 0),
        "in a dict of arrays": pickle.dumps({"train": np.ones(3), "x": _Runs(eval, command)}),
        "in an object array": pickle.dumps(np.array([_Runs(eval, command)], dtype=object)),
        "as a dict key": pickle.dumps({_Runs(eval, command): 1}),
        "nested pickle": pickle.dumps(_Runs(pickle.loads, eval_code)),
        "numpy.load": pickle.dumps(_Runs(np.load, marker)),
        "dotted name": dotted,
        "globals of an admitted function": named,
        "getattr": pickle.dumps(_Runs(getattr, np.ndarray, "tofile")),
        "import": b"cimportlib\nimport_module\n(S'antigravity'\ntR.",
        "INST": f"(S'touch {marker}'\nios\nsystem\n.".encode(),
        "persistent id": b"\x80\x02U\x01xQ.",
    }


@pytest.mark.parametrize("name", hostile_pickles("x"))
def test_hostile_pickles_are_refused_and_nothing_runs(name, tmp_path):
    marker = tmp_path / "executed"
    data = hostile_pickles(str(marker))[name]
    modules = set(sys.modules)
    with pytest.raises(DataError, match="refused.*nothing in it was executed|damaged") as error:
        read(data)
    assert not marker.exists()
    assert "antigravity" not in set(sys.modules) - modules
    assert "\n" not in str(error.value)


def test_the_hostile_pickles_do_run_elsewhere(tmp_path):
    """Else the test above would prove nothing."""
    marker = tmp_path / "executed"
    pickle.loads(hostile_pickles(str(marker))["eval"])
    assert marker.exists()


def rebuilt(array, **changes):
    """A pickle of an array whose BUILD state has been tampered with."""

    class Tampered:
        def __reduce__(self):
            function, arguments, state = array.__reduce__()
            names = ("version", "shape", "dtype", "fortran", "data")
            return (
                function,
                arguments,
                tuple((dict(zip(names, state, strict=True)) | changes).values()),
            )

    return pickle.dumps(Tampered(), 4)


@pytest.mark.parametrize(
    "changes",
    [
        {"shape": (10**6,)},
        {"shape": (-1,)},
        {"shape": "ab"},
        {"data": b"123"},
        {"data": [1, 2]},
        {"dtype": 5},
        {"dtype": np.dtype("f4")},
        {"dtype": np.dtype([("a", "f4"), ("b", "f4")])},
        {"dtype": np.dtype("M8[s]")},
        {"dtype": np.dtype(object)},
    ],
    ids=str,
)
def test_tampered_arrays_are_refused(changes):
    with pytest.raises(DataError):
        read(rebuilt(np.arange(2.0), **changes))


def test_an_object_array_disguised_as_bytes_is_refused():
    """Raw bytes read as object pointers would corrupt memory."""
    data = rebuilt(np.array([None], dtype=object), data=struct.pack("<Q", 0xDEADBEEF))
    with pytest.raises(DataError, match="refused"):
        read(data)


def test_functions_cannot_be_changed_for_later_files():
    # BUILD on numpy.dtype's stand-in with a state, with and without slots
    for state in (b"}\x8c\x01a\x8c\x01bs", b"N}\x8c\x08__call__\x8c\x01bs\x86"):
        with pytest.raises(DataError):
            read(b"\x80\x04\x8c\x05numpy\x8c\x05dtype\x93" + state + b"b.")
    np.testing.assert_array_equal(read(pickle.dumps(np.arange(3))), np.arange(3))


@pytest.mark.parametrize("loop", ["list", "deep"])
def test_endless_nesting_is_refused(loop):
    value = []
    if loop == "list":
        value.append(value)
    else:
        for _ in range(100):
            value = [value]
    with pytest.raises(DataError):
        read(pickle.dumps(value))


@pytest.mark.parametrize("keep", [0, 1, 10, 40, -1])
def test_truncated_files_are_damaged(keep, tmp_path):
    path = tmp_path / "data.pkl"
    path.write_bytes(pickle.dumps({"train": np.arange(100.0)})[:keep])
    with pytest.raises(DataError, match="data.pkl: damaged"):
        load_pickle(path)


def test_missing_file(tmp_path):
    with pytest.raises(DataError, match="none.pkl: cannot be read"):
        load_pickle(tmp_path / "none.pkl")


VALID = pickletools.optimize(pickle.dumps({"train": {"x": np.arange(4.0), "id": [b"a"]}}, 4))


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=60), st.integers(0, len(VALID)), st.integers(0, 20))
def test_fuzzed_streams_give_plain_data_or_one_error(noise, start, cut):
    """Whatever comes in, either plain data come out or a DataError of one line."""

    def is_plain(value):
        if isinstance(value, dict):
            return all(is_plain(part) for pair in value.items() for part in pair)
        if isinstance(value, list | tuple | set | frozenset):
            return all(map(is_plain, value))
        plain = int | float | complex | str | bytes | bytearray | np.ndarray | np.generic | None
        return isinstance(value, plain)

    for data in (noise, VALID[:start] + noise + VALID[start + cut :]):
        try:
            assert is_plain(read(data))
        except DataError as error:
            assert "\n" not in str(error)
