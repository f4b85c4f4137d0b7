"""common/folder.py: what a run writes outlives a crash, what is damaged or foreign is refused in a line."""
import json
import os
import random
import re
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
import torch.nn as nn

from common.folder import atomic_write, load_checkpoint, load_last, load_net, lock, open_folder, save_net
from tests.tiny import FORK, ended, like_any_user

MALFORMED = {  # an entry of a net's file: what it must not be (...: not there)
    "state_dict": [[1, 2]], "state_dict/more": [torch.zeros(2)], "class_counts": [...], "kind": [["Net"]],
    "state_dict/classifier.weight": [..., torch.zeros(3, 5), "text", torch.full((3, 4), torch.nan)],
    "settings": [..., [1]], "settings/depth": [3], "settings/num_classes": [..., -3], "image_size": [..., 0],
    "class_names": [5, ["ant", "bee"], ["ant", "ant", "bee"]], "mean": [..., "grey", (0.5, 0.5)]}


def opened(path, resume=False, prints="a1", names=("ant", "bee"), **flags):
    """A run's folder as a script opens it. path: None for the default one. prints, names: of the data."""
    args = SimpleNamespace(dataset="some/tiny.npz", seed=3, device="cpu", resume=resume, lr=0.1,
                           out=None if path is None else str(path), **flags)
    return open_folder(args, "cbd", {"fingerprint": prints, "class_names": list(names)}, torch.device("cpu"))


def saved(path, *numbers):
    """A folder in which states with these numbers were saved, one behind the other."""
    folder = opened(path)
    for number in numbers:
        folder.save(number=number, model={"weight": torch.full((300,), float(number))})
    folder.close()
    return path


def test_a_failed_write_leaves_the_old_file_and_is_one_line_and_none_follows_a_link(tmp_path, capsys):
    path, log = tmp_path / "net.pt", tmp_path / "run" / "log.jsonl"
    path.write_bytes(b"old")
    for write in (lambda file: file.write(b"ne") and Path("/dev/full").write_bytes(b"w"),
                  lambda file: torch.save({"a": torch.zeros(5)}, "/dev/full")):
        assert pytest.raises(SystemExit, atomic_write, path, write).value.code == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: cannot write {path}: ")
        assert "make room, then --resume" in error and error.count("\n") == 1 and "pos" not in error, error
        assert os.listdir(tmp_path) == ["net.pt"] and path.read_bytes() == b"old"
    folder = opened(tmp_path / "run")
    log.unlink()
    log.symlink_to("/dev/full")
    pytest.raises(SystemExit, folder.log, epoch=1)
    assert f"cannot write {log}: No space left on device" in capsys.readouterr().err

    (tmp_path / "precious").write_text("stays")
    for name in ("net.pt.part", ".lock"):
        (tmp_path / name).symlink_to("precious")
    atomic_write(tmp_path / "net.pt", lambda file: file.write(b"new"))
    pytest.raises(OSError, lock, tmp_path)
    assert (tmp_path / "precious").read_text() == "stays" and (tmp_path / "net.pt").read_bytes() == b"new"


