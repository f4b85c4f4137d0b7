"""Killed, stopped, out of disk, without a screen: what is resumed ends as if nothing had happened."""
import functools
import os
import random
import resource
import signal
import time

import pytest
import torch

from common.stop import Stop
from tests.tiny import (METHODS, assert_same_run, ended, image_folder, log_rows, noise_npz, run_in_parts,
                        start, wait_for)

LONG = ("--epochs", "1000", "--out", "run")


@pytest.mark.parametrize("method", METHODS)
def test_a_run_cut_off_behind_every_step_is_the_uninterrupted_one_bit_for_bit(
        method, whole, tmp_path, capsys):
    _, cuts = run_in_parts(method, tmp_path)
    assert cuts >= 12 and ": goes on after epoch 0 of 2, step 1" in capsys.readouterr().out
    assert_same_run(whole(method)[0], tmp_path / "parts")


def die_at_a_write(number):
    """Let this process die in the number-th file that it writes: half-written, or not yet in its place."""
    writes = []

    def kill_there(real):
        def act(*arguments):
            writes.append(1)
            if len(writes) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments)
        return act
    os.fsync, os.replace = kill_there(os.fsync), kill_there(os.replace)


@pytest.mark.parametrize("method", METHODS)
def test_a_run_killed_anywhere_and_resumed_is_the_uninterrupted_one_bit_for_bit(method, whole, tmp_path):
    finished, seconds = whole(method)
    hows, folder, codes = ["kill", "write", "term", "write", "term", "kill", "write"], "cut0", []
    for number, how in enumerate([*hows, "finish"]):
        draw = random.Random(f"{method} {number}")
        dies = functools.partial(die_at_a_write, draw.randint(1, 12)) if how == "write" else None
        process = start(method, tmp_path, "--out", folder, "--resume", prepare=dies)
        if how in ("kill", "term"):
            process.join(draw.uniform(0.1, 0.6) * seconds)
            (process.kill if how == "kill" else process.terminate)()
        codes.append(ended(process))
        assert codes[-1] in {"term": (143, 0, -15), "finish": (0,)}.get(how, (-9, 0)), (how, codes)
        if codes[-1] == 0:  # it came too late
            folder = f"cut{number + 1}"
    assert codes.count(0) <= 4, codes
    for folder in tmp_path.glob("cut*"):
        assert_same_run(finished, folder)


def signalled(tmp_path, *numbers, wait=0.0, flags=LONG, **how):
    """The exit code of a run that gets these signals in its second epoch, `wait` seconds apart."""
    process = start("cbd", tmp_path, *flags, **how)
    wait_for((tmp_path / "run" / "last.pt").exists)
    for number in numbers:
        (os.killpg if how.get("group") else os.kill)(process.pid, number)
        time.sleep(wait)
    return ended(process, 60)


@pytest.mark.parametrize("numbers", [
    [signal.SIGINT], [signal.SIGTERM] * 3])  # a scheduler signals all, and torchrun hands on what it got
def test_a_signal_ends_the_step_in_flight_writes_a_checkpoint_and_says_how_to_go_on(numbers, tmp_path):
    assert signalled(tmp_path, *numbers) == 128 + numbers[0]
    said, error = ((tmp_path / name).read_text() for name in ("out", "err"))
    assert f"stopped by {numbers[0].name}; the same command with --resume --out run goes on" in said
    assert "another signal ends the run at once" in error and "Traceback" not in error
    saved = torch.load(tmp_path / "run" / "last.pt", weights_only=True)["progress"]
    assert saved["epoch"] == log_rows(tmp_path / "run")[-1]["epoch"]
    assert saved["losses"].shape == (1, saved["step"])


@pytest.mark.parametrize("minutes, by", [(None, "another rank"), (0, "--time-limit")])
def test_a_run_without_a_signal_of_its_own_names_what_stopped_it(minutes, by, capsys):
    with pytest.raises(SystemExit) as end:
        Stop(minutes, torch.device("cpu")).end("run")
    assert end.value.code == 0 and f"stopped by {by};" in capsys.readouterr().out


def slow_steps():
    from torch.optim import SGD
    step = SGD.step
    SGD.step = lambda self, *rest: (time.sleep(0.3), step(self, *rest))


