"""candle.py: sampler, losses, nets, what a row minimises, stages, export, teachers, what it refuses."""
import math
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
from common.resnet import CifarResNet, build_encoder
from tests.tiny import ROOT, as_seen, image_folder, log_rows, prepared, refused, result_of, run, weights

EMBEDDED = ROOT / "common" / "assets" / "fashion_teacher.pt"
IMAGES = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(3))
TARGETS = torch.tensor([2, 0, 1, 1, 0, 2])


def make_teacher(resolutions=(8, 16), **more):
    torch.manual_seed(0)
    teacher = candle.Teacher("resnet14", 3, list(resolutions), 16, 32, 2, **more)
    return teacher.eval().requires_grad_(False)


def make_parts(classifier="linear", connector=torch.nn.Identity(), *balance):
    """A student, its connector and lambda's network, in training mode."""
    torch.manual_seed(1)
    student = candle.Student("reactnet_18", 3, 0.0625, 16, classifier=classifier)
    return torch.nn.ModuleList([student, connector, *balance]).train()


def test_class_balanced_sampling_draws_every_class_once_a_round():
    targets = torch.tensor([4] * 7 + [0] * 90 + [2] * 3)  # a class without images takes no part
    drawn = targets[candle.equal_class_indices(targets, torch.Generator().manual_seed(0))]
    rounds = [drawn[start:start + 3].tolist() for start in range(0, 99, 3)]
    assert len(drawn) == 100 and len(set(map(tuple, rounds))) == 6
    assert all(sorted(each) == [0, 2, 4] for each in rounds)


@pytest.mark.parametrize("head, tail", [(0.4, 0.1), (0.0, 0.38), (0.0, 0.0)])
def test_smoothing_is_mislas_s_by_class(head, tail):
    logits, counts = torch.randn(9, 4, generator=torch.Generator().manual_seed(0)), [20, 500, 5, 80]
    for y, n in enumerate(counts):
        ids, d, x = torch.full((9,), y), head - tail, (n - 5) / (500 - 5)
        for shape, e in {  # MiSLAS's code, section 3.3
                "linear": tail + d * x, "concave": tail + d * math.sin(math.pi / 2 * x),
                "convex": head + d * math.sin(3 * math.pi / 2 + math.pi / 2 * x)}.items():
            loss = candle.label_aware_smoothing_loss(logits, ids, counts, head, tail, shape)
            assert torch.allclose(loss, F.cross_entropy(logits, ids, label_smoothing=e), rtol=0, atol=1e-6)
            equal = candle.label_aware_smoothing_loss(logits, ids, [7] * 4, head, tail, shape)
            assert torch.allclose(equal, F.cross_entropy(logits, ids, label_smoothing=head))


