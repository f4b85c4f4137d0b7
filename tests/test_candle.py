"""candle.py: smoothing, losses, balance, module, one backward pass, stages, export, resuming, bad input."""
import functools
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import candle
from common.assets import make
from common.data import load
from common.evaluate import scores
from common.loader import normalise
from common.reactnet import BinaryConv2d
from common.resnet import CifarResNet, build_encoder
from tests.tiny import COUNTS, one_error, same_weights, tiny_npz, weights

ROOT = Path(__file__).parent.parent
FILES = ["baseline.pt", "teacher.pt", "student.pt"]
STAGES = ["baseline", "teacher, 8 16 24", "candle"]


def tiny_flags(folder):
    """A narrow student, and a random teacher in a file: a CIFAR ResNet's state dict."""
    if not (folder / "tiny.npz").exists():
        tiny_npz(folder / "tiny.npz", size=16)
        torch.manual_seed(0)
        torch.save(CifarResNet(14).state_dict(), folder / "teacher14.pt")
    return ["--dataset", str(folder / "tiny.npz"), "--device", "cpu", "--no-amp", "--arch", "reactnet_18",
            "--student-width", "0.0625", "--teacher", "resnet14", "--teacher-weights",
            str(folder / "teacher14.pt"), "--student-resolution", "16", "--resolutions", "8", "16", "24",
            "--batch-size", "32", "--epochs", "2", "--calibration-epochs", "2", "--evaluate-every", "1"]


def run(folder, *flags, name="run"):
    return candle.main(candle.parse_args([*tiny_flags(folder), "--out", str(folder / name), *flags]))


def settings(*flags):
    return candle.parse_args(list(flags))


def make_teacher(resolutions=(8, 16, 24), num_classes=5, student_dim=32, side=2):
    torch.manual_seed(0)
    return candle.Teacher("resnet14", num_classes, list(resolutions), 16, student_dim, side)


def make_student(classifier="linear", num_classes=5):
    torch.manual_seed(1)
    return candle.Student("reactnet_18", num_classes, 0.0625, 16, classifier=classifier)


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """A run of all stages, what its teacher and its lambda's network were before stage B, and after."""
    seen, folder = SimpleNamespace(before={}, after={}), tmp_path_factory.mktemp("full")
    train_stage, distil = candle.train_stage, candle.distil

    def spy_distil(images, targets, parts, teacher, learns_from, args):
        if teacher is not None and learns_from == "learned" and not seen.before:
            seen.teacher = teacher
            seen.before = {name: value.clone() for name, value in teacher.state_dict().items()}
        return distil(images, targets, parts, teacher, learns_from, args)

    def spy_train(name, parts, *rest):
        seen.parts = parts
        return train_stage(name, parts, *rest)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(candle, "distil", spy_distil)
        patch.setattr(candle, "train_stage", spy_train)
        seen.result = run(folder)
    seen.folder, seen.npz = folder / "run", folder / "tiny.npz"
    return seen


# ---------------------------------------------------------------- sampler

def test_class_balanced_sampling_draws_every_class_equally_often_and_no_image_twice_in_a_cycle():
    targets = torch.tensor([4] * 7 + [0] * 90 + [2] * 3)  # a class without images takes no part
    indices = candle.class_balanced_indices(targets, torch.Generator().manual_seed(0))
    assert len(indices) == 100 and indices.dtype == torch.int64
    drawn = torch.bincount(targets[indices])
    assert sorted(drawn.tolist()) == [0, 0, 33, 33, 34]
    for start in range(0, 99, 3):
        assert sorted(targets[indices[start:start + 3]].tolist()) == [0, 2, 4]  # every class once a round
    for class_id, size in ((4, 7), (0, 90), (2, 3)):
        own = indices[targets[indices] == class_id].tolist()
        cycles = [own[start:start + size] for start in range(0, len(own), size)]
        assert all(len(set(cycle)) == len(cycle) for cycle in cycles)
        assert size == 90 or len({tuple(cycle) for cycle in cycles}) > 1
    again = lambda seed: candle.class_balanced_indices(targets, torch.Generator().manual_seed(seed))
    assert torch.equal(indices, again(0)) and not torch.equal(indices, again(1))
    for bad in (torch.zeros(0).long(), torch.zeros(2, 2).long()):
        with pytest.raises(ValueError):
            candle.class_balanced_indices(bad, torch.Generator())


# ---------------------------------------------------------------- losses

def slow_smoothing(logits, targets, e):
    """MiSLAS's loss, an image at a time; e: a class's smoothing."""
    losses = []
    for row, y in zip(logits.double().tolist(), targets.tolist()):
        total = math.log(sum(math.exp(z) for z in row))
        nll = [total - z for z in row]
        losses.append((1 - e[y]) * nll[y] + e[y] * sum(nll) / len(nll))
    return sum(losses) / len(losses)


SHAPES = {  # MiSLAS's code, section 3.3: n, largest, smallest, head, tail
    "concave": lambda n, n1, nk, h, t: t + (h - t) * math.sin(math.pi * (n - nk) / (2 * (n1 - nk))),
    "linear": lambda n, n1, nk, h, t: t + (h - t) * (n - nk) / (n1 - nk),
    "convex": lambda n, n1, nk, h, t: h + (h - t) * math.sin(
        3 * math.pi / 2 + math.pi * (n - nk) / (2 * (n1 - nk)))}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("head, tail", [(0.4, 0.1), (0.0, 0.38)])
def test_smoothing_is_mislas_s_and_head_and_tail_at_the_extremes(shape, head, tail):
    counts = torch.tensor([20, 500, 5, 80])
    e = [SHAPES[shape](n, 500, 5, head, tail) for n in counts.tolist()]
    assert e[1] == pytest.approx(head) and e[2] == pytest.approx(tail)
    logits = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([0, 1, 2, 3, 3, 2, 1, 0, 2])
    loss = candle.label_aware_smoothing_loss(logits, targets, counts, head, tail, shape)
    assert loss.item() == pytest.approx(slow_smoothing(logits, targets, e), abs=1e-6)
    for y, expected in ((1, head), (2, tail)):  # the largest and the smallest class alone
        only = torch.full((9,), y)
        loss = candle.label_aware_smoothing_loss(logits, only, counts, head, tail, shape).item()
        assert loss == pytest.approx(slow_smoothing(logits, only, [expected] * 4), abs=1e-6)
        assert loss == pytest.approx(F.cross_entropy(logits, only, label_smoothing=expected).item(), abs=1e-6)


