"""What all four scripts share: samplers, what a run and its parts leave, --evaluate, --resume, bad input."""
import importlib
import json
import os
import random
import shutil
import sys

import numpy as np
import pytest
import torch

from common.flags import Parser
from common.run import Run
from tests.tiny import (METHODS, ROWS, assert_same_run, image_folder, log_rows, noise_npz, refused,
                        result_of, run, same_weights, tiny_flags, without_times)

KEYS = ("method", "dataset", "seed", "all", "many", "medium", "few", "ece", "mce", "best_all", "group_sizes",
        "class_counts", "per_class_accuracy", "stages", "seconds", "images_per_second", "args", "versions")
by_method = pytest.mark.parametrize("method", METHODS)


@pytest.mark.parametrize("method, sampler, more", [
    ("cbd", "class_balanced_indices", []), ("candle", "equal_class_indices", []),
    ("async_lt", "weighted_indices", [torch.tensor([0.4, 0, 0.2, 0, 0.4])])])
def test_a_sampler_mixes_classes_and_repeats_no_image_before_all_of_its_class_were_drawn(
        method, sampler, more):
    targets = torch.tensor([4] * 7 + [0] * 90 + [2] * 3)  # ids neither sorted by size nor without gaps
    sample = getattr(importlib.import_module(method), sampler)
    draw = lambda seed: sample(targets, *more, generator=torch.Generator().manual_seed(seed))
    indices = draw(0)
    assert len(indices) == 100 and indices.dtype == torch.int64
    assert torch.equal(indices, draw(0)) and not torch.equal(indices, draw(1))
    assert set(targets[indices[:15]].tolist()) == {0, 2, 4}

    for class_id, size in ((4, 7), (0, 90), (2, 3)):
        own = indices[targets[indices] == class_id].tolist()
        cycles = [tuple(own[start:start + size]) for start in range(0, len(own), size)]
        assert own and all(len(set(cycle)) == len(cycle) for cycle in cycles)
        assert size == 90 or len({cycle for cycle in cycles if len(cycle) == size}) > 1  # shuffled anew


@pytest.mark.parametrize("method", ["cbd", "async_lt", "candle"])
def test_the_cosine_schedule_starts_at_lr_and_ends_at_zero(method):
    rate = importlib.import_module(method).cosine_lr
    assert rate(0, 0.2) == 0.2 and rate(1 / 3, 0.2) == pytest.approx(0.15)
    assert rate(0.5, 0.2) == pytest.approx(0.1) and rate(1, 0.2) == pytest.approx(0, abs=1e-12)


@by_method
def test_a_run_leaves_a_net_and_a_log_line_an_epoch_of_each_stage_and_a_result(method, whole):
    folder, row = whole(method)[0], ROWS[method]
    names = sorted(path.name for path in folder.iterdir())
    assert names == sorted(["last.pt", "log.jsonl", "result.json", *row.nets])
    result, stages = result_of(folder), list(row.nets.values())
    assert not set(KEYS) - result.keys() and result["method"] == method
    assert result["seed"] == 0 and result["many"] is None and result["class_counts"] == [12, 11, 14]
    assert sorted(stage["name"] for stage in result["stages"]) == sorted([*stages, *row.more])
    main = result["stages"][-1]
    assert all(result[key] == main[key] for key in main if key not in ("name", "seconds"))
    assert all(0 <= stage["all"] <= 100 for stage in result["stages"] if stage.get("all") is not None)

    header = json.loads((folder / "log.jsonl").read_text().splitlines()[0])
    assert {"argv", "method", "args", "versions", "device", "ranks", "git_commit"} <= header.keys()
    rows = log_rows(folder)
    assert [(each["stage"], each["epoch"]) for each in rows] == [(name, e) for name in stages for e in (1, 2)]
    assert all(np.isfinite(each["loss"]) and each["seconds"] > 0 for each in rows)
    assert rows[-1]["per_class_accuracy"] == result["per_class_accuracy"]
    assert result["best_all"] == max(each["all"] for each in rows[-2:])


