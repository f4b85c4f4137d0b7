"""What all four scripts share: what a run leaves, --evaluate, --resume, class names, bad input."""
import importlib
import json
import os
import random
import shutil

import numpy as np
import pytest
import torch

from common.flags import Parser
from common.run import Run
from tests.test_folder import MALFORMED
from tests.tiny import (METHODS, ROWS, assert_same_run, image_folder, log_rows, noise_npz, refused, run,
                        same_weights, tiny_flags, without_times)

KEYS = ("method", "dataset", "seed", "all", "many", "medium", "few", "ece", "mce", "best_all", "group_sizes",
        "class_counts", "per_class_accuracy", "stages", "seconds", "images_per_second", "args", "versions")


def result_of(folder):
    return json.loads((folder / "result.json").read_text())


def changed_npz(folder, change):
    """FOLDER/images.npz with other arrays. change: a function of its arrays, {name: array}, in place."""
    noise_npz(folder)
    arrays = dict(np.load(folder / "images.npz"))
    change(arrays)
    np.savez(folder / "images.npz", **arrays)


# ---------------------------------------------------------------- what a run leaves

@pytest.mark.parametrize("method", METHODS)
def test_a_run_leaves_what_it_promises(method, whole):
    folder, _ = whole(method)
    names = sorted(path.name for path in folder.iterdir())
    assert names == sorted(["last.pt", "log.jsonl", "result.json", *ROWS[method].nets])
    result = result_of(folder)
    assert not set(KEYS) - result.keys() and result["method"] == method
    assert result["seed"] == 0 and result["many"] is None and result["class_counts"] == [12, 11, 14]
    assert [stage["name"] for stage in result["stages"]] == ROWS[method].stages
    main = result["stages"][-1]
    assert all(result[key] == main[key] for key in main if key not in ("name", "seconds"))
    assert all(0 <= stage["all"] <= 100 for stage in result["stages"] if stage.get("all") is not None)


@pytest.mark.parametrize("method", METHODS)
def test_the_log_has_a_line_an_epoch_and_the_result_is_the_last_one_s(method, whole):
    folder, _ = whole(method)
    header = json.loads((folder / "log.jsonl").read_text().splitlines()[0])
    assert {"argv", "method", "args", "versions", "device", "ranks", "git_commit"} <= header.keys()
    rows, result = log_rows(folder), result_of(folder)
    stages = list(dict.fromkeys(row["stage"] for row in rows))
    assert len(stages) == len(ROWS[method].nets)  # each leaves a net
    for stage in stages:
        assert [row["epoch"] for row in rows if row["stage"] == stage] == [1, 2]
    assert all(np.isfinite(row["loss"]) and row["seconds"] > 0 for row in rows)
    last = [row for row in rows if row["stage"] == stages[-1]]
    assert last[-1]["per_class_accuracy"] == result["per_class_accuracy"]
    assert result["best_all"] == max(row["all"] for row in last)


@pytest.mark.parametrize("method", METHODS)
def test_image_files_train_evaluate_and_are_left_out_by_flag_alone(method, tmp_path, capsys):
    image_folder(tmp_path / "images")
    (tmp_path / "images" / "train" / "b" / "02.png").write_bytes(b"no image")
    flags = ("--dataset", "folder", "--data-dir", str(tmp_path / "images"), "--recipe", "cifar100_lt",
             "--epochs", "1", "--workers", "0", "--image-size", "8")  # of images of 16 pixels
    with pytest.raises(SystemExit) as stop:
        run(method, tmp_path, *flags)
    assert stop.value.code == 2 and "train/b/02.png" in capsys.readouterr().err
    result = run(method, tmp_path, *flags, "--skip-bad-images", name="skips")
    assert "images shown at 8 pixels" in capsys.readouterr().out
    assert result["class_counts"] == [9, 4, 4]
    saved = torch.load(tmp_path / "skips" / ROWS[method].nets[-1], weights_only=True)
    assert saved["class_names"] == ["a", "b", "c"]


# ---------------------------------------------------------------- --evaluate

