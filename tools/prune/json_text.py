"""Changes single values in a JSON file's text and leaves every other character as it stands.

A configuration is somebody else's file: its order, its spacing and the keys that only its own code knows stay.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from json.decoder import scanstring

Path = tuple[str | int, ...]  # keys of objects and places in lists, from the outside in

_DECODER = json.JSONDecoder()


@dataclass
class _Value:
    """Where a value stands in the text, and in an object the text before and the end of its last member."""

    start: int
    end: int = 0
    before_last: str = ""
    last_end: int | None = None


@dataclass
class _Scan:
    text: str
    values: dict[Path, _Value] = field(default_factory=dict)

    def value(self, at: int, path: Path) -> int:
        found = self.values[path] = _Value(at)
        opening = self.text[at]
        if opening not in "{[":
            _, found.end = _DECODER.raw_decode(self.text, at)
            return found.end
        closing = "}" if opening == "{" else "]"
        at += 1
        place = 0
        while True:
            start = self._skip(at)
            if self.text[start] == closing:
                found.end = start + 1
                return found.end
            if self.text[start] == ",":
                at = start + 1
                continue
            found.before_last = self.text[at:start]
            key: str | int = place
            place += 1
            inner = start
            if opening == "{":
                key, inner = scanstring(self.text, start + 1)
                inner = self._skip(self._skip(inner) + 1)  # past the colon
            at = found.last_end = self.value(inner, (*path, key))

    def _skip(self, at: int) -> int:
        while self.text[at] in " \t\r\n":
            at += 1
        return at


def replace_values(text: str, edits: Mapping[Path, object]) -> str:
    """The text with values at these places replaced; a key that its object lacks is added behind its last.

    Args:
        text: valid JSON.
        edits: the place of a value -> the new value. A list or an object is written on one line where the old one was,
            else one item a line.

    Raises:
        KeyError: no object stands where a key is to be added.
    """
    scan = _Scan(text)
    scan.value(scan._skip(0), ())
    changes = []
    added: dict[Path, list[tuple[str, object]]] = {}
    for path, new in edits.items():
        if path in scan.values:
            at = scan.values[path]
            changes.append((at.start, at.end, _written(new, text[at.start : at.end], _indent(text, at.start))))
        else:
            added.setdefault(path[:-1], []).append((path[-1], new))
    for path, members in added.items():
        holder = scan.values[path]
        if text[holder.start] != "{":
            raise KeyError(path)
        before = holder.before_last if holder.last_end is not None else ""
        at = holder.last_end if holder.last_end is not None else holder.start + 1
        separator = "," if holder.last_end is not None else ""
        written = []
        for key, new in members:
            written.append(f"{separator}{before}{json.dumps(key)}: {json.dumps(new)}")
            separator = ","
        changes.append((at, at, "".join(written)))
    for start, end, new in sorted(changes, reverse=True):
        text = text[:start] + new + text[end:]
    return text


def _indent(text: str, at: int) -> str:
    line = text[text.rfind("\n", 0, at) + 1 : at]
    return line[: len(line) - len(line.lstrip())]


def _written(new: object, old: str, indent: str) -> str:
    if not isinstance(new, list | dict) or "\n" not in old:
        return json.dumps(new, ensure_ascii=False)
    return json.dumps(new, ensure_ascii=False, indent=2).replace("\n", "\n" + indent)
