"""common/folder.py: what a run writes outlives a crash, what is damaged or foreign is refused in a line."""
import json
import os
import random
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn

from common import folder as room
from common.folder import atomic_write, load_checkpoint, load_last, load_net, open_folder, save_net
from tests.tiny import FORK, like_any_user

CPU = torch.device("cpu")


def opened(path, resume=False, prints="a1", names=("ant", "bee"), **flags):
    """A run's folder as a script opens it. path: None for the default one. prints, names: of the data."""
    args = SimpleNamespace(dataset="some/tiny.npz", seed=3, device="cpu", resume=resume, lr=0.1,
                           out=None if path is None else str(path), **flags)
    return open_folder(args, "cbd", {"fingerprint": prints, "class_names": list(names)}, CPU)


def saved(path, *numbers):
    """A folder in which states with these numbers were saved, one behind the other."""
    folder = opened(path)
    for number in numbers:
        folder.save(number=number, model={"weight": torch.full((300,), float(number))})
    folder.close()
    return path


# ---------------------------------------------------------------- files

def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path, capsys):
    path = tmp_path / "net.pt"
    atomic_write(path, lambda file: file.write(b"old"))

    def half(file):
        file.write(b"ne")
        raise OSError(28, "No space left on device")

    for write in (half, lambda file: torch.save({"a": torch.zeros(5)}, "/dev/full")):
        with pytest.raises(SystemExit) as stop:
            atomic_write(path, write)
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.startswith(f"error: cannot write {path}: ")
        assert "make room, then --resume" in error and error.count("\n") == 1 and "pos" not in error, error
        assert [file.name for file in tmp_path.iterdir()] == ["net.pt"] and path.read_bytes() == b"old"


def test_a_log_on_a_full_disk_is_a_line_that_names_it(tmp_path, capsys):
    folder, log = opened(tmp_path / "run"), tmp_path / "run" / "log.jsonl"
    log.unlink()
    log.symlink_to("/dev/full")
    with pytest.raises(SystemExit):
        folder.log(epoch=1)
    assert f"cannot write {log}: No space left on device" in capsys.readouterr().err


def test_a_link_in_the_place_of_a_new_file_is_not_followed(tmp_path):
    (tmp_path / "precious").write_text("stays")
    for name in ("net.pt.part", ".lock"):
        (tmp_path / name).symlink_to("precious")
    atomic_write(tmp_path / "net.pt", lambda file: file.write(b"new"))
    with pytest.raises(OSError):
        room.lock(tmp_path)
    assert (tmp_path / "precious").read_text() == "stays" and (tmp_path / "net.pt").read_bytes() == b"new"


def test_a_checkpoint_never_executes_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return open, (str(tmp_path / "executed"), "w")

    torch.save({"args": Evil()}, tmp_path / "last.pt")
    with pytest.raises(ValueError, match="it holds more than tensors and plain values") as refused:
        load_checkpoint(tmp_path / "last.pt")
    assert "weights_only" not in str(refused.value) and "\n" not in str(refused.value)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", ["missing.pt", ".", "text.pt", "empty.pt"])
def test_what_is_no_checkpoint_is_refused_by_name(name, tmp_path):
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "empty.pt").write_bytes(b"")
    with pytest.raises(ValueError, match="checkpoint") as refused:
        load_checkpoint(tmp_path / name)
    assert str(tmp_path / name) in str(refused.value)


def test_a_flipped_bit_is_seen_or_changes_nothing(tmp_path):
    path, seen = saved(tmp_path / "run", 1) / "last.pt", 0
    whole, good = path.read_bytes(), load_checkpoint(path)
    draw = random.Random(0)
    marks = [(entry.start() + 38, 4) for entry in re.finditer(b"PK\1\2", whole)]  # "is a folder"
    for place, bit in [*marks, *((draw.randrange(len(whole)), draw.randrange(8)) for _ in range(60))]:
        flipped = bytearray(whole)
        flipped[place] ^= 1 << bit
        path.write_bytes(flipped)
        try:
            state = load_checkpoint(path)
        except ValueError as reason:
            assert str(path) in str(reason) and "\n" not in str(reason)
            seen += 1
        else:
            assert torch.equal(state["model"]["weight"], good["model"]["weight"])
            assert {**state, "model": 0} == {**good, "model": 0}
    assert seen > 20


# ---------------------------------------------------------------- damage

