"""async_lt.py: class split, samplers, memory bank, losses, net, what each phase minimises, Figure 1."""
import functools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import async_lt
from common.data import long_tail_counts
from common.ranks import generator
from common.resnet import CosineClassifier
from tests import tiny
from tests.tiny import as_seen, image_folder, log_rows, prepared, same_weights, tiny_npz, weights

OLD, NEW = torch.tensor([1, 3]), torch.tensor([0, 2, 4])  # classes of phase one and two of tiny.COUNTS
FILES = {"plain": "plain.pt", "phase one": "phase_one.pt", "two phases": "model.pt"}
FROZEN = ("--no-amp", "--lr", "0", "--phase-two-lr", "0", "--batch-size", "32")
run = functools.partial(tiny.run, "async_lt")


# ---------------------------------------------------------------- class split

@pytest.mark.parametrize("factor, expected", [(100, 70), (50, 82), (200, 61)])
def test_phase_one_has_cifar_100_lt_s_70_82_or_61_largest_classes_whatever_their_ids(factor, expected):
    counts = torch.tensor(long_tail_counts(100, 500, factor))
    shuffled = counts[torch.randperm(100, generator=torch.Generator().manual_seed(0))]
    old, new = async_lt.phase_one_classes(shuffled)
    assert len(old) == expected and sorted([*old.tolist(), *new.tolist()]) == list(range(100))
    assert torch.equal(shuffled[torch.cat([old, new])], counts)  # sorted
    assert (shuffled[old] >= 20).all() and (shuffled[new] < 20).all()

    old, new = async_lt.phase_one_classes(np.array([5, 50, 5, 90]), 3)  # a number that is given; ties by id
    assert old.tolist() == [3, 1, 0] and new.tolist() == [2]


@pytest.mark.parametrize("counts, num_old", [
    ([500, 100, 50], None), ([19, 3, 1], None),  # by the rule all are old, or none
    ([50, 30, 3], 0), ([50, 30, 3], 3), ([50, 30, 3], -1), ([50, 30, 3], 4)])
def test_a_phase_without_classes_is_refused_and_the_flag_asked_for(counts, num_old):
    with pytest.raises(ValueError, match="--phase-one-classes between 1 and"):
        async_lt.phase_one_classes(counts, num_old)


# ---------------------------------------------------------------- samplers

def test_progressive_sampling_goes_linearly_from_instances_to_classes():
    at = functools.partial(async_lt.progressive_probabilities, torch.tensor([6, 3, 1]))
    assert at(0).tolist() == pytest.approx([0.6, 0.3, 0.1])
    assert at(1).tolist() == pytest.approx([1 / 3] * 3)
    assert torch.allclose(at(0.25), 0.75 * at(0) + 0.25 * at(1))

    for counts, progress in (([1, 2], -0.1), ([1, 2], 1.1), ([1, 2], math.nan), ([0, 0], 0.5), ([], 0.5),
                             ([[1]], 0.5), ([2, -1], 0.5)):
        with pytest.raises(ValueError):
            async_lt.progressive_probabilities(torch.tensor(counts), progress)


def test_weighted_sampling_has_the_given_frequencies():
    targets = torch.tensor([2, 0, 3, 0, 1] * 4000 + [0] * 4000)
    p = torch.tensor([0.2, 0.5, 0.3, 0.0])
    drawn = targets[async_lt.weighted_indices(targets, p, torch.Generator().manual_seed(0))]
    assert len(drawn) == len(targets) == 24000
    three_sigma = 3 * (24000 * p * (1 - p)).sqrt()
    assert ((drawn.bincount(minlength=4) - 24000 * p).abs() <= three_sigma).all()


# ---------------------------------------------------------------- memory bank