@pytest.mark.parametrize("method", METHODS)
def test_evaluate_gives_the_run_s_scores_and_writes_nothing(method, whole, tmp_path, monkeypatch):
    folder, _ = whole(method)
    monkeypatch.chdir(tmp_path)
    noise_npz(tmp_path)
    module, files = importlib.import_module(method), [*folder.iterdir()]
    flags = [*tiny_flags(method), "--evaluate", str(folder / ROWS[method].takes["--evaluate"])]
    scores, result = module.main(module.parse_args(flags)), result_of(folder)
    for key in ("all", "few", "ece", "per_class_accuracy"):
        assert scores[key] == result[key], key
    assert [path.name for path in tmp_path.iterdir()] == ["images.npz"] and [*folder.iterdir()] == files


def name(arrays):
    arrays["class_names"] = np.array(["ant", "bee", "cat"])


def reorder(arrays):
    """ant was 0 and is 1, bee 1 -> 2, cat 2 -> 0."""
    name(arrays)
    arrays["class_names"] = arrays["class_names"][[2, 0, 1]]
    for part in ("y_train", "y_test"):
        arrays[part] = (arrays[part] + 1) % 3


@pytest.mark.parametrize("method, flag, nets, stage", [
    ("cbd", "--teacher-checkpoints", ["teacher_1.pt", "teacher_2.pt"], 0),
    ("async_lt", "--phase-one-checkpoint", ["phase_one.pt"], 1)])
def test_a_run_goes_on_from_nets_that_meet_its_classes_by_name(method, flag, nets, stage, tmp_path, capsys):
    changed_npz(tmp_path, name)
    before = run(method, tmp_path)["stages"][stage]
    given = (flag, *(str(tmp_path / "run" / net) for net in nets))
    changed_npz(tmp_path, reorder)
    after = run(method, tmp_path, *given, name="again")["stages"][stage]
    assert after["per_class_accuracy"] == [before["per_class_accuracy"][i] for i in (2, 0, 1)]
    changed_npz(tmp_path, lambda arrays: arrays.update(class_names=np.array(["ant", "bee", "cow"])))
    assert "'cat' there, 'cow' here" in refused(capsys, method, tmp_path, *given)


@pytest.mark.parametrize("method", METHODS)
def test_a_net_meets_the_same_classes_in_another_order_by_their_names(method, tmp_path, capsys):
    changed_npz(tmp_path, name)
    result = run(method, tmp_path)
    evaluate = ("--evaluate", str(tmp_path / "run" / ROWS[method].takes["--evaluate"]))
    changed_npz(tmp_path, reorder)
    again = run(method, tmp_path, *evaluate, name="no")
    assert again["all"] == result["all"] and again["ece"] == pytest.approx(result["ece"], abs=1e-4)
    assert again["per_class_accuracy"] == [result["per_class_accuracy"][i] for i in (2, 0, 1)]
    changed_npz(tmp_path, lambda arrays: arrays.update(class_names=np.array(["ant", "bee", "cow"])))
    assert "'cat' there, 'cow' here" in refused(capsys, method, tmp_path, *evaluate)


@pytest.mark.parametrize("method", METHODS)
def test_evaluate_on_scores_the_validation_images(method, whole, tmp_path, capsys):
    net = str(whole(method)[0] / ROWS[method].takes["--evaluate"])
    assert "no validation images" in refused(capsys, method, tmp_path, "--evaluate-on", "val")

    def swap(arrays):  # what was tested on is for validation
        arrays.update(x_val=arrays["x_test"], y_val=arrays["y_test"])
        arrays.update(x_test=arrays["x_train"][:5], y_test=arrays["y_train"][:5])
    changed_npz(tmp_path, swap)
    on_val = run(method, tmp_path, "--evaluate", net, "--evaluate-on", "val", name="no")
    assert on_val["per_class_accuracy"] == result_of(whole(method)[0])["per_class_accuracy"]
    assert sum(run(method, tmp_path, "--evaluate", net, name="no")["group_sizes"].values()) == 3


