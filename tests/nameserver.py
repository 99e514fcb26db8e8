"""A name server on a loopback port that can die in the middle of a run, and come back."""

import socket
import struct
import threading
import time
from collections.abc import Iterable, Mapping

_NO_SUCH_NAME = 3


class NameServer:
    """Answers A and AAAA questions for ``names``; all other names do not exist.

    ``turns`` maps names to several answers, given one after another, the last one from then on; ``late`` maps names to
    seconds until they are answered, and may be changed while somebody waits.
    """

    def __init__(self, names: Mapping[str, Iterable[str]]) -> None:
        self.names = {name.lower(): list(addresses) for name, addresses in names.items()}
        self.asked: list[str] = []  # names of A questions, in order
        self.turns: dict[str, list[list[str]]] = {}
        self.late: dict[str, float] = {}
        self.dies_after: int | None = None  # so many of them
        self.port = 0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def place(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def alive(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def start(self) -> "NameServer":
        """Start, or start again at the same port."""
        self._stop.clear()
        server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        server.bind(("127.0.0.1", self.port))
        server.settimeout(0.05)
        self.port = server.getsockname()[1]
        self._thread = threading.Thread(target=self._serve, args=(server,), daemon=True)
        self._thread.start()
        return self

    def stop(self) -> None:
        """Die: whoever asks now is told that there is no such port."""
        self._stop.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(5)

    def _serve(self, server: socket.socket) -> None:
        with server:
            waiting: list[tuple[float, str, bytes, tuple[str, int]]] = []  # since when, for what; what to say, and whom
            while not self._stop.is_set():
                now = time.monotonic()
                for one in [one for one in waiting if one[0] + self.late.get(one[1], 0.0) <= now]:
                    server.sendto(*one[2:])
                    waiting.remove(one)
                try:
                    question, client = server.recvfrom(4096)
                except TimeoutError:
                    continue
                except OSError:
                    return
                name = _name(question)[0]
                answer = self._answer(question)
                if answer is not None:
                    waiting.append((time.monotonic(), name, answer, client))

    def _answer(self, question: bytes) -> bytes | None:
        name, place = _name(question)
        end = place + 5
        (kind,) = struct.unpack(">H", question[place + 1 : place + 3])
        if kind == 1:
            self.asked.append(name)
            if self.dies_after is not None and len(self.asked) > self.dies_after:
                self.dies_after = None
                self._stop.set()
                return None
        known = self.names.get(name)
        if kind == 1 and name in self.turns:
            turns = self.turns[name]
            known = turns.pop(0) if len(turns) > 1 else turns[0]
        code = 0 if known is not None else _NO_SUCH_NAME
        packed = [socket.inet_aton(one) for one in known or () if kind == 1 and ":" not in one]
        packed += [socket.inet_pton(socket.AF_INET6, one) for one in known or () if kind == 28 and ":" in one]
        head = question[:2] + struct.pack(">HHHHH", 0x8180 | code, 1, len(packed), 0, 0)
        answers = (b"\xc0\x0c" + struct.pack(">HHIH", kind, 1, 60, len(one)) + one for one in packed)
        return head + question[12:end] + b"".join(answers)


def _name(question: bytes) -> tuple[str, int]:
    """The name that a question is for, and where it ends."""
    labels, place = [], 12
    while length := question[place]:
        labels.append(question[place + 1 : place + 1 + length].decode())
        place += 1 + length
    return ".".join(labels).lower(), place
