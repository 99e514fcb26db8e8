"""Whose certificates are trusted: those of the machine, and Mozilla's where it has none."""

from __future__ import annotations

import functools
import os
import re
import ssl
from pathlib import Path

_HASHED = re.compile(r"[0-9a-f]{8}\.\d+")  # a certificate as OpenSSL looks for it in a folder


def tls_context(*, verify: bool = True) -> ssl.SSLContext:
    """What https is spoken with.

    A bare container has no certificates of its own, and would take every site for an impostor. ``SSL_CERT_FILE`` and
    ``SSL_CERT_DIR`` name others, as with OpenSSL.
    """
    return _context(verify, os.environ.get("SSL_CERT_FILE"), os.environ.get("SSL_CERT_DIR"))


@functools.lru_cache
def _context(verify: bool, *_: str | None) -> ssl.SSLContext:  # to load them takes 40 ms
    context = ssl.create_default_context()
    context.set_alpn_protocols(["http/1.1"])  # some front ends speak with nobody who does not say
    if not verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    elif not context.cert_store_stats()["x509_ca"] and not _in_folders():
        import certifi

        context.load_verify_locations(certifi.where())
    return context


def _in_folders() -> bool:
    """Whether there are certificates that OpenSSL reads one by one, when it meets their issuers."""
    paths = ssl.get_default_verify_paths()
    folders = os.environ.get(paths.openssl_capath_env, paths.openssl_capath).split(os.pathsep)
    names = (path.name for folder in folders if folder and Path(folder).is_dir() for path in Path(folder).iterdir())
    return any(_HASHED.fullmatch(name) for name in names)
