"""What a run offers beside its scores: predictions of files, logits, a split of its own, what it says."""
import contextlib
import fcntl
import json
import os
import re
import struct
import sys
import termios
import threading
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from async_lt import AsyncNet
from common import predict
from common import run as common_run
from common.data import load
from common.loader import Augmentation, Cut, decoded, make_loader
from tests.tiny import METHODS, image_folder, log_rows, run

SMALL = ("--recipe", "cifar100_lt", "--epochs", "1", "--workers", "0", "--image-size", "8", "--no-amp")


@pytest.mark.parametrize("method", METHODS)
def test_predictions_of_files_are_those_of_the_saved_logits(method, tmp_path, capsys):
    image_folder(tmp_path / "images")
    result = run(method, tmp_path, "--dataset", "folder", "--data-dir", str(tmp_path / "images"), *SMALL,
                 "--save-logits")
    saved = np.load(tmp_path / "run" / ("_".join(result["name"].replace(",", " ").split()) + ".npz"))
    assert saved["class_counts"].tolist() == [9, 5, 4]
    assert saved["targets"].tolist() == [0] * 3 + [1] * 3 + [2] * 3

    # the confusion matrix counts the same logits' classes
    confusion = np.zeros((3, 3), int)
    np.add.at(confusion, (saved["targets"], saved["logits"].argmax(1)), 1)
    assert confusion.tolist() == result["confusion"] == saved["confusion"].tolist()

    nets = [tmp_path / "run" / name for name in ("student.pt", "model.pt")]
    net = next(path for path in nets if path.exists())
    files = [str(path) for path in sorted((tmp_path / "images" / "test").rglob("*.png"))]
    probabilities = predict.predict_files(*predict.load_any(net), files)
    torch.testing.assert_close(probabilities, torch.tensor(saved["logits"]).softmax(1), atol=1e-4, rtol=1e-3)

    # as a program: the best class of each file, and the same as CSV
    capsys.readouterr()
    predict.main([str(net), *files[:2]])
    best = "abc"[probabilities[0].argmax()]
    first = capsys.readouterr().out.splitlines()[0]
    assert first == f"{files[0]}: {best} {100 * probabilities[0].max():.1f}%"
    predict.main([str(net), *files, "--csv", "--top", "3"])
    rows = capsys.readouterr().out.splitlines()
    assert rows[0] == "file,class,probability" and len(rows) == 1 + 3 * len(files)


def test_what_is_no_saved_net_or_no_image_is_one_line(tmp_path, capsys):
    torch.save({"method": "os"}, tmp_path / "other.pt")
    for words in ([str(tmp_path / "other.pt"), "x.png"], [str(tmp_path / "none.pt"), "x.png"]):
        with pytest.raises(SystemExit) as stop:
            predict.main(words)
        assert stop.value.code == 2 and capsys.readouterr().err.startswith("error: ")


def test_a_split_of_the_script_is_left_as_lists_that_another_script_takes(tmp_path):
    image_folder(tmp_path / "images")
    images = tmp_path / "images" / "train"
    flags = ("--dataset", "folder", "--data-dir", str(images), *SMALL)
    first = run("cbd", tmp_path, *flags, "--test-fraction", ".34", name="first")
    assert first["class_counts"] == [6, 3, 3]

    lists = [str(tmp_path / "first" / f"{part}_list.txt") for part in ("train", "test")]
    second = run("async_lt", tmp_path, *flags, "--train-list", lists[0], "--test-list", lists[1],
                 name="second")
    assert second["class_counts"] == first["class_counts"]
    read = [[line.rsplit(" ", 1)[0] for line in open(path).read().splitlines()] for path in lists]
    names = [str(path.relative_to(images)) for path in images.rglob("*.png")]
    assert sorted(read[0] + read[1]) == sorted(names)


def test_a_run_says_what_it_is_where_it_writes_and_that_it_is_too_short(tmp_path, capsys):
    run("cbd", tmp_path, "--second-stage", "class-balanced", "--teachers", "1", "--only-teacher", "1")
    said = " ".join(capsys.readouterr().out.split())  # its lines have at most 80 characters
    assert "37 training images, 3 classes" in said and "settings of the recipe" in said
    assert "note: teacher 1, standard takes only 6 steps in batches of 16" in said
    end = (rf"wrote {tmp_path / 'run'} in \d\d:\d\d: last.pt \(for --resume\), log.jsonl \(a line an "
           r"epoch\), result.json \(all scores\), teacher_1.pt")
    assert re.fullmatch(end, said[said.index("wrote "):])
    lines = (tmp_path / "run" / "result.json").read_text().splitlines()
    assert json.loads("".join(lines)) and len(lines) < 40  # a line a key


