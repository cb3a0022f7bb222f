"""YAML as settings need it: null, true and false, numbers, text, lists, and mappings whose keys are text.

The rest of YAML is refused: tags make objects, anchors and aliases make a short file a huge value, dates and numbers to
the base 60 are seldom meant. Whatever the text, reading it takes time in proportion to its length.
"""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from inflora.config.messages import cut
from inflora.files import read_regular

MAX_BYTES = 2**20
"""Of a config: the longest are some thousand bytes."""
MAX_DEPTH = 20
MAX_DIGITS = 40

_NULL = re.compile(r"~|null|Null|NULL|")
_TRUE = re.compile(r"true|True|TRUE|yes|Yes|YES|on|On|ON")
_FALSE = re.compile(r"false|False|FALSE|no|No|NO|off|Off|OFF")
_WHOLE = re.compile(r"[-+]?(0|[1-9][0-9_]*)")
# Also 5e-4, a number to everyone but YAML 1.1.
_NUMBER = re.compile(r"[-+]?((0|[1-9][\d_]*)(\.[\d_]*)?|\.\d[\d_]*)([eE][-+]?\d+)?\Z", re.ASCII)
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF|nan|NaN|NAN)")


class YamlError(ValueError):
    """Not the YAML that is read here: one line with the reason and the line of the text."""


def read_yaml(text: str) -> Any:
    """The value that ``text`` writes; None where it is empty.

    Raises:
        YamlError: It is no YAML, or has more in it than plain values.
    """
    try:
        events = yaml.parse(text, Loader=yaml.SafeLoader)
        return _document(events)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise YamlError(f"{error.problem or error.context}{_line(mark)}") from None
    except yaml.reader.ReaderError as error:
        raise YamlError(f"the character U+{error.character:04X} is not allowed") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # the parser's own, of escapes and directives
        raise YamlError(cut(str(error))) from None


def read_yaml_file(path: Path, max_bytes: int = MAX_BYTES) -> Any:
    """The value in a file.

    Raises:
        OSError: It cannot be read, or is no regular file.
        YamlError: As ``read_yaml``; it is not UTF-8, or is too large.
    """
    content = read_regular(path, max_bytes + 1)
    if len(content) > max_bytes:
        raise YamlError(f"it is larger than {max_bytes} bytes")
    try:
        return read_yaml(content.decode())
    except UnicodeDecodeError as error:
        raise YamlError(f"it is not UTF-8 at byte {error.start}") from None


def dump_yaml(value: Any) -> str:
    """YAML that ``read_yaml`` gives ``value`` back from, with mappings in their order."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False)


class _Dumper(yaml.SafeDumper):
    """Quotes text that would be read as a number."""


_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _NUMBER, list("-+.0123456789"))


def _document(events: Iterator[Any]) -> Any:
    """The one document in a stream of the parser's events."""
    next(events)  # the stream's start
    if isinstance(next(events), yaml.StreamEndEvent):
        return None
    value = _value(next(events), events, 0)
    next(events)  # the document's end
    if isinstance(more := next(events), yaml.DocumentStartEvent):
        raise _refused("it has more than one document", more)
    return value


def _value(event: Any, events: Iterator[Any], depth: int) -> Any:
    if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
        raise _refused("anchors and aliases are not read", event)
    if event.tag is not None:
        raise _refused("tags are not read", event)
    if isinstance(event, yaml.ScalarEvent):
        return _plain(event) if event.implicit[0] else event.value
    if depth == MAX_DEPTH:
        raise _refused(f"it is nested more than {MAX_DEPTH} levels deep", event)
    if isinstance(event, yaml.SequenceStartEvent):
        return [_value(item, events, depth + 1) for item in _until(yaml.SequenceEndEvent, events)]
    mapping: dict[str, Any] = {}
    for key_event in _until(yaml.MappingEndEvent, events):
        key = _value(key_event, events, depth + 1)
        if not isinstance(key, str):
            raise _refused(f"keys must be text, got {cut(repr(key))}", key_event)
        if key in mapping:
            raise _refused(f"the key {cut(repr(key))} is there twice", key_event)
        mapping[key] = _value(next(events), events, depth + 1)
    return mapping


def _until(end: type, events: Iterator[Any]) -> Iterator[Any]:
    """The events before that of kind ``end``; whoever takes one takes all that belongs to it."""
    while not isinstance(event := next(events), end):
        yield event


def _plain(event: Any) -> Any:
    """Read an unquoted scalar."""
    text = event.value
    if _NULL.fullmatch(text):
        return None
    if _TRUE.fullmatch(text) or _FALSE.fullmatch(text):
        return bool(_TRUE.fullmatch(text))
    if (is_whole := _WHOLE.fullmatch(text)) or _NUMBER.fullmatch(text):
        if len(text) > MAX_DIGITS:
            raise _refused(f"numbers have at most {MAX_DIGITS} digits, got {len(text)}", event)
        value = int(text.replace("_", "")) if is_whole else float(text.replace("_", ""))
        if math.isfinite(value):
            return value
    if _NOT_FINITE.fullmatch(text) or _NUMBER.fullmatch(text):
        raise _refused(f"numbers must be finite, got {text}", event)
    return text


def _refused(reason: str, event: Any) -> YamlError:
    return YamlError(f"{reason}{_line(event.start_mark)}")


def _line(mark: Any) -> str:
    return "" if mark is None else f" (line {mark.line + 1}, column {mark.column + 1})"
