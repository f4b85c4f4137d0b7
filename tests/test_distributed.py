"""Two ranks give one process's numbers, end together, and leave a checkpoint when they are told to stop."""
import contextlib
import os
import signal
import subprocess
import sys

import pytest
import torch

from tests.tiny import (METHODS, ROOT, ended, image_folder, log_rows, noise_npz, result_of, start,
                        start_ranks, tiny_flags, wait_for, weights, without_batch_norm)

# without what a rank draws for itself, and losses that look at all of a rank's part of a batch
EXACT = {"cbd": [], "async_lt": ["--no-retentive", "--no-margin"],
         "livt": ["--augment", "plain", "--drop-path", "0", "--from-scratch"],
         "candle": ["--no-binarize", "--balance", "fixed"]}
NETS = {"cbd": "student.pt", "async_lt": "model.pt", "livt": "model.pt", "candle": "student.pt"}


# 37 images: the last batch holds 5 (3 and 2 a rank), or 1 (fewer than there are ranks)
# 12 = 2 ranks x 3 parts x 2
@pytest.mark.parametrize("method, batch_size, accumulation", [
    ("cbd", "8", "1"), *((method, "12", "3") for method in METHODS)])
def test_two_ranks_give_one_process_losses_weights_and_scores(tmp_path, method, batch_size, accumulation):
    flags = [*EXACT[method], "--batch-size", batch_size, "--lr", "0.003", "--no-amp"]
    one = start(method, tmp_path, *flags, "--out", "one", prepare=without_batch_norm)
    two = start_ranks(method, tmp_path, *flags, "--grad-accumulation", accumulation, "--out", "two",
                      prepare=without_batch_norm)
    assert [ended(process) for process in (one, *two)] == [0, 0, 0], (tmp_path / "err").read_text()
    for a, b in zip(log_rows(tmp_path / "one"), log_rows(tmp_path / "two"), strict=True):
        assert (a["stage"], a["epoch"]) == (b["stage"], b["epoch"])
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a.get("per_class_accuracy") == b.get("per_class_accuracy")
    a, b = (weights(tmp_path / name / NETS[method]) for name in ("one", "two"))
    assert all(torch.allclose(a[name], b[name], atol=2e-4) for name in a)
    for a, b in zip(*(result_of(tmp_path / name)["stages"] for name in ("one", "two")), strict=True):
        assert a["all"] == b["all"] and a.get("ncm") == pytest.approx(b.get("ncm"))


@pytest.mark.parametrize("method", METHODS)
def test_every_stage_ends_on_two_ranks_that_share_one_test_image(method, tmp_path):
    noise_npz(tmp_path, num_test=1)
    ranks = start_ranks(method, tmp_path, "--epochs", "1", "--out", "run")
    assert [ended(process) for process in ranks] == [0, 0], (tmp_path / "err").read_text()
    assert 0 <= result_of(tmp_path / "run")["all"] <= 100


@pytest.mark.parametrize("method", ["async_lt", "candle"])  # a memory bank; several resolutions
def test_two_ranks_give_one_process_numbers_with_image_files_one_of_them_broken(method, tmp_path):
    # 4, 3 and 1 images: in async_lt's phase two one of the ranks has none for the features
    image_folder(tmp_path / "images", counts=(4, 3, 2), test=1)
    (tmp_path / "images" / "train" / "c" / "00.png").write_bytes(b"no image")
    flags = [*EXACT[method], "--dataset", "folder", "--data-dir", "images", "--recipe", "cifar100_lt",
             "--skip-bad-images", "--epochs", "1", "--batch-size", "4", "--lr", "0.003", "--no-amp",
             *["--balance", "learned"] * (method == "candle")]
    one = start(method, tmp_path, *flags, "--workers", "0", "--out", "one", prepare=without_batch_norm)
    two = start_ranks(method, tmp_path, *flags, "--workers", "1", "--out", "two", prepare=without_batch_norm)
    assert [ended(process) for process in (one, *two)] == [0, 0, 0], (tmp_path / "err").read_text()
    assert "note: 1 unreadable image files are left out:" in (tmp_path / "out").read_text()
    for a, b in zip(log_rows(tmp_path / "one"), log_rows(tmp_path / "two"), strict=True):
        near = 1e-2 if "lambdas" in a else 1e-4  # a learned lambda belongs to a rank's part of a batch
        assert a["stage"] == b["stage"] and a["loss"] == pytest.approx(b["loss"], abs=near)
        assert a.get("lambda", 0) == pytest.approx(b.get("lambda", 0), rel=near)
    results = [result_of(tmp_path / name) for name in ("one", "two")]
    assert results[0]["class_counts"] == results[1]["class_counts"] == [4, 3, 1]
    assert results[0]["per_class_accuracy"] == results[1]["per_class_accuracy"]


