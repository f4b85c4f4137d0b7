"""candle.py: smoothing, losses, balance, module, one backward pass, stages, export, bad input."""
import functools
import json
import math
import shutil
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
from common.augment import normalise, resize
from common.reactnet import BinaryConv2d
from common.pretrained import encoder_for
from common.resnet import CifarResNet, build_encoder
from tests.tiny import COUNTS, image_folder, log_rows, one_error, tiny_npz, weights

ROOT = Path(__file__).parent.parent
FILES = ["baseline.pt", "teacher.pt", "student.pt"]
STAGES = ["baseline", "teacher, 8 16 24", "candle"]


def tiny_flags(folder):
    """A narrow student, and a random teacher in a file: a CIFAR ResNet's state dict."""
    if not (folder / "tiny.npz").exists():
        tiny_npz(folder / "tiny.npz", size=16)
        torch.manual_seed(0)
        torch.save(CifarResNet(14).state_dict(), folder / "teacher14.pt")
    return ["--dataset", str(folder / "tiny.npz"), "--recipe", "cifar100_lt", "--device", "cpu", "--no-amp",
            "--arch", "reactnet_18", "--student-width", "0.0625", "--teacher", "resnet14",
            "--teacher-weights", str(folder / "teacher14.pt"), "--student-resolution", "16",
            "--resolutions", "8", "16", "24", "--batch-size", "32", "--epochs", "2",
            "--calibration-epochs", "2", "--evaluate-every", "1"]


def run(folder, *flags, name="run"):
    return candle.main(candle.parse_args([*tiny_flags(folder), "--out", str(folder / name), *flags]))


def settings(*flags):
    args = candle.parse_args(list(flags))
    candle.check_args(args)
    return args


def make_teacher(resolutions=(8, 16, 24), num_classes=5, student_dim=32, side=2):
    torch.manual_seed(0)
    return candle.Teacher("resnet14", num_classes, list(resolutions), 16, student_dim, side)


def make_student(classifier="linear", num_classes=5):
    torch.manual_seed(1)
    return candle.Student("reactnet_18", num_classes, 0.0625, 16, classifier=classifier)


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """A run of all stages: its result, its folder, its data."""
    folder = tmp_path_factory.mktemp("full")
    return SimpleNamespace(result=run(folder), folder=folder / "run", npz=folder / "tiny.npz")


# ---------------------------------------------------------------- sampler

