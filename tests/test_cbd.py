"""cbd.py: sampler, losses, model, stages, resuming, bad input."""
import json
import math

import numpy as np
import pytest
import torch

import cbd
from common.data import load
from common.evaluate import scores
from common.loader import normalise

TINY = ["--epochs", "1", "--batch-size", "64", "--device", "cpu", "--no-amp"]


def tiny_npz(path, per_class=(24, 8, 4), size=8, val=False):
    """A data set of a few small images that one can learn: class c is bright in the c-th rows."""
    generator = np.random.default_rng(0)
    arrays = {}
    for part, counts in (("train", per_class), ("test", [4] * len(per_class)), ("val", [3] * len(per_class))):
        if part == "val" and not val:
            continue
        targets = np.repeat(np.arange(len(counts)), counts)
        images = generator.integers(0, 80, (len(targets), size, size, 3))
        for c in range(len(counts)):
            images[targets == c, 2 * c:2 * c + 2] += 150
        arrays |= {f"x_{part}": images.astype(np.uint8), f"y_{part}": targets}
    np.savez(path, **arrays)
    return str(path)


def weights(path):
    return torch.load(path, weights_only=True)["state_dict"]


def run(tmp_path, *flags, name="run"):
    path = tmp_path / "tiny.npz"
    if not path.exists():
        tiny_npz(path)
    return cbd.main(cbd.parse_args(["--dataset", str(path), "--arch", "resnet14", *TINY,
                                    "--out", str(tmp_path / name), *flags]))


# ---------------------------------------------------------------- sampler

def test_class_balanced_sampling_draws_every_class_equally_often():
    targets = torch.tensor([3] * 500 + [0] * 50 + [7] * 5)  # ids neither sorted by size nor without gaps
    drawn = targets[cbd.class_balanced_indices(targets, torch.Generator().manual_seed(0), 30000)]
    counts = torch.bincount(drawn, minlength=8)[[3, 0, 7]].double()
    three_sigma = 3 * math.sqrt(30000 * (1 / 3) * (2 / 3))
    assert (counts - 10000).abs().max() < three_sigma
    assert counts.sum() == 30000


def test_inside_a_class_no_image_repeats_before_all_were_drawn():
    targets = torch.tensor([0] * 7 + [1] * 40)
    indices = cbd.class_balanced_indices(targets, torch.Generator().manual_seed(1), 200)
    for class_id, size in ((0, 7), (1, 40)):
        drawn = indices[targets[indices] == class_id].tolist()
        for start in range(0, len(drawn), size):
            cycle = drawn[start:start + size]
            assert len(set(cycle)) == len(cycle)
    first, second = ([i for i in indices.tolist() if i < 7][k:k + 7] for k in (0, 7))
    assert first != second  # every cycle is shuffled anew


def test_an_epoch_has_as_many_draws_as_images_and_follows_its_generator():
    targets = torch.tensor([0] * 30 + [1] * 3)
    draw = lambda seed: cbd.class_balanced_indices(targets, torch.Generator().manual_seed(seed)).tolist()
    assert len(draw(0)) == 33 and draw(0) == draw(0) and draw(0) != draw(1)
    assert sorted(cbd.instance_indices(targets, torch.Generator().manual_seed(0)).tolist()) == list(range(33))
    with pytest.raises(ValueError):
        cbd.class_balanced_indices(torch.zeros(0, dtype=torch.int64), torch.Generator())


# ---------------------------------------------------------------- losses

def test_cbd_loss_is_sixty_percent_cross_entropy_plus_forty_times_the_cosine_distance():
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    student, teacher = torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[4.0, 3.0], [5.0, 0.0]])
    ce = (math.log(1 + math.exp(-2)) + math.log(1 + math.exp(1))) / 2  # targets 0 and 0
    distance = ((1 - 24 / 25) + 0) / 2
    loss = cbd.cbd_loss(logits, torch.tensor([0, 0]), student, teacher)
    assert loss.item() == pytest.approx(0.6 * ce + 0.4 * 100 * distance, rel=1e-5)
    assert cbd.feature_distillation_loss(student, teacher).item() == pytest.approx(distance, abs=1e-6)