@pytest.mark.parametrize("damage", ["empty", "short", "tail", "bit", "gone"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before_and_says_so(damage, tmp_path, capsys):
    last = saved(tmp_path / "run", 1, 2, 3) / "last.pt"
    assert load_last(last.parent)["number"] == 3 and "going on" not in capsys.readouterr().out
    whole = bytearray(last.read_bytes())
    whole[whole.index(torch.full((300,), 3.0).numpy().tobytes()) + 100] ^= 1  # in the weights
    if damage == "gone":  # killed between the two renames of a save
        last.unlink()
    else:
        last.write_bytes({"empty": b"", "short": whole[:100], "tail": whole[:-100], "bit": whole}[damage])
    assert load_last(last.parent)["number"] == 2
    said = capsys.readouterr().out
    assert f"going on from {last.parent}/previous.pt" in said and str(last) in said


def test_a_damaged_checkpoint_never_takes_the_place_of_the_good_one(tmp_path):
    last = saved(tmp_path / "run", 1, 2) / "last.pt"
    last.write_bytes(last.read_bytes()[:-50])
    folder = opened(tmp_path / "run", resume=True)
    assert folder.state["number"] == 1
    for number, before in ((5, 1), (6, 5)):
        folder.save(number=number)
        assert load_last(tmp_path / "run")["number"] == number
        assert load_checkpoint(tmp_path / "run" / "previous.pt")["number"] == before


def test_a_whole_file_that_was_not_yet_in_its_place_is_taken(tmp_path):
    run = saved(tmp_path / "run", 1, 2)
    (run / "last.pt").rename(run / "last.pt.part")
    (run / "previous.pt").unlink()
    assert load_last(run)["number"] == 2
    (run / "last.pt.part").write_bytes(b"cut off in the first save")
    assert load_last(run) == {}


def test_two_damaged_checkpoints_are_an_error_and_nothing_is_lost(tmp_path):
    for name in ("last.pt", "previous.pt"):
        (tmp_path / name).write_bytes(b"nothing")
    with pytest.raises(ValueError, match="cannot read the checkpoint .*there is no earlier one"):
        opened(tmp_path, resume=True)
    assert (tmp_path / "last.pt").read_bytes() == b"nothing"


@pytest.mark.parametrize("content", [
    {}, [], None, 3, {"args": {}}, {"args": {}, "data": {}, "log_lines": 1, "run_seconds": 1.0}])
def test_a_last_pt_of_something_else_is_refused(content, tmp_path):
    torch.save(content, tmp_path / "last.pt")
    with pytest.raises(ValueError, match="is not a run's checkpoint"):
        opened(tmp_path, resume=True)


# ---------------------------------------------------------------- nets

class Net(nn.Module):
    """A net with a bias for each class, and a row in a classifier."""

    def __init__(self, num_classes, arch="small"):
        super().__init__()
        self.settings = dict(num_classes=num_classes, arch=arch)
        self.body, self.classifier = nn.Linear(4, 4), nn.Linear(4, num_classes)

    def forward(self, images):
        return self.classifier(self.body(images))


@pytest.fixture
def net(tmp_path):
    """A net and the file that holds it."""
    data = SimpleNamespace(name="tiny", class_names=["ant", "bee", "cat"], class_counts=torch.arange(1, 4),
                           mean=(0.5,) * 3, std=(0.2,) * 3, image_size=8)
    model = Net(3)
    save_net(tmp_path / "net.pt", "cbd", model, data, augmentation="standard")
    return model, tmp_path / "net.pt"


def test_a_net_comes_back_with_what_its_images_must_look_like(net):
    model, path = net
    loaded, about = load_net(path, "cbd", [Net], ["ant", "bee", "cat"])
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values()))
    assert not loaded.training and loaded.settings == model.settings
    assert (about["mean"], about["image_size"], about["augmentation"]) == ((0.5,) * 3, 8, "standard")


def test_classes_are_matched_by_name(net, capsys):
    model, path = net
    loaded, about = load_net(path, "cbd", [Net], ["cat", "ant", "bee"])
    images = torch.randn(5, 4)
    assert torch.equal(loaded(images), model(images)[:, [2, 0, 1]])
    assert about["class_names"] == ["cat", "ant", "bee"] and about["class_counts"] == [3, 1, 2]
    assert "matched by name" in capsys.readouterr().out


@pytest.mark.parametrize("wanted, words", [
    (dict(class_names=["ant", "bee"]), "knows 3 classes, the data set has 2"),
    (dict(class_names=["ant", "bee", "cow"]), "'cat' there, 'cow' here"),
    (dict(class_names=["0", "1", "2"]), "'ant' there, '0' here"),
    (dict(arch="large"), "holds a small, not a large"),
    (dict(method="livt"), "is not a net that livt.py saved"), (dict(kinds=[]), "is not a net")])
