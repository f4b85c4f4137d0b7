"""When a run must stop before its end: SIGTERM, SIGINT, --time-limit."""
import contextlib
import os
import signal
import sys
import threading
import time

import torch

from common.ranks import rank, ranks, say, sum_ranks

# seconds in which the same signal again is the same wish: schedulers signal every process, and torchrun
# hands on what it got itself
SAME_WISH = 10


class Stop:
    """Remembers signals, for `wanted`; a second one, another or later, ends the process at once.

    minutes: of --time-limit, from now on; None: no limit.
    """

    def __init__(self, minutes, device):
        self.minutes, self.device, self.steps = minutes, device, 0
        self.started, self.signal, self.since, self.handlers = time.time(), None, 0.0, {}
        if threading.current_thread() is threading.main_thread():  # Python allows handlers there alone
            self.handlers = {number: signal.signal(number, self._remember)
                             for number in (signal.SIGTERM, signal.SIGINT)}

    def _remember(self, number, frame):
        if self.signal is None:
            self.signal, self.since = number, time.monotonic()
            if rank() == 0 and sys.stderr is not None:
                with contextlib.suppress(OSError):  # | tee has got the same signal, and is gone
                    os.write(2, b"\nstopping after this step, with a checkpoint; "
                                b"another signal ends the run at once\n")
        elif number != self.signal or time.monotonic() - self.since > SAME_WISH:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def wanted(self):
        """Whether the run must end after this step. Under torchrun the ranks agree on it in every 16th
        call."""
        self.steps += 1
        if ranks() > 1 and self.steps % 16:
            return False
        stops = self.signal is not None or self._late()
        return stops if ranks() == 1 else \
            bool(sum_ranks(torch.tensor(float(stops), device=self.device)).item())

    def _late(self):
        return self.minutes is not None and time.time() - self.started > 60 * self.minutes

    def end(self, folder):
        """End the process: exit code 128 + the signal's number; 0 for --time-limit, or for another rank's
        wish."""
        self.close()
        reason = signal.Signals(self.signal).name if self.signal is not None else \
            "--time-limit" if self._late() else "another rank"
        say(f"stopped by {reason}; the same command with --resume --out {folder} goes on")
        sys.exit(0 if self.signal is None else 128 + self.signal)

    def close(self):
        """Give back the signals' handlers."""
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
