"""cbd.py: sampler, losses, nets, which teachers there are, what each stage minimises and trains."""
import functools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import cbd
from common.evaluate import nearest_class_mean
from common.ranks import generator
from tests import tiny
from tests.tiny import as_seen, log_rows, refused, weights

run = functools.partial(tiny.run, "cbd")


# ---------------------------------------------------------------- sampler and losses

def test_class_balanced_sampling_draws_every_class_equally_often():
    targets = torch.tensor([3] * 500 + [0] * 50 + [7] * 5)
    drawn = targets[cbd.class_balanced_indices(targets, torch.Generator().manual_seed(0), 30000)]
    counts = torch.bincount(drawn, minlength=8)[[3, 0, 7]]
    three_sigma = 3 * math.sqrt(30000 * (1 / 3) * (2 / 3))
    assert (counts - 10000).abs().max() < three_sigma and counts.sum() == 30000

    for bad in (torch.zeros(0, dtype=torch.int64), torch.tensor([0, -1]), torch.tensor([0.0, 1.0])):
        with pytest.raises(ValueError):
            cbd.class_balanced_indices(bad, torch.Generator())


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


def test_losses_refuse_bad_input():
    z, ids = torch.zeros, torch.zeros(2).long()
    for loss, cases in (
            (cbd.feature_distillation_loss, [(z(2, 3), z(2, 4)), (z(3), z(3))]),
            (cbd.cbd_loss, [(z(2, 3), ids, z(2, 3), z(2, 4)), (z(2, 3), ids, z(3, 3), z(3, 3)),
                            (z(2, 3), ids, z(2, 3), z(2, 3), 2.0)]),
            (cbd.classifier_distillation_loss, [(z(2, 3), ids, z(2, 4)), (z(2, 3), ids, z(2, 3), 0.4, 0)])):
        for arguments in cases:
            with pytest.raises(ValueError):
                loss(*arguments)


# ---------------------------------------------------------------- nets

def test_one_teacher_needs_no_projection_and_several_get_one():
    one, four = cbd.CBDNet("resnet14", 10), cbd.CBDNet("resnet14", 10, project_to=256)
    assert "h.weight" not in one.state_dict() and one.classifier.weight.shape == (10, 64)
    assert four.h.weight.shape == (256, 64) and four.classifier.weight.shape == (10, 256)
    logits, features = four(torch.rand(3, 3, 8, 8))
    assert features.shape == (3, 256) and (features >= 0).all()  # relu(h(v)), as the teachers' features
    assert logits.abs().max() <= 20 and (four.h.bias == 0).all()

    linear = cbd.CBDNet("resnet14", 10, gamma=5.0, project_to=256, projection="linear")
    linear.h.weight.data.neg_()
    logits, features = linear(torch.rand(3, 3, 8, 8))
    assert (features < 0).any() and logits.abs().max() <= 5


@pytest.mark.parametrize("projection", ["relu", "linear"])
def test_no_unit_of_h_starts_dead(projection):
    torch.manual_seed(0)
    net = cbd.CBDNet("resnet14", 10, project_to=256, projection=projection)
    features = net(torch.randn(200, 3, 16, 16))[1]
    assert (features > 0).any(0).all()  # with weights of both signs a third of the units is 0 for all images
    assert net.h.weight.max().item() == pytest.approx((6 / (64 + 256)) ** .5, rel=.01)  # Glorot's range


def test_teachers_give_unit_features_side_by_side_and_the_mean_of_their_logits():
    torch.manual_seed(0)
    teachers = cbd.Teachers([cbd.CBDNet("resnet14", 10) for _ in range(3)]).eval()
    images = torch.rand(4, 3, 8, 8)
    logits, features = teachers(images)
    assert features.shape == (4, 192) and not features.requires_grad
    for k, teacher in enumerate(teachers):
        v = teacher(images)[1]
        assert torch.allclose(features[:, 64 * k:64 * k + 64], v / v.norm(dim=1, keepdim=True), atol=1e-6)
    assert torch.allclose(logits, sum(teacher(images)[0] for teacher in teachers) / 3, atol=1e-5)


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


def by_hand(stage, model, teachers, images, targets, log_prior):
    """What a second stage minimises on a batch, written out: Eq. (1), (2) with (4), or (3)."""
    logits, features = model(images)
    logits = logits + log_prior
    ce = -logits.log_softmax(1)[torch.arange(len(targets)), targets].mean()
    if stage not in cbd.DISTILLING:
        return ce

    all_logits, all_features = zip(*(teacher(images) for teacher in teachers))
    wide = torch.cat([v / v.norm(dim=1, keepdim=True) for v in all_features], 1)
    distance = 1 - F.cosine_similarity(features, wide).mean() if stage != "kd" else 0
    soft = (sum(all_logits) / len(teachers) / 2).softmax(1)
    kd = -(soft * (logits / 2).log_softmax(1)).sum(1).mean() if stage != "cbd" else 0
    return 0.6 * ce + 0.4 * (100 * distance + 4 * kd)


