"""async_lt.py: class split, samplers, memory bank, losses, net, what each phase minimises, Figure 1."""
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import async_lt
from common.data import long_tail_counts
from common.ranks import generator
from tests.tiny import (as_seen, image_folder, log_rows, noise_npz, prepared, refused, run, same_weights,
                        tiny_npz, weights)

OLD, NEW = torch.tensor([1, 3]), torch.tensor([0, 2, 4])  # classes of phase one and two of tiny.COUNTS
FILES = {"plain": "plain.pt", "phase one": "phase_one.pt", "two phases": "model.pt"}
FROZEN = ("--no-amp", "--lr", "0", "--phase-two-lr", "0", "--batch-size", "32")


def test_phase_one_has_cifar_100_lt_s_70_82_or_61_largest_classes_whatever_their_ids():
    for factor, expected in ((100, 70), (50, 82), (200, 61)):
        counts = torch.tensor(long_tail_counts(100, 500, factor))
        shuffled = counts[torch.randperm(100, generator=torch.Generator().manual_seed(0))]
        old, new = async_lt.phase_one_classes(shuffled)
        assert len(old) == expected and sorted([*old.tolist(), *new.tolist()]) == list(range(100))
        assert torch.equal(shuffled[torch.cat([old, new])], counts)  # sorted
        assert shuffled[old].min() >= 20 > shuffled[new].max()
    old, new = async_lt.phase_one_classes(np.array([5, 50, 5, 90]), 3)  # a number that is given; ties by id
    assert old.tolist() == [3, 1, 0] and new.tolist() == [2]


def test_progressive_sampling_goes_from_instances_to_classes_and_weighted_has_the_given_frequencies():
    at = lambda progress: async_lt.progressive_probabilities(torch.tensor([6, 3, 1]), progress)
    assert at(0).tolist() == pytest.approx([0.6, 0.3, 0.1]) and at(1).tolist() == pytest.approx([1 / 3] * 3)
    assert torch.allclose(at(0.25), 0.75 * at(0) + 0.25 * at(1))

    targets, p = torch.tensor([2, 0, 3, 0, 1] * 4000 + [0] * 4000), torch.tensor([0.2, 0.5, 0.3, 0.0])
    drawn = targets[async_lt.weighted_indices(targets, p, torch.Generator().manual_seed(0))]
    assert len(drawn) == 24000
    assert ((drawn.bincount(minlength=4) - 24000 * p).abs() <= 3 * (24000 * p * (1 - p)).sqrt()).all()


def slow_exemplars(features, k):
    """Eq. (2) to (5), an image at a time."""
    unit, cosine = F.normalize(features.double(), dim=1), torch.nn.CosineSimilarity(dim=0)
    query, center, chosen = unit.mean(0), unit.mean(0), []
    while len(chosen) < min(k, len(unit)):
        left = [i for i in range(len(unit)) if i not in chosen]
        chosen.append(max(left, key=lambda i: cosine(query, unit[i])))
        weight = [cosine(center, unit[i]).exp() for i in chosen]
        query = center + (center - sum(w * unit[i] for w, i in zip(weight, chosen)) / sum(weight))
    return chosen


def test_exemplars_are_a_slow_loop_s_in_its_order_or_all_images_even_where_they_are_equal():
    for seed in range(6):
        features = torch.randn(40, 8, generator=torch.Generator().manual_seed(seed)) + 0.7  # with a direction
        chosen = async_lt.select_exemplars(features, 10).tolist()
        nearest = F.normalize(features, dim=1) @ F.normalize(features, dim=1).mean(0)
        assert chosen == slow_exemplars(features, 10)
        assert set(chosen) != set(nearest.topk(10).indices.tolist())  # or Eq. (3) to (5) were not seen
    for features in (torch.randn(5, 3), torch.ones(5, 3)):
        assert sorted(async_lt.select_exemplars(features, 9).tolist()) == [0, 1, 2, 3, 4]
    assert len(async_lt.select_exemplars(torch.randn(1_000_000, 2), 2)) == 2  # all pairs: 4 terabytes


def slow_retentive(old, new, temperature=0.1, similarity="cos"):
    """Eq. (6) to (8), a loop over the nodes of the old graph."""
    (old, new), mu = (F.normalize(x.double(), dim=1) for x in (old, new)), []
    for i, z in enumerate(old):
        distances, itself = (z - new).norm(dim=1), torch.eye(len(new), dtype=torch.double)[i]
        s = {"cos": new @ z, "neg-sq": -distances ** 2, "self": itself.log()}[similarity]
        mu.append((s / temperature).softmax(0) @ distances)
    return sum(mu).item() / len(mu)


