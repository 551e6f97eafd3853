"""Which bytes of a blob are here, asked for, or still to be asked for: pure bookkeeping, without clocks or sockets."""

from __future__ import annotations

import heapq

Span = tuple[int, int]  # begin, end


class Ranges:
    """Spans of [0, size). Each byte is in one of three states; what was asked for in vain can be asked for again.

    here: bytes that have come. prefix: how many of them have come without a gap from the beginning.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.here = self.prefix = 0
        self.waiting = size
        self._todo: list[Span] = [(0, size)] if size else []
        self._askers: dict[Span, int] = {}
        self._ahead: dict[int, int] = {}

    @property
    def complete(self) -> bool:
        """Whether all of it is here."""
        return self.here == self.size

    def take(self, length: int) -> Span | None:
        """The next span that nobody has been asked for, of at most `length` bytes; None if there is none."""
        if not self._todo:
            return None
        begin, end = heapq.heappop(self._todo)
        span = (begin, min(end, begin + length))
        if span[1] < end:
            heapq.heappush(self._todo, (span[1], end))
        self.waiting -= span[1] - begin
        self._askers[span] = 1
        return span

    def askers(self, span: Span) -> int:
        """How many are being asked for it; 0 if it is here, or to be asked for."""
        return self._askers.get(span, 0)

    def lacks(self, span: Span) -> bool:
        """Whether exactly this span is on its way, or part of what is to be asked for."""
        return span in self._askers or span in self._todo

    def repeat(self, span: Span) -> None:
        """One more is asked for a span that is on its way."""
        self._askers[span] += 1

    def release(self, span: Span) -> None:
        """One of those who were asked for it will not bring it. No harm if it has come by then."""
        askers = self._askers.get(span, 0)
        if askers > 1:
            self._askers[span] = askers - 1
        elif askers:
            del self._askers[span]
            heapq.heappush(self._todo, span)
            self.waiting += span[1] - span[0]

    def release_all(self) -> None:
        """Nobody will bring what they were asked for."""
        for span in list(self._askers):
            self._askers[span] = 1
            self.release(span)

    def land(self, span: Span) -> bool:
        """It is here. False if it had been before, or has been taken back since and cut differently."""
        if span in self._askers:
            del self._askers[span]
        elif span in self._todo:
            self._todo.remove(span)
            heapq.heapify(self._todo)
            self.waiting -= span[1] - span[0]
        else:
            return False
        self.here += span[1] - span[0]
        self._ahead[span[0]] = span[1]
        while (end := self._ahead.pop(self.prefix, None)) is not None:
            self.prefix = end
        return True