@pytest.mark.parametrize("stage, flags, name, sampling", [
    ("cbd", [], "cbd, K=2", "class-balanced"), ("kd", [], "kd, K=2", "class-balanced"),
    ("hybrid", [], "hybrid, K=2", "class-balanced"),
    ("cbd", ["--loss", "logit-adjusted"], "cbd, K=2, logit-adjusted, instance", "instance"),
    ("finetune", [], "finetune of standard", "class-balanced"),
    ("crt", [], "crt of standard", "class-balanced"),
    ("class-balanced", [], "class-balanced", "class-balanced"),
    ("logit-adjusted", [], "logit-adjusted, instance", "instance"),
    ("class-balanced", ["--student-sampling", "instance", "--student-augmentation", "augmented"],
     "class-balanced, instance, augmented", None)])
def test_every_second_stage_minimises_its_own_on_what_is_drawn(stage, flags, name, sampling, still):
    kinds = [] if stage in cbd.ALONE else ["--teacher-kinds", "standard", "augmented"]
    npz, out = str(still / "images.npz"), still / "run"
    result = cbd.main(cbd.parse_args([
        "--dataset", npz, "--arch", "resnet14", "--device", "cpu", "--no-amp", "--batch-size", "32", "--lr",
        "0", "--second-stage-lr", "0", "--epochs", "1", "--second-stage-epochs", "1", "--second-stage", stage,
        "--out", str(out), *kinds, *flags]))
    assert [entry["name"] for entry in result["stages"]] == [
        "teacher 1, standard", "teacher 2, augmented", "teacher ensemble, K=2"][:3 * len(kinds)] + [name]

    student, _ = cbd.load_model(out / "student.pt")  # lr 0: as it started
    for part in student.children():  # a frozen part keeps its batch norm's statistics
        part.train(stage != "crt" or part is student.classifier)
    teachers = [cbd.load_model(path)[0] for path in sorted(out.glob("teacher_*.pt"))]
    (images, targets), draws = as_seen(npz), generator(0, name, "sampling", 0)
    log_prior = (targets.bincount() / len(targets)).log() if "logit-adjusted" in name else 0
    indices = cbd.class_balanced_indices(targets, draws) if sampling == "class-balanced" else \
        torch.randperm(len(targets), generator=draws)
    with torch.no_grad():
        losses = [by_hand(stage, student, teachers, images[part], targets[part], log_prior).item()
                  for part in indices.split(32)]
    assert sampling is None or log_rows(out)[-1]["loss"] == pytest.approx(np.mean(losses), rel=1e-4)
    assert ("h.weight" in student.state_dict()) == (stage in ("cbd", "hybrid"))


@pytest.mark.parametrize("stage", cbd.FROM_TEACHER)
def test_finetune_trains_all_of_the_first_teacher_and_crt_a_new_classifier_alone(stage, whole, tmp_path):
    paths = [str(whole("cbd")[0] / f"teacher_{i}.pt") for i in (1, 2)]
    run(tmp_path, "--teacher-checkpoints", *paths, "--second-stage", stage, "--second-stage-epochs", "1")
    teacher, student = weights(paths[0]), weights(tmp_path / "run" / "student.pt")
    backbone = [name for name in teacher if name.startswith("backbone") and "num_batches" not in name]
    same = [torch.equal(teacher[name], student[name]) for name in backbone]  # batch norm's buffers included
    assert all(same) if stage == "crt" else not any(same)
    near = F.cosine_similarity(teacher["classifier.weight"], student["classifier.weight"]).min()
    assert (near > 0.9) == (stage == "finetune")


def test_the_teacher_ensemble_is_the_average_of_the_teachers_logits_and_scored_by_class_means_too(tmp_path):
    result = run(tmp_path, "--no-amp", "--epochs", "1", "--save-logits")
    teachers = cbd.Teachers(cbd.load_model(tmp_path / "run" / f"teacher_{i}.pt")[0] for i in (1, 2))
    (train, train_ids), (test, ids) = (as_seen(tmp_path / "images.npz", part) for part in ("train", "test"))
    found = np.load(tmp_path / "run" / "teacher_ensemble_K=2.npz")["logits"]
    with torch.no_grad():
        assert np.allclose(found, sum(teacher(test)[0] for teacher in teachers) / 2, atol=1e-4)
    nearest = nearest_class_mean(teachers(train)[1], train_ids, teachers(test)[1], 3)
    assert result["stages"][2]["ncm"] == pytest.approx(100 * (nearest == ids).float().mean().item())


@pytest.mark.parametrize("flags, words", [
    (["--only-teacher", "3"], "one of the 2 teachers"),
    (["--teachers", "3", "--teacher-kinds", "standard"], "contradict"),
    (["--teacher-kinds", "standard", "standard", "--teacher-checkpoints", "a.pt", "b.pt"], "contradict"),
    (["--second-stage", "class-balanced"], "has no teacher"), (["--teachers"], "expected one argument")])
def test_flags_that_cannot_work_are_refused(flags, words, tmp_path, capsys):
    assert words in refused(capsys, "cbd", tmp_path, *flags)
