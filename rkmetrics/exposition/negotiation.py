"""Which representation a request gets: RFC 9110, sections 12.4 and 12.5.

Pure, total and bounded: any bytes have an answer, no bytes raise, and only the first 4096 of them and 64 elements are
read. An element that is not well formed counts as if it were not there. When nothing that is asked for is spoken, the
answer is text (or no coding), never an error: a reader that can do nothing with it is no worse off, a person with a
browser is better off.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from rkmetrics.exposition.base import Format

__all__ = ["choose", "quality", "wanted_codings", "wants"]

MAX_HEADER_BYTES = 4096
MAX_ELEMENTS = 64

_WORD = r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
# One list element; a quoted string may hold commas (RFC 9110, 5.6.4). One without an end goes to the end of the header,
# and nothing is tried twice ("++"), so that the work is linear whatever the bytes.
_ELEMENT = re.compile(r'(?:[^",]|"(?:[^"\\]|\\.?)*+(?:"|\Z))++', re.DOTALL)
_PARAMETER = re.compile(rf'[ \t]*+;[ \t]*+(?:({_WORD})=({_WORD}|"(?:[^"\\]|\\.)*+"))?[ \t]*+', re.DOTALL)
_RANGE = re.compile(rf"[ \t]*({_WORD})/({_WORD})[ \t]*")
_CODING = re.compile(rf"[ \t]*({_WORD})[ \t]*")
_WEIGHT = re.compile(r"0(\.[0-9]{0,3})?|1(\.0{0,3})?")  # 12.4.2


@dataclass(frozen=True, slots=True)
class _Range:
    """A media range: one element of Accept."""

    type: str
    subtype: str
    parameters: Mapping[str, str]
    weight: float

    def specificity(self, media_type: str, asked: Mapping[str, tuple[str, ...]]) -> int | None:
        """How closely the range names the representation (12.5.1: the most specific one decides); None: not at all."""
        kind, _, subtype = media_type.partition("/")
        if (self.type, self.subtype) == ("*", "*"):
            return 0
        if self.type != kind or self.subtype not in ("*", subtype):
            return None
        if self.subtype == "*":
            return 1
        fits = all(self.parameters.get(name, "") in values for name, values in asked.items())
        return 2 + len(self.parameters.keys() & asked.keys()) if fits else None


def _elements(header: bytes) -> list[str]:
    """The elements of a list; what is cut off in the middle by the limit is left out."""
    text = header[:MAX_HEADER_BYTES].decode("latin-1")
    found: list[str] = []
    for match in _ELEMENT.finditer(text):
        if match.end() == MAX_HEADER_BYTES or len(found) == MAX_ELEMENTS:
            break
        found.append(match.group())
    return found


def _parameters(text: str) -> dict[str, str] | None:
    """Parameters in lower case, without quotes; None when text is something else."""
    found: dict[str, str] = {}
    position = 0
    while position < len(text):
        match = _PARAMETER.match(text, position)
        if match is None:
            return None
        name, value = match.groups()
        if name is not None:
            bare = re.sub(r"\\(.)", r"\1", value[1:-1]) if value.startswith('"') else value
            found.setdefault(name.lower(), bare.lower())
        position = match.end()
    return found


def _weight(parameters: dict[str, str]) -> float | None:
    text = parameters.pop("q", "1")
    return float(text) if _WEIGHT.fullmatch(text) else None


@lru_cache(maxsize=64)
def _ranges(accept: bytes) -> tuple[_Range, ...]:
    found: list[_Range] = []
    for element in _elements(accept):
        match = _RANGE.match(element)
        parameters = _parameters(element[match.end() :]) if match else None
        weight = None if parameters is None else _weight(parameters)
        if match is not None and parameters is not None and weight is not None:
            kind, subtype = match.group(1).lower(), match.group(2).lower()
            found.append(_Range(kind, subtype, parameters, weight))
    return tuple(found)


def quality(accept: bytes | None, media_type: str, asked: Mapping[str, tuple[str, ...]]) -> tuple[float, int, int]:
    """What Accept says about a representation: weight (0: not acceptable), how specifically, and minus the place in the
    list.

    Tuples compare as preference does: weight first, then a name over a wildcard, then the order in which the client
    wrote.
    """
    best = (0.0, -1, 0)
    for place, one in enumerate(_ranges((accept or b"")[:MAX_HEADER_BYTES])):
        specificity = one.specificity(media_type, asked)
        if specificity is not None and specificity > best[1]:
            best = (one.weight, specificity, -place)
    return best[0], min(best[1], 2), best[2]


def choose(accept: bytes | None, formats: Sequence[Format]) -> Format:
    """The best of formats, which are in our order of preference; the first when nothing is acceptable."""
    ranked = [(*quality(accept, each.media_type, each.parameters), -at) for at, each in enumerate(formats)]
    best = max(ranked)
    return formats[-best[3]] if best[0] > 0 else formats[0]


def wants(accept: bytes | None, media_type: str, formats: Iterable[Format]) -> bool:
    """Whether the client names media_type (no wildcard does) and prefers it to every one of formats."""
    own = quality(accept, media_type, {})
    rivals = (quality(accept, each.media_type, each.parameters) for each in formats)
    return own[0] > 0 and own[1] == 2 and all(own > rival for rival in rivals)


@lru_cache(maxsize=64)
def _codings(accept_encoding: bytes) -> Mapping[str, float]:
    found: dict[str, float] = {}
    for element in _elements(accept_encoding):
        match = _CODING.match(element)
        parameters = _parameters(element[match.end() :]) if match else None
        weight = None if parameters is None else _weight(parameters)
        if match is not None and weight is not None:
            found.setdefault(match.group(1).lower(), weight)
    return found


def wanted_codings(accept_encoding: bytes | None) -> Mapping[str, float]:
    """Coding (in lower case; perhaps "*") to weight. Empty for no header at all."""
    return _codings((accept_encoding or b"")[:MAX_HEADER_BYTES])
