"""Records of csv and tsv, of which a quote that nothing closes takes no other line with it."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator

from curation.ingest.address import address_error

Cells = list[str]

_MAX_LINES = 1000  # of one record; csv itself bounds a cell, at 131,072 letters
MAX_LINE = 16 << 20  # letters; of a longer line no more than one of them is to be given
_TOO_LONG = f"a line of more than {MAX_LINE:,} letters"


class Records:
    """Records of a file behind its header: number of the line that they begin in, and cells, or why there are none.

    A cell in quotes may hold line breaks. Where its quote is closed too late, closed in the middle of a cell, or holds
    a line that is a record itself, it was a letter: the lines that it took are read again, each on its own. Many
    programs write tsv without quotes, so that a text may begin with one.
    """

    def __init__(self, lines: Iterable[str], delimiter: str, url_column: str | None = None) -> None:
        """Read the header.

        Raises:
            csv.Error: it cannot be read.
        """
        self._held = _Held(lines)
        self._delimiter = delimiter
        self._url_column = url_column
        self._reader = csv.reader(self._held, delimiter=delimiter)
        self._place = 1
        self.header: Cells = []
        self._first = self._next()
        if self._first:
            _, header = self._first.pop(0)
            if isinstance(header, str):
                raise csv.Error(header)
            self.header = header

    def __iter__(self) -> Iterator[tuple[int, Cells | str]]:
        yield from self._first
        while found := self._next():
            yield from found

    def _next(self) -> list[tuple[int, Cells | str]]:
        """The next record, or one for each of the lines that it took; none at the end."""
        held, place = self._held, self._place
        held.begin()
        try:
            cells = next(self._reader, None)
        except csv.Error as error:
            cells = None
            if len(held.lines) == 1:
                self._place += 1
                return [(place, str(error))]
        self._place += len(held.lines)
        if cells is not None and self._is_whole(cells):
            return [(place, cells)]
        return [(place + at, self._alone(line)) for at, line in enumerate(held.lines)]

    def _is_whole(self, cells: Cells) -> bool:
        held = self._held
        if any(len(line) > MAX_LINE for line in held.lines):
            return False
        if held.is_open or len(held.lines) == 1:
            return not held.is_open
        try:
            next(csv.reader(held.lines, delimiter=self._delimiter, strict=True))
        except csv.Error:
            return False
        return not any(self._is_row(line, cells) for line in held.lines[1:])

    def _is_row(self, line: str, cells: Cells) -> bool:
        """Whether a line is a record with an address that is none of these cells, quotes being letters."""
        try:
            own = self._unquoted(line)
        except csv.Error:
            return False
        url = dict(zip(self.header, own, strict=False)).get(self._url_column or "", "")
        return len(own) == len(self.header) and "://" in url and url not in cells and address_error(url) is None

    def _alone(self, line: str) -> Cells | str:
        """Cells of one line; a quote that is not closed in it is a letter, if so it has the cells of the header."""
        if len(line) > MAX_LINE:
            return _TOO_LONG
        held = _Held([line])
        try:
            cells = next(csv.reader(held, delimiter=self._delimiter))
            if not held.is_open:
                return cells
            cells = self._unquoted(line)
        except csv.Error as error:
            return str(error)
        return cells if len(cells) == len(self.header) or not self.header else "a quote that is not closed"

    def _unquoted(self, line: str) -> Cells:
        return next(csv.reader([line], delimiter=self._delimiter, quoting=csv.QUOTE_NONE))


class _Held:
    """Lines as ``csv.reader`` asks for them; those of one record are held, and it gets no more than it may have."""

    def __init__(self, lines: Iterable[str]) -> None:
        self._left = iter(lines)
        self.begin()

    def begin(self) -> None:
        """Hold the lines of the next record."""
        self.lines: list[str] = []
        self.is_open = False  # it asked for a line behind its last

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = next(self._left, None) if len(self.lines) < _MAX_LINES else None
        if line is None:
            self.is_open = True
            raise StopIteration
        self.lines.append(line)
        return line