def test_classifier_distillation_loss_by_hand():
    logits, teacher = torch.tensor([[1.0, -1.0, 0.5]]), torch.tensor([[0.0, 2.0, 1.0]])
    p = [math.exp(z / 2) for z in (0, 2, 1)]
    q = [math.exp(z / 2) for z in (1, -1, 0.5)]
    kd = -sum(a / sum(p) * math.log(b / sum(q)) for a, b in zip(p, q))
    ce = -math.log(math.exp(0.5) / sum(math.exp(z) for z in (1, -1, 0.5)))
    loss = cbd.classifier_distillation_loss(logits, torch.tensor([2]), teacher, alpha=0.3, temperature=2.0)
    assert loss.item() == pytest.approx(0.7 * ce + 0.3 * 4 * kd, rel=1e-5)


def test_logit_adjustment_recovers_the_balanced_classifier():
    # with z = log p(x | y) the adjusted softmax is Bayes' posterior under the training prior
    likelihood, counts = torch.tensor([[0.2, 0.5, 0.1]]), torch.tensor([100, 10, 1])
    posterior = likelihood * counts / (likelihood * counts).sum()
    log_prior = (counts / counts.sum()).log()
    assert torch.allclose(cbd.logit_adjusted(likelihood.log(), log_prior).softmax(1), posterior)
    with pytest.raises(ValueError):
        cbd.logit_adjusted(likelihood, log_prior[:2])


@pytest.mark.parametrize("call", [
    lambda: cbd.feature_distillation_loss(torch.zeros(2, 3), torch.zeros(2, 4)),
    lambda: cbd.cbd_loss(torch.zeros(2, 3), torch.zeros(2).long(), torch.zeros(2, 3), torch.zeros(2, 4)),
    lambda: cbd.cbd_loss(torch.zeros(2, 3), torch.zeros(2).long(), torch.zeros(2, 3), torch.zeros(2, 3), 2.0),
    lambda: cbd.cbd_loss(torch.zeros(2, 3), torch.zeros(2).long(), torch.zeros(3, 3), torch.zeros(3, 3)),
    lambda: cbd.class_balanced_indices(torch.tensor([0, -1]), torch.Generator()),
    lambda: cbd.class_balanced_indices(torch.tensor([0.0, 1.0]), torch.Generator()),
    lambda: cbd.classifier_distillation_loss(torch.zeros(2, 3), torch.zeros(2).long(), torch.zeros(2, 4)),
    lambda: cbd.classifier_distillation_loss(torch.zeros(2, 3), torch.zeros(2).long(), torch.zeros(2, 3),
                                             temperature=0)])
def test_losses_and_samplers_refuse_bad_input(call):
    with pytest.raises(ValueError):
        call()


# ---------------------------------------------------------------- model

def test_one_teacher_needs_no_projection_and_several_get_one():
    one, four = cbd.CBDNet("resnet14", 10), cbd.CBDNet("resnet14", 10, project_to=256)
    assert one.h is None and one.classifier.weight.shape == (10, 64)
    assert four.h.weight.shape == (256, 64) and four.classifier.weight.shape == (10, 256)
    logits, features = four(torch.rand(3, 3, 32, 32))
    assert features.shape == (3, 256) and (features >= 0).all()  # relu(h(v)), as the teachers' features
    assert logits.abs().max() <= 20
    assert (four.h.bias == 0).all()
    assert cbd.CBDNet("resnet14", 10, gamma=5.0)(torch.rand(2, 3, 32, 32))[0].abs().max() <= 5