def test_another_net_than_the_wanted_is_refused(net, wanted, words):
    with pytest.raises(ValueError, match=words):
        load_net(net[1], **{"method": "cbd", "kinds": [Net], **wanted})


WEIGHT = ("state_dict", "classifier.weight")
MALFORMED = {  # the entries, by their keys, that are other than they should be; a value alone is the file's
    "None": None, "a tensor": torch.zeros(3), "empty": {}, "a state dict": Net(3).state_dict(),
    "a missing weight": {WEIGHT: ...}, "an extra weight": {("state_dict", "more"): torch.zeros(2)},
    "a mis-shaped weight": {WEIGHT: torch.zeros(3, 5)}, "a weight of another kind": {WEIGHT: "text"},
    "a weight that is not finite": {WEIGHT: torch.full((3, 4), torch.nan)},
    "no table of weights": {("state_dict",): [1, 2]}, "no settings": {("settings",): ...},
    "settings of another kind": {("settings",): [1]}, "another setting": {("settings", "depth"): 3},
    "a lacking setting": {("settings", "num_classes"): ...},
    "a negative setting": {("settings", "num_classes"): -3}, "a kind of no name": {("kind",): ["Net"]},
    "class names of another kind": {("class_names",): 5}, "no counts": {("class_counts",): ...},
    "fewer class names": {("class_names",): ["ant", "bee"]},
    "class names that repeat": {("class_names",): ["ant", "ant", "bee"]},
    "an older version's": {("image_size",): ..., ("mean",): ...},
    "a mean of another kind": {("mean",): "grey"}, "a mean of two channels": {("mean",): (0.5, 0.5)},
    "an image of no size": {("image_size",): 0},
}


@pytest.mark.parametrize("fault", MALFORMED)
def test_a_malformed_net_is_refused_in_a_line_that_names_the_file(fault, net):
    _, path = net
    content, changes = torch.load(path, weights_only=True), MALFORMED[fault]
    if isinstance(changes, dict) and changes and isinstance(next(iter(changes)), tuple):
        for (*outer, key), value in changes.items():
            entries = content[outer[0]] if outer else content
            entries.pop(key) if value is ... else entries.update({key: value})
    else:
        content = changes
    torch.save(content, path)
    with pytest.raises(ValueError) as refused:
        load_net(path, "cbd", [Net], ["cat", "ant", "bee"])
    assert str(path) in str(refused.value) and "\n" not in str(refused.value)


# ---------------------------------------------------------------- the folder

def put(path, kind):
    """Something other than a folder at a path."""
    path.parent.mkdir(exist_ok=True)
    if kind == "file":
        path.write_text("precious")
    else:
        path.symlink_to({"dangling link": "nowhere", "link loop": path, "device": "/dev/null"}[kind])


