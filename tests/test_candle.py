"""candle.py: sampler, losses, nets, what a row minimises, stages, export, teachers, what it refuses."""
import functools
import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import candle
from common.assets import make
from common.augment import normalise, resize
from common.evaluate import classifier_by_frequency, head_median_tail
from common.pretrained import encoder_for
from common.reactnet import BinaryConv2d
from common.resnet import CifarResNet, build_encoder
from tests import tiny
from tests.tiny import as_seen, image_folder, log_rows, prepared, refused, weights

EMBEDDED = Path(__file__).parent.parent / "common" / "assets" / "fashion_teacher.pt"
IMAGES = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(3))
TARGETS = torch.tensor([2, 0, 1, 1, 0, 2])
run = functools.partial(tiny.run, "candle")


def settings(*flags):
    args = candle.parse_args(list(flags))
    candle.check_args(args)
    return args


def make_teacher(resolutions=(8, 16), **more):
    torch.manual_seed(0)
    teacher = candle.Teacher("resnet14", 3, list(resolutions), 16, 32, 2, **more)
    return teacher.eval().requires_grad_(False)


def make_parts(classifier="linear", connector=None, balance=False):
    """A student, its connector and lambda's network, in training mode."""
    torch.manual_seed(1)
    student = candle.Student("reactnet_18", 3, 0.0625, 16, classifier=classifier)
    more = [candle.LossBalance()] if balance else []
    return torch.nn.ModuleList([student, connector or torch.nn.Identity(), *more]).train()


# ---------------------------------------------------------------- sampler and losses

def test_class_balanced_sampling_draws_every_class_once_a_round():
    targets = torch.tensor([4] * 7 + [0] * 90 + [2] * 3)  # a class without images takes no part
    drawn = targets[candle.equal_class_indices(targets, torch.Generator().manual_seed(0))]
    assert len(drawn) == 100
    rounds = [drawn[start:start + 3].tolist() for start in range(0, 99, 3)]
    assert all(sorted(each) == [0, 2, 4] for each in rounds) and len(set(map(tuple, rounds))) == 6

    for bad in (torch.zeros(0).long(), torch.zeros(2, 2).long()):
        with pytest.raises(ValueError):
            candle.equal_class_indices(bad, torch.Generator())


SHAPES = {  # MiSLAS's code, section 3.3: n, largest, smallest, head, tail
    "concave": lambda n, n1, nk, h, t: t + (h - t) * math.sin(math.pi * (n - nk) / (2 * (n1 - nk))),
    "linear": lambda n, n1, nk, h, t: t + (h - t) * (n - nk) / (n1 - nk),
    "convex": lambda n, n1, nk, h, t: h + (h - t) * math.sin(
        3 * math.pi / 2 + math.pi * (n - nk) / (2 * (n1 - nk)))}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("head, tail", [(0.4, 0.1), (0.0, 0.38), (0.0, 0.0)])
def test_smoothing_is_mislas_s_by_class(shape, head, tail):
    counts = torch.tensor([20, 500, 5, 80])
    logits = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    for y, n in enumerate(counts.tolist()):
        e = SHAPES[shape](n, 500, 5, head, tail)
        assert e == pytest.approx({500: head, 5: tail}.get(n, e))
        loss = candle.label_aware_smoothing_loss(logits, torch.full((9,), y), counts, head, tail, shape)
        expected = F.cross_entropy(logits, torch.full((9,), y), label_smoothing=e)
        assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
    equal = candle.label_aware_smoothing_loss(logits, torch.arange(9) % 4, [7] * 4, head, tail, shape)
    assert torch.allclose(equal, F.cross_entropy(logits, torch.arange(9) % 4, label_smoothing=head))