def test_class_balanced_sampling_draws_every_class_equally_often_and_no_image_twice_in_a_cycle():
    targets = torch.tensor([4] * 7 + [0] * 90 + [2] * 3)  # a class without images takes no part
    indices = candle.equal_class_indices(targets, torch.Generator().manual_seed(0))
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
    again = lambda seed: candle.equal_class_indices(targets, torch.Generator().manual_seed(seed))
    assert torch.equal(indices, again(0)) and not torch.equal(indices, again(1))
    for bad in (torch.zeros(0).long(), torch.zeros(2, 2).long()):
        with pytest.raises(ValueError):
            candle.equal_class_indices(bad, torch.Generator())


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
        teacher.classifier.scale.copy_(torch.rand(5) + 0.5)
        images = torch.rand(3, 3, 16, 16)
        logits, features, own = teacher.outputs(images)
        maps = [teacher.encoder(F.interpolate(images, (r, r), mode="bilinear", antialias=True))
                for r in (8, 16, 24)]
        assert [m.shape[-1] for m in maps] == [2, 4, 6]
        joined = teacher.join(maps)
        assert joined.shape == (3, 64, 2, 2) and own.shape == (3, 32, 2, 2)
        assert torch.allclose(own, joined[:, 16:48], atol=1e-5)
        expected = teacher.classifier.scale * F.linear(joined.mean((2, 3)), teacher.classifier.weight,
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
    assert torch.equal(logits, linear(resize(images, 16))[0])
    assert torch.allclose(logits, F.linear(features, linear.classifier.weight, linear.classifier.bias))
    logits, features = cosine(images)
    assert torch.allclose(logits, 10 * F.cosine_similarity(
        features[:, None], cosine.classifier.weight[None], dim=2), atol=1e-4)
    assert not hasattr(cosine.classifier, "bias")


# ---------------------------------------------------------------- what a row minimises

def step(teacher, parts, row, *flags, images=None, targets=None):
    """`objective` on six images of 16 pixels: the losses that are added, and the terms that are logged."""
    args = settings(*flags, "--student-resolution", "16", "--resolutions", "8", "16", "24")
    run = SimpleNamespace(args=args, class_counts=torch.tensor(COUNTS), device=torch.device("cpu"))
    if images is None:
        images = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    targets = torch.arange(6) % 5 if targets is None else targets
    return candle.objective(run, parts, teacher, images, targets, row)


def parts_of(classifier="linear", connector=None, balance=False):
    more = [candle.LossBalance()] if balance else []
    return torch.nn.ModuleList([make_student(classifier), connector or torch.nn.Identity(), *more]).train()


@pytest.mark.parametrize("classifier", ["linear", "cosine"])
def test_one_backward_pass_gives_equation_4_s_three_gradients(classifier):
    teacher, images = make_teacher().eval().requires_grad_(False), torch.rand(6, 3, 16, 16)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    parts = parts_of(classifier, balance=True)
    losses, terms = step(teacher, parts, "learned", images=images)
    assert len(losses) == 3
    sum(losses).backward()

    assert all(p.grad is None for p in teacher.parameters())
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())
    student, _, balance = parts
    assert all(p.requires_grad for p in student.parameters())

    # three separate passes, as Eq. (4) writes its three players
    with torch.no_grad():
        teacher_logits, _, teacher_map = teacher.outputs(images)
    student_map = student.encode(images)
    logits = student.classifier(student_map.mean((2, 3)))
    l_kl = candle.distillation_kl(logits, teacher_logits, reduction="batchmean")
    l_fs = candle.feature_similarity_loss(student_map, teacher_map)
    assert terms["kl"].item() == pytest.approx(l_kl.item())
    assert terms["fs"].item() == pytest.approx(l_fs.item())
    lam = balance(l_kl, l_fs)
    players = [(student.net, (1 - lam.item()) * l_kl + lam.item() * l_fs), (student.classifier, l_kl),
               (balance, -((1 - lam) * l_kl.item() + lam * l_fs.item()))]
    for module, objective in players:
        parameters = list(module.parameters())
        expected = torch.autograd.grad(objective, parameters, retain_graph=True)
        for p, gradient in zip(parameters, expected):
            near = 1e-5 * gradient.abs().max().item() + 1e-9
            assert torch.allclose(p.grad, gradient, rtol=1e-3, atol=near)
        assert any(gradient.abs().sum() > 0 for gradient in expected)
    expected = (1 - lam.item()) * l_kl.item() + lam.item() * l_fs.item()
    assert terms["loss"].item() == pytest.approx(expected, rel=1e-5)


def test_each_of_the_three_losses_moves_one_player_alone():
    teacher, parts = make_teacher().eval().requires_grad_(False), parts_of(balance=True)
    student, _, balance = parts
    groups = [list(module.parameters()) for module in (student.net, balance, student.classifier)]
    losses, _ = step(teacher, parts, "learned")
    for own, loss in enumerate(losses):
        for number, group in enumerate(groups):
            gradients = torch.autograd.grad(loss, group, retain_graph=True, allow_unused=True)
            assert any(g is not None and g.abs().sum() > 0 for g in gradients) == (number == own)