# ---------------------------------------------------------------- nets that a flag takes

FLAGS = [(method, flag) for method in METHODS for flag in ROWS[method].takes]


@pytest.mark.parametrize("method, flag", FLAGS)
def test_a_file_that_a_flag_takes_and_cannot_use_is_one_line(method, flag, whole, tmp_path, capsys):
    saved = torch.load(whole(method)[0] / ROWS[method].takes[flag], weights_only=True)
    weight = next(name for name, value in saved["state_dict"].items() if value.ndim > 1)

    class Evil:
        def __reduce__(self):
            return open, (str(tmp_path / "executed"), "w")
    contents = {kind: MALFORMED[kind] for kind in (
        "None", "a list", "empty", "an extra weight", "no settings", "no table of weights",
        "a kind of no name")}
    contents |= {
        "another method": lambda saved: {**saved, "method": "none"},
        "a missing weight": lambda saved: {**saved, "state_dict": {
            name: value for name, value in saved["state_dict"].items() if name != weight}},
        "a mis-shaped weight": lambda saved: {**saved, "state_dict": {
            **saved["state_dict"], weight: torch.zeros(1, 2)}},
        "code": lambda saved: Evil(), "code inside": lambda saved: {**saved, "mean": Evil()}}
    paths = {"gone": tmp_path / "gone.pt", "a folder": tmp_path, "text": tmp_path / "images.txt"}
    paths["text"].write_text("hello")
    for kind, content in contents.items():
        paths[kind] = tmp_path / f"{kind}.pt"
        torch.save(content(saved), paths[kind])
    if flag == "--mgp-checkpoint":  # any table of a ViT's weights is an encoder, whatever lies beside it
        for kind in ("another method", "no settings", "a kind of no name"):
            paths.pop(kind)
    for kind, path in paths.items():
        error = refused(capsys, method, tmp_path, flag, str(path), *["--teachers", "1"] * (method == "cbd"))
        assert str(path) in error, (kind, error)
        assert "weights_only" not in error
    assert not (tmp_path / "executed").exists()


# ---------------------------------------------------------------- --resume

@pytest.mark.parametrize("method", METHODS)
def test_a_finished_run_resumed_is_the_same_run_and_trains_nothing(method, whole, tmp_path):
    finished, _ = whole(method)
    shutil.copytree(finished, tmp_path / "run")
    run(method, tmp_path, "--resume")
    assert_same_run(finished, tmp_path / "run")


@pytest.mark.parametrize("method", METHODS)
def test_resume_refuses_other_settings_and_data_and_follows_moved_data(method, whole, tmp_path, capsys):
    finished, _ = whole(method)
    shutil.copytree(finished, tmp_path / "run")
    for flag, words in (
            (("--weight-decay", "0.3"), "--weight-decay"), (("--epochs", "3"), "--epochs 2, now 3"),
            (("--seed", "1"), "--seed 0, now 1"), (("--no-amp",), "--amp True, now False")):
        assert words in refused(capsys, method, tmp_path, "--resume", *flag, name="run")

    def permute(arrays):
        arrays["y_train"] = arrays["y_train"][::-1].copy()

    def shorten(arrays):
        arrays.update(x_train=arrays["x_train"][:-2], y_train=arrays["y_train"][:-2])

    def rename(arrays):
        arrays["class_names"] = np.array(["ant", "bee", "cat"])
    for change, words in ((permute, "have changed"), (shorten, "have changed"), (rename, "now 'ant'")):
        changed_npz(tmp_path, change)
        assert words in refused(capsys, method, tmp_path, "--resume", name="run")
    assert same_weights(finished / ROWS[method].nets[-1], tmp_path / "run" / ROWS[method].nets[-1])

    noise_npz(tmp_path, name="moved.npz")
    result = run(method, tmp_path, "--resume", "--dataset", str(tmp_path / "moved.npz"))
    assert result["per_class_accuracy"] == result_of(finished)["per_class_accuracy"]