@pytest.mark.parametrize("similarity", ["cos", "neg-sq", "self"])
def test_memory_retentive_loss_is_a_loop_over_nodes_its_gradient_finite_and_of_new_alone(similarity):
    old, new = torch.randn(2, 9, 5, generator=torch.Generator().manual_seed(0))
    for settings in ({}, {"temperature": 1.0}):
        loss = async_lt.memory_retentive_loss(4 * old, 0.3 * new, similarity=similarity, **settings)
        expected = slow_retentive(old, new, similarity=similarity, **settings)
        assert loss.item() == pytest.approx(expected, rel=1e-4)

    old[3] = old[2]  # two nodes of one graph coincide, and each with its own in the other graph
    new = old.clone().requires_grad_()
    async_lt.memory_retentive_loss(old.requires_grad_(), new, similarity=similarity).backward()
    assert old.grad is None and new.grad.isfinite().all()
    assert (new.grad.abs().sum() > 0) == (similarity != "self")  # through the attention, too
    nodes = torch.randn(40, 5)  # beyond 25, torch's default goes by matrix products, to within .0005
    assert async_lt.memory_retentive_loss(nodes, nodes, similarity="self") == 0


HAND = [[0.9, 0.95, 0.6, 0.3, 0.2], [0.2, 0.8, 0.0, -0.5, 0.1], [0.0, 0.0, -0.9, 0.9, 0.9]]


@pytest.mark.parametrize("cosines, targets, k, margin, expected, moved", [
    (HAND, [0, 1, 2], 2, 0.5, (0.2 + 0 + 0 + 0) / 4, [0]),  # .9 by .6, .3; .8 by .1, 0; the third is new
    (HAND, [0, 1, 2], 1, 0.5, 0.2 / 2, [0]),
    (HAND, [0, 1, 3], 9, 0.5, 0.2 / 6, [0]),  # no more negatives than there are new classes
    (HAND, [0, 1, 2], 2, 0.9, (0.6 + 0.3 + 0.2 + 0.1) / 4, [0, 1]),
    # an old class nearer than one's own does not count: that is what cross-entropy is for
    ([[0.9, 0.95, 0.39, 0.3], [0.1, 0.4, -0.2, -0.9]], [0, 1], 2, 0.5, 0, []),
    (HAND, [2, 3, 4], 2, 0.5, 0, [])])  # no old samples
def test_margin_loss_is_one_by_hand_of_old_samples_alone(cosines, targets, k, margin, expected, moved):
    cosines = torch.tensor(cosines, requires_grad=True)
    loss = async_lt.margin_loss(cosines, torch.tensor(targets), num_old=2, margin=margin, k=k)
    loss.backward()
    assert loss.item() == pytest.approx(expected, abs=1e-6)
    assert cosines.grad.abs().sum(1).nonzero().flatten().tolist() == moved


def test_bad_input_is_refused_and_where_a_phase_has_no_classes_the_flag_is_asked_for():
    x, y, z, ids = *map(torch.zeros, [(2, 3), (2, 4), 3]), torch.zeros(2).long()
    for function, cases in (
            (async_lt.phase_one_classes, [  # by the rule phase one would have all classes, none, one
                ([500, 100, 50],), ([19, 3, 1],), ([20, 19, 1],),
                *(([50, 30, 3], num_old) for num_old in (0, 3, -1, 4))]),
            (async_lt.progressive_probabilities, [([1, 2], -0.1), ([1, 2], 1.1), ([1, 2], math.nan),
                                                  ([0, 0], 0.5), ([], 0.5), ([[1]], 0.5), ([2, -1], 0.5)]),
            (async_lt.select_exemplars, [(x[:0], 1), (z, 1), (x, 0)]),
            (async_lt.memory_retentive_loss, [(x, y), (x, x[:1]), (z, z), (x, x, 0), (x, x, math.nan),
                                              (x, x, 0.1, "dot")]),
            (async_lt.margin_loss, [(z, z.long(), 1), (x, z.long(), 1), (x, ids, 0), (x, ids, 3),
                                    (x, ids, 1, 0.5, 0)])):
        for arguments in cases:
            with pytest.raises(ValueError, match="must be|--phase-one-classes between 1 and"):
                function(*arguments)