def test_a_fixed_balance_of_a_half_is_equation_1_for_encoder_and_classifier_alike():
    teacher, images = make_teacher([16]).eval().requires_grad_(False), torch.rand(6, 3, 16, 16)
    torch.manual_seed(2)
    parts = parts_of(connector=torch.nn.Conv2d(32, 64, 1))
    student, connector = parts
    (loss,), terms = step(teacher, parts, "fixed", images=images)
    half = 0.5 * terms["kl"].item() + 0.5 * terms["fs"].item()
    assert loss.item() == pytest.approx(half) and terms["lambda"].item() == 0.5
    loss.backward()
    logits = student.classifier(student.encode(images).mean((2, 3)))
    l_kl = candle.distillation_kl(logits, teacher(images)[0], reduction="batchmean")
    expected = 0.5 * torch.autograd.grad(l_kl, student.classifier.weight)[0]
    assert torch.allclose(student.classifier.weight.grad, expected, rtol=1e-3, atol=1e-8)
    assert connector.weight.grad.abs().sum() > 0

    # the baseline: labels, half, and features, half
    targets = torch.tensor([4, 0, 1, 1, 3, 2])
    (loss,), terms = step(teacher, parts, "labels", "--fixed-lambda", ".25", images=images, targets=targets)
    assert loss.item() == pytest.approx(0.75 * terms["ce"].item() + 0.25 * terms["fs"].item())
    expected = F.cross_entropy(parts[0](images)[0], targets).item()
    assert terms["ce"].item() == pytest.approx(expected, rel=1e-4)

    # from scratch: labels alone
    (loss,), terms = step(None, parts, "labels", images=images, targets=targets)
    assert set(terms) == {"loss"} and loss.item() == pytest.approx(expected, rel=1e-4)


def test_balanced_softmax_is_cross_entropy_of_logits_with_the_log_of_the_counts():
    parts, images, targets = parts_of(), torch.rand(6, 3, 16, 16), torch.tensor([4, 0, 1, 1, 3, 2])
    (loss,), _ = step(None, parts, "labels", "--from-scratch", "balanced-softmax", images=images,
                      targets=targets)
    logits, counts = parts[0](images)[0].double(), torch.tensor(COUNTS).double()
    weighted = counts * logits.exp()  # Ren et al. (NeurIPS 2020), Eq. (4)
    p = (weighted / weighted.sum(1, keepdim=True))[torch.arange(6), targets]
    assert loss.item() == pytest.approx(-p.log().mean().item(), rel=1e-4)


def test_direct_multi_resolution_pools_the_student_s_features_of_all_sizes():
    teacher, images = make_teacher().eval().requires_grad_(False), torch.rand(6, 3, 16, 16)
    parts = parts_of()
    student = parts[0]
    _, terms = step(teacher, parts, "fixed", "--direct-multi-resolution", images=images)
    features = sum(student.encode(images, r).mean((2, 3)) for r in (8, 16, 24)) / 3
    kl = functools.partial(candle.distillation_kl, reduction="batchmean")
    expected = kl(student.classifier(features), teacher(images)[0])
    assert terms["kl"].item() == pytest.approx(expected.item(), rel=1e-4)
    alone = kl(student(images)[0], teacher(images)[0]).item()
    assert abs(terms["kl"].item() - alone) > 1e-7  # or nothing is seen


def gradient_ratio(num_classes, reduction):
    """|grad L_KL| / |grad L_FS| in the encoder, of an untrained student."""
    torch.manual_seed(0)
    teacher = make_teacher(num_classes=num_classes).eval().requires_grad_(False)
    student, images = make_student(num_classes=num_classes).train(), torch.rand(32, 3, 16, 16)
    logits, _, teacher_map = teacher.outputs(images)
    teacher_logits = 30.0 * F.one_hot(torch.arange(32) % num_classes, num_classes)  # sure, as trained ones
    student_map = student.encode(images)
    logits = student.classifier(student_map.mean((2, 3)))
    kl = candle.distillation_kl(logits, teacher_logits, reduction=reduction)
    fs = candle.feature_similarity_loss(student_map, teacher_map)
    weights_of = list(student.net.parameters())
    gradients = [torch.autograd.grad(loss, weights_of, retain_graph=True) for loss in (kl, fs)]
    norms = [torch.cat([g.flatten() for g in own]).norm() for own in gradients]
    return (norms[0] / norms[1]).item()


