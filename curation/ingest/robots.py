"""What a site allows: robots.txt by Protego, and opt-out headers, judged before the body is read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MAX_ROBOTS_BYTES = 500_000
_OPT_OUT = ("noai", "noimageai", "noindex", "noimageindex", "noml", "none")


class Rules:
    """The rules of one site for our agent."""

    def __init__(self, text: str | None, *, agent: str) -> None:
        self._agent = agent
        self._protego: Any = None
        if text is not None:
            from protego import Protego

            self._protego = Protego.parse(text)

    @property
    def told(self) -> str:
        """What the site says at all: ``allowed`` where there are rules, ``none`` where there are not."""
        return "none" if self._protego is None else "allowed"

    def allows(self, url: str) -> bool:
        """Whether an address of the site may be fetched."""
        return self._protego is None or bool(self._protego.can_fetch(url, self._agent))

    def delay_s(self) -> float:
        """Seconds to leave between two visits; 0 where the site asks for none."""
        delay = self._protego.crawl_delay(self._agent) if self._protego is not None else None
        return float(delay or 0.0)


def opt_out(headers: Mapping[str, str] | Any, *, agent: str) -> str | None:
    """The header directive that forbids use for training; None where there is none.

    ``X-Robots-Tag`` with noai, noimageai, noindex, noimageindex, noml or none, for everybody or for our agent, and
    ``TDM-Reservation: 1`` (W3C TDM reservation protocol).
    """
    values = headers.getall("X-Robots-Tag", []) if hasattr(headers, "getall") else [headers.get("X-Robots-Tag", "")]
    for value in values:
        addressed = "*"
        for item in value.split(","):
            name, colon, rest = item.partition(":")
            if colon and name.strip().lower() not in ("unavailable_after", "max-snippet", "max-image-preview"):
                addressed, item = name.strip().lower(), rest  # noqa: PLW2901 - an agent in front of its directives
            directive = item.strip().lower()
            if directive in _OPT_OUT and addressed in ("*", agent.lower()):
                return f"x-robots-tag: {directive}"
    if str(headers.get("TDM-Reservation", "")).strip() == "1":
        return "tdm-reservation: 1"
    return None