def test_a_net_has_negative_features_a_learnt_scale_and_a_softmax_over_known_classes_alone():
    torch.manual_seed(0)
    model, images = async_lt.AsyncNet("resnet14", 5, scale=7.0), torch.rand(4, 3, 8, 8)
    everything, features = model(images)
    cosines = F.cosine_similarity(features[:, None], model.classifier.weight[None], dim=2)
    assert (features < 0).any() and torch.allclose(everything, 7 * cosines, atol=1e-5)
    model.known[NEW] = False
    logits, _ = model(images)
    assert (logits[:, NEW] == -math.inf).all() and torch.equal(logits[:, OLD], everything[:, OLD])
    F.cross_entropy(logits, torch.tensor([1, 3, 3, 1])).backward()
    assert "classifier.scale" in dict(model.named_parameters()) and model.classifier.scale.grad != 0
    assert model.classifier.weight.grad.abs().sum(1).nonzero().flatten().tolist() == OLD.tolist()


def test_recipes_are_the_paper_s_where_it_says_so_and_flags_win():
    paper = {
        "cifar100_lt": dict(arch="resnet32", lr=0.1, batch_size=64, weight_decay=5e-4, schedule="step"),
        "places_lt": dict(arch="resnet152", pretrained=True, lr=0.05, feature_lr=5e-4, schedule="step"),
        "imagenet_lt": dict(schedule="cosine", lr=0.05, epochs=90, weight_decay=5e-4),
        "inat18": dict(schedule="cosine", lr=0.05, epochs=200, weight_decay=5e-4)}
    args = {name: async_lt.parse_args(["--dataset", name]) for name in paper}
    for name, values in paper.items():
        assert vars(args[name]).items() >= {**values, "memory_per_class": 10}.items(), name
    assert async_lt.parse_args(["--memory-per-class", "2"]).memory_per_class == 2

    # a hundredth at epochs 160 and 180 of 200, or 20 and 40 of 60
    for own, steps in ((args["cifar100_lt"], [160, 20, 20]), (args["places_lt"], [20, 20, 20])):
        rates = [async_lt.step_lr(t / own.epochs, 1, own.milestones, own.lr_gamma) for t in range(own.epochs)]
        assert rates == pytest.approx(np.repeat([1, 1e-2, 1e-4], steps).tolist())


@pytest.mark.parametrize("sampling", ["progressive", "instance"])
def test_plain_and_phase_one_minimise_equation_1_on_the_images_that_are_drawn(sampling, still):
    run("async_lt", still, *FROZEN, "--sampling", sampling, "--epochs", "3")
    images, targets = as_seen(still / "images.npz")
    for stage, classes in (("plain", torch.arange(5)), ("phase one", OLD)):
        model, _ = async_lt.load_model(still / "run" / FILES[stage])
        members = torch.isin(targets, classes).nonzero().flatten()
        stage += ", instance" * (stage == "plain" and sampling == "instance")
        losses = [row["loss"] for row in log_rows(still / "run") if row["stage"] == stage]
        assert len(losses) == 3
        for epoch, loss in enumerate(losses):
            draws, p = generator(0, stage, "sampling", epoch), torch.zeros(5).double()
            p[classes] = async_lt.progressive_probabilities(targets.bincount()[classes], epoch / 2)
            indices = members[async_lt.weighted_indices(targets[members], p, draws)] \
                if sampling == "progressive" else members[torch.randperm(len(members), generator=draws)]
            expected = [F.cross_entropy(model.train()(images[part])[0], targets[part]).item()
                        for part in indices.split(32)]
            assert loss == pytest.approx(np.mean(expected), rel=1e-3)


@pytest.mark.parametrize("flags, settings", [
    ("", {}), ("--no-imprint", {}), ("--no-margin", dict(margin=False)), ("--no-retentive", dict(weight=0)),
    ("--lambda-scale 2.5", dict(weight=2.5 * math.sqrt(2 / 3))),
    ("--graph-similarity neg-sq --temperature 0.5", dict(similarity="neg-sq", temperature=0.5)),
    ("--graph-similarity self", dict(similarity="self"))])
