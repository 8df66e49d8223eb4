"""What to say when someone names a thing that does not exist, or gives a value of the wrong kind."""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches

_KINDS = {"float": "a number", "int": "a whole number", "bool": "true or false", "str": "text", "NoneType": "null"}


def unknown(kind: str, name: str, known: Iterable[str], most: int = 12) -> str:
    """One sentence that names the unknown `name`, the nearest known one, and up to `most` of all that are known.

    Example:
        >>> unknown("recipe", "digit", ["digits"])
        "unknown recipe 'digit'; did you mean 'digits'? There is: digits."
    """
    known = sorted(known)
    near = get_close_matches(name, known, n=1)
    guess = f"; did you mean {near[0]!r}?" if near else "."
    listed = f" There is: {', '.join(known)}." if len(known) <= most else ""
    return f"unknown {kind} {name!r}{guess}{listed}"


def mistaken(message: str) -> str:
    r"""What jsonargparse says of a value, as a sentence; whatever else it says, unchanged.

    Example:
        >>> mistaken('Parser key "model.lr": Expected a <class \'float\'>. Got value: abc')
        '`model.lr` must be a number; got abc.'
    """
    found = re.search(r'Parser key "([\w.]+)":.*(?:Got|Given) value: (\S.*?)\s*$', message, re.DOTALL)
    kinds = re.findall(r"Expected a (?:<class '(\w+)'>|typing\.Literal\[(.*?)\])", message)
    if not found or not kinds:
        return message
    wanted = [_KINDS.get(kind, kind) if kind else f"one of {words.replace(chr(39), '')}" for kind, words in kinds]
    return f"`{found[1]}` must be {' or '.join(dict.fromkeys(wanted))}; got {found[2]}."
