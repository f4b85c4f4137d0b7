"""cbd.py: sampler, losses, nets, which teachers there are, what each stage minimises and trains."""
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import cbd
from common.evaluate import nearest_class_mean
from common.ranks import generator
from tests.tiny import as_seen, log_rows, refused, run, weights


def test_class_balanced_sampling_draws_every_class_equally_often():
    targets = torch.tensor([3] * 500 + [0] * 50 + [7] * 5)
    drawn = targets[cbd.class_balanced_indices(targets, torch.Generator().manual_seed(0), 30000)]
    counts, sigma = torch.bincount(drawn, minlength=8)[[3, 0, 7]], math.sqrt(30000 * (1 / 3) * (2 / 3))
    assert (counts - 10000).abs().max() < 3 * sigma and counts.sum() == 30000


def by_hand(z, ids, z_hat=None, v=None, v_hat=None, alpha=0.4, T=2):
    """Eq. (1); with features Eq. (2), and so (4); with a teacher's logits Eq. (3); with both the hybrid."""
    loss = -z.log_softmax(1)[torch.arange(len(ids)), ids].mean() * (1 if z_hat is v is None else 1 - alpha)
    if z_hat is not None:
        loss -= alpha * T ** 2 * ((z_hat / T).softmax(1) * (z / T).log_softmax(1)).sum(1).mean()
    if v is not None:
        loss += alpha * 100 * (1 - (v * v_hat).sum(1) / v.norm(dim=1) / v_hat.norm(dim=1)).mean()
    return loss