def slow_exemplars(features, k):
    """Eq. (2) to (5), one number at a time."""
    def cosine(a, b):
        return sum(x * y for x, y in zip(a, b)) / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))

    unit = [[x / math.sqrt(sum(y * y for y in row)) for x in row] for row in features.double().tolist()]
    center = [sum(column) / len(unit) for column in zip(*unit)]
    query, chosen = center, []
    while len(chosen) < min(k, len(unit)):
        left = [i for i in range(len(unit)) if i not in chosen]
        chosen.append(max(left, key=lambda i: cosine(query, unit[i])))
        weight = [math.exp(cosine(center, unit[i])) for i in chosen]
        z = [sum(w * unit[i][d] for w, i in zip(weight, chosen)) / sum(weight) for d in range(len(center))]
        query = [c + (c - value) for c, value in zip(center, z)]
    return chosen


@pytest.mark.parametrize("seed", range(6))
def test_exemplars_are_those_of_a_slow_implementation_in_its_order(seed):
    features = torch.randn(40, 8, generator=torch.Generator().manual_seed(seed)) + 0.7  # with a direction
    chosen = async_lt.select_exemplars(features, 10)
    assert chosen.tolist() == slow_exemplars(features, 10) and len(set(chosen.tolist())) == 10
    nearest = F.normalize(features, dim=1) @ F.normalize(features, dim=1).mean(0)
    assert set(chosen.tolist()) != set(nearest.topk(10).indices.tolist())  # or Eq. (3) to (5) were not seen


def test_more_exemplars_than_images_are_all_images_even_where_they_are_equal():
    for features in (torch.randn(5, 3), torch.ones(5, 3)):
        assert sorted(async_lt.select_exemplars(features, 9).tolist()) == [0, 1, 2, 3, 4]
    for features, k in ((torch.zeros(0, 3), 1), (torch.zeros(3), 1), (torch.zeros(3, 3), 0)):
        with pytest.raises(ValueError):
            async_lt.select_exemplars(features, k)


def test_choosing_exemplars_needs_no_table_of_all_pairs():
    assert len(async_lt.select_exemplars(torch.randn(1_000_000, 2), 2)) == 2  # the table: 4 terabytes


# ---------------------------------------------------------------- losses

def slow_retentive(old, new, temperature=0.1, similarity="cos"):
    """Eq. (6) to (8), a loop over the nodes of both graphs."""
    old, new = (x.double() / x.double().norm(dim=1, keepdim=True) for x in (old, new))
    if similarity == "self":
        return sum((z - other).norm().item() for z, other in zip(old, new)) / len(old)
    mu = []
    for z in old:
        distances = [(z - other).norm().item() for other in new]
        s = [-d * d if similarity == "neg-sq" else (z @ other).item() for d, other in zip(distances, new)]
        a = [math.exp(value / temperature) for value in s]
        mu.append(sum(w * d for w, d in zip(a, distances)) / sum(a))
    return sum(mu) / len(mu)


def slow_margin(cosines, targets, old, margin=0.5, k=2):
    """L_intra of Eq. (9), a loop; old: the class ids of phase one."""
    terms = []
    for row, target in zip(cosines.tolist(), targets.tolist()):
        if target in old:
            negatives = sorted((row[c] for c in range(len(row)) if c not in old), reverse=True)[:k]
            terms += [max(0, margin - row[target] + negative) for negative in negatives]
    return sum(terms) / len(terms) if terms else 0.0


@pytest.mark.parametrize("similarity", ["cos", "neg-sq", "self"])
def test_memory_retentive_loss_is_a_loop_over_nodes(similarity):
    old, new = torch.randn(2, 9, 5, generator=torch.Generator().manual_seed(0))
    for settings in ({}, {"temperature": 1.0}):
        loss = async_lt.memory_retentive_loss(4 * old, 0.3 * new, similarity=similarity, **settings)
        expected = slow_retentive(old, new, similarity=similarity, **settings)
        assert loss.item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("similarity", ["cos", "neg-sq", "self"])
def test_memory_retentive_gradient_is_finite_where_old_and_new_coincide_and_leaves_old_alone(similarity):
    old = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    old[3] = old[2]  # and two nodes of one graph coincide
    old.requires_grad_()
    new = old.detach().clone().requires_grad_()
    async_lt.memory_retentive_loss(old, new, similarity=similarity).backward()
    assert old.grad is None and new.grad.isfinite().all()
    assert (new.grad.abs().sum() > 0) == (similarity != "self")  # through the attention, too