@pytest.mark.parametrize("method, flags, nets", [
    ("cbd", ["--only-teacher", "1"], ["teacher_1.pt"]), ("cbd", ["--only-teacher", "2"], ["teacher_2.pt"]),
    ("cbd", ["--teacher-checkpoints", "teacher_1.pt", "teacher_2.pt"], ["student.pt"]),
    ("async_lt", ["--plain"], ["plain.pt"]), ("async_lt", ["--no-plain"], ["phase_one.pt", "model.pt"]),
    ("async_lt", ["--no-plain", "--phase-one-checkpoint", "phase_one.pt"], ["model.pt"]),
    ("livt", ["--stage", "mgp"], ["mgp.pt"]),
    ("livt", ["--stage", "bft", "--mgp-checkpoint", "mgp.pt"], ["model_bce.pt", "model.pt"]),
    ("candle", ["--no-baseline"], ["teacher.pt", "student.pt"]),
    ("candle", ["--no-calibration"], ["student.pt"])])  # the baseline, as the run's own
def test_a_part_of_a_run_leaves_the_nets_and_the_scores_of_the_whole(method, flags, nets, whole, tmp_path):
    folder, _ = whole(method)
    flags = [str(folder / flag) if flag.endswith(".pt") else flag for flag in flags]
    result = run(method, tmp_path, *flags)
    stages = {stage["name"]: stage for stage in result_of(folder)["stages"]}
    assert sorted(path.name for path in (tmp_path / "run").glob("*.pt")) == sorted(["last.pt", *nets])
    for net in nets:
        same = "baseline.pt" if flags == ["--no-calibration"] else net
        assert same_weights(tmp_path / "run" / net, folder / same)
    for stage in result["stages"]:
        assert stage["per_class_accuracy"] == stages[stage["name"]]["per_class_accuracy"], stage["name"]
    assert len({row["stage"] for row in log_rows(tmp_path / "run")}) == len(nets)  # nothing else was trained


def test_another_seed_gives_other_nets(whole, tmp_path):
    run("cbd", tmp_path, "--only-teacher", "1", "--seed", "1")
    assert not same_weights(tmp_path / "run" / "teacher_1.pt", whole("cbd")[0] / "teacher_1.pt")


@by_method
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
    saved = torch.load(tmp_path / "skips" / [*ROWS[method].nets][-1], weights_only=True)
    assert saved["class_names"] == ["a", "b", "c"]


@by_method
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


NAMES = ["ant", "bee", "cat"]
GOES_ON = {"cbd": [("--teacher-checkpoints", "teacher_1.pt", "teacher_2.pt")],
           "async_lt": [("--phase-one-checkpoint", "phase_one.pt")]}


@by_method
def test_nets_meet_the_same_classes_in_another_order_by_their_names(method, tmp_path, capsys):
    noise_npz(tmp_path, class_names=NAMES)
    stages = {stage["name"]: stage for stage in run(method, tmp_path)["stages"]}
    noise_npz(tmp_path, turn=1, class_names=["cat", "ant", "bee"])
    flags = [["--evaluate", file] for file in ROWS[method].nets if file != "mgp.pt"]
    for flag, *files in [*flags, *GOES_ON.get(method, [])]:
        flags = [flag, *(str(tmp_path / "run" / file) for file in files)]
        again = run(method, tmp_path, *flags, name="again")
        before, stage = stages[ROWS[method].nets[files[0]]], again
        if flag != "--evaluate":
            stage = next(stage for stage in again["stages"] if stage["name"] == before["name"])
        assert stage["all"] == before["all"] and stage["ece"] == pytest.approx(before["ece"], abs=1e-4)
        assert stage["per_class_accuracy"] == [before["per_class_accuracy"][i] for i in (2, 0, 1)]

    noise_npz(tmp_path, class_names=["ant", "bee", "cow"])
    assert "'cat' there, 'cow' here" in refused(capsys, method, tmp_path, *flags)