def test_teacher_targets_are_unit_parts_side_by_side_and_the_mean_logits():
    torch.manual_seed(0)
    teachers = [cbd.CBDNet("resnet14", 10).eval() for _ in range(3)]
    images = torch.rand(4, 3, 32, 32)
    features, logits = cbd.teacher_outputs(teachers, images)
    assert features.shape == (4, 192) and not features.requires_grad
    for k, teacher in enumerate(teachers):
        z, v = teacher(images)
        assert torch.allclose(features[:, 64 * k:64 * k + 64], v / v.norm(dim=1, keepdim=True), atol=1e-6)
    assert torch.allclose(logits, sum(t(images)[0] for t in teachers) / 3, atol=1e-5)
    # the cosine of Eq. (4) divides by the norm of the whole, sqrt(K)
    assert torch.allclose(features.norm(dim=1), torch.full((4,), math.sqrt(3)))


def test_the_cosine_schedule_starts_at_lr_and_ends_at_zero():
    assert cbd.cosine_lr(0, 0.2) == 0.2
    assert cbd.cosine_lr(0.5, 0.2) == pytest.approx(0.1)
    assert cbd.cosine_lr(1, 0.2) == pytest.approx(0, abs=1e-12)


# ---------------------------------------------------------------- stages

def test_the_default_number_of_teachers_and_their_kinds_are_those_of_table_1():
    kinds = lambda *flags: cbd.teacher_kinds(cbd.parse_args(list(flags)))
    assert kinds() == ["standard"]
    assert kinds("--teachers", "2") == ["standard", "augmented"]
    assert kinds("--teachers", "3") == ["standard", "augmented", "augmented"]
    assert kinds("--teachers", "4") == ["standard", "augmented"] * 2
    assert kinds("--teachers", "5") == ["standard", "augmented"] * 2 + ["augmented"]
    assert kinds("--teacher-kinds", "augmented", "augmented") == ["augmented", "augmented"]


def test_a_run_writes_what_it_promises_and_scores_its_last_epoch(tmp_path):
    result = run(tmp_path, "--teachers", "2", "--epochs", "3", "--evaluate-every", "1")
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [
        "last.pt", "log.jsonl", "result.json", "student.pt", "teacher_1.pt", "teacher_2.pt"]
    saved = json.loads((tmp_path / "run" / "result.json").read_text())
    assert saved == json.loads(json.dumps(result))
    for key in ("method", "dataset", "seed", "all", "many", "medium", "few", "ece", "mce", "best_all",
                "group_sizes", "class_counts", "per_class_accuracy", "stages", "seconds", "images_per_second",
                "args", "versions"):
        assert key in saved, key
    assert saved["class_counts"] == [24, 8, 4] and saved["many"] is None
    assert [stage["name"] for stage in saved["stages"]] == [
        "teacher 1, standard", "teacher 2, augmented", "teacher ensemble, K=2", "cbd, K=2"]
    assert all(0 <= stage["ncm"] <= 100 for stage in saved["stages"])
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert {"argv", "versions", "device", "git_commit"} <= lines[0].keys()
    student = [line for line in lines[1:] if line["stage"] == "cbd, K=2"]
    assert [line["epoch"] for line in student] == [1, 2, 3]
    assert saved["all"] == pytest.approx(student[-1]["all"])
    assert saved["best_all"] == max(line["all"] for line in student)


def test_the_teacher_ensemble_is_the_average_of_the_teachers_outputs(tmp_path):
    result = run(tmp_path, "--teachers", "2")
    data = load(str(tmp_path / "tiny.npz"))
    images = normalise(torch.from_numpy(data.test.images), data.mean, data.std)
    with torch.no_grad():
        logits = sum(cbd.load_model(tmp_path / "run" / f"teacher_{i}.pt")[0](images)[0] for i in (1, 2)) / 2
    expected = scores(logits, torch.from_numpy(data.test.targets), data.class_counts)
    assert result["stages"][2]["per_class_accuracy"] == expected["per_class_accuracy"]
    assert result["stages"][2]["ece"] == pytest.approx(expected["ece"], abs=1e-3)