def test_the_default_reduction_leaves_l_kl_its_weight_with_any_number_of_classes():
    assert settings().kl_reduction == "batchmean"
    few, many = (gradient_ratio(C, "batchmean") for C in (10, 200))
    assert many > 0.7 * few  # a mean over the classes divides it by their number, too:
    assert gradient_ratio(200, "mean") < 0.1 * gradient_ratio(10, "mean")


# ---------------------------------------------------------------- stages

def test_a_log_has_the_terms_of_each_stage_and_a_result_the_gain_over_the_baseline(full):
    saved, lines = full.result, log_rows(full.folder)
    assert json.loads((full.folder / "result.json").read_text()) == json.loads(json.dumps(saved))
    assert {"head", "median", "tail", "weight_norms", "biases", "peak_memory_mb"} <= saved.keys()
    assert [line["stage"] for line in lines] == [name for name in STAGES for _ in range(2)]
    terms = [{"loss", "ce", "fs", "lambda"}, {"loss"}, {"loss", "kl", "fs", "lambda", "lambdas"}]
    for number, line in enumerate(lines):
        assert terms[number // 2] <= set(line)
    assert lines[0]["lambda"] == 0.5
    for line in lines[4:]:  # Figure 6: a value a step, four here
        assert len(line["lambdas"]) == 4
        assert np.mean(line["lambdas"]) == pytest.approx(line["lambda"], abs=1e-4)
    gains = [ours - base for ours, base in zip(saved["per_class_accuracy"],
                                               saved["stages"][0]["per_class_accuracy"])]
    assert saved["gain_over_baseline"] == gains


def test_norms_and_biases_go_from_head_to_tail_and_scores_are_those_of_the_saved_nets(full):
    data = load(str(full.npz))
    images = normalise(torch.from_numpy(data.test.images).permute(0, 3, 1, 2), data.mean, data.std)
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


def test_calibration_trains_module_classifier_and_factors_and_leaves_the_encoder(full):
    state = torch.load(full.folder.parent / "teacher14.pt", weights_only=True)
    encoder, saved = build_encoder("resnet14", state).state_dict(), weights(full.folder / "teacher.pt")
    for name, value in encoder.items():
        assert torch.equal(saved[f"encoder.{name}"], value), name
    assert not torch.equal(saved["classifier.scale"], torch.ones(5))
    assert saved["join.convs.1.1.running_mean"].abs().sum() > 0


def test_an_ablation_has_the_four_rows_of_table_3(full):
    result = run(full.folder.parent, "--ablation", "--epochs", "1", "--calibration-epochs", "1",
                 name="ablation")
    assert [stage["name"] for stage in result["stages"]] == [
        "baseline", "teacher, 16", "calibrate & distill", "learned balance", "teacher, 8 16 24", "candle"]
    files = {path.name for path in (full.folder.parent / "ablation").glob("*.pt")}
    assert files == {"baseline.pt", "teacher_single.pt", "calibrate_distill.pt", "learned_balance.pt",
                     "teacher.pt", "student.pt", "last.pt"}
    means = {line["stage"]: line for line in log_rows(full.folder.parent / "ablation")}
    assert means["calibrate & distill"]["lambda"] == 0.5 != means["learned balance"]["lambda"]


def test_all_rows_start_from_one_student_and_single_maps_have_a_connector():
    args = settings("--student-resolution", "16", "--resolutions", "8", "16", "24", "--student-width",
                    "0.0625")
    run = SimpleNamespace(args=args, data=SimpleNamespace(num_classes=5), seed=lambda *parts: 7,
                          place=lambda module: module)
    single, several = make_teacher([16]), make_teacher()
    rows = [candle.new_parts(run, *row) for row in (
        (None, "labels"), (single, "labels"), (single, "fixed"), (single, "learned"), (several, "learned"))]
    for parts in rows:
        assert all(torch.equal(value, rows[0][0].state_dict()[name])
                   for name, value in parts[0].state_dict().items())
    assert [len(list(parts[1].parameters())) > 0 for parts in rows] == [False, True, True, True, False]
    assert rows[1][1](torch.rand(2, 32, 2, 2)).shape == (2, 64, 2, 2)
    assert [len(parts) for parts in rows] == [2, 2, 2, 3, 3]


@pytest.mark.parametrize("flags, names, files", [
    (["--no-calibration"], ["baseline"], {"student.pt"}),
    (["--from-scratch", "tau-norm"], ["from scratch", "from scratch, tau-normalised"], {"student.pt"}),
    (["--from-scratch", "balanced-softmax", "--student-sampling", "class-balanced"],
     ["from scratch, balanced softmax, class-balanced"], {"student.pt"}),
    (["--from-scratch", "--no-binarize", "--student-optimizer", "sgd"], ["from scratch, full precision, sgd"],
     {"student.pt"}),
    (["--no-baseline", "--resolutions", "16", "--balance", "fixed", "--fixed-lambda", ".3"],
     ["teacher, 16", "candle, fixed balance"], {"teacher.pt", "student.pt"}),
    (["--no-baseline", "--classifier", "cosine", "--direct-multi-resolution", "--arch", "reactnet_a",
      "--student-resolution", "32", "--resolutions", "32", "8"],
     ["teacher, 32 8", "candle, cosine, direct"], {"teacher.pt", "student.pt"})])
def test_flags_choose_rows_students_and_balances(full, flags, names, files):
    name = " ".join(flags)
    result = run(full.folder.parent, *flags, "--epochs", "1", "--calibration-epochs", "1", name=name)
    assert [stage["name"] for stage in result["stages"]] == names
    found = {path.name for path in (full.folder.parent / name).glob("*.pt")}
    assert found == files | {"last.pt"} and "gain_over_baseline" not in result
    if "--fixed-lambda" in flags:
        assert log_rows(full.folder.parent / name)[-1]["lambda"] == pytest.approx(0.3)
    if "tau-norm" in flags:
        assert result["weight_norms"] == pytest.approx([1] * 5) and not any(result["biases"])
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


def test_lambda_goes_as_far_in_a_long_run_as_in_a_short_one(full):
    ends = []
    for epochs in ("1", "3"):
        run(full.folder.parent, "--no-baseline", "--calibration-epochs", "1", "--epochs", epochs, "--lr", "0",
            "--balance-optimizer", "sgd", "--balance-lr", "100", name=f"lambda {epochs}")
        lines = log_rows(full.folder.parent / f"lambda {epochs}")
        lambdas = [line["lambdas"] for line in lines if "lambdas" in line]
        ends.append([lambdas[0][0], lambdas[-1][-1]])
    assert ends[0][0] == ends[1][0] and abs(ends[0][1] - ends[0][0]) > 0.02
    assert ends[1][1] - ends[1][0] == pytest.approx(ends[0][1] - ends[0][0], rel=0.35)


def test_large_image_files_are_decoded_once_at_the_largest_resolution(full, tmp_path, monkeypatch):
    image_folder(tmp_path, side=80, counts=(6, 3), test=2)
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


def test_the_base_resolution_may_be_another_than_the_student_s(tmp_path):
    run(tmp_path, "--no-baseline", "--resolutions", "24", "48", "--base-resolution", "48")
    teacher, student = (candle.load_model(tmp_path / "run" / file)[0] for file in ("teacher.pt", "student.pt"))
    images = torch.rand(2, 3, 16, 16)

    with torch.no_grad():
        own, base = student.encode(images), teacher.join.convs[1](teacher.encoder(resize(images, 48)))
        _, _, followed = teacher.outputs(images)
    assert own.shape == followed.shape
    assert torch.allclose(followed, F.interpolate(base, own.shape[-2:], mode="area"))


# ---------------------------------------------------------------- evaluation and export

def test_an_exported_student_has_1_bit_weights_and_the_same_logits_on_the_test_images(full, capsys):
    other = shutil.copy(full.npz, full.npz.with_name("other.npz"))  # the file says what it was trained on
    result = candle.main(candle.parse_args([
        "--dataset", str(other), "--export", str(full.folder / "student.pt"), "--device", "cpu", "--no-amp"]))
    path = full.folder / "student_packed.pt"
    assert f"wrote {path}" in capsys.readouterr().out
    data = load(str(full.npz))
    images = normalise(torch.from_numpy(data.test.images).permute(0, 3, 1, 2), data.mean, data.std)
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


@pytest.mark.parametrize("dataset", [[], ["--dataset", "nowhere/else.npz"]])
def test_export_needs_no_data_and_then_prints_no_scores(full, capsys, dataset):
    candle.main(candle.parse_args([*dataset, "--export", str(full.folder / "student.pt"), "--device", "cpu"]))
    shown = capsys.readouterr().out
    assert "wrote " in shown and "not scored: " in shown and "many" not in shown
    (full.folder / "student_packed.pt").unlink()


def test_classes_are_matched_by_name_in_teachers_and_students(full, tmp_path):
    with np.load(full.npz) as arrays:
        arrays = dict(arrays)
    order = np.array([3, 1, 4, 0, 2])  # new id -> old id
    for split in ("train", "test"):
        arrays[f"y_{split}"] = np.argsort(order)[arrays[f"y_{split}"]]
    names = np.array(load(str(full.npz)).class_names)
    np.savez(tmp_path / "moved.npz", **{**arrays, "class_names": names[order]})
    for file, stage in zip(FILES, full.result["stages"]):
        result = candle.main(candle.parse_args([
            "--dataset", str(tmp_path / "moved.npz"), "--evaluate", str(full.folder / file), "--device",
            "cpu", "--no-amp"]))
        assert result["all"] == stage["all"]
        assert result["per_class_accuracy"] == [stage["per_class_accuracy"][c] for c in order]


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
    (["--resolutions", "8", "24"], "must differ and hold the base (16)"),
    (["--resolutions", "16", "16"], "must differ"),
    (["--resolutions", "16", "0"], "argument --resolutions: must be at least 1"),
    (["--resolutions", "3", "16"], "--resolutions 3 leaves a map of one pixel"),
    (["--student-resolution", "8"], "--student-resolution 8 leaves a map of one pixel"),
    (["--from-scratch", "--student-resolution", "8"], "--student-resolution 8 leaves a map of one pixel"),
    (["--teacher-normalisation", "0", "0", "0", "1", "1", "0"], "must be positive"),
    (["--teacher", "tensorflow:x"], "known are torchvision's names and timm:NAME"),
    (["--student-resolution", "32"], "hold the base (32)"),
    (["--teacher", "resnet20"], "holds a resnet14, not a resnet20"),
    (["--teacher", "vgg11"], "unknown encoder 'vgg11'"),
    (["--teacher-weights", "nowhere.pt"], "nowhere.pt"),
    (["--teacher-weights", "README.md"], "README.md is no file of torch.save"),
    (["--smoothing", "1", "0"], "--smoothing"), (["--smoothing", "0", "-.1"], "--smoothing"),
    (["--smoothing", "nan", "0"], "--smoothing"), (["--smoothing", "0.1"], "expected 2 arguments"),
    (["--fixed-lambda", "1"], "must lie in [0, 1)"), (["--fixed-lambda", "-0.5"], "--fixed-lambda"),
    (["--balance-lr", "-1"], "--balance-lr"), (["--calibration-lr", "nan"], "--calibration-lr"),
    (["--calibration-epochs", "0"], "--calibration-epochs"),
    (["--student-width", "0"], "must be positive"), (["--student-width", "nan"], "must be positive"),
    (["--kl-reduction", "sum"], "invalid choice"),
    (["--ablation", "--resolutions", "16"], "--ablation"), (["--ablation", "--no-baseline"], "--ablation"),
    (["--ablation", "--balance", "fixed"], "--ablation"), (["--ablation", "--from-scratch"], "choose one"),
    (["--no-calibration", "--from-scratch"], "choose one"),
    (["--export", "nowhere.pt", "--evaluate", "nowhere.pt"], "choose one"),
])
def test_bad_input_is_one_error_line_and_writes_nothing(tmp_path, capsys, flags, words):
    assert words in refused(capsys, tmp_path, *flags)