def test_losses_are_equations_2_and_3():
    z, z_hat, v, v_hat = torch.randn(4, 5, 3, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([2, 0, 1, 1, 0])
    ours, kd = cbd.cbd_loss(z, ids, v, v_hat), cbd.classifier_distillation_loss(z, ids, z_hat, 0.3, 3.0)
    assert torch.allclose(ours, by_hand(z, ids, None, v, v_hat), rtol=1e-5, atol=0)
    assert torch.allclose(kd, by_hand(z, ids, z_hat, alpha=0.3, T=3), rtol=1e-5, atol=0)


def test_sampler_and_losses_refuse_bad_input():
    ids, a, b, c, flat = torch.zeros(2).long(), *map(torch.zeros, [(2, 3), (2, 4), (3, 3), 3])
    for function, cases in (
            (cbd.class_balanced_indices, [(bad, torch.Generator()) for bad in (ids[:0], ids - 1, a[:, 0])]),
            (cbd.feature_distillation_loss, [(a, b), (flat, flat)]),
            (cbd.cbd_loss, [(a, ids, a, b), (a, ids, c, c), (a, ids, a, a, 2.0)]),
            (cbd.classifier_distillation_loss, [(a, ids, b), (a, ids, a, 0.4, 0)])):
        for arguments in cases:
            with pytest.raises(ValueError):
                function(*arguments)


@pytest.mark.parametrize("more, gamma", [({}, 20), ({"gamma": 5.0, "projection": "linear"}, 5)])
def test_one_teacher_needs_no_projection_and_several_get_one_of_which_no_unit_starts_dead(more, gamma):
    torch.manual_seed(0)
    one, four = cbd.CBDNet("resnet14", 10), cbd.CBDNet("resnet14", 10, project_to=256, **more)
    assert "h.weight" not in one.state_dict() and one.classifier.weight.shape == (10, 64)
    assert four.h.weight.shape == (256, 64) and four.classifier.weight.shape == (10, 256)
    logits, features = four(images := torch.randn(200, 3, 16, 16))
    assert features.shape == (200, 256) and logits.abs().max() <= gamma and (four.h.bias == 0).all()
    assert (features > 0).any(0).all()  # with weights of both signs a third of the units is 0 for all images
    assert four.h.weight.max().item() == pytest.approx((6 / (64 + 256)) ** .5, rel=.01)  # Glorot's range
    four.h.weight.data.neg_()
    assert (four(images)[1] < 0).any() == ("projection" in more)  # or relu(h(v)), as the teachers' features


def test_the_default_number_of_teachers_and_their_kinds_are_those_of_table_1():
    for flags, kinds in (
            ("", "s"), ("--teachers 2", "sa"), ("--teachers 3", "saa"), ("--teachers 4", "sasa"),
            ("--teachers 5", "sasaa"), ("--teacher-kinds augmented augmented", "aa"),
            ("--second-stage class-balanced", "")):
        assert "".join(kind[0] for kind in cbd.teacher_kinds(cbd.parse_args(flags.split()))) == kinds, flags


@pytest.mark.parametrize("stage, flags, name", [
    ("cbd", "", "cbd, K=2"), ("kd", "", "kd, K=2"), ("hybrid", "", "hybrid, K=2"),
    ("cbd", "--loss logit-adjusted", "cbd, K=2, logit-adjusted, instance"),
    ("finetune", "", "finetune of standard"), ("crt", "", "crt of standard"),
    ("class-balanced", "", "class-balanced"), ("logit-adjusted", "", "logit-adjusted, instance"),
    ("class-balanced", "--student-sampling instance --student-augmentation augmented",
     "class-balanced, instance, augmented")])
def test_every_second_stage_minimises_its_own_on_what_is_drawn(stage, flags, name, still):
    kinds = [] if stage in cbd.ALONE else ["--teacher-kinds", "standard", "augmented"]
    npz, out = str(still / "images.npz"), still / "run"
    small = "--arch resnet14 --device cpu --no-amp --batch-size 32 --lr 0 --second-stage-lr 0 --epochs 1"
    result = cbd.main(cbd.parse_args(["--dataset", npz, "--out", str(out), "--second-stage-epochs", "1",
                                      *small.split(), "--second-stage", stage, *kinds, *flags.split()]))
    assert [entry["name"] for entry in result["stages"]] == [
        "teacher 1, standard", "teacher 2, augmented", "teacher ensemble, K=2"][:3 * len(kinds)] + [name]

    student, _ = cbd.load_model(out / "student.pt")  # lr 0: as it started
    for part in student.children():  # a frozen part keeps its batch norm's statistics
        part.train(stage != "crt" or part is student.classifier)
    teachers = cbd.Teachers(cbd.load_model(path)[0] for path in sorted(out.glob("teacher_*.pt")))
    (images, targets), draws, losses = as_seen(npz), generator(0, name, "sampling", 0), []
    log_prior = (targets.bincount() / len(targets)).log() if "logit-adjusted" in name else 0
    indices = torch.randperm(len(targets), generator=draws) if "instance" in name else \
        cbd.class_balanced_indices(targets, draws)
    for part in indices.split(32):
        (z, v), (z_hat, v_hat) = student(images[part]), teachers(images[part]) if kinds else (None, None)
        losses.append(by_hand(z + log_prior, targets[part], z_hat if stage in ("kd", "hybrid") else None,
                              v if stage in ("cbd", "hybrid") else None, v_hat).item())
    assert "augmented" in name or log_rows(out)[-1]["loss"] == pytest.approx(np.mean(losses), rel=1e-4)
    assert ("h.weight" in student.state_dict()) == (stage in ("cbd", "hybrid"))


@pytest.mark.parametrize("stage", cbd.FROM_TEACHER)
def test_finetune_trains_all_of_the_first_teacher_and_crt_a_new_classifier_alone(stage, whole, tmp_path):
    paths = [str(whole("cbd")[0] / f"teacher_{i}.pt") for i in (1, 2)]
    flags = f"--second-stage {stage} --second-stage-epochs 1 --teacher-checkpoints"
    run("cbd", tmp_path, *flags.split(), *paths)
    teacher, student = weights(paths[0]), weights(tmp_path / "run" / "student.pt")
    same = [torch.equal(teacher[name], student[name]) for name in teacher  # batch norm's buffers included
            if name.startswith("backbone") and "num_batches" not in name]
    assert all(same) if stage == "crt" else not any(same)
    near = F.cosine_similarity(teacher["classifier.weight"], student["classifier.weight"]).min()
    assert (near > 0.9) == (stage == "finetune")


def test_the_teacher_ensemble_has_mean_logits_joins_unit_features_and_is_scored_by_class_means_too(tmp_path):
    result = run("cbd", tmp_path, "--no-amp", "--epochs", "1", "--save-logits")
    teachers = cbd.Teachers(cbd.load_model(tmp_path / "run" / f"teacher_{i}.pt")[0] for i in (1, 2))
    (train, train_ids), (test, ids) = (as_seen(tmp_path / "images.npz", part) for part in ("train", "test"))
    (z1, v1), (z2, v2), (logits, features) = teachers[0](test), teachers[1](test), teachers(test)
    wide = torch.cat([v / v.norm(dim=1, keepdim=True) for v in (v1, v2)], 1)
    assert torch.allclose(features, wide, atol=1e-6) and not features.requires_grad
    assert torch.allclose(logits, (z1 + z2) / 2, atol=1e-5)
    assert np.allclose(np.load(tmp_path / "run" / "teacher_ensemble_K=2.npz")["logits"], logits, atol=1e-4)
    nearest = nearest_class_mean(teachers(train)[1], train_ids, features, 3)
    assert result["stages"][2]["ncm"] == pytest.approx(100 * (nearest == ids).float().mean().item())


@pytest.mark.parametrize("flags, words", [
    ("--only-teacher 3", "one of the 2 teachers"), ("--teachers 3 --teacher-kinds standard", "contradict"),
    ("--teacher-kinds standard standard --teacher-checkpoints a.pt b.pt", "contradict"),
    ("--second-stage class-balanced", "has no teacher"), ("--teachers", "expected one argument")])
def test_flags_that_cannot_work_are_refused(flags, words, tmp_path, capsys):
    assert words in refused(capsys, "cbd", tmp_path, *flags.split())