HAND = torch.tensor([[0.9, 0.95, 0.6, 0.3, 0.2], [0.2, 0.8, 0.0, -0.5, 0.1], [0.0, 0.0, -0.9, 0.9, 0.9]])


@pytest.mark.parametrize("k, margin, expected", [
    (2, 0.5, (0.2 + 0 + 0 + 0) / 4),  # .9 against .6 and .3; .8 against .1 and 0; the third is not old
    (1, 0.5, 0.2 / 2), (9, 0.5, 0.2 / 6),  # no more negatives than there are new classes
    (2, 0.9, (0.6 + 0.3 + 0.2 + 0.1) / 4)])
def test_margin_loss_by_hand(k, margin, expected):
    targets = torch.tensor([0, 1, 2])
    loss = async_lt.margin_loss(HAND, targets, num_old=2, margin=margin, k=k)
    assert loss.item() == pytest.approx(expected, abs=1e-6)
    assert slow_margin(HAND, targets, [0, 1], margin, k) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("cosines, targets, moved", [
    (HAND, [0, 1, 3], [0]),  # the second keeps the margin; the third is new
    # an old class nearer than one's own does not count: that is what cross-entropy is for
    (torch.tensor([[0.9, 0.95, 0.39, 0.3], [0.1, 0.4, -0.2, -0.9]]), [0, 1], []),
    (HAND, [2, 3, 4], [])])  # no old samples
def test_margin_loss_moves_old_samples_that_lack_the_margin_alone(cosines, targets, moved):
    cosines = cosines.clone().requires_grad_()
    loss = async_lt.margin_loss(cosines, torch.tensor(targets), num_old=2)
    loss.backward()
    assert (loss > 0) == bool(moved)
    assert cosines.grad.abs().sum(1).nonzero().flatten().tolist() == moved


def test_losses_refuse_bad_input():
    z, ids = torch.zeros, lambda n: torch.zeros(n).long()
    for arguments in ((z(2, 3), z(2, 4)), (z(2, 3), z(3, 3)), (z(3), z(3)), (z(2, 3), z(2, 3), 0),
                      (z(2, 3), z(2, 3), math.nan), (z(2, 3), z(2, 3), 0.1, "dot")):
        with pytest.raises(ValueError):
            async_lt.memory_retentive_loss(*arguments)
    for arguments in ((z(3), ids(3), 1), (z(2, 3), ids(3), 1), (z(2, 3), ids(2), 0), (z(2, 3), ids(2), 3),
                      (z(2, 3), ids(2), 1, 0.5, 0)):
        with pytest.raises(ValueError):
            async_lt.margin_loss(*arguments)


# ---------------------------------------------------------------- net, schedule, recipes

def test_features_can_be_negative_and_the_scale_is_learnt():
    torch.manual_seed(0)
    model = async_lt.AsyncNet("resnet14", 4, scale=7.0)
    logits, features = model(torch.rand(4, 3, 8, 8))
    assert (features < 0).any() and logits.shape == (4, 4)
    assert torch.allclose(logits, 7 * F.cosine_similarity(
        features[:, None], model.classifier.weight[None], dim=2), atol=1e-5)

    F.cross_entropy(logits, torch.tensor([0, 1, 2, 3])).backward()
    assert "classifier.scale" in dict(model.named_parameters()) and model.classifier.scale.grad != 0


def test_unknown_classes_take_no_part_in_the_softmax():
    torch.manual_seed(0)
    model, images = async_lt.AsyncNet("resnet14", 5).eval(), torch.rand(3, 3, 8, 8)
    everything, _ = model(images)
    model.known[NEW] = False
    logits, _ = model(images)
    assert (logits[:, NEW] == -math.inf).all() and torch.equal(logits[:, OLD], everything[:, OLD])
    F.cross_entropy(logits, torch.tensor([1, 3, 3])).backward()
    assert model.classifier.weight.grad.abs().sum(1).nonzero().flatten().tolist() == OLD.tolist()