def test_training_the_student_leaves_the_teachers_as_they_are(tmp_path):
    run(tmp_path, "--only-teacher", "1", name="teacher")
    path = tmp_path / "teacher" / "teacher_1.pt"
    teacher, _ = cbd.load_model(path)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    images = torch.rand(16, 3, 32, 32)
    student = cbd.CBDNet("resnet14", 3).train()
    features, _ = cbd.teacher_outputs([teacher], images)
    logits, own = student(images)
    cbd.cbd_loss(logits, torch.zeros(16).long(), own, features).backward()
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())
    assert all(p.grad is None for p in teacher.parameters())
    # and through a whole run: what the run loaded scores the same as the file
    result = run(tmp_path, "--teacher-checkpoints", str(path), name="student")
    assert result["stages"][0]["all"] == cbd.main(cbd.parse_args(
        ["--dataset", str(tmp_path / "tiny.npz"), "--evaluate", str(path), "--no-amp"]))["all"]


@pytest.mark.parametrize("stage", cbd.SECOND_STAGES)
def test_every_second_stage_runs_from_saved_teachers(tmp_path, stage):
    run(tmp_path, "--teachers", "2", "--only-teacher", "1", name="one")
    run(tmp_path, "--teachers", "2", "--only-teacher", "2", name="two")
    paths = [str(tmp_path / "one" / "teacher_1.pt"), str(tmp_path / "two" / "teacher_2.pt")]
    result = run(tmp_path, "--teacher-checkpoints", *paths, "--second-stage", stage,
                 "--second-stage-epochs", "1", "--student-augmentation", "augmented",
                 "--loss", "logit-adjusted")
    names = [entry["name"] for entry in result["stages"]]
    assert names[:3] == ["teacher 1, standard", "teacher 2, augmented", "teacher ensemble, K=2"]
    assert names[3].startswith(stage)
    teacher, student = weights(paths[0]), weights(tmp_path / "run" / "student.pt")
    backbone = [name for name in teacher if name.startswith("backbone") and "num_batches" not in name]
    same = [torch.equal(teacher[name], student[name]) for name in backbone]
    assert all(same) if stage == "crt" else not any(same)  # crt freezes it, batch norm's buffers included
    assert ("h.weight" in student) == (stage in ("cbd", "hybrid"))


def test_teachers_have_seeds_of_their_own_and_a_run_repeats_exactly(tmp_path):
    first = run(tmp_path, "--teacher-kinds", "standard", "standard", name="a")
    again = run(tmp_path, "--teacher-kinds", "standard", "standard", name="b")
    other = run(tmp_path, "--teacher-kinds", "standard", "standard", "--seed", "1", name="c")
    weight = lambda folder, file: weights(tmp_path / folder / file)["backbone.conv1.weight"]
    assert not torch.equal(weight("a", "teacher_1.pt"), weight("a", "teacher_2.pt"))
    assert torch.equal(weight("a", "student.pt"), weight("b", "student.pt"))
    assert not torch.equal(weight("a", "student.pt"), weight("c", "student.pt"))
    assert first["all"] == again["all"] and first["seed"] != other["seed"]


def test_an_epoch_keeps_its_last_partial_batch(tmp_path):
    run(tmp_path, "--batch-size", "32", "--only-teacher", "1")  # 36 images: 2 steps, the second of 4 images
    assert weights(tmp_path / "run" / "teacher_1.pt")["backbone.bn1.num_batches_tracked"] == 2


def test_evaluate_on_val_scores_the_validation_images(tmp_path):
    tiny_npz(tmp_path / "tiny.npz", val=True)
    result = run(tmp_path, "--only-teacher", "1", "--evaluate-on", "val")
    data, model = load(str(tmp_path / "tiny.npz")), cbd.load_model(tmp_path / "run" / "teacher_1.pt")[0]
    with torch.no_grad():
        logits, _ = model(normalise(torch.from_numpy(data.val.images), data.mean, data.std))
    assert result["all"] == pytest.approx(100 * (logits.argmax(1).numpy() == data.val.targets).mean())


