"""Reading on while what was read is worked on."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

_END = object()


class ReadAhead:
    """An iterator that a thread keeps ahead by at most `depth` items and about `max_bytes`; `close()` ends it."""

    def __init__(self, items: Iterator, depth: int, max_bytes: int, size_of: Callable[[Any], int]):
        self._depth, self._max_bytes, self._size_of = depth, max_bytes, size_of
        self._waiting: deque[tuple[Any, int]] = deque()
        self._num_bytes = 0
        self._end: Any = None  # _END, or the error that ended the thread
        self._is_closed = False
        self._changed = threading.Condition()
        threading.Thread(target=self._fill, args=(items,), name="read-ahead", daemon=True).start()

    def __iter__(self) -> ReadAhead:
        return self

    def __next__(self) -> Any:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._end is not None)
            if self._waiting:
                item, size = self._waiting.popleft()
                self._num_bytes -= size
                self._changed.notify_all()
                return item
        raise StopIteration if self._end is _END else self._end

    def close(self) -> None:
        """Let the thread end, once what it waits for has come."""
        with self._changed:
            self._is_closed = True
            self._waiting.clear()
            self._changed.notify_all()

    def _fill(self, items: Iterator) -> None:
        end: Any = _END
        try:
            for item in items:
                size = self._size_of(item)
                with self._changed:
                    self._changed.wait_for(self._has_room)
                    if self._is_closed:
                        return
                    self._waiting.append((item, size))
                    self._num_bytes += size
                    self._changed.notify_all()
        except BaseException as error:  # raised where the next item is asked for
            end = error
        finally:
            with self._changed:
                self._end = end
                self._changed.notify_all()

    def _has_room(self) -> bool:
        return self._is_closed or (len(self._waiting) < self._depth and self._num_bytes < self._max_bytes)
