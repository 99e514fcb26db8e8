"""What a sample web is made from."""

from __future__ import annotations

import hashlib
from pathlib import Path

from pydantic import Field

from curation.stage import digest_of
from training.config import EXECUTION, Config, ConfigError

# Raised whenever the same values would build other bytes.
BUILD_VERSION = 2


class SampleWebConfig(Config):
    """One number, ``urls``, scales the site; the same values build the same bytes."""

    path: str = Field("sample_web", json_schema_extra=EXECUTION, description="folder of the site, made when missing")
    urls: int = Field(2000, ge=200, description="lines in the list of addresses")
    seed: int = Field(0, ge=0)
    photos: list[str] = Field(
        default_factory=list,
        description="folders or tars of pictures, each used once; empty: compositions of installed photographs",
    )
    num_hosts: int = Field(200, ge=40, le=1000, description="virtual hosts")
    workers: int = Field(0, ge=0, json_schema_extra=EXECUTION, description="processes that build; 0: one a core")

    def digest(self) -> str:
        """Digest of everything that decides the site, the contents of ``photos`` included."""
        values = {key: value for key, value in self.fingerprint_values().items() if key != "photos"}
        return digest_of([BUILD_VERSION, values, [_content_digest(Path(place)) for place in self.photos]])


def _content_digest(place: Path) -> str:
    """sha256 over the names and bytes of a folder, or over the bytes of an archive."""
    if not place.exists():
        raise ConfigError(f"sample_web.photos: {place} does not exist; give folders or tars of pictures, or []")
    total = hashlib.sha256()
    files = sorted(path for path in place.rglob("*") if path.is_file()) if place.is_dir() else [place]
    for path in files:
        with path.open("rb") as stream:
            content = hashlib.file_digest(stream, "sha256").hexdigest()
        name = str(path.relative_to(place)) if place.is_dir() else ""
        total.update(f"{name}\0{content}\n".encode())
    return total.hexdigest()