def test_what_is_no_checkpoint_is_refused_in_a_line_and_not_executed_a_flipped_bit_seen_or_harmless(tmp_path):
    evil = type("Evil", (), {"__reduce__": lambda self: (open, (str(tmp_path / "executed"), "w"))})
    torch.save({"args": evil()}, tmp_path / "evil.pt")
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "empty.pt").touch()
    for name, why in (("evil.pt", ".*it holds more than tensors and plain values"), (".", ""),
                      ("missing.pt", ""), ("text.pt", ""), ("empty.pt", "")):
        refused = pytest.raises(ValueError, load_checkpoint, tmp_path / name)
        assert refused.match(rf"\A.*checkpoint.* {tmp_path / name}{why}.*\Z")
        assert "weights_only" not in str(refused.value)
    assert not (tmp_path / "executed").exists()
    path, draw, seen = saved(tmp_path / "run", 1) / "last.pt", random.Random(0), 0
    whole, good = path.read_bytes(), load_checkpoint(path)
    marks = [(entry.start() + 38, 4) for entry in re.finditer(b"PK\1\2", whole)]  # "is a folder"
    for place, bit in [*marks, *((draw.randrange(len(whole)), draw.randrange(8)) for _ in range(60))]:
        flipped = bytearray(whole)
        flipped[place] ^= 1 << bit
        path.write_bytes(flipped)
        try:
            state = load_checkpoint(path)
        except ValueError as reason:
            assert re.search(rf"\A.*{path}.*\Z", str(reason))
            seen += 1
        else:
            assert torch.equal(state.pop("model")["weight"], good["model"]["weight"])
            assert state == {key: good[key] for key in good if key != "model"}
    assert seen > 20


def test_a_damaged_checkpoint_falls_back_to_the_one_before_and_never_takes_its_place(tmp_path, capsys):
    run = saved(tmp_path / "run", 1, 2, 3)
    last, whole = run / "last.pt", (run / "last.pt").read_bytes()
    assert load_last(run)["number"] == 3 and "going on" not in capsys.readouterr().out
    flipped = bytearray(whole)
    flipped[whole.index(torch.full((300,), 3.0).numpy().tobytes()) + 100] ^= 1  # in the weights
    for damaged in (b"", whole[:100], whole[:-100], flipped, None):
        last.unlink()
        if damaged is not None:  # None: killed between the two renames of a save
            last.write_bytes(damaged)
        assert load_last(run)["number"] == 2
        said = capsys.readouterr().out
        assert f"going on from {run}/previous.pt" in said and str(last) in said
    last.write_bytes(whole[:-50])
    folder = opened(run, resume=True)
    for number, before in ((5, 2), (6, 5)):
        assert folder.state["number"] == before
        folder.save(number=number)
        assert load_last(run)["number"] == number and load_checkpoint(run / "previous.pt")["number"] == before


def test_a_whole_file_not_yet_in_its_place_is_taken_and_what_is_no_checkpoint_refused_and_kept(tmp_path):
    run, last = saved(tmp_path / "run", 1, 2), tmp_path / "run" / "last.pt"
    part = last.rename(run / "last.pt.part")
    (run / "previous.pt").unlink()
    assert load_last(run)["number"] == 2
    part.write_bytes(b"cut off in the first save")
    assert load_last(run) == {}
    part.rename(run / "previous.pt")
    last.write_bytes(b"nothing")
    pytest.raises(ValueError, opened, run, True).match("cannot read the checkpoint .*there is no earlier one")
    assert last.read_bytes() == b"nothing"
    for content in ({}, [], None, 3, {"args": {}}, dict(args={}, data={}, log_lines=1, run_seconds=1.0)):
        torch.save(content, last)
        pytest.raises(ValueError, opened, run, resume=True).match("is not a run's checkpoint")


class Net(nn.Sequential):
    """A net with a bias for each class, and a row in a classifier."""

    def __init__(self, num_classes, arch="small"):
        super().__init__()
        self.settings, self.body = dict(num_classes=num_classes, arch=arch), nn.Linear(4, 4)
        self.classifier = nn.Linear(4, num_classes)


def saved_net(folder):
    """A net, and the file that holds it."""
    data = SimpleNamespace(name="tiny", class_names=["ant", "bee", "cat"], class_counts=torch.arange(1, 4),
                           mean=(0.5,) * 3, std=(0.2,) * 3, image_size=8)
    model = Net(3)
    save_net(folder / "net.pt", "cbd", model, data, augmentation="standard")
    return model, folder / "net.pt"