def test_l_kl_is_the_teacher_s_at_temperature_2_without_a_factor_and_l_fs_of_unit_maps_before_pooling():
    z, t = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
    q, p = ((logits.double() / 2).softmax(1) for logits in (z, t))
    kl = (p * (p / q).log()).sum().item()
    assert candle.distillation_kl(z, t).item() == pytest.approx(kl / 12, rel=1e-5)
    assert candle.distillation_kl(z, t, 2.0, "batchmean").item() == pytest.approx(kl / 4, rel=1e-5)
    far = candle.distillation_kl(torch.tensor([[1e4, 0.0]]), torch.tensor([[0.0, 1e4]]), 1.0)
    assert far.item() == pytest.approx(1e4 / 2)  # finite where a probability is 0

    a, b = torch.randn(2, 4, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    for other in (b, a.flip(3)):  # the latter equal after pooling
        expected = (F.normalize(a.flatten(1)) - F.normalize(other.flatten(1))).pow(2).sum(1).mean().item()
        loss = candle.feature_similarity_loss(5 * a, 0.1 * other)
        assert loss.item() == pytest.approx(expected, rel=1e-5) and expected > 0.1


def test_sampler_losses_and_module_refuse_bad_input():
    a, b, v, maps, small = map(torch.zeros, [(2, 3), (2, 4), 3, (2, 3, 4, 4), (2, 3, 2, 2)])
    ids, n = torch.zeros(2).long(), [1, 2, 3]
    for function, cases in (
            (candle.equal_class_indices, [(ids[:0], torch.Generator()), (a.long(), torch.Generator())]),
            (candle.label_aware_smoothing_loss, [
                (a, ids, n, 1.0, 0.0), (a, ids, n, 0.0, -0.1), (a, ids, [1, 2], 0.1, 0.0),
                (a, ids, n, math.nan, 0.0), (a, ids, n, 0.1, 0.0, "exp"), (a, v.long(), n, 0.1, 0.0)]),
            (candle.distillation_kl, [(a, b), (v, v), (a, a, 0.0), (a, a, math.nan), (a, a, 2.0, "sum")]),
            (candle.feature_similarity_loss, [(maps, small), (a, a)]),
            (candle.SizeInterpolationConcat(3, 4, [16, 32], 32, 4), [([maps],)])):
        for arguments in cases:
            with pytest.raises(ValueError):
                function(*arguments)


def test_the_balance_has_the_paper_s_widths_and_no_gradient_through_its_inputs():
    balance = candle.LossBalance()
    assert [tuple(p.shape) for p in balance.parameters()][::2] == [(18, 2), (34, 18), (50, 34), (1, 50)]
    kl, fs = torch.tensor([0.3, 0.9], requires_grad=True)
    value = balance(kl, fs)
    assert value.shape == () and 0 < value.item() < 1 and value.requires_grad
    found = torch.autograd.grad(value, [kl, fs, *balance.parameters()], allow_unused=True)
    assert [gradient is None for gradient in found] == [True] * 2 + [False] * 8


def test_the_module_joins_4_7_and_15_at_7_halves_8_by_means_and_knows_the_student_s_slice():
    torch.manual_seed(0)
    module = candle.SizeInterpolationConcat(24, 1024, [128, 224, 480], 224, 7).eval()
    maps = [torch.randn(2, 24, side, side) for side in (4, 7, 15)]
    out, nearest = module(maps), [i * 4 // 7 for i in range(7)]  # 4 pixels become 7
    assert out.shape == (2, 2048, 7, 7) and module.width == 2048 and module.own == slice(512, 1536)
    conv, norm, act = module.convs[1]
    assert torch.equal(out[:, module.own], act(norm(conv(maps[1]))))  # the student's own map
    assert torch.allclose(out[:, :512], module.convs[0](maps[0])[:, :, nearest][:, :, :, nearest])
    halved = candle.SizeInterpolationConcat(24, 64, [32], 32, 4)([torch.arange(64.0).reshape(1, 1, 8, 8)])
    assert halved[0, 0, 0].tolist() == [4.5, 6.5, 8.5, 10.5]  # means of 2x2: 0, 1, 8, 9 and so on
    other = candle.SizeInterpolationConcat(24, 64, [224, 128], 224, 7)
    assert other.own == slice(0, 64) and other.width == 96
    alone = candle.SizeInterpolationConcat(24, 64, [224], 224, 7)
    assert not list(alone.parameters()) and alone.width == 24 and torch.equal(alone([maps[1]]), maps[1])


def test_a_teacher_is_its_encoder_at_every_resolution_then_module_pooling_classifier_and_factors():
    teacher = make_teacher([8, 16, 24])
    g = teacher.classifier
    g.scale.copy_(torch.rand(3) + 0.5)
    logits, features, own = teacher.outputs(IMAGES)
    joined = teacher.join([teacher.encoder(F.interpolate(IMAGES, (r, r), mode="bilinear", antialias=True))
                           for r in (8, 16, 24)])
    assert joined.shape == (6, 64, 2, 2) and torch.allclose(own, joined[:, 16:48], atol=1e-5)
    assert torch.allclose(features, joined.mean((2, 3)), atol=1e-5)
    assert torch.allclose(logits, g.scale * F.linear(features, g.weight, g.bias), atol=1e-5)
    assert torch.equal(teacher(IMAGES)[0], logits)


def test_a_student_takes_images_of_any_side_and_has_a_linear_or_a_cosine_classifier():
    images, (linear, _), (cosine, _) = torch.rand(4, 3, 24, 24), *map(make_parts, ("linear", "cosine"))
    logits, features = linear(images)
    assert torch.equal(logits, linear(resize(images, 16))[0])
    assert torch.allclose(logits, F.linear(features, linear.classifier.weight, linear.classifier.bias))
    logits, features = cosine(images)
    cosines = F.cosine_similarity(features[:, None], cosine.classifier.weight[None], dim=2)
    assert torch.allclose(logits, 10 * cosines, atol=1e-4) and not hasattr(cosine.classifier, "bias")


@pytest.mark.parametrize("classifier", ["linear", "cosine"])
def test_one_backward_pass_gives_equation_4_s_three_gradients(classifier, tmp_path):
    teacher, parts = make_teacher(), make_parts(classifier, torch.nn.Identity(), candle.LossBalance())
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    losses, terms = candle.objective(prepared("candle", tmp_path), parts, teacher, IMAGES, TARGETS, "learned")
    sum(losses).backward()
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())
    assert all(p.grad is None for p in teacher.parameters())
    assert all(p.requires_grad for p in parts.parameters())
    student, _, balance = parts  # in three separate passes, as Eq. (4) writes its three players
    (teacher_logits, _, teacher_map), own = teacher.outputs(IMAGES), student.encode(IMAGES)
    kl = candle.distillation_kl(student.classifier(own.mean((2, 3))), teacher_logits, reduction="batchmean")
    fs = candle.feature_similarity_loss(own, teacher_map)
    lam = balance(kl, fs)
    encoder_loss = (1 - lam.item()) * kl + lam.item() * fs
    for module, objective in ((student.net, encoder_loss), (student.classifier, kl),
                              (balance, -((1 - lam) * kl.item() + lam * fs.item()))):
        expected = torch.autograd.grad(objective, list(module.parameters()), retain_graph=True)
        assert any(gradient.abs().sum() > 0 for gradient in expected)
        for p, gradient in zip(module.parameters(), expected):
            near = 1e-5 * gradient.abs().max().item() + 1e-9
            assert torch.allclose(p.grad, gradient, rtol=1e-3, atol=near)
    by_hand = {"loss": encoder_loss.item(), "kl": kl.item(), "fs": fs.item(), "lambda": lam.item()}
    assert {key: term.item() for key, term in terms.items()} == pytest.approx(by_hand, rel=1e-4)


@pytest.mark.parametrize("row, flags, lam", [
    ("fixed", "", 0.5), ("fixed", "--kl-reduction mean --fixed-lambda 0.3", 0.3),
    ("fixed", "--direct-multi-resolution", 0.5), ("labels", "--fixed-lambda 0.25", 0.25)])
def test_a_fixed_balance_is_equation_1_of_logits_or_labels_and_of_features(row, flags, lam, tmp_path):
    teacher, connector = make_teacher([16]), torch.nn.Conv2d(32, 64, 1)
    parts, one = make_parts(connector=connector), prepared("candle", tmp_path, *flags.split())
    (loss,), terms = candle.objective(one, parts, teacher, IMAGES, TARGETS, row)
    loss.backward()
    student, (teacher_logits, _, teacher_map) = parts[0], teacher.outputs(IMAGES)
    assert student.classifier.weight.grad.abs().sum() > 0 and connector.weight.grad.abs().sum() > 0
    sides = (16, 8) if "direct" in flags else (16,)  # the mean of its pooled features
    logits = student.classifier(sum(student.encode(IMAGES, r).mean((2, 3)) for r in sides) / len(sides))
    other = F.cross_entropy(logits, TARGETS) if row == "labels" else candle.distillation_kl(
        logits, teacher_logits, reduction="mean" if "mean" in flags else "batchmean")
    fs = candle.feature_similarity_loss(connector(student.encode(IMAGES)), teacher_map)
    assert terms["ce" if row == "labels" else "kl"].item() == pytest.approx(other.item(), rel=1e-4)
    assert loss.item() == pytest.approx((1 - lam) * other.item() + lam * fs.item(), rel=1e-4)
    assert terms["loss"] is loss and terms["lambda"].item() == pytest.approx(lam)


@pytest.mark.parametrize("loss", ["ce", "balanced-softmax"])
def test_from_scratch_is_the_labels_cross_entropy_with_the_classes_counts_or_without(loss, tmp_path):
    parts, one = make_parts(), prepared("candle", tmp_path, "--from-scratch", loss)
    (found,), terms = candle.objective(one, parts, None, IMAGES, TARGETS, "labels")
    weighted = parts[0](IMAGES)[0].exp() * (one.class_counts if loss == "balanced-softmax" else 1)
    p = weighted / weighted.sum(1, keepdim=True)  # Ren et al. (2020), Eq. (4)
    assert found.item() == pytest.approx(-p[torch.arange(6), TARGETS].log().mean().item(), rel=1e-4)
    assert set(terms) == {"loss"}


def test_all_rows_start_from_one_student_single_maps_have_a_connector_and_lambda_an_lr_of_its_own(tmp_path):
    one = prepared("candle", tmp_path, "--balance-lr", "30", "--time-limit", "0")
    single, several = make_teacher([16]), make_teacher()
    rows = [candle.new_parts(one, *row) for row in (
        (None, "labels"), (single, "labels"), (single, "fixed"), (single, "learned"), (several, "learned"))]
    students = [torch.cat([p.flatten() for p in parts[0].parameters()]) for parts in rows]
    assert all(torch.equal(students[0], student) for student in students)
    assert [len(list(parts[1].parameters())) > 0 for parts in rows] == [False, True, True, True, False]
    assert rows[1][1](torch.rand(2, 32, 2, 2)).shape == (2, 64, 2, 2)
    assert [len(parts) for parts in rows] == [2, 2, 2, 3, 3]
    one.open()
    with one, pytest.raises(SystemExit):  # behind the first step of two epochs of three
        candle.train_student(one, "candle", "student.pt", several, "learned")
    state = torch.load(one.folder.path / "last.pt", weights_only=True)["optimizer"]
    assert [its["param_groups"][0]["lr"] for its in state] == pytest.approx([0.01, 30 / 6])  # of six steps
    assert state[0]["param_groups"][0]["weight_decay"] == 0


def test_a_run_logs_the_terms_of_each_stage_and_gains_and_leaves_the_teacher_s_encoder_alone(whole):
    folder, _ = whole("candle")
    result, lines, saved = result_of(folder), log_rows(folder), weights(folder / "teacher.pt")
    terms = [{"loss", "ce", "fs", "lambda"}, {"loss"}, {"loss", "kl", "fs", "lambda", "lambdas"}]
    assert all(terms[number // 2] <= set(line) for number, line in enumerate(lines))
    assert lines[0]["lambda"] == 0.5 and [len(line["lambdas"]) for line in lines[4:]] == [3, 3]
    for line in lines[4:]:  # Figure 6: a value a step
        assert np.mean(line["lambdas"]) == pytest.approx(line["lambda"], abs=1e-4)
    base, counts = result["stages"][0]["per_class_accuracy"], result["class_counts"]
    assert result["gain_over_baseline"] == [a - b for a, b in zip(result["per_class_accuracy"], base)]
    for file, stage in zip(("baseline.pt", "teacher.pt", "student.pt"), result["stages"]):
        model, _ = candle.load_model(folder / file)
        expected = classifier_by_frequency(model.classifier, counts) | head_median_tail(
            stage["per_class_accuracy"], counts, result["args"]["head_median"])
        assert all(stage[key] == pytest.approx(expected[key]) for key in expected) and len(expected) == 5
    encoder = build_encoder("resnet14", torch.load(EMBEDDED, weights_only=True)).state_dict()
    assert all(torch.equal(saved[f"encoder.{name}"], value) for name, value in encoder.items())
    assert (saved["classifier.scale"] != 1).any() and saved["join.convs.1.1.running_mean"].abs().sum() > 0


@pytest.mark.parametrize("flags, names, nets", [
    ("--ablation", "baseline; teacher, 16; calibrate & distill; learned balance; teacher, 8 16; candle",
     "baseline teacher_single calibrate_distill learned_balance teacher student"),  # Table 3
    ("--from-scratch tau-norm", "from scratch; from scratch, tau-normalised", "student"),
    ("--from-scratch balanced-softmax --student-sampling class-balanced",
     "from scratch, balanced softmax, class-balanced", "student"),
    ("--from-scratch --no-binarize --student-optimizer sgd", "from scratch, full precision, sgd", "student"),
    ("--no-baseline --resolutions 16 --balance fixed --fixed-lambda .3",
     "teacher, 16; candle, fixed balance", "teacher student"),
    ("--no-baseline --classifier cosine --direct-multi-resolution --arch reactnet_a --student-resolution 32 "
     "--resolutions 32 8", "teacher, 32 8; candle, cosine, direct", "teacher student")])
def test_flags_choose_rows_students_and_balances(flags, names, nets, tmp_path):
    result = run("candle", tmp_path, *flags.split(), "--no-amp", "--epochs", "1", "--calibration-epochs", "1")
    lambdas = {line["stage"]: line.get("lambda") for line in log_rows(tmp_path / "run")}
    assert [stage["name"] for stage in result["stages"]] == names.split("; ")
    assert ("gain_over_baseline" in result) == ("baseline" in names)
    assert {path.stem for path in (tmp_path / "run").glob("*.pt")} == {*nets.split(), "last"}
    assert "--ablation" not in flags or lambdas["calibrate & distill"] == 0.5 != lambdas["learned balance"]
    assert "--fixed-lambda" not in flags or lambdas["candle, fixed balance"] == pytest.approx(0.3)
    if "tau-norm" in flags:
        assert result["weight_norms"] == pytest.approx([1] * 3) and not any(result["biases"])
    if "cosine" in flags:
        assert result["biases"] is None and len(result["weight_norms"]) == 3
    if "--no-binarize" in flags:
        model, _ = candle.load_model(tmp_path / "run" / "student.pt")
        assert not any(getattr(module, "binarize", False) for module in model.modules())


def test_large_files_are_decoded_once_at_the_largest_resolution_and_the_base_is_the_one_named(tmp_path):
    image_folder(tmp_path, side=80, counts=(6, 3), test=2)
    flags = ("--dataset folder --workers 0 --no-baseline --student-resolution 72 --resolutions 108 120 "
             "--base-resolution 108 --recipe cifar100_lt --epochs 1 --calibration-epochs 1")
    run("candle", tmp_path, *flags.split(), "--data-dir", str(tmp_path))
    folder = tmp_path / "run"
    (teacher, _), (student, saved) = map(candle.load_model, (folder / "teacher.pt", folder / "student.pt"))
    own, (_, _, followed) = student.encode(IMAGES), teacher.outputs(IMAGES)
    assert saved["image_size"] == 120
    base = teacher.join.convs[0](teacher.encoder(resize(IMAGES, 108)))
    assert own.shape == followed.shape and base.shape[-1] == 9 * own.shape[-1]
    assert torch.allclose(followed, F.interpolate(base, own.shape[-2:], mode="area"))


def test_an_exported_student_has_1_bit_weights_and_the_same_logits_and_scores(whole, tmp_path, capsys):
    folder, path = whole("candle")[0], tmp_path / "student.pt"
    path.write_bytes((folder / "student.pt").read_bytes())
    result = run("candle", tmp_path, "--export", str(path))
    assert f"wrote {tmp_path / 'student_packed.pt'}" in capsys.readouterr().out
    assert result["per_class_accuracy"] == result_of(folder)["per_class_accuracy"]
    images, _ = as_seen(tmp_path / "images.npz", "test")
    (model, _), (packed, saved) = map(candle.load_model, (path, tmp_path / "student_packed.pt"))
    assert torch.equal(model(images)[0], packed(images)[0])
    binary = saved["state_dict"]["binary"].values()
    assert len(binary) == 16 and all(8 * entry["bits"].numel() == math.prod(entry["shape"]) and
                                     entry["bits"].dtype == torch.uint8 for entry in binary)

    for dataset in ([], ["--dataset", "nowhere/else.npz"]):  # export needs no data, and then prints no scores
        candle.main(candle.parse_args([*dataset, "--export", str(path), "--device", "cpu"]))
        shown = capsys.readouterr().out
        assert "wrote " in shown and "not scored: " in shown and "many" not in shown


def test_the_recipes_of_the_paper_s_data_sets():
    paper = dict(epochs=400, batch_size=256, lr=0.01, weight_decay=0.0, arch="reactnet_a", student_width=1.0,
                 student_resolution=224, teacher_weights="ImageNet-1K", kl_reduction="batchmean")
    table = {  # data set and factor: smoothing, classes of head, of head and median, classes
        "cifar10_lt 10": (0.1, 0.0, 3, 7, 10), "cifar10_lt 100": (0.3, 0.0, 3, 7, 10),
        "cifar100_lt 10": (0.2, 0.0, 36, 71, 100), "cifar100_lt 100": (0.4, 0.1, 36, 71, 100),
        "cifar100_lt 50": (0.3, 0.0, 36, 71, 100), "cifar100_lt 200": (0.4, 0.1, 36, 71, 100),  # as at 100
        "caltech101_lt": (0.01, 0.01, 36, 72, 102), "cub200_lt": (0.04, 0.01, 72, 142, 200),
        "stanford_dogs_lt": (0.0, 0.03, 43, 85, 120), "stanford_cars_lt": (0.0, 0.38, 70, 139, 196),
        "fgvc_aircraft_lt": (0.0, 0.39, 36, 71, 100), "dtd_lt": (0.01, 0.39, 14, 33, 47),
        "flowers102_lt": (0.04, 0.04, 36, 72, 102), "fruits360_lt": (0.0, 0.0, 7, 14, 24),
        "places_lt": (0.4, 0.1, 131, 259, 365), "imagenet_lt": (0.3, 0.0, 390, 835, 1000),
        "inat18": (0.3, 0.0, 842, 4543, 8142)}
    assert {key.split()[0] for key in table} == candle.RECIPES.keys() - {"fashion_lt", "small"}
    for key, (*smoothing, head, median, classes) in table.items():
        name, *factor = key.split()
        args = candle.parse_args(["--dataset", name, *["--imb-factor"] * len(factor), *factor])
        candle.check_args(args)
        is_large = name in ("places_lt", "imagenet_lt", "inat18")
        teacher = ("efficientnet_v2_m", [224]) if is_large else ("resnet152", [128, 224, 480])
        assert (args.smoothing, args.teacher, args.resolutions) == (smoothing, *teacher), key
        assert [round(end * classes) for end in args.head_median] == [head, median], key
        assert vars(args).items() >= paper.items(), key
    assert candle.parse_args("--dataset cifar100_lt --smoothing .2 0".split()).smoothing == [0.2, 0.0]


@pytest.mark.parametrize("flags, words", [
    ("--resolutions 8 24", "must differ and hold the base (16)"), ("--teacher-weights no.pt", "no.pt"),
    ("--resolutions 16 16", "must differ"), ("--teacher-weights ImageNet-1K", "name --teacher-weights FILE"),
    ("--student-resolution 32", "hold the base (32)"), ("--export no.pt --evaluate no.pt", "choose one"),
    ("--teacher vgg11", "unknown encoder 'vgg11'"), ("--no-calibration --from-scratch", "choose one"),
    ("--resolutions 3 16", "--resolutions 3 leaves a map of one pixel"),
    ("--student-resolution 8", "--student-resolution 8 leaves a map of one pixel"),
    ("--from-scratch --student-resolution 8", "--student-resolution 8 leaves a map of one pixel"),
    ("--teacher tensorflow:x", "known are torchvision's names and timm:NAME"),
    ("--teacher-normalisation 0 0 0 1 1 0", "must be positive"), ("--smoothing 0.1", "expected 2 arguments"),
    ("--teacher resnet20", "holds a resnet14, not a resnet20"), ("--ablation --balance fixed", "--ablation"),
    ("--teacher-weights README.md", "README.md is no file of torch.save"),
    *((f"--teacher-weights {{here}}/bad{i}.pt", f"bad{i}.pt") for i in range(3)),
    ("--ablation --resolutions 16", "--ablation"), ("--ablation --no-baseline", "--ablation"),
    ("--ablation --from-scratch", "choose one"),
    ("--export {run}/teacher.pt", "is not a net that candle.py saved (Student)")])
def test_flags_and_files_that_cannot_work_are_refused(flags, words, whole, tmp_path, capsys):
    for i, content in enumerate((None, {"state_dict": {}}, {"conv1.weight": torch.zeros(16, 3, 3, 3)})):
        torch.save(content, tmp_path / f"bad{i}.pt")
    flags = flags.format(run=whole("candle")[0], here=tmp_path).split()
    assert words in refused(capsys, "candle", tmp_path, *flags)


def test_without_a_network_one_line_says_which_weights_to_get(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("urllib.request.urlopen", lambda *given, **named: open(tmp_path / "no network"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    with pytest.raises(SystemExit) as stop:
        run("candle", tmp_path, "--teacher", "resnet18", "--teacher-weights", "ImageNet-1K")
    *_, error = capsys.readouterr().err.splitlines()  # behind what torchvision says before it finds out
    assert stop.value.code == 2 and error.startswith("error: ") and "put resnet18-" in error
    assert not (tmp_path / "run").exists()


def test_a_teacher_sees_images_normalised_as_it_learnt_and_one_that_knows_imagenet_lt_is_warned_of(
        tmp_path, capsys, monkeypatch):
    torch.manual_seed(0)
    state, pixels = CifarResNet(14).state_dict(), (255 * torch.rand(2, 3, 16, 16)).byte()
    mean, std = wanted = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]
    torch.save(state, tmp_path / "plain.pt")
    torch.save({"state_dict": state, "mean": mean, "std": std}, tmp_path / "stored.pt")
    data = SimpleNamespace(name="mine", mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.1))
    plain, given, stored = (encoder_for(data, "resnet14", str(tmp_path / file), numbers, 8) for file, numbers
                            in (("plain.pt", None), ("plain.pt", mean + std), ("stored.pt", None)))
    own, theirs = normalise(pixels, *wanted), normalise(pixels, data.mean, data.std)
    assert plain.affine is None and torch.allclose(given(theirs), plain(own), atol=1e-4)
    assert torch.equal(stored(theirs), given(theirs))
    teacher = make_teacher(affine=given.affine, encoder=given)
    again = candle.Teacher(**teacher.settings).eval()
    again.load_state_dict(teacher.state_dict())
    assert torch.equal(again(theirs)[0], teacher(theirs)[0])

    monkeypatch.setattr("common.pretrained.load_encoder", lambda *given: plain)
    for data.name in ("imagenet_lt", "places_lt"):
        encoder_for(data, "resnet14", "ImageNet-1K", None, 8)
        warning = "warning: the teacher learnt these classes from all of ImageNet-1K"
        assert (warning in capsys.readouterr().out) == (data.name == "imagenet_lt")


def test_the_embedded_teacher_is_small_half_precision_and_fits_and_of_balanced_images_in_no_split():
    saved = torch.load(EMBEDDED, weights_only=True)
    assert EMBEDDED.stat().st_size < 1e6 and saved["arch"] == candle.parse_args([]).teacher
    assert {w.dtype for w in saved["state_dict"].values() if w.is_floating_point()} == {torch.float16}
    encoder = build_encoder(saved["arch"], saved)
    assert (encoder.feature_dim, encoder.stride) == (64, 4)

    y = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 6000))  # as many as Fashion-MNIST has
    train, val, teacher = make.split_fashion_mnist(y)
    assert len(train) == 2478 and len(val) == 1000  # the embedded set's sizes
    assert np.bincount(y[teacher]).tolist() == [make.TEACHER_IMAGES] * 10
    assert len({*train, *val, *teacher}) == len(train) + len(val) + len(teacher)


@pytest.mark.parametrize("learns", ["turns", "labels"])
def test_pre_training_learns_quarter_turns_anticlockwise_or_labels(learns):
    targets = np.arange(120) % 3
    colours = (80 * targets).astype(np.uint8)[:, None, None, None]  # whose turns cannot be told
    top = np.uint8(200) * (np.arange(8) < 3)[None, :, None, None]  # the same of every class
    images = np.zeros((120, 8, 8, 3), np.uint8) + (top if learns == "turns" else colours)
    more = dict(targets=targets, test_targets=targets[:30]) if learns == "labels" else {}
    net, accuracy = make.pretrain(images, images[:30], (0.4,) * 3, (0.4,) * 3, epochs=4, batch_size=16,
                                  lr=0.05, **more)
    assert accuracy > 90  # of 25 or 33 by chance
    build_encoder("resnet14", net.state_dict())
    square = torch.tensor([[0, 1], [2, 3]]).expand(2, 3, 2, 2)
    batch, turns = make.turned(square)
    assert turns.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert batch[::2, 0].flatten(1).tolist() == [[0, 1, 2, 3], [1, 3, 0, 2], [3, 2, 1, 0], [2, 0, 3, 1]]
