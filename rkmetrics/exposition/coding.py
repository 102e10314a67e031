"""Content codings: how a page is packed for the way (RFC 9110, 8.4 and 12.5.3)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from importlib.util import find_spec

from rkmetrics.exposition.base import Coding
from rkmetrics.exposition.negotiation import wanted_codings

__all__ = ["CODINGS", "choose_coding"]

# Level 1: of a page of metrics it leaves a tenth, level 9 a little less for four times the work.
_LEVEL = 1


def _gzip(page: bytes) -> bytes:
    import zlib

    packer = zlib.compressobj(_LEVEL, zlib.DEFLATED, wbits=31)  # 31: a gzip header, without a time in it
    return packer.compress(page) + packer.flush()


@cache
def _zstd_compressor() -> Callable[[bytes], bytes] | None:
    """Python 3.14's own, or that of the extra `zstd`; None without either."""
    try:
        if find_spec("compression") is not None:
            from compression import zstd  # type: ignore[import-not-found, unused-ignore]

            return lambda page: zstd.compress(page, _LEVEL)  # type: ignore[no-any-return, unused-ignore]
        import zstandard
    except ImportError:
        return None
    return lambda page: zstandard.ZstdCompressor(_LEVEL).compress(page)  # a compressor is for one thread


def _zstd(page: bytes) -> bytes:
    compress = _zstd_compressor()
    assert compress is not None, "choose_coding offers zstd only where it is"
    return compress(page)


IDENTITY = Coding("identity", lambda page: page)
GZIP = Coding("gzip", _gzip, aliases=("x-gzip",))  # 8.4.1.3: x-gzip is equivalent
ZSTD = Coding("zstd", _zstd, named_only=True)

# In our order of preference: zstd is half the work of gzip, and smaller.
CODINGS = (ZSTD, GZIP, IDENTITY)


# What a coding weighs that is acceptable only because nobody said that it is not: less than any weight that can be
# written.
_UNSAID = 0.0001


def choose_coding(accept_encoding: bytes | None) -> Coding:
    """The best coding that is acceptable; identity when none is, or when the client says nothing."""
    wanted = wanted_codings(accept_encoding)
    best, best_weight = IDENTITY, 0.0
    for coding in CODINGS:
        weight = _weight(coding, wanted)
        if weight > best_weight and (coding is not ZSTD or _zstd_compressor() is not None):
            best, best_weight = coding, weight
    return best


def _weight(coding: Coding, wanted: Mapping[str, float]) -> float:
    for name in (coding.name, *coding.aliases):
        if name in wanted:
            return wanted[name]
    if "*" in wanted and not coding.named_only:
        return wanted["*"]
    return _UNSAID if coding is IDENTITY else 0.0