def test_phase_two_starts_from_phase_one_and_minimises_equation_9_on_bank_and_rest(flags, settings, still):
    run("async_lt", still, *FROZEN, *flags.split(), "--no-plain", "--epochs", "1", "--memory-per-class", "8")
    paths = (still / "run" / FILES[stage] for stage in ("phase one", "two phases"))
    (old_model, _), (model, _) = map(async_lt.load_model, paths)
    (images, targets), start = as_seen(still / "images.npz"), model.state_dict()
    saved = old_model.state_dict()
    for key in saved:
        if not {"weight", "bias", "scale"}.isdisjoint(key.split(".")) and key != "classifier.weight":
            assert torch.equal(start[key], saved[key]), key  # the scale is carried over too
    assert start["known"].all() and saved["known"].nonzero().flatten().tolist() == OLD.tolist()
    rows, before = start["classifier.weight"], saved["classifier.weight"]
    assert torch.equal(rows[OLD], before[OLD])
    for c in NEW:  # a mean of unit features, as long as the old rows are on average
        mean = F.normalize(old_model.backbone(images[targets == c]), dim=1).mean(0)
        imprinted = before[OLD].norm(dim=1).mean() * F.normalize(mean, dim=0)
        assert torch.allclose(rows[c], imprinted, atol=1e-4) == (flags != "--no-imprint")
    # random without imprinting, not what weight decay left of phase one's unused rows
    assert F.cosine_similarity(rows[NEW], before[NEW]).abs().max() < 0.5

    bank = async_lt.memory_bank(prepared("async_lt", still, "--memory-per-class", "8"), old_model, OLD)
    D, order = torch.cat([bank, torch.isin(targets, NEW).nonzero().flatten()]), torch.cat([OLD, NEW])
    assert len(D) == 8 + 8 + 23

    def loss_of(part, weight=math.sqrt(2 / 3), margin=True, **graph):
        logits, features = model.train()(images[part])
        cosines, places = logits[:, order] / model.classifier.scale, order.argsort()[targets[part]]
        loss = F.cross_entropy(logits, targets[part]) + margin * async_lt.margin_loss(cosines, places, 2)
        return loss + weight * slow_retentive(old_model.backbone(images[part]), features, **graph)

    losses = [row["loss"] for row in log_rows(still / "run") if row["stage"] == "two phases"]
    drawn = [torch.randperm(len(D), generator=generator(0, "two phases", "sampling", t)) for t in (0, 1)]
    assert losses == pytest.approx([np.mean([loss_of(D[part], **settings).item() for part in each.split(32)])
                                    for each in drawn], rel=1e-3)


def test_phases_plain_and_the_backbone_have_epochs_and_learning_rates_of_their_own(tmp_path, monkeypatch):
    note = lambda optimizer: rates.append([group["lr"] for group in optimizer.param_groups])
    monkeypatch.setattr(torch.optim.SGD, "step", note)
    flags = ("--batch-size 128 --epochs 2 --schedule step --milestones 0.5 --lr-gamma 0.1 --lr 0.2 "
             "--phase-two-lr 0.4 --phase-two-epochs")  # a step an epoch
    for more, expected in (
            ("4 --plain-epochs 1 --plain-lr 0.3 --feature-lr 0.02",
             [[.02, .3], [.02, .2], [.002, .02], [.02, .4], [.02, .4], [.002, .04], [.002, .04]]),
            ("1", [[.2, .2], [.02, .02], [.2, .2], [.02, .02], [.4, .4]])):
        rates = []
        run("async_lt", tmp_path, *flags.split(), *more.split(), name=more)
        assert np.allclose(rates, expected)