def test_gradient_accumulation_gives_the_large_batch_s_update(tmp_path, monkeypatch):
    # without batch norm, whose statistics are those of the parts; the last batch of 4 is cut into 4 parts
    monkeypatch.setattr(torch.nn.BatchNorm2d, "forward", lambda self, x: x * self.weight.view(-1, 1, 1))
    flags = ("--only-teacher", "1", "--batch-size", "32", "--lr", "0.001")
    run(tmp_path, *flags, name="whole")
    run(tmp_path, *flags, "--grad-accumulation", "4", name="parts")
    a, b = (weights(tmp_path / name / "teacher_1.pt") for name in ("whole", "parts"))
    assert all(torch.allclose(a[name], b[name], atol=1e-6) for name in a)


# ---------------------------------------------------------------- resuming

def test_a_run_resumed_in_the_middle_of_either_stage_ends_with_the_same_weights(tmp_path, monkeypatch):
    flags = ("--epochs", "3", "--evaluate-every", "1")
    whole = run(tmp_path, *flags, name="whole")
    for stop in (2, 5):  # after the teacher's second epoch, after the student's first (one save ends a stage)
        saves = []

        def save(self, *, _save=cbd.runtime.Run.save, **state):
            _save(self, **state)
            saves.append(state)
            if len(saves) == stop:
                raise KeyboardInterrupt
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(cbd.runtime.Run, "save", save)
            run(tmp_path, *flags, name=f"cut{stop}")
        with open(tmp_path / f"cut{stop}" / "log.jsonl", "a") as log:
            log.write('{"a line behind": "the checkpoint"}\n')
        resumed = run(tmp_path, *flags, "--resume", name=f"cut{stop}")
        for file in ("teacher_1.pt", "student.pt"):
            a, b = (weights(tmp_path / name / file) for name in ("whole", f"cut{stop}"))
            assert all(torch.equal(a[key], b[key]) for key in a)
        assert resumed["per_class_accuracy"] == whole["per_class_accuracy"]
        assert resumed["best_all"] == whole["best_all"]
        strip = lambda name: [{k: v for k, v in json.loads(line).items() if k != "seconds"}
                              for line in (tmp_path / name / "log.jsonl").read_text().splitlines()[1:]]
        assert strip("whole") == strip(f"cut{stop}")


def test_resume_starts_when_nothing_is_there_and_refuses_other_settings(tmp_path, capsys):
    run(tmp_path, "--only-teacher", "1", "--resume")
    assert (tmp_path / "run" / "result.json").exists()
    with pytest.raises(SystemExit) as stop:
        run(tmp_path, "--only-teacher", "1", "--resume", "--lr", "0.3")
    assert stop.value.code == 2 and "--lr 0.1, now 0.3" in capsys.readouterr().err


def test_time_limit_stops_with_a_checkpoint_that_resumes(tmp_path):
    with pytest.raises(SystemExit) as stop:
        run(tmp_path, "--epochs", "2", "--time-limit", "0")
    assert stop.value.code == 0
    saved = torch.load(tmp_path / "run" / "last.pt", weights_only=True)["progress"]
    assert (saved["epoch"], saved["step"]) == (0, 1)
    assert run(tmp_path, "--epochs", "2", "--resume")["stages"][0]["name"] == "teacher 1, standard"


# ---------------------------------------------------------------- bad input