def test_a_run_stopped_inside_an_epoch_goes_on_on_another_number_of_ranks_with_the_same_losses(tmp_path):
    flags = ("--teachers", "1", "--only-teacher", "1", "--batch-size", "2", "--lr", "0.003", "--no-amp",
             "--epochs", "1", "--resume")
    for name in ("whole", "cut"):
        limit = ["--time-limit", "0"] * (name == "cut")
        ranks = start_ranks("cbd", tmp_path, *flags, *limit, "--out", name, prepare=without_batch_norm)
        assert [ended(process) for process in ranks] == [0, 0], (tmp_path / "err").read_text()
    assert torch.load(tmp_path / "cut" / "last.pt", weights_only=True)["progress"]["step"] == 16
    assert ended(start("cbd", tmp_path, *flags, "--out", "cut", prepare=without_batch_norm)) == 0
    whole, cut = log_rows(tmp_path / "whole"), log_rows(tmp_path / "cut")
    assert whole[0]["loss"] == pytest.approx(cut[0]["loss"], abs=1e-5)


def test_a_wrong_flag_is_one_line_on_two_ranks(tmp_path):
    ranks = start_ranks("cbd", tmp_path, "--evaluate-on", "val")
    assert [ended(process) for process in ranks] == [2, 2]
    assert (tmp_path / "err").read_text().count("error: ") == 1


@pytest.fixture
def agent(tmp_path, monkeypatch):
    """torchrun with two ranks of an endless cbd.py in its second epoch, in a process group of its own."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # for torchrun's own files
    noise_npz(tmp_path)
    with open(tmp_path / "out", "w") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
             str(ROOT / "cbd.py"), *tiny_flags("cbd"), "--batch-size", "2", "--epochs", "1000",
              "--out", "run"],
            cwd=tmp_path, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
    wait_for(lambda: (tmp_path / "run" / "last.pt").exists() or process.poll() is not None)
    yield process, children(process.pid), tmp_path
    for pid in (*children(process.pid), process.pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def children(pid):
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True)
    return [int(child) for child in found.stdout.split()]


def is_gone(pid):
    try:
        return os.waitpid(pid, os.WNOHANG)[0] == pid
    except ChildProcessError:  # none of ours
        status = f"/proc/{pid}/stat"
        return not os.path.exists(status) or open(status).read().rsplit(")", 1)[1].split()[0] == "Z"


def test_a_signal_to_all_processes_at_once_leaves_a_checkpoint(agent):
    process, ranks, folder = agent
    os.killpg(process.pid, signal.SIGTERM)  # as schedulers do; torchrun hands it on to the ranks once more
    wait_for(lambda: all(map(is_gone, ranks)), 60)
    assert process.wait(60) != 0
    saved = torch.load(folder / "run" / "last.pt", weights_only=True)["progress"]
    assert saved["step"] > 0, (folder / "out").read_text()
    said = (folder / "out").read_text()
    assert said.count("stopping after this step") == said.count("stopped by SIGTERM") == 1, said


def test_ranks_whose_agent_is_killed_do_not_train_on(agent):
    process, ranks, _ = agent
    assert len(ranks) == 2
    process.kill()
    process.wait(10)
    wait_for(lambda: all(map(is_gone, ranks)), 60)


def test_a_dead_rank_ends_the_others_within_a_minute(agent):
    process, ranks, folder = agent
    os.kill(ranks[-1], signal.SIGKILL)
    assert process.wait(60) != 0
    assert torch.load(folder / "run" / "last.pt", weights_only=True)["stage"] == "teacher 1, standard"


def transfer_and_end():
    from common import ranks
    ranks.start_ranks("cpu")
    for _ in range(300):
        total = ranks.sum_ranks(torch.ones(1000))
    assert total[0] == 2


def test_ranks_that_end_right_after_a_transfer_end_well(tmp_path):
    # where gloo's threads still hold a tensor, one end in ten aborted, or hung, on a busy machine
    script = tmp_path / "script.py"
    script.write_text(f"import sys\nsys.path[:0] = {[str(ROOT), str(ROOT / 'tests')]!r}\n"
                      "from test_distributed import transfer_and_end\ntransfer_and_end()\n")
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    for _ in range(2):
        subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node",
                        "2", str(script)], check=True, env=environment, timeout=120)