@pytest.mark.parametrize("method", METHODS)
def test_a_finished_stage_whose_net_is_gone_cut_or_another_s_is_one_line(method, whole, tmp_path, capsys):
    finished, _ = whole(method)
    first, last = ROWS[method].nets[0], ROWS[method].nets[-1]
    for kind in ("gone", "cut", "other"):
        folder = tmp_path / kind
        shutil.copytree(finished, folder)
        if kind == "cut":
            (folder / first).write_bytes((folder / first).read_bytes()[:-100])
        else:
            (folder / first).unlink()
        if kind == "other":
            torch.save({"state_dict": {"weight": torch.zeros(2)}}, folder / first)
        error = refused(capsys, method, tmp_path, "--resume", name=kind)
        assert "is finished, but" in error and f"{kind}/{first} cannot be used" in error
        assert same_weights(finished / last, folder / last)


@pytest.mark.parametrize("method", METHODS)
def test_a_folder_without_last_pt_is_left_alone_one_without_its_log_goes_on(method, whole, tmp_path, capsys):
    finished, _ = whole(method)
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "log.jsonl").unlink()
    result = run(method, tmp_path, "--resume")
    assert without_times(result) == without_times(result_of(finished))
    assert "log.jsonl is gone; a new one begins here" in capsys.readouterr().out
    (tmp_path / "run" / "last.pt").unlink()
    assert "but no last.pt to go on from" in refused(capsys, method, tmp_path, "--resume", name="run")


# ---------------------------------------------------------------- bad input

BAD_FLAGS = [
    (["--dataset", "imagenette"], "known: fashion_lt"), (["--dataset", "nowhere/x.npz"], "nowhere/x.npz"),
    (["--dataset", "folder", "--data-dir", "nowhere"], "no such folder: nowhere/train"),
    (["--dataset", "fashion_lt", "--imb-factor", "10"], "fixed list"),
    (["--dataset", "folder", "--train-list", "a.txt"], "give both --train-list and --test-list"),
    (["--dataset", "imagenet_lt", "--train-list", "a.txt", "--test-list", "b.txt"],
     "no such list file: a.txt"),
    (["--dataset", "cifar10_lt", "--imb-factor", "0.01"], "at least 1"),
    (["--evaluate", "nowhere.pt"], "no such checkpoint: nowhere.pt"),
    (["--evaluate", ""], "must not be empty"),
    (["--out", " "], "must not be empty"), (["--recipe", "imagenet"], "unknown recipe"),
    (["--batch-size", "0"], "--batch-size"), (["--batch-size", "2147483648"], "--batch-size"),
    (["--epochs", "-1"], "--epochs"), (["--epochs", "two"], "--epochs"), (["--epochs", "1.5"], "--epochs"),
    (["--lr", "nan"], "--lr"), (["--lr", "1e39"], "--lr"), (["--lr", "-1"], "--lr"),
    (["--weight-decay", "1e308"], "--weight-decay"), (["--seed", "-1"], "--seed"),
    (["--subset-seed", "-1"], "--subset-seed"), (["--workers", "-1"], "--workers"),
    (["--batch-size", "30", "--grad-accumulation", "4"], "multiple"),
    (["--sync-bn", "--device", "cpu"], "--sync-bn needs GPUs"),
    (["--device", "tpu9"], "cannot use the device"),
    (["--device", "meta"], "cannot use the device"), (["--time-limit", "nan"], "--time-limit"),
    (["--arch", "resnet33"], "invalid choice"), (["--epochs"], "expected one argument"),
    (["--unknown"], "--unknown"), (["stray"], "stray"), (["--epoch", "3"], "--epoch")]


@pytest.mark.parametrize("method", METHODS)
def test_bad_input_is_one_error_line_and_writes_nothing(method, tmp_path, capsys):
    for flags, words in BAD_FLAGS:
        assert words in refused(capsys, method, tmp_path, *flags), flags


