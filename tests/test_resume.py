"""Killed, preempted, out of disk: what is resumed ends as if nothing had happened."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from common import runtime

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
FLAGS = {"cbd": ["--teachers", "2", "--arch", "resnet14"],
         "async_lt": ["--arch", "resnet14", "--phase-two-epochs", "2", "--phase-one-classes", "2",
                      "--memory-per-class", "3"],
         "livt": ["--width", "16", "--depth", "2", "--heads", "2", "--patch-size", "4", "--image-size", "8",
                  "--decoder-width", "16", "--decoder-depth", "1", "--decoder-heads", "2", "--mgp-epochs",
                  "2", "--mgp-batch-size", "8", "--augment", "strong"],  # all that draws numbers
         "candle": ["--arch", "reactnet_18", "--student-width", "0.0625", "--teacher", "resnet14",
                    "--teacher-weights", "embedded", "--student-resolution", "16", "--resolutions", "8", "16",
                    "--calibration-epochs", "2"]}


def flags(folder, method):
    generator, path = np.random.default_rng(0), folder / "images.npz"
    targets = np.concatenate([[0, 1, 2], generator.integers(0, 3, 34)])
    images = generator.integers(0, 256, (37, 8, 8, 3), dtype=np.uint8)
    np.savez(path, x_train=images, y_train=targets, x_test=images[:11], y_test=targets[:11])
    return ["--dataset", "images.npz", *FLAGS[method], "--epochs", "2", "--batch-size", "8",
            "--device", "cpu", "--evaluate-every", "1"]


def start(folder, method, *more):
    return subprocess.Popen([sys.executable, str(ROOT / f"{method}.py"), *flags(folder, method), *more],
                            cwd=folder, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True)


def wait_for(condition, seconds=120):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end
        time.sleep(0.01)


def without_times(value):
    """A result or a log line without times and without what may differ between two runs of one kind."""
    if isinstance(value, dict):
        return {key: without_times(item) for key, item in value.items()
                if key not in ("seconds", "seconds_per_epoch", "images_per_second", "peak_memory_mb", "out",
                               "resume", "argv")}
    return [without_times(item) for item in value] if isinstance(value, list) else value


def assert_same_run(a, b):
    names = sorted(path.name for path in a.iterdir())
    assert names == sorted(path.name for path in b.iterdir())
    assert "result.json" in names and ".lock" not in names and "previous.pt" not in names
    for name in names:
        if name.endswith(".pt") and name != "last.pt":
            x, y = (torch.load(folder / name, weights_only=True)["state_dict"] for folder in (a, b))
            assert x.keys() == y.keys() and all(torch.equal(x[key], y[key]) for key in x), name
    rows = [[without_times(json.loads(line)) for line in (folder / "log.jsonl").read_text().splitlines()]
            for folder in (a, b)]
    assert rows[0] == rows[1]
    results = [without_times(json.loads((folder / "result.json").read_text())) for folder in (a, b)]
    assert results[0] == results[1]


@pytest.mark.parametrize("method", FLAGS)
def test_a_run_killed_anywhere_and_resumed_is_the_uninterrupted_one_bit_for_bit(method, tmp_path):
    hows = ["kill", "write", "term", "kill", "write", "term", "write"]  # 28 deaths for four scripts
    done = subprocess.run([sys.executable, str(ROOT / "tests" / "kill_and_resume.py"), ",".join(hows), method,
                           *flags(tmp_path, method)], cwd=tmp_path, env=ENVIRONMENT, capture_output=True,
                          text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    codes = [int(code) for code in done.stdout.split("exit codes")[1].split()]
    for how, code in zip(hows, codes):
        assert code in {"kill": (-9, 0), "write": (-9, 0), "term": (143, 0)}[how], (codes, done.stderr)
    assert codes[-1] == 0 and codes[:-1].count(0) <= 2, codes  # 0: it came too late
    for folder in tmp_path.glob("cut*"):
        assert_same_run(tmp_path / "whole", folder)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_step_in_flight_writes_a_checkpoint_and_says_how_to_go_on(number, tmp_path):
    process = start(tmp_path, "cbd", "--epochs", "1000", "--out", "run")
    wait_for((tmp_path / "run" / "last.pt").exists)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number and not err.replace("\r", "").strip().startswith("Traceback")
    assert f"stopped by {number.name}; the same command with --resume --out run goes on" in out
    saved = torch.load(tmp_path / "run" / "last.pt", weights_only=True)["progress"]
    logged = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()[1:]]
    assert saved["epoch"] == logged[-1]["epoch"] and len(saved["losses"]) == saved["step"]


def test_a_signal_to_the_whole_group_leaves_the_workers_alive_until_it_is_written(tmp_path):
    generator = np.random.default_rng(0)
    for part in ("train", "test"):
        for name in "abc":
            folder = tmp_path / "images" / part / name
            folder.mkdir(parents=True)
            for i in range(8):
                Image.fromarray(generator.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(
                    folder / f"{i}.png")
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "cbd.py"), "--dataset", "folder", "--data-dir", "images", "--workers",
         "2", "--arch", "resnet14", "--epochs", "1000", "--batch-size", "8", "--device", "cpu", "--out",
         "run"], cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True)
    wait_for((tmp_path / "run" / "last.pt").exists)
    os.killpg(process.pid, signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 143 and "stopped by SIGTERM" in out and "Traceback" not in err, err


def test_a_second_signal_ends_the_process_at_once():
    code = ("import os, signal, time\nfrom types import SimpleNamespace\nfrom common import runtime\n"
            "run = runtime.Run('.', SimpleNamespace(device='cpu', time_limit=None), {})\n"
            "os.kill(os.getpid(), signal.SIGTERM)\ntime.sleep(.01)\nassert run.must_stop()\n"
            "os.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)")
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=50).returncode == -signal.SIGINT


@pytest.mark.parametrize("size", [0, 100, -100])
def test_a_damaged_checkpoint_falls_back_to_the_one_before_and_says_so(size, tmp_path, capsys):
    run = runtime.Run(tmp_path, SimpleNamespace(device="cpu", time_limit=None), {})
    (tmp_path / "log.jsonl").write_text("{}\n")
    for number in (1, 2, 3):
        run.save(number=number, model={"weight": torch.ones(1000)})
    run.close()
    assert runtime.load_last(tmp_path)["number"] == 3 and capsys.readouterr().out == ""
    last = tmp_path / "last.pt"
    last.write_bytes(last.read_bytes()[:size])
    assert runtime.load_last(tmp_path)["number"] == 2
    said = capsys.readouterr().out
    assert f"cannot read the checkpoint {last}" in said
    assert f"going on from {tmp_path / 'previous.pt'}" in said
    last.unlink()  # killed between the two renames of a save
    assert runtime.load_last(tmp_path)["number"] == 2


def test_two_damaged_checkpoints_are_an_error_and_nothing_is_lost(tmp_path):
    for name in ("last.pt", "previous.pt"):
        (tmp_path / name).write_bytes(b"nothing")
    with pytest.raises(ValueError, match="there is no earlier one"):
        runtime.load_last(tmp_path)
    assert (tmp_path / "last.pt").read_bytes() == b"nothing"


def test_a_checkpoint_never_executes_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return open, (str(tmp_path / "executed"), "w")
    torch.save({"state_dict": Evil()}, tmp_path / "last.pt")
    with pytest.raises(ValueError, match="cannot read the checkpoint"):
        runtime.load_last(tmp_path)
    assert not (tmp_path / "executed").exists()


def test_a_full_disk_keeps_the_last_good_checkpoint_and_names_the_file(tmp_path):
    process = start(tmp_path, "cbd", "--time-limit", "0", "--out", "run")
    assert process.wait(120) == 0
    before = (tmp_path / "run" / "last.pt").read_bytes()
    limited = ("import resource, signal, sys, runpy\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
               "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
               "sys.argv = sys.argv[1:]\nrunpy.run_path(sys.argv[0], run_name='__main__')")
    done = subprocess.run([sys.executable, "-c", limited, str(ROOT / "cbd.py"), *flags(tmp_path, "cbd"),
                           "--out", "run", "--resume"], cwd=tmp_path, capture_output=True, text=True,
                          env={**ENVIRONMENT, "PYTHONPATH": str(ROOT)}, timeout=120)
    errors = [line for line in done.stderr.splitlines() if "error" in line or "Traceback" in line]
    assert done.returncode == 2 and len(errors) == 1 and "cannot write run/last.pt" in errors[0], done.stderr
    assert (tmp_path / "run" / "last.pt").read_bytes() == before
    assert not (tmp_path / "run" / "last.pt.part").exists()
    process = start(tmp_path, "cbd", "--out", "run", "--resume")  # there is room again
    assert process.wait(120) == 0 and (tmp_path / "run" / "result.json").exists()


def test_two_processes_cannot_write_to_one_folder(tmp_path):
    first = start(tmp_path, "cbd", "--epochs", "1000", "--out", "run")
    wait_for((tmp_path / "run" / "last.pt").exists)
    second = start(tmp_path, "cbd", "--epochs", "1000", "--out", "run", "--resume")
    _, err = second.communicate(timeout=120)
    first.kill()
    assert second.returncode == 2 and "another process writes to run" in err and err.count("\n") == 1
    first.wait(10)
    third = start(tmp_path, "cbd", "--epochs", "1000", "--out", "run", "--resume", "--time-limit", "0")
    assert third.wait(120) == 0  # the dead process's lock is gone with it


def test_two_ranks_of_a_few_steps_an_epoch_stop_at_the_time_limit(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
               str(ROOT / "cbd.py"), *flags(tmp_path, "cbd"), "--epochs", "1000", "--out", "run",
               "--time-limit", "0"]
    done = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "stopped by --time-limit" in done.stdout, done.stderr
    assert torch.load(tmp_path / "run" / "last.pt", weights_only=True)["stage"] == "teacher 1, standard"


def test_a_dead_rank_ends_the_others_within_a_minute(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
               str(ROOT / "cbd.py"), *flags(tmp_path, "cbd"), "--epochs", "1000", "--out", "run"]
    process = subprocess.Popen(command, cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    wait_for((tmp_path / "run" / "last.pt").exists)
    children = [int(pid) for pid in subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True,
                                                   text=True).stdout.split()]
    os.kill(children[-1], signal.SIGKILL)
    assert process.wait(60) != 0
    assert torch.load(tmp_path / "run" / "last.pt", weights_only=True)["stage"] == "teacher 1, standard"
