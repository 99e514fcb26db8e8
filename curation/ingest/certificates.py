"""Whose certificates are trusted: those of the machine, and Mozilla's where it has none."""

from __future__ import annotations

import ssl
from pathlib import Path


def tls_context(*, verify: bool = True) -> ssl.SSLContext:
    """What https is spoken with.

    A bare container has no certificates of its own, and would take every site for an impostor. ``SSL_CERT_FILE`` and
    ``SSL_CERT_DIR`` name others, as with OpenSSL.
    """
    if not verify:
        context = ssl.create_default_context()
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        return context
    if _machine_has_some():
        return ssl.create_default_context()
    import certifi

    return ssl.create_default_context(cafile=certifi.where())


def _machine_has_some() -> bool:
    paths = ssl.get_default_verify_paths()
    return bool(paths.cafile) or (bool(paths.capath) and any(Path(paths.capath).iterdir()))
