"""Lines of a run by id or address, and what to say when there is none."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any
from urllib.parse import urlsplit

from curation.ingest.address import AddressError, canonical_url, parse_address
from training.config import ConfigError

_NUM_NEAR = 3
_NUM_OF_HOST = 5_000  # addresses of a host that are held against an unknown one


def rows_of(connection: Any, query: str, *values: Any) -> list[dict[str, Any]]:
    """Rows of a query as dictionaries."""
    cursor = connection.execute(query, list(values))
    names = [column[0] for column in cursor.description]
    return [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]


def find_lines(connection: Any, id_or_url: str) -> list[int]:
    """Ids of the lines that are meant, ascending.

    Args:
        connection: of ``curation.query.connect``.
        id_or_url: ``image_id`` in digits; or the address, or the local location, as the source has it; or another
            spelling of the address.

    Raises:
        ConfigError: the run has no such line; the message names those that are most alike.
    """
    text = id_or_url.strip()
    if text.isdecimal() and len(text) < 19:
        found = rows_of(connection, "SELECT image_id FROM urls WHERE image_id = ?::BIGINT", text)
    else:
        query = "SELECT image_id FROM urls WHERE url = ? OR location = ? ORDER BY image_id"
        found = rows_of(connection, query, text, text)
    ids = [row["image_id"] for row in found] or _other_spellings(connection, text)
    if ids:
        return ids
    hint = _ids(connection) if text.isdecimal() else _near(connection, text)
    raise ConfigError(
        f"picture {id_or_url!r} is not in this run; {hint or 'give an image_id or an address as the list has it'}, "
        "or look for it with a query on the view end_state (lvd sql FILE.sql)"
    )


def _other_spellings(connection: Any, text: str) -> list[int]:
    """Lines whose address has the same canonical spelling."""
    try:
        host, canonical = parse_address(text).host, canonical_url(text)
    except AddressError:
        return []
    query = "SELECT image_id, url FROM urls WHERE host = ? AND error IS NULL ORDER BY image_id"
    return [row["image_id"] for row in rows_of(connection, query, host) if _canonical(row["url"]) == canonical]


def _canonical(url: str) -> str | None:
    try:
        return canonical_url(url)
    except AddressError:  # a local picture whose address is only a note
        return None


def _path(url: str) -> str:
    try:
        return urlsplit(url).path
    except ValueError:  # brackets that are none of an IPv6 address
        return ""


def _ids(connection: Any) -> str:
    """Which ids there are."""
    query = "SELECT source, min(image_id) AS first, max(image_id) AS last FROM urls GROUP BY source ORDER BY first"
    spans = [f"{row['source']} {row['first']} to {row['last']}" for row in rows_of(connection, query)]
    return f"its ids are {', '.join(spans)}" if spans else ""


def _near(connection: Any, text: str) -> str:
    """Addresses with the same file name, then those of the same host that are most alike."""
    name = _path(text).rpartition("/")[2]
    by_name = """
        SELECT coalesce(url, location) AS address FROM urls
        WHERE contains(address, '/' || ?1) OR address = ?1 ORDER BY image_id LIMIT ?2
    """
    alike = [row["address"] for row in rows_of(connection, by_name, name, _NUM_NEAR)] if name else []
    try:
        host = parse_address(text).host
    except AddressError:
        host = ""
    of_host = rows_of(connection, "SELECT url FROM urls WHERE host = ? LIMIT ?", host, _NUM_OF_HOST) if host else []
    paths = {_path(row["url"]): row["url"] for row in of_host}
    alike += [paths[path] for path in get_close_matches(_path(text), paths, n=_NUM_NEAR, cutoff=0.5)]
    alike = list(dict.fromkeys(alike))[:_NUM_NEAR]
    if alike:
        return f"the most alike are {', '.join(alike)}"
    return f"it has {len(of_host):,} other addresses of host {host}" if of_host else ""
