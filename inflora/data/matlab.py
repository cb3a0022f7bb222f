"""MATLAB's level 5 files (.mat): text, numbers, cells and structs, read from bytes that nobody has checked.

scipy's reader is compiled code that a few changed bytes can crash, and the process with it. This one knows what
datasets need and no more. The format is MathWorks's, "MAT-File Format": elements of a type, a length and data, which
begin at multiples of 8 bytes; a matrix is an element of elements: its class, sides, name and content.
"""

import struct
import zlib
from collections.abc import Iterator
from math import prod
from typing import Any, NamedTuple

import numpy as np

MOST_UNPACKED = 1 << 26
"""Bytes of a packed variable."""
_DEEPEST = 8  # structs in cells in structs: annotations have two levels
_HEADER, _VERSION = 128, b"\x00\x01IM"
_MATRIX, _PACKED = 14, 15
_NUMBERS = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
_TEXT = {1: "latin-1", 2: "latin-1", 4: "utf-16-le", 16: "utf-8", 17: "utf-16-le", 18: "utf-32-le"}
_CELL, _STRUCT, _CHAR, _NUMERIC = 1, 2, 4, range(6, 16)


class _Element(NamedTuple):
    kind: int
    data: bytes


def variables(content: bytes) -> dict[str, Any]:
    """The variables of a file by name: text as str, numbers as flat arrays, cells as lists, structs as lists of dicts.

    Whatever their sides, matrices come flat, column after column.

    Raises:
        ValueError: It is no such file, or damaged.
    """
    if content[124:_HEADER] != _VERSION:
        raise ValueError("it does not begin as a MATLAB file of level 5, written on a little-endian machine, does")
    found: dict[str, Any] = {}
    for element in _elements(content[_HEADER:]):
        for inner in _elements(_unpacked(element.data)) if element.kind == _PACKED else [element]:
            if inner.kind == _MATRIX:
                name, value = _matrix(inner.data, _DEEPEST)
                found[name] = value
    return found


def _unpacked(data: bytes) -> bytes:
    unpack = zlib.decompressobj()
    try:
        content = unpack.decompress(data, MOST_UNPACKED)
    except zlib.error as error:
        raise ValueError(str(error)) from None
    if not unpack.eof:
        raise ValueError(f"a variable is cut off, or unpacks to more than {MOST_UNPACKED:,} bytes")
    return content


def _elements(data: bytes) -> Iterator[_Element]:
    at = 0
    while at < len(data):
        kind, size, begin = _tag(data, at)
        end = begin + size
        if end > len(data):
            raise ValueError("it ends within an element")
        yield _Element(kind, data[begin:end])
        # A small element's data fill its tag; what is packed is not followed by anything that fills it up.
        at = at + 8 if begin == at + 4 else end if kind == _PACKED else end + -end % 8


def _tag(data: bytes, at: int) -> tuple[int, int, int]:
    """The type of the element at a place, its length, and where its data begin."""
    if at + 8 > len(data):
        raise ValueError("it ends within a tag")
    kind, size = struct.unpack_from("<II", data, at)
    if small := kind >> 16:  # up to four bytes of data, in the tag itself
        return kind & 0xFFFF, min(small, 4), at + 4
    return kind, size, at + 8


def _matrix(data: bytes, levels: int) -> tuple[str, Any]:
    """The name and the value of a matrix."""
    if not data:
        return "", []
    if not levels:
        raise ValueError("cells lie in cells without end")
    parts = _elements(data)
    flags, sides, name = (_next(parts) for _ in range(3))
    kind, count = _whole(flags)[0] & 0xFF, prod(_whole(sides))
    return name.data.decode("latin-1"), _value(kind, count, parts, levels)


def _value(kind: int, count: int, parts: Iterator[_Element], levels: int) -> Any:
    def inner() -> Any:
        element = _next(parts)
        if element.kind != _MATRIX:
            raise ValueError("a cell holds what is no matrix")
        return _matrix(element.data, levels - 1)[1]

    if kind == _CELL:
        return [inner() for _ in range(count)]
    if kind == _STRUCT:
        length, names = _whole(_next(parts))[0], _next(parts).data
        if not 0 < length <= len(names):
            raise ValueError("a struct without fields")
        fields = [names[at : at + length].split(b"\0")[0].decode("latin-1") for at in range(0, len(names), length)]
        return [{field: inner() for field in fields} for _ in range(count)]
    if kind == _CHAR:
        return _text(_next(parts)) if count else ""
    if kind in _NUMERIC:
        return _numbers(_next(parts))
    raise ValueError(f"matrices of class {kind} are not read")


def _next(parts: Iterator[_Element]) -> _Element:
    element = next(parts, None)
    if element is None:
        raise ValueError("a matrix ends too early")
    return element


def _numbers(element: _Element) -> np.ndarray:
    if element.kind not in _NUMBERS:
        raise ValueError(f"type {element.kind} is none of numbers")
    kind = np.dtype(f"<{_NUMBERS[element.kind]}")
    if len(element.data) % kind.itemsize:
        raise ValueError("a number is cut off")
    return np.frombuffer(element.data, kind)


def _whole(element: _Element) -> list[int]:
    """At least one whole number: flags, sides, lengths."""
    numbers = _numbers(element)
    if not len(numbers) or numbers.dtype.kind == "f":
        raise ValueError("whole numbers are missing")
    return [int(number) for number in numbers]


def _text(element: _Element) -> str:
    if element.kind not in _TEXT:
        raise ValueError(f"type {element.kind} is none of text")
    return element.data.decode(_TEXT[element.kind])
