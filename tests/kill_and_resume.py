"""Run a script again and again with --resume, killed or stopped each time, until it ends by itself:

    python tests/kill_and_resume.py HOW,HOW,... SCRIPT FLAGS...

HOW an attempt ends: "kill" (SIGKILL at a random moment), "write" (SIGKILL in the middle of a random write of
a checkpoint or a net) or "term" (SIGTERM at a random step). A last one is left alone. Each is a forked
process, so that a start costs no imports. The first run of all is not interrupted, in the folder whole, the
others are in cut; where one's end comes too late it is finished, and the next starts anew, in cut1, ... .
Prints their exit codes.
"""
import importlib
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import torch  # noqa: E402

from common import runtime  # noqa: E402


def die_in_a_write(number):
    """Make the number-th file that this process writes end in the middle of it."""
    writes, fsync, replace = [], os.fsync, os.replace

    def kill_there(real):
        def act(*arguments):
            writes.append(1)
            if len(writes) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments)
        return act
    os.fsync, os.replace = kill_there(fsync), kill_there(replace)  # half-written, or not yet in its place


def term_at_a_step(number):
    must_stop = runtime.Run.must_stop

    def act(self):
        if self.steps == number - 1:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)  # Python calls the handler between two instructions
        return must_stop(self)
    runtime.Run.must_stop = act


def attempt(method, flags, prepare):
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        torch.set_num_threads(1)
        prepare()
        method.main(method.parse_args(flags))
        code = 0
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


if __name__ == "__main__":
    hows, name, *flags = sys.argv[1:]
    method, codes, started = importlib.import_module(name), [], time.time()
    whole = attempt(method, [*flags, "--out", "whole"], lambda: None)
    assert os.waitpid(whole, 0)[1] == 0
    seconds, folder = time.time() - started, "cut"
    for i, how in enumerate([*hows.split(","), "finish"]):
        draw = random.Random(f"{name} {i}")
        number = draw.randint(1, 12)
        pid = attempt(method, [*flags, "--out", folder, "--resume"],
                      {"write": lambda: die_in_a_write(number), "term": lambda: term_at_a_step(number)}.get(
                          how, lambda: None))
        if how == "kill":
            time.sleep(draw.uniform(0.05, 0.6) * seconds)
            os.kill(pid, signal.SIGKILL)
        codes.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        if codes[-1] == 0:
            folder = f"cut{i + 1}"
    print("exit codes", *codes)
