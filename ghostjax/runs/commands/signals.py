"""What ends a run from outside."""

import contextlib
import signal
from collections.abc import Callable, Iterator

from ghostjax.runs.errors import TerminatedError

SIGNALS = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: TerminatedError}


@contextlib.contextmanager
def noted() -> Iterator[Callable[[], int]]:
    """Ctrl-C and SIGTERM end the run after the step at hand, so that its state is whole; twice, at
    once. Gives which of them came, or 0."""
    received: list[int] = []

    def note(number, frame):
        if received:
            raise SIGNALS[number]
        received.append(number)

    before = {}
    try:
        for number in SIGNALS:
            # As in the background of a script, where they are ignored.
            if signal.getsignal(number) is not signal.SIG_IGN:
                with contextlib.suppress(ValueError):  # not in the main thread
                    before[number] = signal.signal(number, note)
        yield lambda: received[0] if received else 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
