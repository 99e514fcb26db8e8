"""Metadata of Common Crawl (WAT): what a crawler found on a page, as JSON, in place of the page itself."""

from __future__ import annotations

import json
from typing import Any

from curation.ingest.pages import Findings, Page, is_inline

_IMAGES = ("IMG@/src", "IMG@/data-src")
_SOURCES = ("IMG@/srcset", "IMG@/data-srcset", "SOURCE@/srcset")
_LINKS = ("A@/href", "AREA@/href")


class WatError(ValueError):
    """The record is no metadata of a page; the message says why in a few words."""


def read_metadata(data: bytes) -> Page | None:
    """Pictures and links of a page; None where the record describes no page of HTML.

    A link stands as ``{"path": "IMG@/src", "url": …, "alt": …}``, one for each attribute, in the order of the page.

    Raises:
        WatError: it is not JSON.
    """
    try:
        envelope = _inside(json.loads(data), "Envelope")
    except (ValueError, RecursionError):
        raise WatError("not json") from None
    http = _inside(envelope, "Payload-Metadata", "HTTP-Response-Metadata")
    html = _inside(http, "HTML-Metadata")
    page_url = _text(_inside(envelope, "WARC-Header-Metadata").get("WARC-Target-URI"))
    if not html or page_url is None:
        return None
    found = Findings()
    head = _inside(html, "Head")
    found.base = _text(head.get("Base"))
    for meta in _objects(head.get("Metas")):
        found.meta(_text(meta.get("property")) or _text(meta.get("name")), _text(meta.get("content")))
    shown = False  # whether the picture before has an address that a late one would only repeat
    for link in _objects(html.get("Links")):
        path, url, alt_text = _text(link.get("path")), _text(link.get("url")), _text(link.get("alt"))
        if path in _IMAGES:
            if path == "IMG@/src" or not shown:
                found.image(url, alt_text)
            shown = path == "IMG@/src" and not is_inline(url)
        elif path in _SOURCES:
            found.candidates(url, alt_text)
        elif path in _LINKS:
            found.link(url, _text(link.get("rel")))
    headers = _inside(http, "Headers").items()
    return found.page(page_url, None).with_headers((name, value) for name, value in headers if isinstance(value, str))


def _inside(value: Any, *names: str) -> dict[str, Any]:
    """An object inside others; an empty one where there is none."""
    for name in names:
        value = value.get(name) if isinstance(value, dict) else None
    return value if isinstance(value, dict) else {}


def _objects(value: Any) -> list[dict[str, Any]]:
    return [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None