def test_imprinted_rows_are_class_means_as_long_as_the_other_rows():
    torch.manual_seed(0)
    classifier, features = CosineClassifier(6, 5, 10.0), torch.randn(9, 6)
    targets, before = torch.tensor([4, 0, 4, 2, 4, 0, 2, 2, 2]), classifier.weight.detach().clone()
    classifier.imprint(features, targets, torch.tensor([4, 0, 2]), torch.tensor([1, 3]))
    assert torch.equal(classifier.weight[[1, 3]], before[[1, 3]]) and classifier.weight.requires_grad

    length = (before[1].norm() + before[3].norm()) / 2
    for c in (0, 2, 4):
        mean = torch.stack([z / z.norm() for z, y in zip(features, targets) if y == c]).mean(0)
        assert torch.allclose(classifier.weight[c], length * mean / mean.norm(), atol=1e-6)


def test_recipes_are_the_paper_s_where_it_says_so_and_flags_win():
    for name, flags, values in (
            ("cifar100_lt", "arch lr batch_size weight_decay", ("resnet32", 0.1, 64, 5e-4)),
            ("places_lt", "arch pretrained lr feature_lr", ("resnet152", True, 0.05, 5e-4)),
            ("imagenet_lt", "schedule lr epochs weight_decay", ("cosine", 0.05, 90, 5e-4)),
            ("inat18", "schedule lr epochs weight_decay", ("cosine", 0.05, 200, 5e-4))):
        args = async_lt.parse_args(["--dataset", name])
        assert tuple(getattr(args, flag) for flag in flags.split()) == values and args.memory_per_class == 10
    assert async_lt.parse_args(["--memory-per-class", "2"]).memory_per_class == 2

    # a hundredth at epochs 160 and 180 of 200, or 20 and 40 of 60
    for name, steps in (("cifar100_lt", [160, 20, 20]), ("places_lt", [20, 20, 20])):
        args = async_lt.parse_args(["--dataset", name])
        rates = [async_lt.step_lr(epoch / args.epochs, 1, args.milestones, args.lr_gamma)
                 for epoch in range(args.epochs)]
        assert args.schedule == "step" and rates == pytest.approx(np.repeat([1, 1e-2, 1e-4], steps).tolist())


# ---------------------------------------------------------------- what a stage minimises

def mean_loss(loss_of, indices):
    """The mean over an epoch's batches of 32 indices."""
    with torch.no_grad():
        return np.mean([float(loss_of(part)) for part in indices.split(32)])


@pytest.mark.parametrize("sampling", ["progressive", "instance"])
def test_plain_and_phase_one_minimise_equation_1_on_the_images_that_are_drawn(sampling, still):
    run(still, *FROZEN, "--sampling", sampling, "--epochs", "3")
    (images, targets), rows = as_seen(still / "images.npz"), log_rows(still / "run")
    for stage, classes in (("plain", torch.arange(5)), ("phase one", OLD)):
        model, _ = async_lt.load_model(still / "run" / FILES[stage])
        members = torch.isin(targets, classes).nonzero().flatten()
        stage += ", instance" * (stage == "plain" and sampling == "instance")
        losses = [row["loss"] for row in rows if row["stage"] == stage]
        assert len(losses) == 3

        for epoch, loss in enumerate(losses):
            draws, p = generator(0, stage, "sampling", epoch), torch.zeros(5).double()
            p[classes] = async_lt.progressive_probabilities(targets.bincount()[classes], epoch / 2)
            indices = members[async_lt.weighted_indices(targets[members], p, draws)] \
                if sampling == "progressive" else members[torch.randperm(len(members), generator=draws)]
            expected = mean_loss(lambda part: F.cross_entropy(model.train()(images[part])[0], targets[part]),
                                 indices)
            assert loss == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("flags, settings", [
    ([], {}), (["--no-margin"], dict(margin=False)), (["--no-retentive"], dict(weight=0)),
    (["--lambda-scale", "2.5"], dict(weight=2.5 * math.sqrt(2 / 3))),
    (["--graph-similarity", "neg-sq", "--temperature", "0.5"], dict(similarity="neg-sq", temperature=0.5)),
    (["--graph-similarity", "self"], dict(similarity="self"))])