def test_another_signal_ends_the_process_at_once(tmp_path):
    numbers = signal.SIGTERM, signal.SIGINT
    assert signalled(tmp_path, *numbers, wait=0.05, prepare=slow_steps) == -signal.SIGINT
    assert "stopped by" not in (tmp_path / "out").read_text()


def test_a_signal_to_the_whole_group_leaves_the_workers_alive_until_it_is_written(tmp_path):
    image_folder(tmp_path / "images", side=40)
    flags = ("--dataset", "folder", "--data-dir", "images", "--workers", "2", "--recipe", "cifar100_lt",
             "--evaluate-every", "1000")
    assert signalled(tmp_path, signal.SIGTERM, flags=(*flags, *LONG), group=True) == 143
    assert "stopped by SIGTERM" in (tmp_path / "out").read_text()
    assert "Traceback" not in (tmp_path / "err").read_text()


def small_disk():
    """No file of this process can be larger than 100 kB: a net of cbd.py's has 700 kB."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))


def test_a_full_disk_keeps_the_last_good_checkpoint_and_names_the_file(tmp_path):
    flags = ("--out", "run", "--resume")
    assert ended(start("cbd", tmp_path, *flags, "--time-limit", "0")) == 0
    before = (tmp_path / "run" / "last.pt").read_bytes()
    assert ended(start("cbd", tmp_path, *flags, prepare=small_disk)) == 2
    lines = (tmp_path / "err").read_text().splitlines()
    errors = [line for line in lines if "error" in line or "Traceback" in line]
    assert len(errors) == 1 and "cannot write run/last.pt: File too large" in errors[0], errors
    assert (tmp_path / "run" / "last.pt").read_bytes() == before
    assert not (tmp_path / "run" / "last.pt.part").exists()
    assert ended(start("cbd", tmp_path, *flags)) == 0  # there is room again
    assert (tmp_path / "run" / "result.json").exists()


@pytest.mark.parametrize("screen", ["/dev/full", "closed", "pipe"])
def test_a_screen_that_is_gone_ends_no_run(screen, whole, tmp_path):
    if screen == "pipe":  # | head -1
        os.mkfifo(tmp_path / "pipe")
    process = start("cbd", tmp_path, "--out", "run", out=screen)
    if screen == "pipe":
        with open(tmp_path / "pipe") as pipe:
            assert pipe.readline()
    assert ended(process) == 0 and "Traceback" not in (tmp_path / "err").read_text()
    assert_same_run(whole("cbd")[0], tmp_path / "run")


def test_a_signal_writes_a_checkpoint_where_nobody_reads_a_word(tmp_path):
    image_folder(tmp_path / "images")  # of which a note is printed
    flags = ("--dataset", "folder", "--data-dir", "images", *LONG)
    assert signalled(tmp_path, signal.SIGTERM, flags=flags, out="/dev/full", err="/dev/full") == 143
    assert torch.load(tmp_path / "run" / "last.pt", weights_only=True)["progress"]["step"] > 0


def test_two_processes_cannot_write_to_one_folder(tmp_path):
    first = start("cbd", tmp_path, *LONG)
    wait_for((tmp_path / "run" / "last.pt").exists)
    assert ended(start("cbd", tmp_path, *LONG, "--resume", err="second")) == 2
    error = (tmp_path / "second").read_text()
    assert "another process writes to run" in error and error.count("\n") == 1
    first.kill()
    ended(first)
    third = start("cbd", tmp_path, *LONG, "--resume", "--time-limit", "0")
    assert ended(third) == 0  # the dead process's lock is gone with it


def test_a_run_stopped_and_resumed_on_classes_in_another_order_is_the_uninterrupted_one(tmp_path):
    noise_npz(tmp_path, class_names=["ant", "bee", "cat"])
    cut = "--imb-factor", "3"  # it draws class by class
    assert ended(start("async_lt", tmp_path, *cut, "--out", "whole")) == 0
    go_on = *cut, "--out", "cut", "--resume"
    assert ended(start("async_lt", tmp_path, *go_on, "--time-limit", "0.003")) == 0
    assert not (tmp_path / "cut" / "result.json").exists()
    noise_npz(tmp_path, turn=2, class_names=["bee", "cat", "ant"])
    assert ended(start("async_lt", tmp_path, *go_on)) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "cut")
    assert "they are matched by name" in (tmp_path / "out").read_text()
