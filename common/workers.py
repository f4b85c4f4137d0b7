"""Worker processes of a torch DataLoader that neither lose a run nor outlive it: their start, what they send,
their end."""
import atexit
import contextlib
import multiprocessing
import os
import signal
import threading

from common.ranks import die_with_parent

PATIENCE = 5  # seconds without an item after which workers are woken, in case somebody has stopped one


class LostWorker(ValueError):
    """A worker process is gone, or cannot send what it has made."""
    one_rank = True  # under torchrun one rank meets it, not all


def start_worker(number):
    """A DataLoader's worker_init_fn. Signals to the whole process group are the parent's business, which may
    still want its batch, however long its step takes; and a worker dies with its parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    die_with_parent(signal.SIGKILL, multiprocessing.parent_process().pid)


def items(loader):
    """An epoch of a DataLoader with `worker_init_fn=start_worker`, `timeout=PATIENCE`; or of one without
    workers. Raises LostWorker."""
    if loader.num_workers == 0:
        yield from loader
        return

    with _one_line():
        waiting = _start(loader)
        while True:
            # a worker that is stopped while it hands over its tensors blocks `next` beyond the timeout
            alarm = threading.Timer(loader.timeout, _signal_workers, [signal.SIGCONT])
            alarm.daemon = True
            alarm.start()
            try:
                item = next(waiting)
            except StopIteration:
                return
            except RuntimeError as reason:
                if "timed out" not in str(reason):
                    raise
                continue
            finally:
                alarm.cancel()
            yield item


def _start(loader):
    """iter(loader), whose new processes never see a signal that is meant for their parent."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGCHLD"):
        return iter(loader)

    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))  # they inherit it
    on_child = signal.getsignal(signal.SIGCHLD) or signal.SIG_DFL
    _signal_workers(signal.SIGCONT)  # those of the epoch before must answer in time
    try:
        return iter(loader)
    finally:
        # torch's own handler raises when a worker dies, anywhere in the step; `next` finds out as well
        signal.signal(signal.SIGCHLD, on_child)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        # The last one registered is called first: before torch and multiprocessing wait for the workers' end
        atexit.unregister(_signal_workers)
        atexit.register(_signal_workers, signal.SIGKILL)


def _signal_workers(number):
    for process in multiprocessing.active_children():
        if process.daemon:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, number)


@contextlib.contextmanager
def _one_line():
    """What torch raises for a worker that is gone, as a LostWorker that says what to do."""
    try:
        yield
    except (RuntimeError, OSError, EOFError) as reason:
        text = str(reason)
        ended = ("exited unexpectedly", "killed by signal", "timed out")
        if "shared memory" in text or "No space left" in text:
            what = "the shared memory, /dev/shm, is full: make it larger (docker run --shm-size 8g)"
        elif "Too many open files" in text:
            what = "too many open files: allow more (ulimit -n 65536)"
        elif not isinstance(reason, RuntimeError) or any(words in text for words in ended):
            what = "a worker process was killed, perhaps for want of memory: --resume goes on"
        else:
            raise
        raise LostWorker(f"{what}; fewer --workers take less (0: none)") from reason