def test_l_kl_is_the_teacher_s_divergence_by_hand_at_temperature_2_without_a_factor():
    student, teacher = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
    kl = 0
    for z, t in zip(student.double().tolist(), teacher.double().tolist()):
        p, q = ([math.exp(value / 2) for value in row] for row in (t, z))
        kl += sum(a / sum(p) * math.log(a / sum(p) / (b / sum(q))) for a, b in zip(p, q))
    assert candle.distillation_kl(student, teacher).item() == pytest.approx(kl / 12, rel=1e-5)
    batchmean = candle.distillation_kl(student, teacher, 2.0, "batchmean")
    assert batchmean.item() == pytest.approx(kl / 4, rel=1e-5)

    far = candle.distillation_kl(torch.tensor([[1e4, 0.0]]), torch.tensor([[0.0, 1e4]]), 1.0)
    assert far.item() == pytest.approx(1e4 / 2)  # finite where a probability is 0


def test_l_fs_is_the_squared_distance_of_unit_maps_before_pooling():
    a, b = torch.randn(2, 4, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    unit = lambda maps: maps.flatten(1) / maps.flatten(1).norm(dim=1, keepdim=True)
    for other in (b, a.flip(3)):  # the latter equal after pooling
        expected = ((unit(a) - unit(other)) ** 2).sum(1).mean().item()
        loss = candle.feature_similarity_loss(5 * a, 0.1 * other)
        assert loss.item() == pytest.approx(expected, rel=1e-5) and expected > 0.1


def test_losses_refuse_bad_input():
    z, ids = torch.zeros, torch.zeros(2).long()
    smoothed = functools.partial(candle.label_aware_smoothing_loss, z(2, 3))
    for loss, cases in (
            (smoothed, [(ids, [1, 2, 3], 1.0, 0.0), (ids, [1, 2, 3], 0.0, -0.1), (ids, [1, 2], 0.1, 0.0),
                        (ids, [1, 2, 3], math.nan, 0.0), (ids, [1, 2, 3], 0.1, 0.0, "exp"),
                        (torch.zeros(3).long(), [1, 2, 3], 0.1, 0.0)]),
            (candle.distillation_kl, [(z(2, 3), z(2, 4)), (z(3), z(3)), (z(2, 3), z(2, 3), 0.0),
                                      (z(2, 3), z(2, 3), math.nan), (z(2, 3), z(2, 3), 2.0, "sum")]),
            (candle.feature_similarity_loss, [(z(2, 3, 4, 4), z(2, 3, 2, 2)), (z(2, 3), z(2, 3))])):
        for arguments in cases:
            with pytest.raises(ValueError):
                loss(*arguments)


# ---------------------------------------------------------------- nets

def test_the_balance_has_the_paper_s_widths_and_no_gradient_through_its_inputs():
    balance = candle.LossBalance()
    assert [tuple(p.shape) for p in balance.parameters()][::2] == [(18, 2), (34, 18), (50, 34), (1, 50)]
    kl, fs = torch.tensor(0.3, requires_grad=True), torch.tensor(0.9, requires_grad=True)
    value = balance(kl, fs)
    value.backward()
    assert value.shape == () and 0 < value.item() < 1 and kl.grad is None and fs.grad is None
    assert all(p.grad is not None for p in balance.parameters())


def test_the_module_joins_4_7_and_15_at_7_halves_8_by_means_and_knows_the_student_s_slice():
    torch.manual_seed(0)
    module = candle.SizeInterpolationConcat(24, 1024, [128, 224, 480], 224, 7).eval()
    maps = [torch.randn(2, 24, side, side) for side in (4, 7, 15)]
    out = module(maps)
    assert out.shape == (2, 2048, 7, 7) and module.width == 2048
    assert (module.own.start, module.own.stop) == (512, 1536)
    conv, norm, act = module.convs[1]
    assert torch.equal(out[:, module.own], act(norm(conv(maps[1]))))  # the student's own map
    nearest = [i * 4 // 7 for i in range(7)]  # 4 pixels become 7
    assert torch.allclose(out[:, :512], module.convs[0](maps[0])[:, :, nearest][:, :, :, nearest])
    with pytest.raises(ValueError):
        module(maps[:2])

    halved = candle.SizeInterpolationConcat(24, 64, [32], 32, 4)([torch.arange(64.0).reshape(1, 1, 8, 8)])
    assert halved[0, 0, 0].tolist() == [4.5, 6.5, 8.5, 10.5]  # means of 2x2: 0, 1, 8, 9 and so on
    other = candle.SizeInterpolationConcat(24, 64, [224, 128], 224, 7)
    assert (other.own.start, other.own.stop, other.width) == (0, 64, 96)
    alone = candle.SizeInterpolationConcat(24, 64, [224], 224, 7)
    assert not list(alone.parameters()) and alone.width == 24 and torch.equal(alone([maps[1]]), maps[1])


def test_a_teacher_is_its_encoder_at_every_resolution_then_module_pooling_classifier_and_factors():
    teacher = make_teacher([8, 16, 24])
    teacher.classifier.scale.copy_(torch.rand(3) + 0.5)
    logits, features, own = teacher.outputs(IMAGES)
    joined = teacher.join([teacher.encoder(F.interpolate(IMAGES, (r, r), mode="bilinear", antialias=True))
                           for r in (8, 16, 24)])
    assert joined.shape == (6, 64, 2, 2) and torch.allclose(own, joined[:, 16:48], atol=1e-5)
    assert torch.allclose(features, joined.mean((2, 3)), atol=1e-5)
    classifier = teacher.classifier
    expected = classifier.scale * F.linear(features, classifier.weight, classifier.bias)
    assert torch.allclose(logits, expected, atol=1e-5) and torch.equal(teacher(IMAGES)[0], logits)


def test_a_student_takes_images_of_any_side_and_has_a_linear_or_a_cosine_classifier():
    images = torch.rand(4, 3, 24, 24)
    (linear, _), (cosine, _) = make_parts().eval(), make_parts("cosine").eval()
    logits, features = linear(images)
    assert torch.equal(logits, linear(resize(images, 16))[0])
    assert torch.allclose(logits, F.linear(features, linear.classifier.weight, linear.classifier.bias))
    logits, features = cosine(images)
    cosines = F.cosine_similarity(features[:, None], cosine.classifier.weight[None], dim=2)
    assert torch.allclose(logits, 10 * cosines, atol=1e-4) and not hasattr(cosine.classifier, "bias")


# ---------------------------------------------------------------- what a row minimises

@pytest.mark.parametrize("classifier", ["linear", "cosine"])
def test_one_backward_pass_gives_equation_4_s_three_gradients(classifier, tmp_path):
    teacher, parts = make_teacher(), make_parts(classifier, balance=True)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    losses, terms = candle.objective(prepared("candle", tmp_path), parts, teacher, IMAGES, TARGETS, "learned")
    sum(losses).backward()
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())
    assert all(p.grad is None for p in teacher.parameters())
    assert all(p.requires_grad for p in parts.parameters())

    # three separate passes, as Eq. (4) writes its three players
    student, _, balance = parts
    teacher_logits, _, teacher_map = teacher.outputs(IMAGES)
    student_map = student.encode(IMAGES)
    l_kl = candle.distillation_kl(student.classifier(student_map.mean((2, 3))), teacher_logits,
                                  reduction="batchmean")
    l_fs = candle.feature_similarity_loss(student_map, teacher_map)
    lam = balance(l_kl, l_fs)
    encoder_loss = (1 - lam.item()) * l_kl + lam.item() * l_fs
    players = [(student.net, encoder_loss), (student.classifier, l_kl),
               (balance, -((1 - lam) * l_kl.item() + lam * l_fs.item()))]
    for module, objective in players:
        expected = torch.autograd.grad(objective, list(module.parameters()), retain_graph=True)
        assert any(gradient.abs().sum() > 0 for gradient in expected)
        for p, gradient in zip(module.parameters(), expected):
            near = 1e-5 * gradient.abs().max().item() + 1e-9
            assert torch.allclose(p.grad, gradient, rtol=1e-3, atol=near)
    assert {name: value.item() for name, value in terms.items()} == pytest.approx(
        {"loss": encoder_loss.item(), "kl": l_kl.item(), "fs": l_fs.item(), "lambda": lam.item()}, rel=1e-4)


@pytest.mark.parametrize("row, flags, lam", [
    ("fixed", [], 0.5), ("fixed", ["--kl-reduction", "mean", "--fixed-lambda", "0.3"], 0.3),
    ("fixed", ["--direct-multi-resolution"], 0.5), ("labels", ["--fixed-lambda", "0.25"], 0.25)])
def test_a_fixed_balance_is_equation_1_of_logits_or_labels_and_of_features(row, flags, lam, tmp_path):
    teacher, connector = make_teacher([16]), torch.nn.Conv2d(32, 64, 1)
    parts = make_parts(connector=connector)
    student = parts[0]
    (loss,), terms = candle.objective(prepared("candle", tmp_path, *flags), parts, teacher, IMAGES, TARGETS,
                                      row)
    loss.backward()
    assert student.classifier.weight.grad.abs().sum() > 0 and connector.weight.grad.abs().sum() > 0

    teacher_logits, _, teacher_map = teacher.outputs(IMAGES)
    sides = (16, 8) if "--direct-multi-resolution" in flags else (16,)  # its pooled features: their mean
    logits = student.classifier(sum(student.encode(IMAGES, r).mean((2, 3)) for r in sides) / len(sides))
    reduction = "mean" if "mean" in flags else "batchmean"
    kl = candle.distillation_kl(logits, teacher_logits, reduction=reduction)
    other = F.cross_entropy(logits, TARGETS) if row == "labels" else kl
    fs = candle.feature_similarity_loss(connector(student.encode(IMAGES)), teacher_map)
    assert terms["ce" if row == "labels" else "kl"].item() == pytest.approx(other.item(), rel=1e-4)
    assert loss.item() == pytest.approx((1 - lam) * other.item() + lam * fs.item(), rel=1e-4)
    assert terms["loss"] is loss and terms["lambda"].item() == pytest.approx(lam)


@pytest.mark.parametrize("loss", ["ce", "balanced-softmax"])
def test_from_scratch_is_the_labels_cross_entropy_with_the_classes_counts_or_without(loss, tmp_path):
    parts, one = make_parts(), prepared("candle", tmp_path, "--from-scratch", loss)
    (found,), terms = candle.objective(one, parts, None, IMAGES, TARGETS, "labels")
    logits, _ = parts[0](IMAGES)
    counts = one.class_counts if loss == "balanced-softmax" else torch.ones(3)
    p = counts * logits.exp() / (counts * logits.exp()).sum(1, keepdim=True)  # Ren et al. (2020), Eq. (4)
    expected = -p[torch.arange(6), TARGETS].log().mean().item()
    assert found.item() == pytest.approx(expected, rel=1e-4) and set(terms) == {"loss"}


def test_all_rows_start_from_one_student_and_single_maps_have_a_connector(tmp_path):
    one, single, several = prepared("candle", tmp_path), make_teacher([16]), make_teacher()
    rows = [candle.new_parts(one, *row) for row in (
        (None, "labels"), (single, "labels"), (single, "fixed"), (single, "learned"), (several, "learned"))]
    students = [torch.cat([p.flatten() for p in parts[0].parameters()]) for parts in rows]
    assert all(torch.equal(students[0], student) for student in students)
    assert [len(list(parts[1].parameters())) > 0 for parts in rows] == [False, True, True, True, False]
    assert rows[1][1](torch.rand(2, 32, 2, 2)).shape == (2, 64, 2, 2)
    assert [len(parts) for parts in rows] == [2, 2, 2, 3, 3]


def test_lambda_s_learning_rate_is_that_of_all_steps_together(tmp_path):
    one = prepared("candle", tmp_path, "--balance-lr", "30", "--time-limit", "0")
    one.open()
    with one, pytest.raises(SystemExit):  # behind the first step of two epochs of three
        candle.train_student(one, "candle", "student.pt", make_teacher(), "learned")
    state = torch.load(one.folder.path / "last.pt", weights_only=True)["optimizer"]
    assert [its["param_groups"][0]["lr"] for its in state] == pytest.approx([0.01, 30 / 6])
    assert state[0]["param_groups"][0]["weight_decay"] == 0


# ---------------------------------------------------------------- stages

def test_a_log_has_the_terms_of_each_stage_and_a_result_the_gain_over_the_baseline(whole):
    folder, _ = whole("candle")
    result, lines = json.loads((folder / "result.json").read_text()), log_rows(folder)
    terms = [{"loss", "ce", "fs", "lambda"}, {"loss"}, {"loss", "kl", "fs", "lambda", "lambdas"}]
    assert all(terms[number // 2] <= set(line) for number, line in enumerate(lines))
    assert lines[0]["lambda"] == 0.5
    for line in lines[4:]:  # Figure 6: a value a step, three here
        assert len(line["lambdas"]) == 3
        assert np.mean(line["lambdas"]) == pytest.approx(line["lambda"], abs=1e-4)
    base = result["stages"][0]["per_class_accuracy"]
    gains = [ours - before for ours, before in zip(result["per_class_accuracy"], base)]
    assert result["gain_over_baseline"] == gains

    for file, stage in zip(("baseline.pt", "teacher.pt", "student.pt"), result["stages"]):
        model, _ = candle.load_model(folder / file)
        expected = {**classifier_by_frequency(model.classifier, result["class_counts"]), **head_median_tail(
            stage["per_class_accuracy"], result["class_counts"], result["args"]["head_median"])}
        assert all(stage[key] == pytest.approx(expected[key]) for key in expected) and len(expected) == 5


def test_calibration_trains_module_classifier_and_factors_and_leaves_the_encoder(whole):
    saved = weights(whole("candle")[0] / "teacher.pt")
    encoder = build_encoder("resnet14", torch.load(EMBEDDED, weights_only=True)).state_dict()
    for name, value in encoder.items():
        assert torch.equal(saved[f"encoder.{name}"], value), name
    assert not torch.equal(saved["classifier.scale"], torch.ones(3))
    assert saved["join.convs.1.1.running_mean"].abs().sum() > 0


def test_an_ablation_has_the_four_rows_of_table_3(tmp_path):
    result = run(tmp_path, "--ablation", "--epochs", "1", "--calibration-epochs", "1")
    assert [stage["name"] for stage in result["stages"]] == [
        "baseline", "teacher, 16", "calibrate & distill", "learned balance", "teacher, 8 16", "candle"]
    assert {path.name for path in (tmp_path / "run").glob("*.pt")} == {
        "baseline.pt", "teacher_single.pt", "calibrate_distill.pt", "learned_balance.pt", "teacher.pt",
        "student.pt", "last.pt"}
    lambdas = {line["stage"]: line.get("lambda") for line in log_rows(tmp_path / "run")}
    assert lambdas["calibrate & distill"] == 0.5 != lambdas["learned balance"]


@pytest.mark.parametrize("flags, names", [
    (["--from-scratch", "tau-norm"], ["from scratch", "from scratch, tau-normalised"]),
    (["--from-scratch", "balanced-softmax", "--student-sampling", "class-balanced"],
     ["from scratch, balanced softmax, class-balanced"]),
    (["--from-scratch", "--no-binarize", "--student-optimizer", "sgd"],
     ["from scratch, full precision, sgd"]),
    (["--no-baseline", "--resolutions", "16", "--balance", "fixed", "--fixed-lambda", ".3"],
     ["teacher, 16", "candle, fixed balance"]),
    (["--no-baseline", "--classifier", "cosine", "--direct-multi-resolution", "--arch", "reactnet_a",
      "--student-resolution", "32", "--resolutions", "32", "8"],
     ["teacher, 32 8", "candle, cosine, direct"])])
def test_flags_choose_rows_students_and_balances(flags, names, tmp_path):
    result = run(tmp_path, *flags, "--no-amp", "--epochs", "1", "--calibration-epochs", "1")
    assert [stage["name"] for stage in result["stages"]] == names and "gain_over_baseline" not in result
    nets = ["student.pt"] if "--from-scratch" in flags else ["student.pt", "teacher.pt"]
    assert sorted(path.name for path in (tmp_path / "run").glob("[st]*.pt")) == nets
    if "--fixed-lambda" in flags:
        assert log_rows(tmp_path / "run")[-1]["lambda"] == pytest.approx(0.3)
    if "tau-norm" in flags:
        assert result["weight_norms"] == pytest.approx([1] * 3) and not any(result["biases"])
    if "cosine" in flags:
        assert result["biases"] is None and len(result["weight_norms"]) == 3
    if "--no-binarize" in flags:
        model, _ = candle.load_model(tmp_path / "run" / "student.pt")
        assert not any(getattr(module, "binarize", False) for module in model.modules())


def test_large_image_files_are_decoded_once_at_the_largest_resolution(tmp_path):
    image_folder(tmp_path, side=80, counts=(6, 3), test=2)
    run(tmp_path, "--dataset", "folder", "--data-dir", str(tmp_path), "--workers", "0", "--no-baseline",
        "--student-resolution", "72", "--resolutions", "48", "72", "96", "--recipe", "cifar100_lt",
        "--epochs", "1", "--calibration-epochs", "1")
    assert torch.load(tmp_path / "run" / "student.pt", weights_only=True)["image_size"] == 96


def test_the_base_resolution_may_be_another_than_the_student_s(tmp_path):
    run(tmp_path, "--no-baseline", "--resolutions", "24", "48", "--base-resolution", "48", "--epochs", "1",
        "--calibration-epochs", "1")
    teacher, student = (candle.load_model(tmp_path / "run" / f"{net}.pt")[0]
                        for net in ("teacher", "student"))
    with torch.no_grad():
        own, base = student.encode(IMAGES), teacher.join.convs[1](teacher.encoder(resize(IMAGES, 48)))
        _, _, followed = teacher.outputs(IMAGES)
    assert own.shape == followed.shape
    assert torch.allclose(followed, F.interpolate(base, own.shape[-2:], mode="area"))


# ---------------------------------------------------------------- export

def test_an_exported_student_has_1_bit_weights_and_the_same_logits_and_scores(whole, tmp_path, capsys):
    folder, _ = whole("candle")
    (tmp_path / "student.pt").write_bytes((folder / "student.pt").read_bytes())
    result = run(tmp_path, "--export", str(tmp_path / "student.pt"))
    path = tmp_path / "student_packed.pt"
    assert f"wrote {path}" in capsys.readouterr().out
    saved = json.loads((folder / "result.json").read_text())
    assert result["per_class_accuracy"] == saved["per_class_accuracy"]

    images, _ = as_seen(tmp_path / "images.npz", "test")
    (model, _), (packed, saved) = (candle.load_model(p) for p in (tmp_path / "student.pt", path))
    with torch.no_grad():
        assert torch.equal(model(images)[0], packed(images)[0])
    binary = saved["state_dict"]["binary"].values()
    assert len(binary) == 16 and all(8 * entry["bits"].numel() == math.prod(entry["shape"]) and
                                     entry["bits"].dtype == torch.uint8 for entry in binary)

    error = refused(capsys, "candle", tmp_path, "--export", str(folder / "teacher.pt"))
    assert "is not a net that candle.py saved (Student)" in error


@pytest.mark.parametrize("dataset", [[], ["--dataset", "nowhere/else.npz"]])
def test_export_needs_no_data_and_then_prints_no_scores(dataset, whole, tmp_path, capsys):
    (tmp_path / "student.pt").write_bytes((whole("candle")[0] / "student.pt").read_bytes())
    candle.main(candle.parse_args([*dataset, "--export", str(tmp_path / "student.pt"), "--device", "cpu"]))
    shown = capsys.readouterr().out
    assert "wrote " in shown and "not scored: " in shown and "many" not in shown


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


def test_the_recipes_of_all_15_data_sets():
    for (name, factor), (smoothing, head, median, classes) in RECIPES.items():
        args = settings("--dataset", name, *(["--imb-factor", str(factor)] if factor else []))
        assert args.smoothing == smoothing, name
        assert [round(end * classes) for end in args.head_median] == [head, median], name
        assert (args.epochs, args.batch_size, args.lr, args.weight_decay) == (400, 256, 0.01, 0.0)
        assert (args.arch, args.student_width, args.student_resolution) == ("reactnet_a", 1.0, 224)
        teacher = (args.teacher, args.teacher_weights, args.resolutions, args.kl_reduction)
        assert teacher[1::2] == ("ImageNet-1K", "batchmean") and teacher[::2] == (
            ("efficientnet_v2_m", [224]) if name in ("places_lt", "imagenet_lt", "inat18") else
            ("resnet152", [128, 224, 480]))
    assert len(RECIPES) == 15

    for flags, smoothing in ((["--imb-factor", "50"], [0.3, 0.0]), (["--smoothing", ".2", "0"], [0.2, 0.0]),
                             (["--imb-factor", "200"], [0.4, 0.1])):  # the nearest that MiSLAS lists
        assert settings("--dataset", "cifar100_lt", *flags).smoothing == smoothing


# ---------------------------------------------------------------- what is refused

@pytest.mark.parametrize("flags, words", [
    (["--resolutions", "8", "24"], "must differ and hold the base (16)"),
    (["--resolutions", "16", "16"], "must differ"), (["--student-resolution", "32"], "hold the base (32)"),
    (["--resolutions", "3", "16"], "--resolutions 3 leaves a map of one pixel"),
    (["--student-resolution", "8"], "--student-resolution 8 leaves a map of one pixel"),
    (["--from-scratch", "--student-resolution", "8"], "--student-resolution 8 leaves a map of one pixel"),
    (["--teacher-normalisation", "0", "0", "0", "1", "1", "0"], "must be positive"),
    (["--teacher", "tensorflow:x"], "known are torchvision's names and timm:NAME"),
    (["--teacher", "resnet20"], "holds a resnet14, not a resnet20"),
    (["--teacher", "vgg11"], "unknown encoder 'vgg11'"),
    (["--teacher-weights", "nowhere.pt"], "nowhere.pt"),
    (["--teacher-weights", "ImageNet-1K"], "name --teacher-weights FILE"),
    (["--teacher-weights", "README.md"], "README.md is no file of torch.save"),
    (["--smoothing", "0.1"], "expected 2 arguments"),
    (["--ablation", "--resolutions", "16"], "--ablation"), (["--ablation", "--no-baseline"], "--ablation"),
    (["--ablation", "--balance", "fixed"], "--ablation"), (["--ablation", "--from-scratch"], "choose one"),
    (["--no-calibration", "--from-scratch"], "choose one"),
    (["--export", "nowhere.pt", "--evaluate", "nowhere.pt"], "choose one")])
def test_flags_that_cannot_work_are_refused(tmp_path, capsys, flags, words):
    assert words in refused(capsys, "candle", tmp_path, *flags)


def test_a_malformed_teacher_file_is_one_line_and_no_random_teacher(tmp_path, capsys):
    for content in (None, {"state_dict": {}}, {"conv1.weight": torch.zeros(16, 3, 3, 3)}):
        torch.save(content, tmp_path / "bad.pt")
        flags = ["--teacher-weights", str(tmp_path / "bad.pt")]
        assert "bad.pt" in refused(capsys, "candle", tmp_path, *flags)


def test_without_a_network_one_line_says_which_weights_to_get(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("urllib.request.urlopen", lambda *given, **named: open(tmp_path / "no network"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    with pytest.raises(SystemExit) as stop:
        run(tmp_path, "--teacher", "resnet18", "--teacher-weights", "ImageNet-1K")
    *_, error = capsys.readouterr().err.splitlines()  # behind what torchvision says before it finds out
    assert stop.value.code == 2 and error.startswith("error: ") and "put resnet18-" in error
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------- teachers

def test_a_teacher_sees_images_normalised_as_those_that_it_learnt_from(tmp_path):
    torch.manual_seed(0)
    state, pixels = CifarResNet(14).state_dict(), (255 * torch.rand(2, 3, 16, 16)).byte()
    wanted = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    torch.save(state, tmp_path / "plain.pt")
    torch.save({"state_dict": state, "mean": wanted[:3], "std": wanted[3:]}, tmp_path / "stored.pt")
    data = SimpleNamespace(name="mine", mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.1))
    plain, given, stored = (encoder_for(data, "resnet14", str(tmp_path / file), numbers, 8)
                            for file, numbers in (("plain.pt", None), ("plain.pt", wanted),
                                                  ("stored.pt", None)))
    own, theirs = normalise(pixels, wanted[:3], wanted[3:]), normalise(pixels, data.mean, data.std)
    assert plain.affine is None and torch.allclose(given(theirs), plain(own), atol=1e-4)
    assert torch.equal(stored(theirs), given(theirs))

    teacher = make_teacher(affine=given.affine, encoder=given)
    again = candle.Teacher(**teacher.settings).eval()
    again.load_state_dict(teacher.state_dict())
    with torch.no_grad():
        assert torch.equal(again(theirs)[0], teacher(theirs)[0])


@pytest.mark.parametrize("name", ["imagenet_lt", "places_lt"])
def test_an_imagenet_1k_teacher_on_imagenet_lt_is_warned_of(name, capsys, monkeypatch):
    encoder = build_encoder("resnet14", torch.load(EMBEDDED, weights_only=True))
    monkeypatch.setattr("common.pretrained.load_encoder", lambda *given: encoder)
    data = SimpleNamespace(name=name, mean=(0.5,) * 3, std=(0.5,) * 3)
    encoder_for(data, "resnet14", "ImageNet-1K", None, 8)
    warned = "warning: the teacher learnt these classes from all of ImageNet-1K" in capsys.readouterr().out
    assert warned == (name == "imagenet_lt")


def test_the_embedded_teacher_is_small_half_precision_and_fits():
    saved = torch.load(EMBEDDED, weights_only=True)
    assert EMBEDDED.stat().st_size < 1e6 and saved["arch"] == settings().teacher
    assert all(value.dtype == torch.float16 for value in saved["state_dict"].values()
               if value.is_floating_point())
    encoder = build_encoder(saved["arch"], saved)
    assert (encoder.feature_dim, encoder.stride) == (64, 4)


def test_the_teacher_s_images_are_balanced_and_in_no_split_of_the_embedded_set():
    y = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 6000))  # as many as Fashion-MNIST has
    train, val, teacher = make.split_fashion_mnist(y)
    assert len(train) == 2478 and len(val) == 1000  # the embedded set's sizes
    assert np.bincount(y[teacher]).tolist() == [make.TEACHER_IMAGES] * 10
    assert len({*train, *val, *teacher}) == len(train) + len(val) + len(teacher)


def test_quarter_turns_are_numbered_anticlockwise():
    images = torch.zeros(2, 3, 4, 4)
    images[:, :, 0] = 1.0  # the top row
    batch, turns = make.turned(images)
    assert turns.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    top, left, bottom, right = batch[::2, 0]
    assert (top[0] == 1).all() and (left[:, 0] == 1).all() and (bottom[3] == 1).all()
    assert (right[:, 3] == 1).all() and batch.sum() == 8 * 3 * 4


@pytest.mark.parametrize("learns", ["turns", "labels"])
def test_pre_training_learns_quarter_turns_or_labels(learns):
    targets = np.arange(120) % 3
    images = np.zeros((120, 8, 8, 3), np.uint8)
    if learns == "turns":
        images[:, :3] = 200
    else:  # whose turns cannot be told
        images += (80 * targets).astype(np.uint8)[:, None, None, None]
    more = dict(targets=targets, test_targets=targets[:30]) if learns == "labels" else {}
    net, accuracy = make.pretrain(images, images[:30], (0.4,) * 3, (0.4,) * 3, epochs=4, batch_size=16,
                                  lr=0.05, **more)
    assert accuracy > 90  # of 25 or 33 by chance
    build_encoder("resnet14", net.state_dict())