@by_method
def test_evaluate_on_scores_the_validation_images(method, whole, tmp_path, capsys):
    net = str(whole(method)[0] / ROWS[method].takes["--evaluate"])
    assert "no validation images" in refused(capsys, method, tmp_path, "--evaluate-on", "val")

    arrays = dict(np.load(tmp_path / "images.npz"))  # what was tested on is for validation
    arrays.update(x_val=arrays["x_test"], y_val=arrays["y_test"])
    np.savez(tmp_path / "images.npz", **arrays | {
        "x_test": arrays["x_train"][:5], "y_test": arrays["y_train"][:5]})
    on_val = run(method, tmp_path, "--evaluate", net, "--evaluate-on", "val", name="no")
    assert on_val["per_class_accuracy"] == result_of(whole(method)[0])["per_class_accuracy"]
    assert sum(run(method, tmp_path, "--evaluate", net, name="no")["group_sizes"].values()) == 3


@pytest.mark.parametrize("method, flag", [(name, flag) for name, row in ROWS.items() for flag in row.takes])
def test_a_file_that_a_flag_takes_and_cannot_use_is_one_line(method, flag, whole, tmp_path, capsys):
    saved = torch.load(whole(method)[0] / ROWS[method].takes[flag], weights_only=True)
    weight = next(name for name, value in saved["state_dict"].items() if value.ndim > 1)

    class Evil:
        def __reduce__(self):
            return open, (str(tmp_path / "executed"), "w")
    state, without = saved["state_dict"], lambda table, key: {k: v for k, v in table.items() if k != key}
    contents = {
        "a list": [saved], "no settings": without(saved, "settings"), "no table": {**saved, "state_dict": 1},
        "another method": {**saved, "method": "none"},
        "a missing weight": {**saved, "state_dict": without(state, weight)},
        "an extra weight": {**saved, "state_dict": {**state, "more": torch.zeros(2)}},
        "a mis-shaped weight": {**saved, "state_dict": {**state, weight: torch.zeros(1, 2)}},
        "code": Evil(), "code inside": {**saved, "mean": Evil()}}
    paths = {"gone": tmp_path / "gone.pt", "a folder": tmp_path, "text": tmp_path / "images.txt"}
    paths["text"].write_text("hello")
    for kind, content in contents.items():
        paths[kind] = tmp_path / f"{kind}.pt"
        torch.save(content, paths[kind])
    if flag == "--mgp-checkpoint":  # any table of a ViT's weights is an encoder, whatever lies beside it
        del paths["another method"], paths["no settings"]
    for kind, path in paths.items():
        error = refused(capsys, method, tmp_path, flag, str(path), *["--teachers", "1"] * (method == "cbd"))
        assert str(path) in error, (kind, error)
        assert "weights_only" not in error
    assert not (tmp_path / "executed").exists()


@by_method
def test_resume_refuses_other_settings_and_data_and_follows_moved_data(method, whole, tmp_path, capsys):
    finished, _ = whole(method)
    shutil.copytree(finished, tmp_path / "run")
    for flag, words in (
            (("--weight-decay", "0.3"), "--weight-decay"), (("--epochs", "3"), "--epochs 2, now 3"),
            (("--seed", "1"), "--seed 0, now 1"), (("--no-amp",), "--amp True, now False")):
        assert words in refused(capsys, method, tmp_path, "--resume", *flag, name="run")

    for changes, words in (({"turn": 1}, "have changed"), ({"num_images": 35}, "have changed"),
                           ({"class_names": NAMES}, "now 'ant'")):
        noise_npz(tmp_path, **changes)
        assert words in refused(capsys, method, tmp_path, "--resume", name="run")
    assert same_weights(finished / [*ROWS[method].nets][-1], tmp_path / "run" / [*ROWS[method].nets][-1])

    noise_npz(tmp_path, name="moved.npz")
    result = run(method, tmp_path, "--resume", "--dataset", str(tmp_path / "moved.npz"))
    assert result["per_class_accuracy"] == result_of(finished)["per_class_accuracy"]