def test_a_net_comes_back_classes_matched_by_name_and_another_or_a_malformed_one_is_refused(tmp_path, capsys):
    (model, path), images = saved_net(tmp_path), torch.randn(5, 4)
    loaded, about = load_net(path, "cbd", [Net], ["ant", "bee", "cat"])
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values()))
    assert not loaded.training and loaded.settings == model.settings
    assert (about["mean"], about["image_size"], about["augmentation"]) == ((0.5,) * 3, 8, "standard")
    loaded, about = load_net(path, "cbd", [Net], ["cat", "ant", "bee"])
    assert torch.equal(loaded(images), model(images)[:, [2, 0, 1]])
    assert about["class_names"] == ["cat", "ant", "bee"] and about["class_counts"] == [3, 1, 2]
    assert "matched by name" in capsys.readouterr().out
    for wanted, words in ((dict(class_names=["ant", "bee"]), "knows 3 classes, the data set has 2"),
                          (dict(class_names=["ant", "bee", "cow"]), "'cat' there, 'cow' here"),
                          (dict(class_names=["0", "1", "2"]), "'ant' there, '0' here"),
                          (dict(arch="large"), "holds a small, not a large"), (dict(kinds=[]), "not a net"),
                          (dict(method="livt"), "is not a net that livt.py saved")):
        pytest.raises(ValueError, load_net, path, **{"method": "cbd", "kinds": [Net], **wanted}).match(words)
    contents, good = [None, torch.zeros(3), {}, Net(3).state_dict()], torch.load(path, weights_only=True)
    for entry, value in ((entry, value) for entry, values in MALFORMED.items() for value in values):
        contents.append(deepcopy(good))
        *outer, key = entry.split("/")
        entries = contents[-1][outer[0]] if outer else contents[-1]
        entries.pop(key) if value is ... else entries.update({key: value})
    for content in contents:
        torch.save(content, path)
        refused = pytest.raises(ValueError, load_net, path, "cbd", [Net], ["cat", "ant", "bee"])
        assert refused.match(rf"\A.*{path}.*\Z")


def put(path, target):
    """Something other than a folder at a path: a link to what target says, or a file."""
    path.parent.mkdir(exist_ok=True)
    path.symlink_to(target.replace("itself", str(path))) if target else path.write_text("precious")