def test_phase_two_minimises_equation_9_on_the_memory_bank_and_the_rest(flags, settings, still):
    run(still, *FROZEN, *flags, "--no-plain", "--epochs", "1", "--memory-per-class", "8")
    old_model, model = (async_lt.load_model(still / "run" / FILES[stage])[0]
                        for stage in ("phase one", "two phases"))
    images, targets = as_seen(still / "images.npz")
    bank = async_lt.memory_bank(prepared("async_lt", still, "--memory-per-class", "8"), old_model, OLD)
    D = torch.cat([bank, torch.isin(targets, NEW).nonzero().flatten()])
    assert len(D) == 8 + 8 + 23

    def loss_of(part, weight=math.sqrt(2 / 3), margin=True, **graph):
        logits, features = model.train()(images[part])
        loss = F.cross_entropy(logits, targets[part])
        if margin:
            loss += slow_margin(logits / model.classifier.scale, targets[part], OLD.tolist())
        return loss + weight * slow_retentive(old_model.backbone(images[part]), features, **graph)

    rows = [row["loss"] for row in log_rows(still / "run") if row["stage"] == "two phases"]
    for epoch, loss in enumerate(rows):
        order = torch.randperm(len(D), generator=generator(0, "two phases", "sampling", epoch))
        expected = mean_loss(functools.partial(loss_of, **settings), D[order])
        assert loss == pytest.approx(expected, rel=1e-3)
    assert len(rows) == 2


@pytest.mark.parametrize("imprint", [True, False])
def test_phase_two_starts_from_phase_one_but_for_the_rows_of_new_classes(imprint, still):
    run(still, *FROZEN, "--no-plain", *["--no-imprint"] * (not imprint))
    start, saved = (weights(still / "run" / FILES[stage]) for stage in ("two phases", "phase one"))
    for key in saved:
        if not {"weight", "bias", "scale"}.isdisjoint(key.split(".")) and key != "classifier.weight":
            assert torch.equal(start[key], saved[key]), key  # the scale is carried over too
    assert start["known"].all() and saved["known"].nonzero().flatten().tolist() == OLD.tolist()
    rows, before = start["classifier.weight"], saved["classifier.weight"]
    assert torch.equal(rows[OLD], before[OLD])

    model, _ = async_lt.load_model(still / "run" / "phase_one.pt")
    images, targets = as_seen(still / "images.npz")
    for c in NEW:
        with torch.no_grad():
            mean = F.normalize(model.backbone(images[targets == c]), dim=1).mean(0)
        imprinted = before[OLD].norm(dim=1).mean() * F.normalize(mean, dim=0)
        assert torch.allclose(rows[c], imprinted, atol=1e-4) == imprint

    # random without imprinting, not what weight decay left of phase one's unused rows
    assert F.cosine_similarity(rows[NEW], before[NEW]).abs().max() < 0.5


def test_phases_and_plain_have_epochs_and_learning_rates_of_their_own_and_so_has_the_backbone(
        tmp_path, monkeypatch):
    rates = []

    class Recorder(torch.optim.SGD):
        def step(self):
            rates.append([group["lr"] for group in self.param_groups])
            super().step()
    monkeypatch.setattr(torch.optim, "SGD", Recorder)
    flags = ("--epochs", "2", "--batch-size", "128", "--schedule", "step", "--milestones", "0.5",
             "--lr-gamma", "0.1", "--lr", "0.2", "--phase-two-lr", "0.4")  # a step an epoch
    run(tmp_path, *flags, "--plain-epochs", "1", "--plain-lr", "0.3", "--phase-two-epochs", "4",
        "--feature-lr", "0.02")
    assert np.allclose(rates, [[0.02, 0.3], [0.02, 0.2], [0.002, 0.02], [0.02, 0.4], [0.02, 0.4],
                               [0.002, 0.04], [0.002, 0.04]])
    rates.clear()
    run(tmp_path, *flags, "--phase-two-epochs", "1", name="one rate")
    assert np.allclose(rates, [[0.2, 0.2], [0.02, 0.02], [0.2, 0.2], [0.02, 0.02], [0.4, 0.4]])