def test_equal_counts_are_all_smoothed_as_the_head_and_no_smoothing_is_cross_entropy():
    logits, targets = torch.randn(6, 3), torch.tensor([0, 1, 2, 0, 1, 2])
    loss = candle.label_aware_smoothing_loss(logits, targets, [7, 7, 7], 0.3, 0.1)
    expected = F.cross_entropy(logits, targets, label_smoothing=0.3).item()
    assert loss.item() == pytest.approx(expected, abs=1e-6)
    loss = candle.label_aware_smoothing_loss(logits, targets, [9, 7, 2], 0.0, 0.0)
    assert loss.item() == pytest.approx(F.cross_entropy(logits, targets).item(), abs=1e-6)


def test_l_kl_is_the_teacher_s_divergence_by_hand_at_temperature_2_without_a_factor():
    student, teacher = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
    rows = []
    for z, t in zip(student.double().tolist(), teacher.double().tolist()):
        p, q = ([math.exp(value / 2) for value in row] for row in (t, z))
        p, q = [value / sum(p) for value in p], [value / sum(q) for value in q]
        rows.append(sum(a * math.log(a / b) for a, b in zip(p, q)))
    assert candle.distillation_kl(student, teacher).item() == pytest.approx(sum(rows) / 12, rel=1e-5)
    batchmean = candle.distillation_kl(student, teacher, 2.0, "batchmean").item()
    assert batchmean == pytest.approx(sum(rows) / 4, rel=1e-5)
    assert candle.distillation_kl(teacher + 3, teacher).item() == pytest.approx(0, abs=1e-7)
    far = candle.distillation_kl(torch.tensor([[1e4, 0.0]]), torch.tensor([[0.0, 1e4]]), 1.0)
    assert far.item() == pytest.approx(1e4 / 2)  # finite where a probability is 0


def test_l_fs_is_the_squared_distance_of_unit_maps_before_pooling():
    a, b = torch.randn(2, 4, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    unit = lambda maps: maps.flatten(1) / maps.flatten(1).norm(dim=1, keepdim=True)
    expected = ((unit(a) - unit(b)) ** 2).sum(1).mean().item()
    assert candle.feature_similarity_loss(5 * a, 0.1 * b).item() == pytest.approx(expected, rel=1e-5)
    assert candle.feature_similarity_loss(a, a).item() == pytest.approx(0, abs=1e-6)
    assert candle.feature_similarity_loss(a, a.flip(3)).item() > 0.1  # equal after pooling


def smoothed(head, tail, shape="concave", counts=(1, 2, 3), n=2):
    logits, targets = torch.zeros(2, 3), torch.zeros(n).long()
    return candle.label_aware_smoothing_loss(logits, targets, counts, head, tail, shape)


@pytest.mark.parametrize("call", [
    lambda: smoothed(1.0, 0.0), lambda: smoothed(0.0, -0.1), lambda: smoothed(math.nan, 0.0),
    lambda: smoothed(0.1, 0.0, "exp"), lambda: smoothed(0.1, 0.0, counts=(1, 2)),
    lambda: smoothed(0.1, 0.0, n=3),
    lambda: candle.distillation_kl(torch.zeros(2, 3), torch.zeros(2, 4)),
    lambda: candle.distillation_kl(torch.zeros(3), torch.zeros(3)),
    lambda: candle.distillation_kl(torch.zeros(2, 3), torch.zeros(2, 3), 0.0),
    lambda: candle.distillation_kl(torch.zeros(2, 3), torch.zeros(2, 3), math.nan),
    lambda: candle.distillation_kl(torch.zeros(2, 3), torch.zeros(2, 3), 2.0, "sum"),
    lambda: candle.feature_similarity_loss(torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 2, 2)),
    lambda: candle.feature_similarity_loss(torch.zeros(2, 3), torch.zeros(2, 3))])
def test_losses_refuse_bad_input(call):
    with pytest.raises(ValueError):
        call()


# ---------------------------------------------------------------- balance

def ascend(kl, fs, steps, lr=1e-3):
    """lambda before and after so many steps of phi on fixed losses."""
    torch.manual_seed(0)
    balance = candle.LossBalance()
    optimizer = torch.optim.Adam(balance.parameters(), lr)
    kl, fs = torch.tensor(kl), torch.tensor(fs)
    before = balance(kl, fs).item()
    for _ in range(steps):
        optimizer.zero_grad()
        value = balance(kl, fs)
        (-((1 - value) * kl + value * fs)).backward()
        optimizer.step()
    return before, balance(kl, fs).item()


def test_the_balance_has_the_paper_s_widths_and_no_gradient_through_its_inputs():
    balance = candle.LossBalance()
    assert [tuple(p.shape) for p in balance.parameters()][::2] == [(18, 2), (34, 18), (50, 34), (1, 50)]
    assert sum(p.numel() for p in balance.parameters()) == 2501
    kl, fs = torch.tensor(0.3, requires_grad=True), torch.tensor(0.9, requires_grad=True)
    value = balance(kl, fs)
    assert value.shape == () and 0 < value.item() < 1
    value.backward()
    assert kl.grad is None and fs.grad is None
    assert all(p.grad is not None for p in balance.parameters())
    assert candle.LossBalance((4, 6)).layers[-1].in_features == 6


