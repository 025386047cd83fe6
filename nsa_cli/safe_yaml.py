"""YAML as people write settings in it: plain values and their lines. What runs, refers or grows is refused.

Scalars are those of YAML 1.2: `no` and `12:30` are texts, not a boolean and a number of seconds.
"""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nsa_models.errors import InputError

if TYPE_CHECKING:
    import yaml

MAX_BYTES = 64_000
MAX_DEPTH = 16
OPENING, CLOSING = ("SequenceStartEvent", "MappingStartEvent"), ("SequenceEndEvent", "MappingEndEvent")
PLAIN = (
    (r"~|null|Null|NULL|", lambda text: None),
    (r"true|True|TRUE", lambda text: True),
    (r"false|False|FALSE", lambda text: False),
    (r"[-+]?[0-9]{1,18}", int),
    (r"[-+]?(\.[0-9]{1,18}|[0-9]{1,18}(\.[0-9]{0,18})?)([eE][-+]?[0-9]{1,2})?", float),
)


@dataclass(frozen=True)
class Node:
    """A value and the line, from 1, where it (in a mapping: its key) stands."""

    value: None | bool | int | float | str | list["Node"] | dict[str, "Node"]
    line: int

    def plain(self):
        """The value without lines."""
        if isinstance(self.value, list):
            return [item.plain() for item in self.value]
        if isinstance(self.value, dict):
            return {key: item.plain() for key, item in self.value.items()}
        return self.value


def parse(data: bytes, name: str) -> Node:
    """The one document in `data`. Raises InputError, `name:line: what is wrong`."""
    import yaml

    if len(data) > MAX_BYTES:
        raise InputError(f"{name}: {len(data):,} bytes; at most {MAX_BYTES:,} are read")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        text = data.decode("utf-8-sig")
        _check_events(yaml.parse(text, loader), name)
        root = yaml.compose(text, loader)
    except UnicodeDecodeError as error:
        raise InputError(f"{name}: not UTF-8 ({error.reason} at byte {error.start})") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise InputError(f"{name}:{line}: not YAML: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise InputError(f"{name}: not YAML: {' '.join(str(error).split())}") from None
    if root is None:
        raise InputError(f"{name}: empty")
    return _node(root, root.start_mark.line + 1, name)


def _check_events(events, name: str) -> None:
    """Refuse aliases (ten lines of them can stand for gigabytes), tags (they name types to build) and deep nesting."""
    depth = 0
    for event in events:
        kind, line = type(event).__name__, event.start_mark.line + 1
        if kind == "AliasEvent" or getattr(event, "anchor", None):
            raise InputError(f"{name}:{line}: anchors and aliases are not allowed; write the value out")
        if getattr(event, "tag", None):
            raise InputError(f"{name}:{line}: the tag {event.tag} is not allowed; plain values only")
        depth += (kind in OPENING) - (kind in CLOSING)
        if depth > MAX_DEPTH:
            raise InputError(f"{name}:{line}: nested more than {MAX_DEPTH} deep")


def _node(node: "yaml.Node", line: int, name: str) -> Node:
    kind = type(node).__name__
    if kind == "ScalarNode":
        return Node(node.value if node.style else _scalar(node.value), line)
    if kind == "SequenceNode":
        return Node([_node(item, item.start_mark.line + 1, name) for item in node.value], line)
    values: dict[str, Node] = {}
    for key, value in node.value:
        key_line = key.start_mark.line + 1
        if type(key).__name__ != "ScalarNode":
            raise InputError(f"{name}:{key_line}: a key must be a text")
        if key.value in values:
            raise InputError(f"{name}:{key_line}: {key.value!r} stands here twice")
        values[key.value] = _node(value, key_line, name)
    return Node(values, line)


def _scalar(text: str):
    for pattern, convert in PLAIN:
        if re.fullmatch(pattern, text):
            return convert(text)
    return text