@pytest.mark.parametrize("kind", ["dangling link", "link loop", "file", "device"])
def test_an_out_or_a_runs_that_is_no_folder_is_refused(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    put(tmp_path / "run", kind)
    for resume in (False, True):
        with pytest.raises(ValueError, match=f"{tmp_path}/run is (a link that leads to )?no folder"):
            opened(tmp_path / "run", resume)
    assert os.path.lexists("run") and not Path("runs").exists()  # and nothing went elsewhere
    put(Path("runs/cbd_tiny_seed3"), kind)
    with pytest.raises(ValueError, match="runs/cbd_tiny_seed3 is (a link that leads to )?no folder"):
        opened(None, resume=True)
    Path("runs").rename("other")
    put(tmp_path / "runs", kind)
    with pytest.raises((ValueError, OSError), match="runs"):
        opened(None)


def test_a_taken_folder_is_refused_and_a_default_one_is_numbered(tmp_path, monkeypatch):
    saved(tmp_path / "run", 1).joinpath("log.jsonl").unlink()
    with pytest.raises(ValueError, match="is taken; name another --out, or continue it with --resume"):
        opened(tmp_path / "run")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    assert (saved(tmp_path / "link", 1) / "last.pt").samefile(tmp_path / "empty" / "last.pt")

    monkeypatch.chdir(tmp_path)
    for name in ("cbd_tiny_seed3", "cbd_tiny_seed3-2"):
        assert opened(None).path == Path("runs") / name
    put(Path("runs/cbd_tiny_seed3-3"), "dangling link")
    assert opened(None).path == Path("runs/cbd_tiny_seed3-4") and not Path("nowhere").exists()


@pytest.mark.parametrize("out", ["file/run", "x" * 300, "/proc/run"])
def test_a_folder_that_cannot_be_made_is_the_system_s_error_with_its_path(out, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError) as refused:
        opened(tmp_path / out)
    assert out in refused.value.filename


# ---------------------------------------------------------------- resuming

def test_resume_starts_where_nothing_is_and_refuses_other_settings_but_for_some(tmp_path):
    folder = opened(tmp_path / "run", resume=True, workers=1)
    assert folder.state == {}
    folder.save(number=7)
    folder.close()
    changed = dict(workers=2, data_dir="moved", train_list="moved/train.txt")  # they change no number
    assert opened(tmp_path / "run", resume=True, **changed).state["number"] == 7
    with pytest.raises(ValueError, match="started with other settings: --alpha None, now 0.5"):
        opened(tmp_path / "run", resume=True, workers=1, alpha=0.5)


def test_other_data_is_refused(tmp_path):
    saved(tmp_path / "run", 1)
    with pytest.raises(ValueError, match="the images, labels or class names of some/tiny.npz have changed"):
        opened(tmp_path / "run", resume=True, prints="b2")
    with pytest.raises(ValueError, match="other data: a class was 'bee', now 'cow'"):
        opened(tmp_path / "run", resume=True, prints="b2", names=("ant", "cow"))


@pytest.mark.parametrize("left", ["result.json", "student.pt"])
def test_results_without_a_checkpoint_are_not_overwritten(left, tmp_path):
    (tmp_path / left).write_text("precious")
    with pytest.raises(ValueError, match=f"holds {left} but no last.pt to go on from"):
        opened(tmp_path, resume=True)
    assert (tmp_path / left).read_text() == "precious"


def test_the_log_is_cut_to_the_checkpoint_and_begun_anew_where_it_is_gone(tmp_path, capsys):
    folder = opened(tmp_path / "run")
    folder.log(epoch=1)
    folder.save()
    folder.log(epoch=2)
    folder.close()
    log = tmp_path / "run" / "log.jsonl"
    opened(tmp_path / "run", resume=True).close()
    header, *rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert {"argv", "method", "args", "versions", "device", "ranks", "git_commit"} == header.keys()
    assert rows == [{"epoch": 1}]

    log.unlink()
    opened(tmp_path / "run", resume=True).close()
    assert f"{log} is gone; a new one begins here" in capsys.readouterr().out
    assert len(log.read_text().splitlines()) == 1


def test_a_finished_folder_holds_no_lock_and_no_earlier_checkpoint_and_counts_all_its_seconds(tmp_path):
    folder = opened(tmp_path / "run")
    folder.started -= 100
    folder.save()
    folder.save()
    folder.close()
    folder = opened(tmp_path / "run", resume=True)
    assert 200 < 100 + folder.finish({"all": 50.0})["seconds"] < 230
    names = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert names == ["last.pt", "log.jsonl", "result.json"]
    assert json.loads((tmp_path / "run" / "result.json").read_text())["all"] == 50.0


# ---------------------------------------------------------------- what the system refuses

def open_in_vain(place, mode, path, said):
    """In a process of its own that is not root's: why a folder cannot be opened, written to a file.

    place: what is in the way in a run's folder. mode: its rights; None: a folder is in its place."""
    like_any_user()
    try:
        if place != ".lock":
            saved(path, 1)
            (path / "log.jsonl").unlink()
        if mode is None:
            (path / place).unlink(missing_ok=True)
            (path / place).mkdir(parents=True)
        else:
            path.mkdir(exist_ok=True)
            (path / place).touch()
            (path / place).chmod(mode)
        opened(path, resume=True)
        said.write_text("opened")
    except (ValueError, OSError) as reason:
        said.write_text(f"{getattr(reason, 'filename', '')} {reason}")


@pytest.mark.parametrize("place, mode", [
    (".", 0o500), (".", 0), ("last.pt", 0), (".lock", 0o444), (".lock", None), ("log.jsonl", None),
    ("last.pt", None)])
def test_what_the_system_refuses_is_an_error_with_its_path(place, mode, tmp_path):
    path, said = tmp_path / "run", tmp_path / "said"
    process = FORK.Process(target=open_in_vain, args=(place, mode, path, said))
    process.start()
    process.join(60)
    assert process.exitcode in (0, 2), process.exitcode
    if process.exitcode == 0:  # 2: the log could not be written, by `fail`
        assert str(path) in said.read_text() and said.read_text() != "opened", said.read_text()


def test_a_file_system_without_locks_is_said_once(tmp_path, monkeypatch, capsys):
    def refuse(*how):
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.lockf", refuse)
    saved(tmp_path / "run", 1)
    assert capsys.readouterr().out.count("cannot be locked (No locks available)") == 1