@pytest.mark.parametrize("kl, fs", [(0.02, 1.1), (0.4, 0.5), (1.1, 0.02), (0.5, 0.4)])
def test_lambda_rises_if_and_only_if_the_feature_loss_is_larger_and_runs_to_the_end(kl, fs):
    before, after = ascend(kl, fs, 1)
    assert (after > before) == (fs > kl) and after != before
    _, end = ascend(kl, fs, 150, lr=0.03)
    assert end > 0.99 if fs > kl else end < 0.01


# ---------------------------------------------------------------- module and nets

def test_the_module_joins_4_7_and_15_at_7_halves_8_by_means_and_knows_the_student_s_slice():
    torch.manual_seed(0)
    module = candle.SizeInterpolationConcat(24, 1024, [128, 224, 480], 224, 7)
    maps = [torch.randn(2, 24, side, side) for side in (4, 7, 15)]
    out = module.train()(maps)
    assert out.shape == (2, 2048, 7, 7) and module.width == 2048
    assert (module.own.start, module.own.stop) == (512, 1536)
    assert [conv[0].weight.shape[0] for conv in module.convs] == [512, 1024, 512]
    module.eval()
    out = module(maps)
    conv, norm, act = module.convs[1]
    assert torch.equal(out[:, module.own], act(norm(conv(maps[1]))))  # the slice of the student's own map
    first = module.convs[0](maps[0])  # nearest: 4 pixels become 7
    nearest = [i * 4 // 7 for i in range(7)]
    assert torch.allclose(out[:, :512], first[:, :, nearest][:, :, :, nearest])
    halved = candle.SizeInterpolationConcat(24, 64, [32], 32, 4)([torch.arange(64.0).reshape(1, 1, 8, 8)])
    assert halved[0, 0, 0].tolist() == [4.5, 6.5, 8.5, 10.5]  # means of 2x2: 0, 1, 8, 9 and so on
    other = candle.SizeInterpolationConcat(24, 64, [224, 128], 224, 7)
    assert (other.own.start, other.own.stop, other.width) == (0, 64, 96)
    alone = candle.SizeInterpolationConcat(24, 64, [224], 224, 7)
    assert not list(alone.parameters()) and alone.width == 24
    assert torch.equal(alone([maps[1]])[:, alone.own], maps[1])
    with pytest.raises(ValueError):
        module(maps[:2])


def test_a_teacher_is_its_encoder_at_three_resolutions_then_module_pooling_classifier_and_factors():
    teacher = make_teacher().eval()
    with torch.no_grad():
        teacher.scale.copy_(torch.rand(1, 5) + 0.5)
        images = torch.rand(3, 3, 16, 16)
        logits, features, own = teacher.outputs(images)
        maps = [teacher.encoder(F.interpolate(images, (r, r), mode="bilinear", antialias=True))
                for r in (8, 16, 24)]
        assert [m.shape[-1] for m in maps] == [2, 4, 6]
        joined = teacher.join(maps)
        assert joined.shape == (3, 64, 2, 2) and own.shape == (3, 32, 2, 2)
        assert torch.allclose(own, joined[:, 16:48], atol=1e-5)
        expected = teacher.scale * F.linear(joined.mean((2, 3)), teacher.classifier.weight,
                                            teacher.classifier.bias)
        assert torch.allclose(logits, expected, atol=1e-5)
        assert torch.equal(teacher(images)[0], logits) and features.shape == (3, 64)


def test_the_encoder_has_no_training_mode():
    teacher, images = make_teacher(), torch.rand(2, 3, 16, 16)
    assert not any(isinstance(m, torch.nn.modules.batchnorm._BatchNorm) for m in teacher.encoder.modules())
    before = {name: value.clone() for name, value in teacher.encoder.state_dict().items()}
    a, b = teacher.train().encoder(images), teacher.eval().encoder(images)
    assert torch.equal(a, b) and not any(p.requires_grad for p in teacher.encoder.parameters())
    assert all(torch.equal(before[name], value) for name, value in teacher.encoder.state_dict().items())


def test_a_student_takes_images_of_any_side_and_has_a_linear_or_a_cosine_classifier():
    images = torch.rand(4, 3, 24, 24)
    linear, cosine = make_student().eval(), make_student("cosine").eval()
    logits, features = linear(images)
    assert torch.equal(logits, linear(candle.resize(images, 16))[0])
    assert torch.allclose(logits, F.linear(features, linear.classifier.weight, linear.classifier.bias))
    logits, features = cosine(images)
    assert torch.allclose(logits, 10 * F.cosine_similarity(
        features[:, None], cosine.classifier.weight[None], dim=2), atol=1e-4)
    assert not hasattr(cosine.classifier, "bias")


# ---------------------------------------------------------------- one backward pass

@pytest.mark.parametrize("classifier", ["linear", "cosine"])
def test_one_backward_pass_gives_equation_4_s_three_gradients(classifier):
    teacher, args = make_teacher().eval().requires_grad_(False), settings()
    images, targets = torch.rand(6, 3, 16, 16), torch.zeros(6).long()
    args.student_resolution = 16
    parts = torch.nn.ModuleDict({"model": make_student(classifier), "connector": torch.nn.Identity(),
                                 "balance": candle.LossBalance()}).train()
    minimised, (loss, kl, fs, balance) = candle.distil(images, targets, parts, teacher, "learned", args)
    minimised.backward()
    assert all(p.grad is None for p in teacher.parameters())
    # three separate passes, as Eq. (4) writes its three players
    student = parts["model"]
    with torch.no_grad():
        teacher_logits, _, teacher_map = teacher.outputs(images)
    student_map = student.encode(images)
    l_kl = candle.distillation_kl(student.classifier(student_map.mean((2, 3))), teacher_logits)
    l_fs = candle.feature_similarity_loss(student_map, teacher_map)
    assert kl.item() == pytest.approx(l_kl.item()) and fs.item() == pytest.approx(l_fs.item())
    lam = parts["balance"](l_kl, l_fs)
    players = {"classifier": (student.classifier, l_kl),
               "encoder": (student.net, (1 - lam.item()) * l_kl + lam.item() * l_fs),
               "balance": (parts["balance"], -((1 - lam) * l_kl.item() + lam * l_fs.item()))}
    for name, (module, objective) in players.items():
        parameters = list(module.parameters())
        expected = torch.autograd.grad(objective, parameters, retain_graph=True)
        for p, gradient in zip(parameters, expected):
            near = 1e-5 * gradient.abs().max().item() + 1e-9
            assert torch.allclose(p.grad, gradient, rtol=1e-3, atol=near), name
        assert any(gradient.abs().sum() > 0 for gradient in expected), name
    assert loss.item() == pytest.approx((1 - lam.item()) * kl.item() + lam.item() * fs.item(), rel=1e-5)


def test_a_fixed_balance_of_a_half_is_equation_1_for_encoder_and_classifier_alike():
    teacher, args = make_teacher([16]).eval().requires_grad_(False), settings()
    args.student_resolution = 16
    images, targets = torch.rand(6, 3, 16, 16), torch.zeros(6).long()
    torch.manual_seed(2)
    connector = torch.nn.Conv2d(32, 64, 1)
    parts = torch.nn.ModuleDict({"model": make_student(), "connector": connector})
    minimised, (loss, kl, fs, balance) = candle.distil(images, targets, parts, teacher, "fixed", args)
    assert minimised.item() == pytest.approx(0.5 * kl.item() + 0.5 * fs.item()) and balance.item() == 0.5
    minimised.backward()
    weight = parts["model"].classifier.weight
    student_map = parts["model"].encode(images)
    l_kl = candle.distillation_kl(parts["model"].classifier(student_map.mean((2, 3))), teacher(images)[0])
    assert torch.allclose(weight.grad, 0.5 * torch.autograd.grad(l_kl, weight)[0], rtol=1e-3, atol=1e-8)
    assert connector.weight.grad.abs().sum() > 0
    # the baseline: labels, half, and features, half
    minimised, (loss, ce, fs, _) = candle.distil(images, targets, parts, teacher, "labels", args)
    assert minimised.item() == pytest.approx(0.5 * ce.item() + 0.5 * fs.item())
    expected = F.cross_entropy(parts["model"](images)[0], targets).item()
    assert ce.item() == pytest.approx(expected, rel=1e-4)
    # from scratch: labels alone
    minimised, (loss,) = candle.distil(images, targets, parts, None, "labels", args)
    assert minimised.item() == pytest.approx(expected, rel=1e-4)


def test_direct_multi_resolution_pools_the_student_s_features_of_all_sizes():
    teacher, args = make_teacher().eval().requires_grad_(False), settings("--direct-multi-resolution")
    args.student_resolution = 16
    images, targets = torch.rand(6, 3, 16, 16), torch.zeros(6).long()
    parts = torch.nn.ModuleDict({"model": make_student(), "connector": torch.nn.Identity()})
    _, (_, kl, fs, _) = candle.distil(images, targets, parts, teacher, "fixed", args)
    student = parts["model"]
    features = sum(student.encode(images, r).mean((2, 3)) for r in (8, 16, 24)) / 3
    expected = candle.distillation_kl(student.classifier(features), teacher(images)[0])
    assert kl.item() == pytest.approx(expected.item(), rel=1e-4)
    only = candle.distillation_kl(student(images)[0], teacher(images)[0]).item()
    assert abs(kl.item() - only) > 1e-7  # or the test would not see it


# ---------------------------------------------------------------- stages

def test_a_run_is_baseline_then_calibration_then_distillation_and_writes_what_it_promises(full):
    assert sorted(path.name for path in full.folder.iterdir()) == sorted(
        [*FILES, "last.pt", "log.jsonl", "result.json"])
    saved = json.loads((full.folder / "result.json").read_text())
    assert saved == json.loads(json.dumps(full.result))
    assert [stage["name"] for stage in saved["stages"]] == STAGES
    for key in ("method", "dataset", "seed", "all", "many", "medium", "few", "ece", "mce", "best_all",
                "group_sizes", "class_counts", "per_class_accuracy", "seconds", "images_per_second", "args",
                "versions", "head", "median", "tail", "weight_norms", "biases", "gain_over_baseline",
                "seconds_per_epoch", "peak_memory_mb"):
        assert key in saved, key
    assert saved["method"] == "candle" and saved["class_counts"] == list(COUNTS)
    lines = [json.loads(line) for line in (full.folder / "log.jsonl").read_text().splitlines()]
    assert [(line["stage"], line["epoch"]) for line in lines[1:]] == [
        (name, epoch + 1) for name in STAGES for epoch in range(2)]
    for stage, keys in zip(saved["stages"], ({"loss", "ce", "fs", "lambda"}, {"loss"},
                                             {"loss", "kl", "fs", "lambda"})):
        assert len(stage["epochs"]) == 2 and all(set(means) == keys for means in stage["epochs"])
    assert saved["stages"][0]["epochs"][0]["lambda"] == 0.5
    assert 0 < saved["epochs"][1]["lambda"] < 1 and saved["epochs"][1]["fs"] > saved["epochs"][1]["kl"]
    assert saved["epochs"][1]["lambda"] > saved["epochs"][0]["lambda"]  # Figure 6: it rises while L_FS > L_KL
    gains = [ours - base for ours, base in zip(saved["per_class_accuracy"],
                                               saved["stages"][0]["per_class_accuracy"])]
    assert saved["gain_over_baseline"] == gains


def test_norms_and_biases_go_from_head_to_tail_and_scores_are_those_of_the_saved_nets(full):
    data = load(str(full.npz))
    images = normalise(torch.from_numpy(data.test.images), data.mean, data.std)
    for file, stage in zip(FILES, full.result["stages"]):
        model, saved = candle.load_model(full.folder / file)
        assert not model.training and saved["class_names"] == data.class_names
        with torch.no_grad():
            expected = scores(model(images)[0], torch.from_numpy(data.test.targets), data.class_counts)
        assert stage["per_class_accuracy"] == expected["per_class_accuracy"]
        assert stage["ece"] == pytest.approx(expected["ece"], abs=1e-3)
        by_size = [1, 3, 4, 0, 2]
        norms = model.classifier.weight.detach().norm(dim=1)[by_size].tolist()
        assert stage["weight_norms"] == pytest.approx(norms)
        assert stage["biases"] == pytest.approx(model.classifier.bias[by_size].tolist())
        groups = [np.mean([stage["per_class_accuracy"][c] for c in part])
                  for part in (by_size[:2], by_size[2:4], by_size[4:])]  # .36 and .71 of 5 classes
        assert [stage[name] for name in ("head", "median", "tail")] == pytest.approx(groups)


def test_teacher_module_and_classifier_are_bit_identical_after_stage_b_buffers_included(full):
    after, saved = full.teacher.state_dict(), weights(full.folder / "teacher.pt")
    assert any("running_mean" in name for name in saved)  # M's batch norm
    assert full.before.keys() == after.keys() == saved.keys()
    for name in after:
        assert torch.equal(full.before[name], after[name]) and torch.equal(saved[name], after[name]), name
    assert not any(p.requires_grad or p.grad is not None for p in full.teacher.parameters())
    assert not any(module.training for module in full.teacher.join.modules())


def test_calibration_trains_module_classifier_and_factors_and_leaves_the_encoder(full):
    state = torch.load(full.folder.parent / "teacher14.pt", weights_only=True)
    encoder, saved = build_encoder("resnet14", state).state_dict(), weights(full.folder / "teacher.pt")
    for name, value in encoder.items():
        assert torch.equal(saved[f"encoder.{name}"], value), name
    assert not torch.equal(saved["scale"], torch.ones(1, 5))
    assert saved["join.convs.1.1.running_mean"].abs().sum() > 0


def test_every_student_of_an_ablation_starts_alike_and_the_four_rows_of_table_3_are_there(full):
    starts, train_stage = {}, candle.train_stage

    def spy(name, parts, *rest):
        starts[name] = {key: value.clone() for key, value in parts["model"].state_dict().items()}
        starts[name + " parts"] = set(parts)
        starts[name + " connector"] = len(list(parts.get_submodule("connector").parameters())) > 0 \
            if "connector" in parts else None
        return train_stage(name, parts, *rest)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(candle, "train_stage", spy)
        result = run(full.folder.parent, "--ablation", "--epochs", "1", "--calibration-epochs", "1",
                     name="ablation")
    names = [stage["name"] for stage in result["stages"]]
    rows = ["baseline", "calibrate & distill", "learned balance", "candle"]
    assert names == ["baseline", "teacher, 16", "calibrate & distill", "learned balance",
                     "teacher, 8 16 24", "candle"]
    for name in rows[1:]:
        assert all(torch.equal(starts[name][key], value) for key, value in starts["baseline"].items())
    assert [starts[name + " connector"] for name in rows] == [True, True, True, False]
    assert ["balance" in starts[name + " parts"] for name in rows] == [False, False, True, True]
    files = {path.name for path in (full.folder.parent / "ablation").glob("*.pt")}
    assert files == {"baseline.pt", "teacher_single.pt", "calibrate_distill.pt", "learned_balance.pt",
                     "teacher.pt", "student.pt", "last.pt"}
    means = {stage["name"]: stage["epochs"][0] for stage in result["stages"]}
    assert means["calibrate & distill"]["lambda"] == 0.5 != means["learned balance"]["lambda"]


@pytest.mark.parametrize("flags, names, files", [
    (["--no-calibration"], ["baseline"], {"student.pt"}),
    (["--from-scratch"], ["from scratch"], {"student.pt"}),
    (["--from-scratch", "--no-binarize", "--student-optimizer", "sgd"], ["from scratch, full precision, sgd"],
     {"student.pt"}),
    (["--no-baseline", "--resolutions", "16", "--balance", "fixed", "--fixed-lambda", ".3"],
     ["teacher, 16", "candle, fixed balance"], {"teacher.pt", "student.pt"}),
    (["--no-baseline", "--classifier", "cosine", "--direct-multi-resolution", "--arch", "reactnet_a",
      "--resolutions", "16", "8"],
     ["teacher, 16 8", "candle, cosine, direct"], {"teacher.pt", "student.pt"})])
def test_flags_choose_rows_students_and_balances(full, flags, names, files):
    name = " ".join(flags)
    result = run(full.folder.parent, *flags, "--epochs", "1", "--calibration-epochs", "1", name=name)
    assert [stage["name"] for stage in result["stages"]] == names
    found = {path.name for path in (full.folder.parent / name).glob("*.pt")}
    assert found == files | {"last.pt"} and "gain_over_baseline" not in result
    if "--fixed-lambda" in flags:
        assert result["epochs"][0]["lambda"] == pytest.approx(0.3)
    if "cosine" in flags:
        assert result["biases"] is None and len(result["weight_norms"]) == 5
    if "--no-binarize" in flags:
        model, _ = candle.load_model(full.folder.parent / name / "student.pt")
        assert not any(getattr(module, "binarize", False) for module in model.modules())


def test_a_student_s_convolutions_are_binary_and_adam_has_no_weight_decay(full):
    model, saved = candle.load_model(full.folder / "student.pt")
    convolutions = [module for module in model.modules() if isinstance(module, BinaryConv2d)]
    assert len(convolutions) == 16 and all(m.binarize for m in convolutions)
    assert saved["settings"]["binarize"] is True
    group = candle.torch.optim.Adam([torch.zeros(1)], weight_decay=settings().weight_decay).param_groups[0]
    assert group["weight_decay"] == 0 == settings("--dataset", "cifar100_lt").weight_decay


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="known on Linux alone")
def test_peak_memory_is_that_since_the_last_call():
    code = ("import torch; from common import runtime; device = torch.device('cpu')\n"
            "runtime.peak_memory(device); base = runtime.peak_memory(device)\n"
            "block = torch.ones(64 * 2**18); del block\n"  # 64 MiB
            "print(*(runtime.peak_memory(device) - base for _ in range(2)))")
    done = subprocess.run(  # in a process of its own: this one may have freed memory to give
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    first, second = map(float, done.stdout.split())
    assert 56 < first < 80 and second < 16


def test_large_image_files_are_decoded_once_at_the_largest_resolution(full, tmp_path, monkeypatch):
    from PIL import Image
    noise = np.random.default_rng(0).integers(0, 255, (9, 80, 80, 3)).astype(np.uint8)
    for part, counts in (("train", (6, 3)), ("test", (2, 2))):
        for c, count in enumerate(counts):
            (tmp_path / part / str(c)).mkdir(parents=True)
            for i in range(count):
                Image.fromarray(noise[i]).save(tmp_path / part / str(c) / f"{i}.png")
    sides, views, encode = set(), set(), candle.Teacher.outputs

    def spy(self, images):
        sides.add(images.shape[-1])
        views.add(tuple(self.settings["resolutions"]))
        return encode(self, images)
    monkeypatch.setattr(candle.Teacher, "outputs", spy)
    result = run(full.folder.parent, "--dataset", "folder", "--data-dir", str(tmp_path), "--workers", "0",
                 "--student-resolution", "72", "--resolutions", "48", "72", "96", "--epochs", "1",
                 "--calibration-epochs", "1", name="folder")
    assert sides == {96} and views == {(72,), (48, 72, 96)}
    assert [stage["name"] for stage in result["stages"]] == ["baseline", "teacher, 48 72 96", "candle"]


# ---------------------------------------------------------------- evaluation and export

def test_evaluate_scores_a_saved_net_and_writes_nothing(full, tmp_path):
    for file, stage in zip(FILES, full.result["stages"]):
        result = candle.main(candle.parse_args([
            "--dataset", str(full.npz), "--evaluate", str(full.folder / file), "--device", "cpu", "--no-amp",
            "--out", str(tmp_path / "out")]))
        assert result["per_class_accuracy"] == stage["per_class_accuracy"]
    assert not (tmp_path / "out").exists()


def test_an_exported_student_has_1_bit_weights_and_the_same_logits_on_the_test_images(full, capsys):
    other = shutil.copy(full.npz, full.npz.with_name("other.npz"))  # the file says what it was trained on
    result = candle.main(candle.parse_args([
        "--dataset", str(other), "--export", str(full.folder / "student.pt"), "--device", "cpu",
        "--no-amp"]))
    path = full.folder / "student_packed.pt"
    assert f"wrote {path}" in capsys.readouterr().out
    data = load(str(full.npz))
    images = normalise(torch.from_numpy(data.test.images), data.mean, data.std)
    (model, _), (packed, saved) = (candle.load_model(p) for p in (full.folder / "student.pt", path))
    with torch.no_grad():
        assert torch.equal(model(images)[0], packed(images)[0])
    assert result["per_class_accuracy"] == full.result["per_class_accuracy"]
    assert saved["dataset"] == str(full.npz)
    binary = saved["state_dict"]["binary"]
    assert len(binary) == 16 and all(entry["bits"].dtype == torch.uint8 for entry in binary.values())
    assert sum(entry["bits"].numel() for entry in binary.values()) * 8 == sum(
        math.prod(entry["shape"]) for entry in binary.values())
    path.unlink()


def test_weights_load_strictly_and_only_what_candle_saved(full, tmp_path):
    saved = torch.load(full.folder / "student.pt", weights_only=True)
    lacking = {**saved, "state_dict": dict(list(saved["state_dict"].items())[1:])}
    torch.save(lacking, tmp_path / "lacking.pt")
    with pytest.raises(RuntimeError, match="Missing key"):
        candle.load_model(tmp_path / "lacking.pt")
    torch.save({**saved, "method": "cbd"}, tmp_path / "cbd.pt")
    with pytest.raises(ValueError, match="not a net that candle.py saved"):
        candle.load_model(tmp_path / "cbd.pt")
    with pytest.raises(ValueError, match="knows 5 classes"):
        candle.load_model(full.folder / "student.pt", 7)


# ---------------------------------------------------------------- resuming

@pytest.mark.parametrize("stop", [2, 5, 8])  # steps: 4 an epoch; the baseline's, stage A's and stage B's
def test_a_run_stopped_in_the_middle_of_any_stage_ends_with_the_same_weights(full, monkeypatch, stop):
    must_stop, name = candle.runtime.Run.must_stop, f"cut{stop}"
    place = {2: 3, 5: 8 + 6, 8: 16 + 4}[stop]  # in an epoch, in the second one, at the end of one

    steps = []

    def stops(self):
        steps.append(1)
        return must_stop(self) or len(steps) == place
    monkeypatch.setattr(candle.runtime.Run, "must_stop", stops)
    with pytest.raises(SystemExit) as stopped:
        run(full.folder.parent, name=name)
    assert stopped.value.code == 0 and not (full.folder.parent / name / "result.json").exists()
    resumed = run(full.folder.parent, "--resume", name=name)
    assert len(steps) == 3 * 2 * 4  # it went on; starting again would give the same weights too
    assert all(same_weights(full.folder.parent / name / file, full.folder / file) for file in FILES)
    for a, b in zip(resumed["stages"], full.result["stages"], strict=True):
        assert all(a[key] == b[key] for key in ("name", "all", "best_all", "per_class_accuracy", "ece"))
        for one, two in zip(a["epochs"], b["epochs"], strict=True):
            assert one == pytest.approx(two)


# ---------------------------------------------------------------- ranks

def test_two_ranks_give_one_process_s_losses_weights_and_scores(tmp_path):
    # Without batch norm and signs, which turn rounding into other numbers
    flags = [*tiny_flags(tmp_path), "--epochs", "1", "--calibration-epochs", "1", "--lr", "0.001",
             "--no-binarize"]
    environment, stages = {**os.environ, "OMP_NUM_THREADS": "1"}, {}
    for name, launcher, more in (
            ("one", [], []), ("two", ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
                              ["--grad-accumulation", "2"])):
        command = [sys.executable, *launcher, str(ROOT / "tests" / "run_without_batch_norm.py"), "candle",
                   *flags, "--out", str(tmp_path / name), *more]
        subprocess.run(command, check=True, env=environment, timeout=300)
        stages[name] = json.loads((tmp_path / name / "result.json").read_text())["stages"]
    for number, (one, two) in enumerate(zip(stages["one"], stages["two"], strict=True)):
        assert one["name"] == two["name"] == STAGES[number] + ", full precision" * (number != 1)
        near = 1e-4 if number < 2 else 1e-2  # a learned lambda belongs to a rank's part of a batch
        for key, value in one["epochs"][0].items():
            assert value == pytest.approx(two["epochs"][0][key], rel=near, abs=1e-6), (one["name"], key)
        if number < 2:
            assert one["per_class_accuracy"] == two["per_class_accuracy"]
    a, b = (weights(tmp_path / name / "teacher.pt") for name in ("one", "two"))
    assert all(torch.allclose(a[key], b[key], atol=1e-5) for key in a)


# ---------------------------------------------------------------- recipes

RECIPES = {  # data set and factor: smoothing, classes of head, of head and median, classes
    ("cifar10_lt", 10): ([0.1, 0.0], 3, 7, 10), ("cifar10_lt", 100): ([0.3, 0.0], 3, 7, 10),
    ("cifar100_lt", 10): ([0.2, 0.0], 36, 71, 100), ("cifar100_lt", 100): ([0.4, 0.1], 36, 71, 100),
    ("caltech101_lt", None): ([0.01, 0.01], 36, 72, 102), ("cub200_lt", None): ([0.04, 0.01], 72, 142, 200),
    ("stanford_dogs_lt", None): ([0.0, 0.03], 43, 85, 120),
    ("stanford_cars_lt", None): ([0.0, 0.38], 70, 139, 196),
    ("fgvc_aircraft_lt", None): ([0.0, 0.39], 36, 71, 100), ("dtd_lt", None): ([0.01, 0.39], 14, 33, 47),
    ("flowers102_lt", None): ([0.04, 0.04], 36, 72, 102), ("fruits360_lt", None): ([0.0, 0.0], 7, 14, 24),
    ("places_lt", None): ([0.4, 0.1], 131, 259, 365), ("imagenet_lt", None): ([0.3, 0.0], 390, 835, 1000),
    ("inat18", None): ([0.3, 0.0], 842, 4543, 8142)}


@pytest.mark.parametrize("dataset, factor", RECIPES)
def test_the_recipes_of_all_15_data_sets(dataset, factor):
    args = settings("--dataset", dataset, *(["--imb-factor", str(factor)] if factor else []))
    smoothing, head, median, classes = RECIPES[dataset, factor]
    assert args.smoothing == smoothing
    assert [round(end * classes) for end in args.head_median] == [head, median]
    assert (args.epochs, args.batch_size, args.lr, args.weight_decay) == (400, 256, 0.01, 0.0)
    assert (args.arch, args.student_width, args.student_resolution) == ("reactnet_a", 1.0, 224)
    large = dataset in ("places_lt", "imagenet_lt", "inat18")
    assert args.resolutions == ([224] if large else [128, 224, 480])
    assert args.teacher == ("efficientnet_v2_m" if large else "resnet152")
    assert args.teacher_weights == "ImageNet-1K"


def test_flags_win_over_recipes_and_mislas_s_nearest_factor_is_taken():
    assert len(RECIPES) == 15
    assert settings("--dataset", "cifar100_lt").smoothing == [0.4, 0.1]
    assert settings("--dataset", "cifar100_lt", "--imb-factor", "50").smoothing == [0.3, 0.0]
    assert settings("--dataset", "cifar100_lt", "--imb-factor", "200").smoothing == [0.4, 0.1]
    assert settings("--dataset", "dtd_lt", "--smoothing", ".2", "0").smoothing == [0.2, 0.0]
    quick = settings("--dataset", "cifar100_lt", "--quick")
    assert (quick.epochs, settings("--dataset", "cifar100_lt", "--quick", "--epochs", "3").epochs) == (30, 3)


def test_the_cosine_schedule_starts_at_lr_and_ends_at_zero():
    assert candle.cosine_lr(0, 0.2) == 0.2 and candle.cosine_lr(0.5, 0.2) == pytest.approx(0.1)
    assert candle.cosine_lr(1 / 3, 0.2) == pytest.approx(0.15)
    assert candle.cosine_lr(1, 0.2) == pytest.approx(0, abs=1e-12)


# ---------------------------------------------------------------- bad input

refused = functools.partial(one_error, run)


@pytest.mark.parametrize("flags, words", [
    (["--resolutions", "8", "24"], "the student's own (16) among them"),
    (["--resolutions", "16", "16"], "different sides"),
    (["--resolutions", "16", "0"], "--resolutions 0 leaves no map"),
    (["--resolutions", "3", "16"], "--resolutions 3 leaves no map: the teacher's stride is 4"),
    (["--student-resolution", "32"], "the student's own (32) among them"),
    (["--teacher", "resnet20"], "these weights are not a resnet20's"),
    (["--teacher", "vgg11"], "unknown encoder 'vgg11'"),
    (["--teacher-weights", "nowhere.pt"], "nowhere.pt"),
    (["--teacher-weights", "README.md"], "cannot read the checkpoint README.md"),
    (["--smoothing", "1", "0"], "--smoothing"), (["--smoothing", "0", "-.1"], "--smoothing"),
    (["--smoothing", "nan", "0"], "--smoothing"), (["--smoothing", "0.1"], "expected 2 arguments"),
    (["--fixed-lambda", "1"], "--fixed-lambda"), (["--fixed-lambda", "-0.5"], "--fixed-lambda"),
    (["--balance-lr", "-1"], "--balance-lr"), (["--calibration-lr", "nan"], "--calibration-lr"),
    (["--calibration-epochs", "0"], "--calibration-epochs"), (["--epochs", "0"], "--epochs"),
    (["--student-width", "0"], "leaves no channel"), (["--student-width", "nan"], "not negative"),
    (["--kl-reduction", "sum"], "invalid choice"),
    (["--ablation", "--resolutions", "16"], "--ablation"), (["--ablation", "--no-baseline"], "--ablation"),
    (["--ablation", "--balance", "fixed"], "--ablation"), (["--ablation", "--from-scratch"], "choose one"),
    (["--no-calibration", "--from-scratch"], "choose one"),
    (["--dataset", "nowhere/x.npz"], "no such file: nowhere/x.npz"),
    (["--recipe", "imagenet"], "unknown recipe"), (["--evaluate-on", "val"], "no validation images"),
    (["--batch-size", "30", "--grad-accumulation", "4"], "multiple"), (["--lr", "nan"], "--lr"),
    (["--evaluate", "nowhere.pt"], "no such checkpoint: nowhere.pt"),
    (["--export", "nowhere.pt"], "no such checkpoint: nowhere.pt"),
])
def test_bad_input_is_one_error_line_and_writes_nothing(tmp_path, capsys, flags, words):
    assert words in refused(capsys, tmp_path, *flags)


def test_a_full_precision_net_cannot_be_exported(full, capsys):
    error = refused(capsys, full.folder.parent, "--export", str(full.folder / "teacher.pt"))
    assert "no binary weights" in error and not (full.folder / "teacher_packed.pt").exists()


def test_without_a_network_one_line_says_which_weights_to_get(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))

    def offline(*args, **named):
        raise OSError("no network")
    monkeypatch.setattr("urllib.request.urlopen", offline)
    flags = [flag for flag in tiny_flags(tmp_path)]
    place = flags.index("--teacher-weights")
    del flags[place:place + 2]
    for name, words in (("resnet18", "put resnet18-"), ("resnet14", "name --teacher-weights FILE")):
        with pytest.raises(SystemExit) as stop:
            candle.main(candle.parse_args([*flags, "--teacher", name, "--out", str(tmp_path / "refused")]))
        error = [line for line in capsys.readouterr().err.splitlines()
                 if not line.startswith("Downloading: ")]  # of torchvision before it finds out
        assert stop.value.code == 2 and len(error) == 1 and error[0].startswith("error: ")
        assert words in error[0], error
        assert not (tmp_path / "refused").exists()