@pytest.mark.parametrize("target", ["nowhere", "itself", "/dev/null", None])
def test_an_out_or_a_runs_that_is_no_folder_is_refused(target, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    put(tmp_path / "run", target)
    for resume in (False, True):
        refused = pytest.raises(ValueError, opened, tmp_path / "run", resume)
        assert refused.match(f"{tmp_path}/run is (a link that leads to )?no folder")
    assert os.listdir() == ["run"]  # and nothing went elsewhere
    put(tmp_path / "runs" / "cbd_tiny_seed3", target)
    refused = pytest.raises(ValueError, opened, None, resume=True)
    assert refused.match("runs/cbd_tiny_seed3 is (a link that leads to )?no folder")
    Path("runs").rename("other")
    put(tmp_path / "runs", target)
    pytest.raises((ValueError, OSError), opened, None).match("runs")


def test_a_taken_or_impossible_out_is_refused_a_default_one_numbered(tmp_path, monkeypatch, capsys):
    saved(tmp_path / "run", 1).joinpath("log.jsonl").unlink()
    refused = pytest.raises(ValueError, opened, tmp_path / "run")
    assert refused.match("is taken; name another --out, or continue it with --resume")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    assert (saved(tmp_path / "link", 1) / "last.pt").samefile(tmp_path / "empty" / "last.pt")
    (tmp_path / "file").touch()
    for out in ("file/run", "x" * 300, "/proc/run"):
        assert out in pytest.raises(OSError, opened, tmp_path / out).value.filename
    monkeypatch.chdir(tmp_path)
    for name in ("cbd_tiny_seed3", "cbd_tiny_seed3-2"):
        assert opened(None).path == Path("runs") / name
    put(Path("runs/cbd_tiny_seed3-3"), "nowhere")
    assert opened(None).path == Path("runs/cbd_tiny_seed3-4") and not Path("nowhere").exists()
    monkeypatch.setattr("fcntl.lockf", Mock(side_effect=OSError(37, "No locks available")))  # on this disk
    saved(tmp_path / "other", 1)
    assert capsys.readouterr().out.count("cannot be locked (No locks available)") == 1


def test_resume_starts_where_nothing_is_and_refuses_other_settings_and_data_but_for_some(tmp_path):
    folder, run = opened(tmp_path / "run", resume=True, workers=1), tmp_path / "run"
    assert folder.state == {}
    folder.save(number=7)
    folder.close()
    changed = dict(workers=2, data_dir="moved", train_list="moved/train.txt")  # they change no number
    assert opened(run, resume=True, **changed).state["number"] == 7
    for changed, words in ((dict(alpha=0.5), "started with other settings: --alpha None, now 0.5"),
                           (dict(prints="b2"), "images, labels or class names of some/tiny.npz have changed"),
                           (dict(prints="b2", names=("ant", "cow")), "a class was 'bee', now 'cow'")):
        pytest.raises(ValueError, opened, run, resume=True, workers=1, **changed).match(words)
    for left in ("result.json", "student.pt"):  # results without a checkpoint are not overwritten
        (tmp_path / left).mkdir()
        (tmp_path / left / left).write_text("precious")
        refused = pytest.raises(ValueError, opened, tmp_path / left, resume=True)
        assert refused.match(f"holds {left} but no last.pt to go on from")
        assert (tmp_path / left / left).read_text() == "precious"


def test_a_resumed_log_is_cut_or_begun_anew_and_a_finished_run_has_all_seconds_and_is_tidy(tmp_path, capsys):
    folder, run = opened(tmp_path / "run"), tmp_path / "run"
    folder.started -= 100
    folder.log(epoch=1)
    folder.save()
    folder.log(epoch=2)
    folder.close()
    opened(run, resume=True).close()
    header, *rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert {"argv", "method", "args", "versions", "device", "ranks", "git_commit"} == header.keys()
    assert rows == [{"epoch": 1}]
    (run / "log.jsonl").unlink()
    folder = opened(run, resume=True)
    assert f"{run / 'log.jsonl'} is gone; a new one begins here" in capsys.readouterr().out
    assert len((run / "log.jsonl").read_text().splitlines()) == 1
    folder.save()
    assert 200 < 100 + folder.finish({"all": 50.0})["seconds"] < 230
    assert sorted(os.listdir(run)) == ["last.pt", "log.jsonl", "result.json"]  # no lock, no previous.pt
    assert json.loads((run / "result.json").read_text())["all"] == 50.0


def open_in_vain(place, mode, path, said):
    """Write why a user who is not root cannot open a run's folder: the file PLACE in it has these rights, or
    (mode None) is a folder."""
    like_any_user()
    try:
        path.mkdir()
        if place != ".lock":
            saved(path, 1)
            (path / "log.jsonl").unlink()
        if mode is None:
            (path / place).unlink(missing_ok=True)
            (path / place).mkdir()
        else:
            (path / place).touch()
            (path / place).chmod(mode)
        opened(path, resume=True)
    except (ValueError, OSError) as reason:
        said.write_text(f"{getattr(reason, 'filename', '')} {reason}")


@pytest.mark.parametrize("place, mode", [(".", 0o500), (".", 0), ("last.pt", 0), (".lock", 0o444),
                                         (".lock", None), ("log.jsonl", None), ("last.pt", None)])
def test_what_the_system_refuses_is_an_error_with_its_path(place, mode, tmp_path):
    path, said = tmp_path / "run", tmp_path / "said"
    process = FORK.Process(target=open_in_vain, args=(place, mode, path, said))
    process.start()
    code = ended(process)
    assert code == 2 or code == 0 and str(path) in said.read_text()  # 2: no log could be written, by `fail`
