"""What to say when someone names a thing that does not exist."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


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