@pytest.mark.parametrize("flags, words", [
    (["--dataset", "imagenette"], "known: fashion_lt"),
    (["--dataset", "nowhere/x.npz"], "no such file: nowhere/x.npz"),
    (["--dataset", "folder", "--data-dir", "nowhere"], "no such folder: nowhere/train"),
    (["--imb-factor", "10"], "fixed list"),
    (["--dataset", "cifar10_lt", "--imb-factor", "0.01"], "at least 1"),
    (["--teachers", "0"], "--teachers must be at least 1"),
    (["--teachers", "two"], "invalid int value"),
    (["--only-teacher", "2"], "counted from 1"),
    (["--teachers", "3", "--teacher-kinds", "standard"], "must agree"),
    (["--teacher-checkpoints", "nowhere.pt"], "no such checkpoint: nowhere.pt"),
    (["--evaluate", "README.md"], "cannot read the checkpoint README.md"),
    (["--recipe", "imagenet"], "unknown recipe"),
    (["--batch-size", "0"], "--batch-size"),
    (["--epochs", "-1"], "--epochs must be at least 1"),
    (["--lr", "nan"], "--lr"),
    (["--alpha", "1.5"], "--alpha"),
    (["--temperature", "0"], "--temperature must be positive"), (["--temperature", "nan"], "--temperature"),
    (["--noise", "nan"], "--noise must be a number that is not negative"),
    (["--batch-size", "30", "--grad-accumulation", "4"], "multiple"),
    (["--sync-bn", "--device", "cpu"], "--sync-bn needs GPUs"),
    (["--device", "tpu9"], "cannot use the device"),
    (["--arch", "resnet33"], "invalid choice"),
    (["--second-stage", "none"], "invalid choice"),
    (["--teachers"], "expected one argument"),
])
def test_bad_input_is_one_error_line_and_writes_nothing(tmp_path, capsys, flags, words):
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as stop:
        cbd.main(cbd.parse_args(["--out", str(out), *flags]))
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.startswith("error: ") and error.count("\n") == 1 and words in error
    assert not out.exists()


def test_a_checkpoint_of_another_architecture_or_data_set_is_refused(tmp_path, capsys):
    run(tmp_path, "--only-teacher", "1", name="teacher")
    path = str(tmp_path / "teacher" / "teacher_1.pt")
    for flags, words in ((["--arch", "resnet20"], "a resnet14, not a resnet20"), ([], "knows 3 classes")):
        with pytest.raises(SystemExit) as stop:
            cbd.main(cbd.parse_args(["--teacher-checkpoints", path, "--out", str(tmp_path / "x"), *flags]))
        assert stop.value.code == 2 and words in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_a_taken_out_folder_is_refused_and_a_default_one_is_numbered(tmp_path, capsys, monkeypatch):
    run(tmp_path, "--only-teacher", "1")
    with pytest.raises(SystemExit) as stop:
        run(tmp_path, "--only-teacher", "1")
    assert stop.value.code == 2 and "is taken" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        flags = ["--dataset", "tiny.npz", "--arch", "resnet14", *TINY, "--only-teacher", "1"]
        cbd.main(cbd.parse_args(flags))
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == ["cbd_tiny_seed0", "cbd_tiny_seed0-2"]


def test_a_loss_that_becomes_nan_ends_the_run_and_names_the_step(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        run(tmp_path, "--lr", "1e38", "--batch-size", "4", "--epochs", "2")
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: the loss of teacher 1, standard became")
    assert f"at step 2 of epoch 1, lr {cbd.cosine_lr(1 / 18, 1e38):g};" in error  # 2 epochs of 9 steps
    assert "last good checkpoint: none yet" in error
    assert not (tmp_path / "run" / "result.json").exists()


def test_a_net_that_diverges_in_its_last_step_ends_the_run_with_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        run(tmp_path, "--lr", "1e38", "--batch-size", "256")
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: the net's outputs became nan")
    assert error.count("\n") == 1


def test_evaluate_on_val_without_validation_images_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        run(tmp_path, "--evaluate-on", "val")
    assert stop.value.code == 2 and "no validation images" in capsys.readouterr().err
