"""cbd.py: samplers, losses, nets, schedule, what each stage trains."""
import math

import pytest
import torch
import torch.nn.functional as F

import cbd
from common.augment import normalise
from common.data import load
from common.evaluate import scores
from tests.tiny import log_rows, noise_npz, refused, run, same_weights, weights

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


# ---------------------------------------------------------------- nets and schedule

def test_one_teacher_needs_no_projection_and_several_get_one():
    one, four = cbd.CBDNet("resnet14", 10), cbd.CBDNet("resnet14", 10, project_to=256)
    assert "h.weight" not in one.state_dict() and one.classifier.weight.shape == (10, 64)
    assert four.h.weight.shape == (256, 64) and four.classifier.weight.shape == (10, 256)
    logits, features = four(torch.rand(3, 3, 32, 32))
    assert features.shape == (3, 256) and (features >= 0).all()  # relu(h(v)), as the teachers' features
    assert logits.abs().max() <= 20
    assert (four.h.bias == 0).all()
    linear = cbd.CBDNet("resnet14", 10, gamma=5.0, project_to=256, projection="linear")
    logits, features = linear(torch.rand(3, 3, 32, 32))
    assert (features < 0).any() and logits.abs().max() <= 5


def test_teachers_give_unit_features_side_by_side_and_the_mean_of_their_logits():
    torch.manual_seed(0)
    teachers = cbd.Teachers([cbd.CBDNet("resnet14", 10) for _ in range(3)]).eval()
    images = torch.rand(4, 3, 32, 32)
    logits, features = teachers(images)
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
    assert kinds("--second-stage", "class-balanced") == []


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """A folder with images, and in `both` what a run of two teachers and a student left; its result."""
    folder = tmp_path_factory.mktemp("teachers")
    both = run("cbd", folder, "--no-amp", name="both")
    return folder, both


def test_the_teacher_ensemble_is_the_average_of_the_teachers_outputs(teachers):
    folder, result = teachers
    data = load(str(folder / "images.npz"))
    images = normalise(torch.from_numpy(data.test.images).permute(0, 3, 1, 2), data.mean, data.std)
    with torch.no_grad():
        logits = sum(cbd.load_model(folder / "both" / f"teacher_{i}.pt")[0](images)[0] for i in (1, 2)) / 2
    expected = scores(logits, torch.from_numpy(data.test.targets), data.class_counts)
    assert result["stages"][2]["per_class_accuracy"] == expected["per_class_accuracy"]
    assert result["stages"][2]["ece"] == pytest.approx(expected["ece"], abs=1e-3)
    assert all(0 <= stage["ncm"] <= 100 for stage in result["stages"])


def test_one_teacher_alone_and_saved_teachers_give_the_nets_of_the_whole_run(teachers):
    folder, result = teachers
    for i in (1, 2):
        run("cbd", folder, "--no-amp", "--only-teacher", str(i), name=f"only{i}")
        assert same_weights(folder / f"only{i}" / f"teacher_{i}.pt", folder / "both" / f"teacher_{i}.pt")
        assert not (folder / f"only{i}" / "student.pt").exists()
    assert not same_weights(folder / "both" / "teacher_1.pt", folder / "both" / "teacher_2.pt")
    paths = [str(folder / f"only{i}" / f"teacher_{i}.pt") for i in (1, 2)]
    again = run("cbd", folder, "--no-amp", "--teacher-checkpoints", *paths, name="student")
    assert same_weights(folder / "student" / "student.pt", folder / "both" / "student.pt")
    # training the student has left the teachers as they were
    assert [stage["ece"] for stage in again["stages"]] == [stage["ece"] for stage in result["stages"]]


def test_another_seed_gives_other_nets(teachers):
    folder, _ = teachers
    run("cbd", folder, "--no-amp", "--only-teacher", "1", "--seed", "1", name="seed")
    assert not same_weights(folder / "seed" / "teacher_1.pt", folder / "both" / "teacher_1.pt")