def test_an_imagenet_1k_teacher_on_imagenet_lt_is_warned_of(full, capsys, monkeypatch):
    state = torch.load(full.folder.parent / "teacher14.pt", weights_only=True)
    monkeypatch.setattr("common.resnet.imagenet_weights", lambda arch: state)
    monkeypatch.setattr(candle, "build_encoder", lambda arch, weights=None: build_encoder(
        arch, state if weights == "ImageNet-1K" else weights))
    flags = tiny_flags(full.folder.parent)
    place = flags.index("--teacher-weights")
    del flags[place:place + 2]
    for name, warned in (("imagenet_lt", True), ("places_lt", False)):
        def named(*settings):
            data = load(*settings)
            data.name = name
            return data
        monkeypatch.setattr(candle, "load", named)
        candle.main(candle.parse_args([*flags, "--recipe", "imagenet_lt", "--no-calibration", "--epochs",
                                       "1", "--batch-size", "128", "--out",
                                       str(full.folder.parent / f"warned {name}")]))
        shown = capsys.readouterr().out
        assert ("warning: the teacher learnt these classes from all of ImageNet-1K" in shown) == warned


def test_the_embedded_teacher_is_small_half_precision_and_fits():
    path = candle.EMBEDDED["embedded"]
    saved = torch.load(path, weights_only=True)
    assert path.stat().st_size < 1e6 and saved["arch"] == settings().teacher
    assert all(value.dtype == torch.float16 for name, value in saved["state_dict"].items()
               if value.is_floating_point())
    encoder = build_encoder(saved["arch"], saved)
    assert (encoder.feature_dim, encoder.stride) == (64, 4)