@by_method
def test_a_finished_stage_whose_net_is_gone_cut_or_another_s_is_one_line(method, whole, tmp_path, capsys):
    finished, _ = whole(method)
    first, *_, last = ROWS[method].nets
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


def test_a_begun_stage_of_another_net_or_step_is_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit):
        run("cbd", tmp_path, "--time-limit", "0")
    shutil.copy(tmp_path / "run" / "last.pt", tmp_path / "good")
    for part in ("model", "progress"):
        state = torch.load(tmp_path / "good", weights_only=True)
        if part == "model":
            state["model"]["renamed"] = state["model"].popitem()[1]  # as an earlier version of the code had it
        else:
            state["progress"]["step"] += 1  # its losses are fewer
        torch.save(state, tmp_path / "run" / "last.pt")
        assert "is begun, but" in refused(capsys, "cbd", tmp_path, "--resume", name="run"), part


@by_method
def test_a_finished_run_resumed_trains_nothing_even_without_its_log_and_is_left_alone_without_last_pt(
        method, whole, tmp_path, capsys):
    finished, folder = whole(method)[0], tmp_path / "run"
    shutil.copytree(finished, folder)
    run(method, tmp_path, "--resume")
    assert_same_run(finished, folder)
    (folder / "log.jsonl").unlink()
    assert without_times(run(method, tmp_path, "--resume")) == without_times(result_of(finished))
    assert "log.jsonl is gone; a new one begins here" in capsys.readouterr().out
    (folder / "last.pt").unlink()
    assert "but no last.pt to go on from" in refused(capsys, method, tmp_path, "--resume", name="run")


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
    (["--batch-size", "30", "--grad-accumulation", "4"], "multiple"),
    (["--sync-bn", "--device", "cpu"], "--sync-bn needs GPUs"),
    (["--device", "tpu9"], "cannot use the device"),
    (["--device", "meta"], "cannot use the device"), (["--arch", "resnet33"], "invalid choice"),
    (["--epochs"], "expected one argument"), (["--unknown"], "--unknown"), (["stray"], "stray"),
    (["--epoch", "3"], "--epoch")]
# just outside of what a flag takes; `all`: the shared ones
EDGES = {
    "all": "--batch-size 0, --batch-size 2147483648, --epochs -1, --epochs two, --epochs 1.5, --lr nan, "
           "--lr 1e39, --lr -1, --weight-decay 1e308, --seed -1, --subset-seed -1, --workers -1, "
           "--time-limit nan, --image-size 0, --test-fraction 1.1, --evaluate-every 0",
    "cbd": "--alpha 1.5, --beta -1, --gamma 0, --temperature 0, --noise nan, --teachers 0, --only-teacher 0, "
           "--second-stage-lr -1, --second-stage-epochs 0, --teacher-kinds none",
    "async_lt": "--phase-one-classes 0, --temperature 0, --scale 0, --memory-per-class 0, --plain-lr nan, "
                "--phase-two-lr -0.1, --feature-lr nan, --lambda-scale 1e20, --milestones 160, "
                "--lr-gamma -1, --graph-similarity dot, --plain-epochs 0, --phase-two-epochs 0",
    "livt": "--mask-ratio nan, --tau -1, --label-smoothing 1.1, --layer-decay -1, --images-per-class 0, "
            "--mgp-lr -1, --mgp-epochs 0, --mgp-warmup-epochs -1, --warmup-epochs nan, --mixup -1, "
            "--cutmix -1, --drop-path 1.1, --width 0, --depth 0, --loss mse",
    "candle": "--resolutions 0, --student-width 0, --student-width nan, --calibration-epochs 0, "
              "--calibration-lr nan, --fixed-lambda 1, --fixed-lambda -0.5, --balance-lr -1, "
              "--smoothing 1 0, --smoothing 0 -.1, --student-resolution 0, --base-resolution 0, "
              "--kl-reduction sum"}