# ---------------------------------------------------------------- a run that learns

@pytest.fixture(scope="module")
def learnt(tmp_path_factory):
    """The folder of a run that is long enough to tell the colours of its classes; its result."""
    folder = tmp_path_factory.mktemp("learnt")
    tiny_npz(folder / "images.npz")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("common.loader.CROP_PADDING", 1)  # of 8 pixels, 4 would leave black images
        return folder, run(folder, "--epochs", "6", "--phase-two-epochs", "12", "--lr", "0.02",
                           "--phase-two-lr", "0.02", "--schedule", "cosine", "--evaluate-every", "99")


def test_phase_one_knows_its_own_classes_and_the_other_stages_all(learnt):
    plain, phase_one, both = (stage["per_class_accuracy"] for stage in learnt[1]["stages"])
    # colours are easily learnt, so any mixing up of ids would show
    assert min(plain[c] for c in OLD) > 80 and min(both) > 80
    assert phase_one == [0, pytest.approx(100, abs=20), 0, pytest.approx(100, abs=20), 0]


def test_the_memory_bank_holds_k_chosen_images_of_each_phase_one_class_or_all(learnt, capsys):
    model, _ = async_lt.load_model(learnt[0] / "run" / "phase_one.pt")
    images, targets = as_seen(learnt[0] / "images.npz")
    for k in (8, 40):
        one = prepared("async_lt", learnt[0], "--memory-per-class", str(k))
        bank = async_lt.memory_bank(one, model, OLD)
        assert targets[bank].tolist() == [1] * k + [3] * min(k, 30)
        notes = capsys.readouterr().out.count("note: a phase-one class with fewer than 40 images")
        assert notes == (k == 40)

        own = (targets == 1).nonzero().flatten()
        with torch.no_grad():
            assert bank[:k].tolist() == own[slow_exemplars(model.backbone(images[own]), k)].tolist()


# ---------------------------------------------------------------- gradients

def test_gradient_norms_are_those_of_the_direct_gradient_on_512_images(tmp_path):
    tiny_npz(tmp_path / "images.npz", counts=(400, 150, 50))
    one, (images, targets) = prepared("async_lt", tmp_path), as_seen(tmp_path / "images.npz")
    torch.manual_seed(0)
    model = async_lt.AsyncNet("resnet14", 3)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = one.gradient_norms(model, torch.tensor([0, 2]), torch.tensor([0]))  # batches of two sizes
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())

    probe = torch.randperm(600, generator=generator(0, "probe"))[:512]  # the same each time
    probe = probe[targets[probe] != 1]
    losses = F.cross_entropy(model.eval()(images[probe])[0], targets[probe], reduction="none")
    of_head, gradients = targets[probe] == 0, []
    for part in (torch.ones(len(probe)), of_head, ~of_head):
        of_part = torch.autograd.grad((part * losses).mean(), list(model.parameters()), retain_graph=True)
        gradients.append(torch.cat([g.flatten() for g in of_part]))
    whole, head, tail = gradients
    expected = {"norm": whole.norm().item()}
    for name, part in (("head", head), ("tail", tail)):
        expected[f"cosine_{name}"] = F.cosine_similarity(part, whole, dim=0).item()
        expected[f"norm_{name}"] = part.norm().item()
    assert found == pytest.approx(expected, rel=1e-3)