# ---------------------------------------------------------------- the embedded teacher's pre-training

def test_the_teacher_s_images_are_balanced_and_in_no_split_of_the_embedded_set():
    y = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 6000))  # as many as Fashion-MNIST has
    train, val, teacher = make.split_fashion_mnist(y)
    assert len(train) == 2478 and len(val) == 1000  # the embedded set's sizes
    assert np.bincount(y[teacher]).tolist() == [make.TEACHER_IMAGES] * 10
    assert len(set(train) | set(val) | set(teacher)) == len(train) + len(val) + len(teacher)


def test_pre_training_tells_quarter_turns_that_are_numbered_anticlockwise():
    images = torch.zeros(2, 3, 4, 4)
    images[:, :, 0] = 1.0  # the top row
    batch, turns = make.turned(images)
    assert turns.tolist() == [0, 0, 1, 1, 2, 2, 3, 3] and batch.shape == (8, 3, 4, 4)
    for place, rows, columns in ((0, 0, slice(None)), (2, slice(None), 0), (4, 3, slice(None)),
                                 (6, slice(None), 3)):  # top, left, bottom, right
        assert (batch[place][:, rows, columns] == 1).all() and batch[place].sum() == 12
    tops = np.zeros((160, 8, 8, 3), np.uint8)
    tops[:, :3] = 200
    net, accuracy = make.pretrain(tops, tops[:20], (0.4,) * 3, (0.4,) * 3, epochs=4, batch_size=16, lr=0.05)
    assert accuracy > 90  # of 25 by chance
    build_encoder("resnet14", net.state_dict())


def test_pre_training_on_labels_learns_them():
    targets = np.arange(160) % 3
    images = np.broadcast_to((80 * targets).astype(np.uint8)[:, None, None, None], (160, 8, 8, 3)).copy()
    _, accuracy = make.pretrain(images, images[:30], (0.4,) * 3, (0.4,) * 3, epochs=4, batch_size=16, lr=0.05,
                                targets=targets, test_targets=targets[:30])
    assert accuracy > 90  # of 33 by chance; the quarter turns of such images cannot be told