@pytest.mark.parametrize("variable", ["LOCAL_RANK", "RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"])
def test_a_rank_that_is_no_number_is_one_line(variable, tmp_path, capsys, monkeypatch):
    noise_npz(tmp_path)
    for value in ("abc", "-1", "", "1.5"):
        monkeypatch.setenv(variable, value)
        assert f"the environment's {variable} must be a whole number" in refused(capsys, "cbd", tmp_path)


@pytest.mark.parametrize("variable, value", [("RANK", "1"), ("WORLD_SIZE", "0"), ("LOCAL_WORLD_SIZE", "0")])
def test_a_rank_that_cannot_be_is_one_line(variable, value, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv(variable, value)
    assert f"the environment's {variable}" in refused(capsys, "cbd", tmp_path)


class Ready(Exception):
    """Raised where a run would begin to write and to train."""


@pytest.mark.parametrize("method", METHODS)
def test_no_command_line_ends_in_a_traceback(method, tmp_path, capsys, monkeypatch):
    def ready(run):
        raise Ready
    monkeypatch.setattr(Run, "open", ready)
    module = importlib.import_module(method)
    with monkeypatch.context() as patch:
        patch.setattr(Parser, "parse_args", lambda self, argv=None: self)
        actions = [each for each in module.parse_args([])._actions if "--help" not in each.option_strings]
    noise_npz(tmp_path)
    (tmp_path / "text").write_text("hello")
    monkeypatch.chdir(tmp_path)

    values = ["-1", "0", "1", "2", "16", "0.5", "1e-320", "1e39", "1e308", "-0.0", "nan", "-inf",
              "2147483648", "", " ", "abc", "--", "text", ".", "gone.pt", "/dev/null", "x" * 300,
              "\u00e9\x00", "cpu",
              "8 16"]
    outcomes, draw = {"ready": 0, "refused": 0}, random.Random(method)
    for _ in range(150):
        flags = tiny_flags(method)
        for action in draw.sample(actions, draw.choice((1, 1, 2, 3))):
            flags.append(draw.choice(action.option_strings))
            if action.nargs != 0:
                some = [str(choice) for choice in action.choices or () if str(choice) in ROWS[method].flags]
                flags += [draw.choice(values + some * 9) for _ in range(draw.choice((1, 1, 1, 2)))]
        try:
            module.main(module.parse_args(flags))
            outcomes["ready"] += 1  # of --evaluate
        except Ready:
            outcomes["ready"] += 1
        except SystemExit as stop:
            error = capsys.readouterr().err
            assert stop.code == 2 and error.startswith("error: ") and error.count("\n") == 1, (flags, error)
            outcomes["refused"] += 1
        except BaseException as reason:
            raise AssertionError(f"{method}.py {flags}") from reason
    assert min(outcomes.values()) >= 10, outcomes
    assert sorted(os.listdir(tmp_path)) == ["images.npz", "text"]


# ---------------------------------------------------------------- a net that diverges

DIVERGES = {"cbd": ["--lr", "1e12"], "async_lt": ["--lambda-scale", "1e12", "--lr", "1e12"],
            "livt": ["--mgp-lr", "1e6", "--lr", "1e6"], "candle": ["--lr", "1e12"]}


@pytest.mark.parametrize("how", ["to the end", "stopped"])
@pytest.mark.parametrize("method", METHODS)
def test_a_net_that_diverges_ends_the_run_in_one_line_and_is_not_saved(method, how, tmp_path, capsys):
    flags = [*DIVERGES[method], "--no-amp", *["--time-limit", "0", "--resume"] * (how == "stopped")]
    for _ in range(60):  # where the run is stopped, behind every step
        with pytest.raises(SystemExit) as stop:
            run(method, tmp_path, *flags)
        if stop.value.code == 2:
            break
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("error: ") == 1 and "diverged: " in error, error
    assert "train again with a smaller learning rate and another --out" in error
    assert not (tmp_path / "run" / "result.json").exists()
    for path in (tmp_path / "run").glob("*.pt"):
        saved = torch.load(path, weights_only=True)
        for value in (saved.get("state_dict") or saved.get("model") or {}).values():
            assert value.isfinite().all(), path