@pytest.mark.parametrize("method", ["cbd", "async_lt"])
def test_weights_that_cannot_be_had_are_one_line_before_anything_is_written(method, tmp_path, capsys):
    assert "no ImageNet weights for resnet14 at 8 pixels" in refused(capsys, method, tmp_path, "--pretrained")


@by_method
def test_bad_input_is_one_error_line_and_writes_nothing(method, tmp_path, capsys):
    for flags, words in BAD_FLAGS:
        assert words in refused(capsys, method, tmp_path, *flags), flags
    for edge in f"{EDGES['all']}, {EDGES[method]}".split(", "):
        assert f"argument {edge.split()[0]}: " in refused(capsys, method, tmp_path, *edge.split()), edge


@pytest.mark.parametrize("variable", ["LOCAL_RANK", "RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"])
def test_a_rank_that_is_no_number_or_cannot_be_is_one_line(variable, tmp_path, capsys, monkeypatch):
    cannot_be = {"RANK": ["1"], "WORLD_SIZE": ["0"], "LOCAL_WORLD_SIZE": ["0"]}.get(variable, [])
    for value in ("abc", "-1", "", "1.5", *cannot_be):
        monkeypatch.setenv(variable, value)
        why = "" if value in cannot_be else " must be a whole number"
        assert f"the environment's {variable}{why}" in refused(capsys, "cbd", tmp_path), value


@by_method
def test_no_command_line_ends_in_a_traceback(method, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Run, "open", lambda *given, **named: sys.exit(0))  # where it begins to write
    module = importlib.import_module(method)
    with monkeypatch.context() as patch:
        patch.setattr(Parser, "parse_args", lambda self, argv=None: self)
        actions = [each for each in module.parse_args([])._actions if "--help" not in each.option_strings]
    noise_npz(tmp_path)
    (tmp_path / "text").write_text("hello")
    monkeypatch.chdir(tmp_path)

    values = ["-1", "0", "1", "2", "16", "0.5", "1e-320", "1e39", "1e308", "-0.0", "nan", "-inf", "cpu",
              "2147483648", "", " ", "abc", "--", "text", ".", "gone.pt", "/dev/null", "x" * 300, "8 16",
              "\u00e9\x00"]
    codes, draw = [], random.Random(method)
    for _ in range(150):
        flags = tiny_flags(method)
        for action in draw.sample(actions, draw.choice((1, 1, 2, 3))):
            flags.append(draw.choice(action.option_strings))
            if action.nargs != 0:
                some = [str(choice) for choice in action.choices or () if str(choice) in ROWS[method].flags]
                flags += [draw.choice(values + some * 9) for _ in range(draw.choice((1, 1, 1, 2)))]
        try:
            module.main(module.parse_args(flags))
            codes.append(0)  # of --evaluate
        except SystemExit as stop:
            codes.append(stop.code)
        except BaseException as reason:
            raise AssertionError(f"{method}.py {flags}") from reason
        error = capsys.readouterr().err
        assert codes[-1] == 0 or error.startswith("error: ") and error.count("\n") == 1, (flags, error)
    assert set(codes) == {0, 2} and min(map(codes.count, (0, 2))) >= 10
    assert sorted(os.listdir(tmp_path)) == ["images.npz", "text"]


DIVERGES = {"cbd": ["--lr", "1e12"], "async_lt": ["--lambda-scale", "1e12", "--lr", "1e12"],
            "livt": ["--mgp-lr", "1e6", "--lr", "1e6"], "candle": ["--lr", "1e12"]}


@pytest.mark.parametrize("how", [[], ["--time-limit", "0", "--resume"]])
@by_method
def test_a_net_that_diverges_ends_the_run_in_one_line_and_is_not_saved(method, how, tmp_path, capsys):
    flags = [*DIVERGES[method], "--no-amp", *how]
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


def test_a_net_that_diverges_in_an_epoch_s_last_step_ends_the_run_in_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:  # the one step's loss was still finite
        run("cbd", tmp_path, "--lr", "1e12", "--batch-size", "64", "--no-amp")
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and "training diverged" in error
