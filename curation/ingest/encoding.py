"""What the body of a page is packed in, and in which encoding it is written; the bytes of strangers have limits."""

from __future__ import annotations

import codecs
import re
import zlib
from collections.abc import Callable, Iterator
from typing import Any

_GZIP = b"\x1f\x8b\x08"
_ZSTD = b"\x28\xb5\x2f\xfd"
_PIECE_BYTES = 1 << 16
_META_BYTES = 4096  # how far a page is searched for its encoding; the standard asks for 1024
_META_CHARSET = re.compile(rb"<meta[^>]{0,512}?charset\s*=\s*[\"']?\s*([A-Za-z0-9_.:-]+)", re.IGNORECASE)
_HTTP_CHARSET = re.compile(r"charset\s*=\s*[\"']?\s*([A-Za-z0-9_.:-]+)", re.IGNORECASE)
_BOMS = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"))
# What browsers read instead of what a page says (WHATWG, Encoding, section 4.2), by Python's name.
_INSTEAD = {
    **dict.fromkeys(("ascii", "iso8859-1"), "cp1252"),
    "iso8859-9": "cp1254",
    **dict.fromkeys(("iso8859-11", "tis-620"), "cp874"),
    **dict.fromkeys(("gb2312", "gbk"), "gb18030"),
    "shift_jis": "cp932",
    "euc_kr": "cp949",
    "big5": "big5hkscs",
    "utf-8-sig": "utf-8",
}
_ENCODINGS = frozenset(
    [
        *("utf-8", "utf-16", "utf-16-le", "utf-16-be", "koi8-r", "koi8-u", "mac-roman", "mac-cyrillic", "cp866"),
        *("gb18030", "big5hkscs", "cp932", "euc_jp", "iso2022_jp", "cp949", "cp874"),
        *(f"cp125{n}" for n in range(9)),
        *(f"iso8859-{n}" for n in (2, 3, 4, 5, 6, 7, 8, 10, 13, 14, 15, 16)),
    ]
)


def unpacked(data: bytes, coding: str, max_bytes: int) -> bytes:
    """A body without one content encoding.

    Archives often hold a body unpacked under the headers that it came with: what is not packed is given as it is.

    Args:
        data: the body.
        coding: one word of the header ``Content-Encoding``.
        max_bytes: where unpacking stops, give or take the blocks that brotli works in.

    Raises:
        ValueError: it is damaged from its start, or the encoding is not known. Of later damage only the rest is lost.
    """
    coding = coding.strip().lower()
    if coding in ("", "identity"):
        return data
    unpack = _CODINGS.get(coding)
    if unpack is None:
        raise ValueError(f"content encoding {coding!r} is not known")
    try:
        return unpack(data, max_bytes)
    except (zlib.error, OSError):  # what these say differs from version to version, and rows must not
        raise ValueError(f"{coding} that cannot be unpacked") from None


def _gzip(data: bytes, max_bytes: int) -> bytes:
    return zlib.decompressobj(31).decompress(data, max_bytes) if data.startswith(_GZIP) else data


def _deflate(data: bytes, max_bytes: int) -> bytes:
    try:
        return zlib.decompressobj().decompress(data, max_bytes)
    except zlib.error:  # some servers send it without its header
        return data if _is_text(data) else zlib.decompressobj(-15).decompress(data, max_bytes)


def _brotli(data: bytes, max_bytes: int) -> bytes:
    import brotli

    try:
        return bytes(brotli.Decompressor().process(data, output_buffer_limit=max_bytes))
    except brotli.error:
        if _is_text(data):
            return data
        raise ValueError("br that cannot be unpacked") from None


def _zstd(data: bytes, max_bytes: int) -> bytes:
    import pyarrow as pa

    if not data.startswith(_ZSTD):
        return data
    out = b""
    with pa.CompressedInputStream(pa.BufferReader(data), "zstd") as stream:
        try:
            while len(out) < max_bytes and (piece := stream.read(min(_PIECE_BYTES, max_bytes - len(out)))):
                out += piece
        except OSError:
            if not out:
                raise
    return out


_CODINGS: dict[str, Callable[[bytes, int], bytes]] = {
    **dict.fromkeys(("gzip", "x-gzip"), _gzip),
    "deflate": _deflate,
    "br": _brotli,
    "zstd": _zstd,
}


def _is_text(data: bytes) -> bool:
    return data.lstrip()[:1] == b"<"


def texts(html: bytes, content_type: str | None, piece_bytes: int) -> Iterator[bytes]:
    """A page as UTF-8, piece by piece; bytes that are none in its encoding are replaced."""
    decoder: Any = codecs.getincrementaldecoder(encoding_of(html, content_type))("replace")
    for place in range(0, len(html), piece_bytes):
        text: str = decoder.decode(html[place : place + piece_bytes], place + piece_bytes >= len(html))
        yield (text if place else text.removeprefix("\ufeff")).encode("utf-8", "replace")


def encoding_of(html: bytes, content_type: str | None) -> str:
    """By byte order mark, server, page, in this order; else UTF-8 where it is, and Windows' Latin."""
    for mark, encoding in _BOMS:
        if html.startswith(mark):
            return encoding
    found = _HTTP_CHARSET.search(content_type or "")
    if found and (known := _known_encoding(found[1])):
        return known
    meta = _META_CHARSET.search(html[:_META_BYTES])
    if meta and (known := _known_encoding(meta[1].decode("ascii"))):
        return "utf-8" if known.startswith("utf-16") else known  # it could not have been read there
    try:
        codecs.utf_8_decode(html)
    except UnicodeDecodeError:
        return "cp1252"
    return "utf-8"


def _known_encoding(label: str) -> str | None:
    try:
        name = codecs.lookup(label.lower().removeprefix("x-")).name
    except (LookupError, ValueError):
        return None
    name = _INSTEAD.get(name, name)
    return name if name in _ENCODINGS else None
