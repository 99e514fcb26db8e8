"""Leases: one driver at a time writes into a root."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from curation.store import Store
from training.config import ConfigError

_LEASE = "lease.json"
HEARTBEAT_S = 10.0
STALE_AFTER_S = 60.0


class LeaseLostError(Exception):
    """Another driver has taken the root over: stop, and write nothing more."""


class LeaseTakenError(ConfigError):
    """A living driver works on the root."""


class Lease:
    """The right to write into a root: one driver at a time, kept up by a heartbeat.

    A dead process on the same machine loses it at once; a silent one on another machine after ``STALE_AFTER_S``.
    """

    def __init__(self, store: Store, scratch: Path) -> None:
        self.token = uuid.uuid4().hex
        self._store = store
        self._scratch = scratch
        self._stop = threading.Event()
        self._acquire()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Give the root back."""
        self._stop.set()
        self._thread.join()
        if lease_token(self._store) == self.token:
            self._store.delete(_LEASE)

    def _acquire(self) -> None:
        if self._store.create(_LEASE, self._note()):
            return
        tag = self._store.tag(_LEASE)
        held = _read_lease(self._store)
        if held is not None and _alive(held):
            raise LeaseTakenError(
                f"{self._store.location}: process {held['pid']} on {held['host']} works on it; "
                "wait for it, or end it and run this again"
            )
        if not self._store.replace(_LEASE, self._note(), tag):
            raise LeaseTakenError(f"{self._store.location}: another process took it at this moment; wait for it")

    def _note(self) -> Path:
        path = self._scratch / f"lease-{uuid.uuid4().hex}"
        note = {
            "token": self.token,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": start_of(os.getpid()),
            "time": time.time(),
        }
        path.write_text(json.dumps(note))
        return path

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT_S):
            try:
                tag = self._store.tag(_LEASE)
                if lease_token(self._store) != self.token:
                    return
                self._store.replace(_LEASE, self._note(), tag)
            except Exception:  # an error of the disk or the network passes; the next beat tries again
                continue


def lease_token(store: Store) -> str | None:
    """Token of the driver that holds a root; None where nobody does."""
    held = _read_lease(store)
    return None if held is None else str(held["token"])


def check_lease(store: Store, token: str) -> None:
    """Raise ``LeaseLostError`` when another driver holds the root, or when the one that held it is gone.

    A worker may outlive its driver for a moment. What it made then (visits to a site that went down with the driver,
    say) is not what an undisturbed run would have made.
    """
    held = _read_lease(store)
    if held is None or held["token"] != token:
        raise LeaseLostError(f"{store.location}: another driver took it over; this one stops")
    if not _alive(held):
        raise LeaseLostError(f"{store.location}: the driver is gone; its workers stop")


def lease_holder(store: Store) -> str | None:
    """``process PID on HOST`` of the living driver of a root; None where there is none."""
    held = _read_lease(store)
    return f"process {held['pid']} on {held['host']}" if held is not None and _alive(held) else None


def _read_lease(store: Store) -> dict[str, Any] | None:
    try:
        note: dict[str, Any] = json.loads(store.read(_LEASE))
    except FileNotFoundError:
        return None
    except ValueError:
        raise ConfigError(
            f"{store.location}/{_LEASE} is damaged; remove it when nothing works on this folder"
        ) from None
    return note


def _alive(held: dict[str, Any]) -> bool:
    if held["host"] == socket.gethostname():
        return held["started"] is not None and start_of(int(held["pid"])) == held["started"]
    return time.time() - float(held["time"]) < STALE_AFTER_S


def start_of(pid: int) -> float | None:
    """When a process of this machine started, so that a reused pid is not taken for it; None where it is gone.

    Ticks since the machine started, where the kernel tells them: the clock may be set meanwhile.
    """
    import psutil

    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return None
        stat = Path(f"/proc/{pid}/stat")
        if stat.exists():  # the name in parentheses may hold anything; field 22 is the start
            return float(stat.read_text().rpartition(")")[2].split()[19])
        return float(process.create_time())
    except (psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
        return None
