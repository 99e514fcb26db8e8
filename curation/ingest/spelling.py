"""The canonical spelling of many addresses at once.

Nearly all addresses of a list are in it already: one pattern tells which, at a fraction of a microsecond each. Only the
others are taken apart one by one.
"""

from __future__ import annotations

from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from curation.ingest.address import AddressError, canonical_url, parse_address

# No user, port or fragment; a path of characters that are not escaped, and of escapes that must be.
_CANONICAL = (
    r"^https?://[a-z0-9_](?:[a-z0-9_.-]*[a-z0-9_-])?"
    r"/(?:[A-Za-z0-9/:@!$&'()*+,;=._~-]|%(?:[0189A-F][0-9A-F]|2[0-9A-CF]|3[A-F]|40|5[B-E]|60|7[B-DF]))*"
    r"(?:\?[!\"$-~]*)?\z"
)
_DOT_SEGMENT = r"/\.\.?(?:[/?]|\z)"
_HOST = r"^https?://(?P<host>[a-z0-9_.-]+)/"


class Spelled(NamedTuple):
    """Addresses taken apart, arrays of strings of length N; all null where a text is none, or null."""

    canonical: pa.Array
    scheme: pa.Array
    host: pa.Array


def spelled(urls: pa.Array) -> Spelled:
    """What ``canonical_url`` and ``parse_address`` say of each text of an array of strings."""
    is_canonical = pc.match_substring_regex(urls, _CANONICAL)
    is_canonical = pc.and_(is_canonical, pc.invert(pc.match_substring_regex(urls, _DOT_SEGMENT)))
    others = pc.fill_null(pc.invert(is_canonical), False)
    found = [_one(url) for url in urls.filter(others).to_pylist()]
    columns = [
        urls,
        pc.if_else(pc.starts_with(urls, "https:"), "https", "http"),
        pc.struct_field(pc.extract_regex(urls, _HOST), "host"),
    ]
    return Spelled(
        *(
            pc.replace_with_mask(column, others, pa.array([one[place] for one in found], pa.string()))
            for place, column in enumerate(columns)
        )
    )


def _one(url: str) -> tuple[str | None, str | None, str | None]:
    try:
        address = parse_address(url)
        return canonical_url(url), address.scheme, address.host
    except AddressError:
        return None, None, None
