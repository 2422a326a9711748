"""Being told to stop: the step at work is finished, the state saved, and the exit status says by what."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType


@dataclass
class Told:
    """The signal that asked the run to end; 0 while nobody did."""

    signal: int = 0


@contextmanager
def listening() -> Iterator[Told]:
    """Within this block SIGTERM and SIGINT are taken down instead of ending the process; a second SIGINT ends it at once.

    Outside the main thread, where Python allows no handlers, nothing is changed.
    """
    told = Told()
    if threading.current_thread() is not threading.main_thread():
        yield told
        return

    def hear(number: int, frame: FrameType | None) -> None:
        if told.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        told.signal = number

    before = {number: signal.signal(number, hear) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield told
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