def test_the_student_s_first_step_follows_equation_4(tmp_path):
    # the first loss that is logged, from the nets before and a batch of all images as they are
    flags = ("--second-stage-epochs", "1", "--batch-size", "64", "--noise", "0", "--lr", "0", "--no-amp",
             "--weight-decay", "0")
    run("cbd", tmp_path, *flags)
    data = load(str(tmp_path / "images.npz"))
    teachers = cbd.Teachers(cbd.load_model(tmp_path / "run" / f"teacher_{i}.pt")[0] for i in (1, 2))
    student = cbd.load_model(tmp_path / "run" / "student.pt")[0].train()  # lr 0: as it started
    images = normalise(torch.from_numpy(data.train.images).permute(0, 3, 1, 2), data.mean, data.std)
    targets = torch.from_numpy(data.train.targets)
    logits, features = student(images)
    wide = teachers(images)[1]
    expected = 0.6 * F.cross_entropy(logits, targets) + 40 * (1 - F.cosine_similarity(features, wide)).mean()
    logged = log_rows(tmp_path / "run")[-1]["loss"]
    assert logged == pytest.approx(expected.item(), rel=0.1)  # crops and flips


@pytest.mark.parametrize("stage", [*cbd.DISTILLING, *cbd.FROM_TEACHER])
def test_every_second_stage_runs_from_saved_teachers(teachers, stage):
    folder, _ = teachers
    paths = [str(folder / "both" / f"teacher_{i}.pt") for i in (1, 2)]
    result = run("cbd", folder, "--no-amp", "--teacher-checkpoints", *paths, "--second-stage", stage,
                 "--second-stage-epochs", "1", "--student-augmentation", "augmented", "--loss",
                 "logit-adjusted", name=stage)
    names = [entry["name"] for entry in result["stages"]]
    assert names[:3] == ["teacher 1, standard", "teacher 2, augmented", "teacher ensemble, K=2"]
    assert names[3].startswith(stage) and "logit-adjusted" in names[3] and "augmented" in names[3]

    teacher, student = weights(paths[0]), weights(folder / stage / "student.pt")
    backbone = [name for name in teacher if name.startswith("backbone") and "num_batches" not in name]
    same = [torch.equal(teacher[name], student[name]) for name in backbone]
    assert all(same) if stage == "crt" else not any(same)  # crt freezes it, batch norm's buffers included
    assert ("h.weight" in student) == (stage in ("cbd", "hybrid"))


@pytest.mark.parametrize("stage", cbd.ALONE)
def test_a_second_stage_without_a_teacher_trains_one_net(tmp_path, stage):
    noise_npz(tmp_path)
    result = cbd.main(cbd.parse_args([
        "--dataset", str(tmp_path / "images.npz"), "--arch", "resnet14", "--epochs", "1", "--device", "cpu",
        "--second-stage", stage, "--out", str(tmp_path / "run")]))
    assert [entry["name"].split(",")[0] for entry in result["stages"]] == [stage]
    assert not list((tmp_path / "run").glob("teacher*"))


@pytest.mark.parametrize("flags, words", [
    (["--only-teacher", "3"], "one of the 2 teachers"),
    (["--teachers", "3", "--teacher-kinds", "standard"], "contradict"),
    (["--teacher-kinds", "standard", "standard", "--teacher-checkpoints", "a.pt", "b.pt"], "contradict"),
    (["--second-stage", "class-balanced"], "has no teacher"),
    (["--teachers"], "expected one argument"), (["--teacher-kinds", "none"], "invalid choice"),
    (["--alpha", "1.5"], "--alpha"), (["--temperature", "0"], "--temperature"),
    (["--noise", "nan"], "--noise"),
    (["--gamma", "0"], "--gamma"), (["--second-stage-lr", "-1"], "--second-stage-lr")])
def test_flags_that_cannot_work_are_refused(flags, words, tmp_path, capsys):
    assert words in refused(capsys, "cbd", tmp_path, *flags)