def test_small_sets_of_files_are_decoded_to_what_their_loader_would_stream(tmp_path):
    image_folder(tmp_path)
    files = load("folder", tmp_path)
    files.image_size = 12
    kept = decoded(files, 12)
    assert kept.train.images.shape == (18, 12, 12, 3) and kept.image_size == 12
    for part in ("train", "test"):
        streamed, resident = (next(iter(make_loader(getattr(data, part), data, Cut(18), "cpu", Augmentation())
                                        .batches(np.arange(9)))) for data in (files, kept))
        assert torch.equal(streamed.images, resident.images)
        assert torch.equal(streamed.targets, resident.targets)


@contextlib.contextmanager
def terminal(monkeypatch):
    """Inside, standard error is a pseudo terminal of 80 columns. Yields a list, to which what it got is added
    at the end."""
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    shown, read = [], []

    def until_it_closes():
        with contextlib.suppress(OSError):  # Linux's way to say that nobody writes any more
            while data := os.read(ours, 4096):
                read.append(data)

    reader = threading.Thread(target=until_it_closes)
    with os.fdopen(theirs, "w") as stderr, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", stderr)
        reader.start()
        yield shown
    reader.join()
    os.close(ours)
    shown.append(b"".join(read).decode())


@pytest.mark.parametrize("method", METHODS)
def test_a_terminal_s_bar_is_of_the_run_with_stage_loss_and_time_left(method, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(common_run, "REFRESH", 0)
    with terminal(monkeypatch) as shown:
        run(method, tmp_path)
    trained = dict.fromkeys(json.loads(line)["stage"]
                            for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()[1:])
    bars = re.findall(r"[\r\n]([^\r\n]+?) \((\d) of (\d)\) +(\d+)%\|.*?\| (\S+) left, epoch (\d)/2, "
                      r"loss (\S+)", shown[0])
    assert list(dict.fromkeys(bar[:3] for bar in bars)) == [
        (name, str(number), str(len(trained))) for number, name in enumerate(trained, 1)]
    assert {bar[5] for bar in bars} == {"1", "2"} and all(float(bar[6]) >= 0 for bar in bars)
    done = [int(bar[3]) for bar in bars]  # percent of the run, whose stages all have two epochs
    assert done == sorted(done) and done[-1] == 100
    assert all(abs(int(bar[3]) / 100 * len(trained) - int(bar[1]) + 0.5) <= 0.52 for bar in bars)
    assert all(re.fullmatch(r"\d\d:\d\d", bar[4]) for bar in bars) and bars[-1][4] == "00:00"


@pytest.mark.parametrize("method, flags", [
    ("cbd", "--second-stage crt --second-stage-epochs 1"), ("cbd", "--only-teacher 2"),
    ("cbd", "--teachers 1 --teacher-checkpoints {net}"), ("async_lt", "--plain-epochs 3"),
    ("async_lt", "--no-plain --phase-two-epochs 1"), ("async_lt", "--no-plain --phase-one-checkpoint {net}"),
    ("async_lt", "--plain"), ("livt", "--stage mgp --mgp-epochs 1"), ("livt", "--mgp-epochs 1 --loss ce bce"),
    ("livt", "--from-scratch --loss ce"), ("candle", "--ablation --calibration-epochs 1"),
    ("candle", "--no-baseline"), ("candle", "--from-scratch ce"), ("candle", "--no-calibration")])
def test_the_bar_s_whole_is_the_epochs_that_are_trained(method, flags, tmp_path, whole, monkeypatch):
    net = whole(method)[0] / {"cbd": "teacher_1.pt", "async_lt": "phase_one.pt"}.get(method, "")
    planned, finish = [], common_run.Run.finish
    monkeypatch.setattr(common_run.Run, "finish", lambda run: planned.extend(run.planned) or finish(run))
    run(method, tmp_path, *flags.format(net=net).split())
    epochs = Counter(row["stage"] for row in log_rows(tmp_path / "run"))
    assert planned == list(epochs.values())


def test_compile_takes_the_backbone_and_leaves_classifier_and_weights(monkeypatch):
    compiled, model = [], AsyncNet("resnet14", 3)
    monkeypatch.setattr(torch, "compile", lambda net: compiled.append(net) or net)
    twin = common_run.Run.compiled(SimpleNamespace(args=SimpleNamespace(compile=True)), model)
    assert compiled == [model.backbone] and twin is not model

    logits, _ = twin(torch.randn(2, 3, 8, 8))
    logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters())