def test_tracking_gradients_logs_those_of_every_stage_and_changes_no_weight(tmp_path):
    tiny_npz(tmp_path / "images.npz")
    flags = ("--no-amp", "--epochs", "1", "--phase-two-epochs", "1", "--batch-size", "32")
    run(tmp_path, *flags)
    run(tmp_path, *flags, "--track-gradients", name="tracked")
    rows = {row["stage"]: row for row in log_rows(tmp_path / "tracked")}  # of the last epochs
    one = prepared("async_lt", tmp_path)
    for stage, file in FILES.items():
        assert same_weights(tmp_path / "run" / file, tmp_path / "tracked" / file)
        model, _ = async_lt.load_model(tmp_path / "run" / file)
        classes = OLD if stage == "phase one" else torch.arange(5)
        norms = one.gradient_norms(model, classes, OLD)
        assert {key: rows[stage][key] for key in norms} == pytest.approx(norms, rel=1e-4)
    assert rows["phase one"]["norm_tail"] == 0 < rows["two phases"]["norm_tail"]
    assert "norm" not in log_rows(tmp_path / "run")[0]


def test_figure_1_s_balanced_run_has_the_head_classes_of_a_long_tailed_one(tmp_path):
    npz = tiny_npz(tmp_path / "images.npz", counts=[250] * 5)  # at factor 100: 250 79 25 7 2
    async_lt.main(async_lt.parse_args(
        ["--dataset", npz, "--arch", "resnet14", "--device", "cpu", "--no-amp", "--epochs", "1", "--plain",
         "--track-gradients", "--batch-size", "1250", "--out", str(tmp_path / "run")]))
    model, _ = async_lt.load_model(tmp_path / "run" / "plain.pt")
    norms = prepared("async_lt", tmp_path).gradient_norms(model, torch.arange(5), torch.arange(3))
    assert log_rows(tmp_path / "run")[0]["norm_head"] == pytest.approx(norms["norm_head"], rel=1e-4)


# ---------------------------------------------------------------- what is refused, what is not

@pytest.mark.parametrize("flags, words", [
    (["--phase-one-classes", "99"], "choose --phase-one-classes between 1 and 2"),
    (["--phase-one-classes", "3"], "would have 3 of the 3 classes"),
    (["--plain", "--phase-one-checkpoint", "phase_one.pt"], "leave out --phase-one-checkpoint"),
    (["--no-retentive", "--graph-similarity", "self"], "leave out --no-retentive"),
    (["--evaluate", "a.pt", "--phase-one-checkpoint", "phase_one.pt"], "leave out --phase-one-checkpoint"),
    (["--arch", "resnet18", "--pretrained"], "no ImageNet weights")])
def test_flags_that_cannot_work_are_refused(tmp_path, capsys, flags, words):
    assert words in tiny.refused(capsys, "async_lt", tmp_path, *flags)


def test_a_checkpoint_of_another_split_or_architecture_is_refused(learnt, tmp_path, capsys):
    refused, folder = functools.partial(tiny.refused, capsys, "async_lt", tmp_path), learnt[0] / "run"
    for file, flags, words in (
            ("phase_one.pt", ["--phase-one-classes", "3"], "trained on other classes than the 3"),
            ("model.pt", [], "trained on other classes"),  # a net of all classes is none of phase one
            ("phase_one.pt", ["--arch", "resnet20"], "a resnet14, not a resnet20"),
            ("phase_one.pt", ["--dataset", tiny_npz(tmp_path / "other.npz", (60, 8, 30, 3, 12))],
             "trained on other classes than the 2")):  # as many; but 0 and 2 are the largest
        data = ["--dataset", str(learnt[0] / "images.npz")]
        assert words in refused(*data, *flags, "--phase-one-checkpoint", str(folder / file))


@pytest.mark.parametrize("broken", ["a/03.png", "b/02.png"])  # of phase one, of the rest
def test_unreadable_images_are_left_out_of_the_memory_bank_and_the_imprinting(tmp_path, broken):
    image_folder(tmp_path, counts=(21, 5), test=2)
    (tmp_path / "train" / broken).write_bytes(b"not an image")
    result = run(tmp_path, "--dataset", "folder", "--data-dir", str(tmp_path), "--workers", "0", "--no-plain",
                 "--skip-bad-images", "--epochs", "1", "--phase-one-classes", "1", "--memory-per-class", "20")
    assert [stage["name"] for stage in result["stages"]] == ["phase one", "two phases"]
    assert all(value.isfinite().all() for value in weights(tmp_path / "run" / "model.pt").values())