def test_phases_learn_their_classes_and_the_bank_holds_k_chosen_images_of_each_of_phase_one_or_all(
        tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("common.loader.CROP_PADDING", 1)  # of 8 pixels, 4 would leave black images
    tiny_npz(tmp_path / "images.npz")
    flags = "--epochs 6 --phase-two-epochs 12 --lr 0.02 --phase-two-lr 0.02 --schedule cosine"
    stages = run("async_lt", tmp_path, *flags.split(), "--evaluate-every", "99")["stages"]
    plain, phase_one, both = (stage["per_class_accuracy"] for stage in stages)
    # colours are easily learnt, so any mixing up of ids would show
    assert min(plain[c] for c in OLD) > 80 and min(both) > 80
    assert phase_one == [0, pytest.approx(100, abs=20), 0, pytest.approx(100, abs=20), 0]

    model, _ = async_lt.load_model(tmp_path / "run" / "phase_one.pt")
    images, targets = as_seen(tmp_path / "images.npz")
    own = (targets == 1).nonzero().flatten()
    for k in (8, 40):
        bank = async_lt.memory_bank(prepared("async_lt", tmp_path, "--memory-per-class", str(k)), model, OLD)
        notes = capsys.readouterr().out.count("note: a phase-one class with fewer than 40 images")
        assert targets[bank].tolist() == [1] * k + [3] * min(k, 30) and notes == (k == 40)
        assert bank[:k].tolist() == own[slow_exemplars(model.backbone(images[own]).detach(), k)].tolist()


def test_tracked_gradients_are_the_direct_ones_of_512_images_in_every_stage_and_change_no_weight(tmp_path):
    tiny_npz(tmp_path / "images.npz", counts=(150, 400, 50))
    flags = ("--no-amp", "--batch-size", "96")  # so the 512 are batches of two sizes
    run("async_lt", tmp_path, *flags)
    run("async_lt", tmp_path, *flags, "--track-gradients", name="tracked")
    (images, targets), rows = as_seen(tmp_path / "images.npz"), log_rows(tmp_path / "tracked")
    probe = torch.randperm(600, generator=generator(0, "probe"))[:512]  # the same each time
    for stage, file in FILES.items():
        assert same_weights(tmp_path / "run" / file, tmp_path / "tracked" / file)
        model, _ = async_lt.load_model(tmp_path / "run" / file)
        own = probe[targets[probe] != 2] if stage == "phase one" else probe
        is_head = targets[own] != 2
        losses = F.cross_entropy(model(images[own])[0], targets[own], reduction="none")
        whole, *parts = (torch.cat([g.flatten() for g in torch.autograd.grad(
            (part * losses).mean(), list(model.parameters()), retain_graph=True)])
            for part in (torch.ones(len(own)), is_head, ~is_head))
        expected = {"norm": whole.norm().item()}
        for name, part in zip(("head", "tail"), parts):
            expected[f"norm_{name}"] = part.norm().item()
            expected[f"cosine_{name}"] = F.cosine_similarity(part, whole, dim=0).item()
        last = [row for row in rows if row["stage"] == stage][-1]
        assert {key: last[key] for key in expected} == pytest.approx(expected, rel=1e-3)
        assert (last["norm_tail"] == 0) == (stage == "phase one")
    assert "norm" not in log_rows(tmp_path / "run")[0]


def test_figure_1_s_balanced_run_has_the_head_classes_of_a_long_tailed_one(tmp_path):
    npz = tiny_npz(tmp_path / "images.npz", counts=[250] * 5)  # at factor 100: 250 79 25 7 2
    flags = "--arch resnet14 --device cpu --no-amp --epochs 1 --plain --track-gradients --batch-size 1250"
    async_lt.main(async_lt.parse_args(["--dataset", npz, "--out", str(tmp_path / "run"), *flags.split()]))
    model, _ = async_lt.load_model(tmp_path / "run" / "plain.pt")
    norms = prepared("async_lt", tmp_path).gradient_norms(model, torch.arange(5), torch.arange(3))
    assert log_rows(tmp_path / "run")[0]["norm_head"] == pytest.approx(norms["norm_head"], rel=1e-4)


@pytest.mark.parametrize("flags, words", [
    ("--phase-one-classes 99", "choose --phase-one-classes between 1 and 2"),
    ("--phase-one-classes 3", "would have 3 of the 3 classes"),
    ("--plain --phase-one-checkpoint x.pt", "leave out --phase-one-checkpoint"),
    ("--evaluate a.pt --phase-one-checkpoint x.pt", "leave out --phase-one-checkpoint"),
    ("--no-retentive --graph-similarity self", "leave out --no-retentive"),
    ("--arch resnet18 --pretrained", "no ImageNet weights"),
    ("--phase-one-classes 1 --phase-one-checkpoint {run}/phase_one.pt", "other classes than the 1"),
    ("--phase-one-checkpoint {run}/model.pt", "trained on other classes"),  # of all, none of phase one
    ("--arch resnet20 --phase-one-checkpoint {run}/phase_one.pt", "a resnet14, not a resnet20"),
    ("--dataset {here}/turned.npz --phase-one-checkpoint {run}/phase_one.pt", "other classes than the 2")])
def test_flags_and_checkpoints_that_cannot_work_are_refused(flags, words, whole, tmp_path, capsys):
    noise_npz(tmp_path, name="turned.npz", turn=1)
    flags = flags.format(run=whole("async_lt")[0], here=tmp_path).split()
    assert words in refused(capsys, "async_lt", tmp_path, *flags)


@pytest.mark.parametrize("broken", ["a/03.png", "b/02.png"])  # of phase one, of the rest
def test_unreadable_images_are_left_out_of_the_memory_bank_and_the_imprinting(tmp_path, broken):
    image_folder(tmp_path, counts=(21, 5), test=2)
    (tmp_path / "train" / broken).write_bytes(b"not an image")
    flags = ("--dataset folder --workers 0 --no-plain --skip-bad-images --epochs 1 --phase-one-classes 1 "
             "--memory-per-class 20")
    result = run("async_lt", tmp_path, *flags.split(), "--data-dir", str(tmp_path))
    assert [stage["name"] for stage in result["stages"]] == ["phase one", "two phases"]
    assert all(value.isfinite().all() for value in weights(tmp_path / "run" / "model.pt").values())