@pytest.mark.parametrize("content", [None, [], {}, {"state_dict": {}},
                                     {"conv1.weight": torch.zeros(16, 3, 3, 3)}])
def test_a_malformed_teacher_file_is_one_line_and_no_random_teacher(tmp_path, capsys, content):
    torch.save(content, tmp_path / "bad.pt")
    error = refused(capsys, tmp_path, "--teacher-weights", str(tmp_path / "bad.pt"))
    assert "bad.pt" in error


def test_only_a_binary_student_can_be_exported(full, capsys):
    error = refused(capsys, full.folder.parent, "--export", str(full.folder / "teacher.pt"))
    assert "is not a net that candle.py saved (Student)" in error
    assert not (full.folder / "teacher_packed.pt").exists()


def test_without_a_network_one_line_says_which_weights_to_get(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))

    def offline(*args, **named):
        raise OSError("no network")
    monkeypatch.setattr("urllib.request.urlopen", offline)
    flags = tiny_flags(tmp_path)
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


def test_a_teacher_sees_images_normalised_as_those_that_it_learnt_from(full, tmp_path):
    path, images = str(full.folder.parent / "teacher14.pt"), torch.rand(2, 3, 16, 16)
    data = SimpleNamespace(name="mine", mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.1))
    wanted = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    plain = encoder_for(data, "resnet14", path, None, 8)
    other = encoder_for(data, "resnet14", path, wanted, 8)
    assert plain.affine is None
    own = normalise((255 * images).byte(), wanted[:3], wanted[3:])
    theirs = normalise((255 * images).byte(), data.mean, data.std)
    assert torch.allclose(other(theirs), plain(own), atol=1e-4)

    state = torch.load(path, weights_only=True)
    torch.save({"state_dict": state, "mean": wanted[:3], "std": wanted[3:]}, tmp_path / "stored.pt")
    stored = encoder_for(data, "resnet14", str(tmp_path / "stored.pt"), None, 8)
    assert torch.equal(stored(theirs), other(theirs))
    torch.manual_seed(0)
    teacher = candle.Teacher("resnet14", 5, [8, 16], 16, 32, 2, other.affine, other)
    again = candle.Teacher(**teacher.settings)
    again.load_state_dict(teacher.state_dict())
    with torch.no_grad():
        assert torch.equal(again.eval()(theirs)[0], teacher.eval()(theirs)[0])


def test_an_imagenet_1k_teacher_on_imagenet_lt_is_warned_of(full, capsys, monkeypatch):
    state = torch.load(full.folder.parent / "teacher14.pt", weights_only=True)
    monkeypatch.setattr("common.pretrained.load_encoder", lambda arch, *more: build_encoder(arch, state))
    for name, warned in (("imagenet_lt", True), ("places_lt", False)):
        data = SimpleNamespace(name=name, mean=(0.5,) * 3, std=(0.5,) * 3)
        encoder_for(data, "resnet14", "ImageNet-1K", None, 8)
        shown = capsys.readouterr().out
        assert ("warning: the teacher learnt these classes from all of ImageNet-1K" in shown) == warned


def test_the_embedded_teacher_is_small_half_precision_and_fits():
    path = ROOT / "common" / "assets" / "fashion_teacher.pt"
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
