"""async_lt.py: class split, samplers, memory bank, losses, model, both phases, Figure 1, bad input."""
import contextlib
import functools
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

import async_lt
import common.loader
from common.augment import normalise
from common.data import load, long_tail_counts
from common.evaluate import gradient_norms, scores
from common.resnet import CosineClassifier
from common.run import Epoch, Run
from tests.tiny import image_folder, one_error, same_weights, tiny_npz, weights

OLD, NEW = [1, 3], [0, 2, 4]  # classes of phase one and two of COUNTS
STAGES = ["plain", "phase one", "two phases"]
FILES = ["plain.pt", "phase_one.pt", "model.pt"]
SHORT = ("--epochs", "2", "--phase-two-epochs", "2", "--batch-size", "32", "--memory-per-class", "3",
         "--evaluate-every", "1")


def run(folder, *flags, name="run"):
    path = folder / "tiny.npz"
    if not path.exists():
        tiny_npz(path)
    return async_lt.main(async_lt.parse_args(
        ["--dataset", str(path), "--arch", "resnet14", "--device", "cpu", "--no-amp", "--evaluate-every",
         "99", "--out", str(folder / name), *flags]))


def observed_run(folder, *flags, name="run"):
    """A run and what went through it: .drawn {stage: an index list an epoch}, .start {stage: weights}, .steps
    {stage: a (images, targets, logits, features, scale, loss) a batch}."""
    seen = SimpleNamespace(drawn={}, start={}, steps={}, stage=None)
    batches, track = Epoch.batches, Epoch.track

    def watched_batches(epoch, indices):
        seen.stage = epoch.stage
        seen.start.setdefault(epoch.stage, {key: v.clone() for key, v in epoch.parts.state_dict().items()})
        seen.drawn.setdefault(epoch.stage, []).append(indices.clone())
        for batch in batches(epoch, indices):
            seen.batch = batch
            yield batch

    def watch_forward(module, inputs, outputs):
        if isinstance(module, async_lt.AsyncNet) and module.training:
            seen.outputs = [*(output.detach() for output in outputs), module.classifier.scale.item()]

    def watched_track(epoch, loss):
        seen.steps.setdefault(epoch.stage, []).append((*seen.batch[:2], *seen.outputs, loss.item()))
        track(epoch, loss=loss)

    hook = torch.nn.modules.module.register_module_forward_hook(watch_forward)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Epoch, "batches", watched_batches)
        patch.setattr(Epoch, "track", watched_track)
        seen.result = run(folder, *flags, name=name)
    hook.remove()
    seen.folder, seen.npz = folder / name, folder / "tiny.npz"
    return seen


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """A run that is long enough to learn its classes, observed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common.loader, "CROP_PADDING", 1)  # of 8 pixels, 4 would leave black images
        return observed_run(
            tmp_path_factory.mktemp("full"), "--epochs", "6", "--phase-two-epochs", "15", "--batch-size",
            "16", "--lr", "0.02", "--phase-two-lr", "0.02", "--schedule", "cosine", "--memory-per-class", "8")


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """The folder of a run of two epochs a stage, that others must repeat or differ from."""
    folder = tmp_path_factory.mktemp("short")
    run(folder, *SHORT)
    return folder


# ---------------------------------------------------------------- class split

@pytest.mark.parametrize("factor, expected", [(100, 70), (50, 82), (200, 61)])
def test_phase_one_has_cifar_100_lt_s_70_82_or_61_largest_classes_whatever_their_ids(factor, expected):
    counts = torch.tensor(long_tail_counts(100, 500, factor))
    for order in (torch.arange(100), torch.randperm(100, generator=torch.Generator().manual_seed(0))):
        shuffled = counts[order]
        old, new = async_lt.phase_one_classes(shuffled)
        assert len(old) == expected
        assert torch.equal(shuffled[torch.cat([old, new])], counts)  # sorted; every class stands there once
        assert sorted([*old.tolist(), *new.tolist()]) == list(range(100))
        assert (shuffled[old] >= 20).all() and (shuffled[new] < 20).all()


def test_the_number_of_phase_one_classes_can_be_given_and_ties_go_by_id():
    old, new = async_lt.phase_one_classes(np.array([5, 50, 5, 90]), 3)
    assert old.tolist() == [3, 1, 0] and new.tolist() == [2]


@pytest.mark.parametrize("counts, num_old", [
    (long_tail_counts(100, 500, 10), None),  # the smallest class has 50: the rule gives C
    ([19, 3, 1], None),  # the rule gives 0
    ([50, 30, 3], 0), ([50, 30, 3], 3), ([50, 30, 3], -1), ([50, 30, 3], 4)])
def test_a_phase_without_classes_is_refused_and_the_flag_asked_for(counts, num_old):
    with pytest.raises(ValueError, match="--phase-one-classes between 1 and"):
        async_lt.phase_one_classes(counts, num_old)


# ---------------------------------------------------------------- samplers

def test_progressive_sampling_goes_linearly_from_instances_to_classes():
    counts = torch.tensor([6, 3, 1])
    at = lambda progress: async_lt.progressive_probabilities(counts, progress)
    assert at(0).tolist() == pytest.approx([0.6, 0.3, 0.1])
    assert at(1).tolist() == pytest.approx([1 / 3] * 3)
    assert torch.allclose(at(0.25), 0.75 * at(0) + 0.25 * at(1))
    assert all(at(i / 7).sum().item() == pytest.approx(1) for i in range(8))
    for bad_counts, progress in (([1, 2], -0.1), ([1, 2], 1.1), ([1, 2], math.nan), ([0, 0], 0.5), ([], 0.5),
                                 ([[1]], 0.5), ([2, -1], 0.5)):
        with pytest.raises(ValueError):
            async_lt.progressive_probabilities(torch.tensor(bad_counts), progress)


def test_weighted_sampling_has_the_given_frequencies_and_leaves_out_classes_of_probability_zero():
    targets = torch.tensor([2, 0, 3, 0, 1] * 4000 + [0] * 4000)
    probabilities = torch.tensor([0.2, 0.5, 0.3, 0.0])
    indices = async_lt.weighted_indices(targets, probabilities, torch.Generator().manual_seed(0))
    drawn = torch.bincount(targets[indices], minlength=4)
    assert len(indices) == len(targets) == 24000 and indices.dtype == torch.int64
    for count, p in zip(drawn.tolist(), probabilities.tolist()):
        assert abs(count - 24000 * p) <= 3 * math.sqrt(24000 * p * (1 - p))


def test_weighted_sampling_repeats_no_image_before_all_of_its_class_were_drawn():
    targets = torch.tensor([1] * 7 + [0] * 90 + [3] * 3)
    p = torch.tensor([0.2, 0.5, 0.0, 0.3])
    draw = lambda seed: async_lt.weighted_indices(targets, p, torch.Generator().manual_seed(seed))
    indices = draw(0)
    for class_id, size in ((1, 7), (0, 90), (3, 3)):
        drawn = indices[targets[indices] == class_id].tolist()
        cycles = [drawn[start:start + size] for start in range(0, len(drawn), size)]
        assert drawn and all(len(set(cycle)) == len(cycle) for cycle in cycles)
        assert size == 90 or len({tuple(cycle) for cycle in cycles}) > 1  # each is shuffled anew
    # classes are mixed over the epoch, not drawn one after the other
    assert len(set(targets[indices[:10]].tolist())) == 3
    assert torch.equal(indices, draw(0)) and not torch.equal(indices, draw(1))


# ---------------------------------------------------------------- memory bank

def slow_exemplars(features, k):
    """Eq. (2) to (5), one number at a time."""
    def cosine(a, b):
        return sum(x * y for x, y in zip(a, b)) / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))
    unit = [[x / math.sqrt(sum(y * y for y in row)) for x in row] for row in features.double().tolist()]
    center = [sum(column) / len(unit) for column in zip(*unit)]
    query, chosen = center, []
    while len(chosen) < min(k, len(unit)):
        chosen.append(max((i for i in range(len(unit)) if i not in chosen),
                          key=lambda i: cosine(query, unit[i])))
        weight = [math.exp(cosine(center, unit[i])) for i in chosen]
        z = [sum(w * unit[i][d] for w, i in zip(weight, chosen)) / sum(weight) for d in range(len(center))]
        query = [c + (c - value) for c, value in zip(center, z)]
    return chosen


def test_exemplars_are_those_of_a_slow_implementation_in_its_order():
    nearest_are_the_same = []
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        features = torch.randn(40, 8, generator=generator) + 0.7  # a class has a direction
        chosen = async_lt.select_exemplars(features, 10)
        assert chosen.dtype == torch.int64 and chosen.tolist() == slow_exemplars(features, 10)
        assert len(set(chosen.tolist())) == 10
        unit = F.normalize(features, dim=1)
        nearest = F.cosine_similarity(unit, unit.mean(0, keepdim=True)).topk(10).indices.tolist()
        assert chosen[0] == nearest[0]
        nearest_are_the_same.append(sorted(chosen.tolist()) == sorted(nearest))
        # an image's feature length says nothing
        scale = 0.1 + 20 * torch.rand(40, 1, generator=generator)
        assert torch.equal(async_lt.select_exemplars(scale * features, 10), chosen)
    assert not any(nearest_are_the_same)  # or the test would not see Eq. (3) to (5)


def test_more_exemplars_than_images_are_all_images_even_where_they_are_equal():
    assert sorted(async_lt.select_exemplars(torch.randn(5, 3), 9).tolist()) == [0, 1, 2, 3, 4]
    assert sorted(async_lt.select_exemplars(torch.ones(4, 3), 4).tolist()) == [0, 1, 2, 3]
    assert async_lt.select_exemplars(torch.randn(1, 3), 1).tolist() == [0]
    for features, k in ((torch.zeros(0, 3), 1), (torch.zeros(3), 1), (torch.zeros(3, 3), 0)):
        with pytest.raises(ValueError):
            async_lt.select_exemplars(features, k)


def test_choosing_exemplars_makes_no_tensor_larger_than_the_features():
    class Largest(TorchFunctionMode):
        numbers = 0

        def __torch_function__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                self.numbers = max(self.numbers, result.numel())
            return result
    features = torch.randn(1000, 16)
    with Largest() as largest:
        async_lt.select_exemplars(features, 5)
    assert largest.numbers == 16000


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
    for temperature in (0.1, 1.0):
        loss = async_lt.memory_retentive_loss(4 * old, 0.3 * new, temperature, similarity)
        assert loss.item() == pytest.approx(slow_retentive(old, new, temperature, similarity), rel=1e-4)
    default = async_lt.memory_retentive_loss(old, new).item()
    assert default == pytest.approx(slow_retentive(old, new), rel=1e-4)


@pytest.mark.parametrize("similarity, other", [("cos", math.exp(-1 / 0.1)), ("neg-sq", math.exp(-2 / 0.1))])
def test_memory_retentive_loss_is_small_where_nothing_moved(similarity, other):
    nodes = 3 * torch.eye(64)  # orthogonal: the other nodes have the same small attention, at sqrt(2) each
    loss = async_lt.memory_retentive_loss(nodes, nodes, 0.1, similarity).item()
    assert loss == pytest.approx(63 * other / (1 + 63 * other) * math.sqrt(2), rel=1e-3, abs=1e-7)
    assert loss < 0.005


@pytest.mark.parametrize("similarity", ["cos", "neg-sq", "self"])
def test_memory_retentive_gradient_is_finite_where_old_and_new_coincide_and_leaves_old_alone(similarity):
    old = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    old[3] = old[2]  # and two nodes of one graph coincide
    old.requires_grad_()
    new = old.detach().clone().requires_grad_()
    async_lt.memory_retentive_loss(old, new, similarity=similarity).backward()
    assert old.grad is None
    assert new.grad.isfinite().all()
    assert (new.grad.abs().sum() > 0) == (similarity != "self")  # through the attention, too
    with torch.inference_mode():
        assert async_lt.memory_retentive_loss(old, new, similarity=similarity).isfinite()


def test_memory_retentive_loss_keeps_what_was_learnt_and_at_temperature_one_it_does_not():
    old = F.normalize(torch.randn(64, 64, generator=torch.Generator().manual_seed(0)), dim=1)
    kept = {}
    for temperature in (0.1, 1.0):
        new = old.clone().requires_grad_()
        optimizer = torch.optim.SGD([new], lr=10.0)
        for _ in range(100):
            optimizer.zero_grad()
            async_lt.memory_retentive_loss(old, new, temperature).backward()
            optimizer.step()
        kept[temperature] = F.cosine_similarity(old, new.detach()).mean().item()
    assert kept[0.1] > 0.95
    assert kept[1.0] < 0.95  # why the default is not the literal reading; and these steps are not small


HAND = torch.tensor([[0.9, 0.95, 0.6, 0.3, 0.2], [0.2, 0.8, 0.0, -0.5, 0.1], [0.0, 0.0, -0.9, 0.9, 0.9]])


@pytest.mark.parametrize("k, margin, expected", [
    (2, 0.5, (0.2 + 0 + 0 + 0) / 4),  # .9 against .6 and .3; .8 against .1 and 0; the third is not old
    (1, 0.5, 0.2 / 2), (9, 0.5, 0.2 / 6),  # no more negatives than there are new classes
    (2, 0.9, (0.6 + 0.3 + 0.2 + 0.1) / 4)])
def test_margin_loss_by_hand(k, margin, expected):
    loss = async_lt.margin_loss(HAND, torch.tensor([0, 1, 2]), num_old=2, margin=margin, k=k)
    assert loss.item() == pytest.approx(expected, abs=1e-6)
    assert slow_margin(HAND, torch.tensor([0, 1, 2]), [0, 1], margin, k) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("cosines, targets", [
    # the margin is kept; an old class nearer than one's own does not count: that is what cross-entropy is for
    ([[0.9, 0.95, 0.39, 0.3], [0.1, 0.4, -0.2, -0.9]], [0, 1]),
    (HAND.tolist(), [2, 3, 4])])  # no old samples
def test_margin_loss_is_zero_and_so_is_its_gradient(cosines, targets):
    cosines = torch.tensor(cosines, requires_grad=True)
    loss = async_lt.margin_loss(cosines, torch.tensor(targets), num_old=2)
    loss.backward()
    assert loss == 0 and (cosines.grad == 0).all()


def test_margin_loss_is_blind_to_phase_two_samples():
    cosines = HAND.clone().requires_grad_()
    targets = torch.tensor([0, 1, 3])
    loss = async_lt.margin_loss(cosines, targets, num_old=2)
    loss.backward()
    assert (cosines.grad[2] == 0).all() and (cosines.grad[0] != 0).any()
    changed = HAND.clone()
    changed[2] = torch.tensor([-1.0, 1.0, 1.0, -1.0, 0.3])
    assert async_lt.margin_loss(changed, targets, num_old=2) == loss


@pytest.mark.parametrize("call", [
    lambda: async_lt.memory_retentive_loss(torch.zeros(2, 3), torch.zeros(2, 4)),
    lambda: async_lt.memory_retentive_loss(torch.zeros(2, 3), torch.zeros(3, 3)),
    lambda: async_lt.memory_retentive_loss(torch.zeros(3), torch.zeros(3)),
    lambda: async_lt.memory_retentive_loss(torch.zeros(2, 3), torch.zeros(2, 3), 0),
    lambda: async_lt.memory_retentive_loss(torch.zeros(2, 3), torch.zeros(2, 3), math.nan),
    lambda: async_lt.memory_retentive_loss(torch.zeros(2, 3), torch.zeros(2, 3), 0.1, "dot"),
    lambda: async_lt.margin_loss(torch.zeros(3), torch.zeros(3).long(), 1),
    lambda: async_lt.margin_loss(torch.zeros(2, 3), torch.zeros(3).long(), 1),
    lambda: async_lt.margin_loss(torch.zeros(2, 3), torch.zeros(2).long(), 0),
    lambda: async_lt.margin_loss(torch.zeros(2, 3), torch.zeros(2).long(), 3),
    lambda: async_lt.margin_loss(torch.zeros(2, 3), torch.zeros(2).long(), 1, k=0)])
def test_losses_refuse_bad_input(call):
    with pytest.raises(ValueError):
        call()


# ---------------------------------------------------------------- model and schedule

@pytest.mark.parametrize("arch", ["resnet14", "resnet18"])
def test_features_can_be_negative_and_the_scale_is_learnt(arch):
    torch.manual_seed(0)
    model = async_lt.AsyncNet(arch, 4, scale=7.0)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.ones_(module.weight)  # torchvision starts the last one at 0: no residual at all
            torch.nn.init.constant_(module.bias, -1.0)  # so that a residual's mean is negative
    logits, features = model(torch.rand(4, 3, 32, 32))
    assert (features < 0).any() and logits.shape == (4, 4)
    assert torch.allclose(logits, 7 * F.cosine_similarity(
        features[:, None], model.classifier.weight[None], dim=2), atol=1e-5)
    F.cross_entropy(logits, torch.tensor([0, 1, 2, 3])).backward()
    assert "classifier.scale" in dict(model.named_parameters()) and model.classifier.scale.grad != 0


def test_unknown_classes_take_no_part_in_the_softmax():
    torch.manual_seed(0)
    model = async_lt.AsyncNet("resnet14", 5).eval()
    images = torch.rand(3, 3, 8, 8)
    everything, _ = model(images)
    model.known.copy_(torch.tensor([False, True, False, True, True]))
    logits, _ = model(images)
    assert (logits[:, [0, 2]] == -math.inf).all()
    assert torch.allclose(logits.softmax(1)[:, [1, 3, 4]], everything[:, [1, 3, 4]].softmax(1))
    F.cross_entropy(logits, torch.tensor([1, 3, 4])).backward()
    gradient = model.classifier.weight.grad
    assert gradient.isfinite().all() and (gradient[[0, 2]] == 0).all() and (gradient[[1, 3, 4]] != 0).any()


def test_imprinted_rows_are_class_means_as_long_as_the_other_rows():
    torch.manual_seed(0)
    classifier, features = CosineClassifier(6, 5, 10.0), torch.randn(9, 6)
    targets, before = torch.tensor([4, 0, 4, 2, 4, 0, 2, 2, 2]), classifier.weight.detach().clone()
    classifier.imprint(features, targets, torch.tensor([4, 0, 2]), torch.tensor([1, 3]))
    assert torch.equal(classifier.weight[[1, 3]], before[[1, 3]])
    length = (before[1].norm() + before[3].norm()) / 2
    for c in (0, 2, 4):
        mean = torch.stack([z / z.norm() for z, y in zip(features, targets) if y == c]).mean(0)
        assert torch.allclose(classifier.weight[c], length * mean / mean.norm(), atol=1e-6)
    assert classifier.weight.requires_grad


def test_the_step_schedule_multiplies_by_a_hundredth_at_160_and_180_of_200_epochs():
    cifar, places = (async_lt.parse_args(["--dataset", name]) for name in ("cifar100_lt", "places_lt"))
    assert (cifar.epochs, cifar.schedule, places.epochs, places.schedule) == (200, "step", 60, "step")
    rate = lambda args, epoch: async_lt.step_lr(epoch / args.epochs, 1, args.milestones, args.lr_gamma)
    rates = [rate(cifar, epoch) for epoch in range(200)]
    assert rates == pytest.approx([1] * 160 + [1e-2] * 20 + [1e-4] * 20)
    assert [rate(places, epoch) for epoch in range(60)] == pytest.approx([1] * 20 + [1e-2] * 20 + [1e-4] * 20)


def test_the_cosine_schedule_starts_at_lr_and_ends_at_zero():
    assert async_lt.cosine_lr(0, 0.2) == 0.2
    assert async_lt.cosine_lr(1 / 3, 0.2) == pytest.approx(0.15)
    assert async_lt.cosine_lr(0.5, 0.2) == pytest.approx(0.1)
    assert async_lt.cosine_lr(1, 0.2) == pytest.approx(0, abs=1e-12)


def test_recipes_are_the_papers_where_it_says_so_and_flags_win():
    settings = lambda *flags: async_lt.parse_args(list(flags))
    cifar = settings("--dataset", "cifar100_lt")
    assert (cifar.arch, cifar.lr, cifar.batch_size, cifar.weight_decay) == ("resnet32", 0.1, 64, 5e-4)
    places = settings("--dataset", "places_lt")
    assert (places.arch, places.pretrained, places.epochs) == ("resnet152", True, 60)
    assert (places.lr, places.feature_lr, places.weight_decay) == (0.05, 5e-4, 5e-4)
    for name, epochs in (("imagenet_lt", 90), ("inat18", 200)):
        large = settings("--dataset", name)
        assert (large.schedule, large.lr, large.epochs, large.weight_decay) == ("cosine", 0.05, epochs, 5e-4)
    assert settings().memory_per_class == 10 and settings("--memory-per-class", "2").memory_per_class == 2
    assert settings("--dataset", "cifar100_lt", "--quick", "--epochs", "3").epochs == 3


# ---------------------------------------------------------------- stages

def test_scores_are_in_the_data_set_s_own_class_ids(full):
    data = load(str(full.npz))
    images = normalise(torch.from_numpy(data.test.images).permute(0, 3, 1, 2), data.mean, data.std)
    for file, stage in zip(FILES, full.result["stages"]):
        model, saved = async_lt.load_model(full.folder / file)
        assert not model.training and saved["class_names"] == data.class_names
        with torch.no_grad():
            expected = scores(model(images)[0], torch.from_numpy(data.test.targets), data.class_counts)
        assert stage["per_class_accuracy"] == expected["per_class_accuracy"]
        assert stage["ece"] == pytest.approx(expected["ece"], abs=1e-3)
    plain, phase_one, both = (stage["per_class_accuracy"] for stage in full.result["stages"])
    # colours are easily learnt, so any mixing up of ids would show
    assert min(plain[c] for c in OLD) > 80 and min(both) > 80
    assert phase_one == [0, pytest.approx(100, abs=20), 0, pytest.approx(100, abs=20), 0]


def test_phase_one_sees_and_predicts_its_own_classes_alone(full):
    data = load(str(full.npz))
    targets = torch.from_numpy(data.train.targets)
    assert [len(epoch) for epoch in full.drawn["phase one"]] == [90] * 6  # as many as X1 has
    assert set(targets[torch.cat(full.drawn["phase one"])].tolist()) == set(OLD)
    assert set(targets[torch.cat(full.drawn["plain"])].tolist()) == {0, 1, 2, 3, 4}
    assert [len(epoch) for epoch in full.drawn["plain"]] == [113] * 6
    for _, _, logits, *_ in full.steps["phase one"]:
        assert (logits[:, NEW] == -math.inf).all() and logits[:, OLD].isfinite().all()


def test_plain_and_phase_one_sample_progressively_or_by_instance(tmp_path):
    tiny_npz(tmp_path / "tiny.npz", (600, 200, 40))
    targets = torch.from_numpy(load(str(tmp_path / "tiny.npz")).train.targets)
    counts = torch.tensor([600, 200, 40])
    flags = ("--plain", "--epochs", "3", "--batch-size", "840")

    for epoch, drawn in enumerate(observed_run(tmp_path, *flags).drawn["plain"]):
        p = async_lt.progressive_probabilities(counts, epoch / 2)
        three_sigma = 3 * (840 * p * (1 - p)).sqrt()
        assert ((torch.bincount(targets[drawn]) - 840 * p).abs() <= three_sigma).all()
    seen = observed_run(tmp_path, *flags, "--sampling", "instance", name="instance")
    for drawn in seen.drawn["plain, instance"]:
        assert sorted(drawn.tolist()) == list(range(840))  # each image once


def test_plain_has_epochs_and_a_learning_rate_of_its_own(tmp_path):
    flags = ("--epochs", "1", "--phase-two-epochs", "1", "--batch-size", "64")
    run(tmp_path, *flags, "--plain-epochs", "2", "--plain-lr", "0.03", name="own")
    run(tmp_path, "--plain", "--epochs", "2", "--lr", "0.03", "--batch-size", "64", name="plain")
    run(tmp_path, *flags, "--no-plain", name="phases")
    assert same_weights(tmp_path / "own" / "plain.pt", tmp_path / "plain" / "plain.pt")
    assert same_weights(tmp_path / "own" / "model.pt", tmp_path / "phases" / "model.pt")


def test_memory_holds_k_chosen_images_of_each_phase_one_class_and_none_of_the_others(full):
    data = load(str(full.npz))
    targets = torch.from_numpy(data.train.targets)
    D = full.drawn["two phases"][0]
    assert all(sorted(epoch.tolist()) == sorted(D.tolist()) for epoch in full.drawn["two phases"])
    assert len({tuple(epoch.tolist()) for epoch in full.drawn["two phases"]}) == 15  # shuffled anew
    assert len(set(D.tolist())) == len(D)
    assert torch.bincount(targets[D]).tolist() == [8, 8, 3, 8, 12]  # 8 of 60 and of 30, and all of X2
    model, _ = async_lt.load_model(full.folder / "phase_one.pt")
    images = torch.from_numpy(data.train.images).permute(0, 3, 1, 2)
    images = normalise(images, data.mean, data.std)  # not augmented
    for c in OLD:
        own = (targets == c).nonzero().flatten()
        with torch.no_grad():
            chosen = slow_exemplars(model.backbone(images[own]), 8)
        assert set(own[chosen].tolist()) == {i for i in D.tolist() if targets[i] == c}


def test_the_old_model_is_bit_identical_after_phase_two(full, tmp_path):
    args = async_lt.parse_args(["--dataset", str(full.npz), "--arch", "resnet14", "--device", "cpu", *SHORT,
                                "--out", str(tmp_path / "run")])
    old_model, _ = async_lt.load_model(full.folder / "phase_one.pt")
    old_model.requires_grad_(False)
    run = Run("async_lt", args)
    run.open()
    with run:
        async_lt.train_phase_two(run, old_model, torch.tensor(OLD), torch.tensor(NEW))
    state, saved = old_model.state_dict(), weights(full.folder / "phase_one.pt")
    assert state.keys() == saved.keys() and all(torch.equal(state[key], saved[key]) for key in saved)
    assert not any(module.training for module in old_model.modules())
    assert all(p.grad is None and not p.requires_grad for p in old_model.parameters())

    changed = weights(full.folder / "model.pt")
    assert not torch.equal(changed["backbone.conv1.weight"], saved["backbone.conv1.weight"])
    assert not torch.equal(changed["backbone.bn1.running_mean"], saved["backbone.bn1.running_mean"])


def test_phase_two_starts_from_phase_one_with_imprinted_rows(full, short):
    start, saved = full.start["two phases"], weights(full.folder / "phase_one.pt")
    for key in saved:
        if key not in ("classifier.weight", "known"):
            assert torch.equal(start[key], saved[key]), key  # the scale is carried over too
    assert start["known"].all() and saved["known"].nonzero().flatten().tolist() == OLD
    rows = start["classifier.weight"]
    assert torch.equal(rows[OLD], saved["classifier.weight"][OLD])
    data, (model, _) = load(str(full.npz)), async_lt.load_model(full.folder / "phase_one.pt")
    for c in NEW:
        images = torch.from_numpy(data.train.images[data.train.targets == c]).permute(0, 3, 1, 2)
        with torch.no_grad():
            mean = F.normalize(model.backbone(normalise(images, data.mean, data.std)), dim=1).mean(0)
        assert torch.allclose(rows[c], rows[OLD].norm(dim=1).mean() * F.normalize(mean, dim=0), atol=1e-4)
    # without imprinting they are random, not what weight decay left of phase one's unused rows
    checkpoint = str(short / "run" / "phase_one.pt")
    seen = observed_run(short, *SHORT, "--no-imprint", "--no-plain", "--phase-one-checkpoint", checkpoint,
                        name="random rows")
    rows, saved = seen.start["two phases"]["classifier.weight"], weights(checkpoint)["classifier.weight"]
    assert torch.equal(rows[OLD], saved[OLD])
    assert F.cosine_similarity(rows[NEW], saved[NEW]).abs().max() < 0.5
    assert rows[NEW].abs().max() <= math.sqrt(6 / (64 + 5))  # Glorot uniform


def expected_loss(step, old_model, old, weight=1.0, margin=True, **graph):
    """Eq. (9) on an observed batch by the slow losses; old: class ids, weight: of the graph."""
    images, targets, logits, features, scale, _ = step
    loss = -sum(math.log(p) for p in logits.double().softmax(1).gather(1, targets[:, None])) / len(targets)
    loss += slow_margin(logits / scale, targets, old) if margin else 0
    if weight:
        with torch.no_grad():
            loss += weight * slow_retentive(old_model.backbone(images), features, **graph)
    return loss


def test_phase_two_minimises_equation_9_with_lambda_the_root_of_c1_by_c2(full):
    old_model, _ = async_lt.load_model(full.folder / "phase_one.pt")
    assert len(full.steps["two phases"]) == 15 * 3  # 39 images in batches of 16, the last one partial
    for step in full.steps["two phases"][::4]:
        assert step[-1] == pytest.approx(expected_loss(step, old_model, OLD, math.sqrt(2 / 3)), rel=1e-3)
    for stage in ("plain", "phase one"):  # Eq. (1)
        for step in full.steps[stage][::4]:
            assert step[-1] == pytest.approx(expected_loss(step, None, OLD, 0, margin=False), rel=1e-3)


@pytest.mark.parametrize("flags, settings", [
    (["--no-margin"], dict(margin=False)), (["--no-retentive"], dict(weight=0)),
    (["--lambda-scale", "2.5"], dict(weight=2.5 * math.sqrt(2 / 3))),
    (["--graph-similarity", "neg-sq", "--temperature", "0.5"], dict(similarity="neg-sq", temperature=0.5)),
    (["--graph-similarity", "self"], dict(similarity="self"))])
def test_every_ablation_flag_changes_its_term_alone(short, flags, settings):
    checkpoint = str(short / "run" / "phase_one.pt")
    seen = observed_run(short, *SHORT, *flags, "--phase-one-checkpoint", checkpoint, "--no-plain",
                        name=" ".join(flags))
    old_model, _ = async_lt.load_model(checkpoint)
    settings = {"weight": math.sqrt(2 / 3), **settings}
    for step in seen.steps["two phases"]:
        assert step[-1] == pytest.approx(expected_loss(step, old_model, OLD, **settings), rel=1e-3)


def test_lambda_is_2_035_for_the_294_and_71_classes_of_places_lt(tmp_path):
    tiny_npz(tmp_path / "tiny.npz", counts=[1] * 365, test=1)
    seen = observed_run(tmp_path, "--no-plain", "--phase-one-classes", "294", "--epochs", "1",
                        "--phase-two-epochs", "1", "--batch-size", "73", "--memory-per-class", "1")
    old_model, _ = async_lt.load_model(tmp_path / "run" / "phase_one.pt")
    step = seen.steps["two phases"][2]
    without, once = (expected_loss(step, old_model, range(294), weight) for weight in (0, 1))
    assert (step[-1] - without) / (once - without) == pytest.approx(2.035, abs=0.005)


def test_lambda_zero_is_no_retentive_loss_bit_for_bit(short):
    flags = (*SHORT, "--no-plain", "--phase-one-checkpoint", str(short / "run" / "phase_one.pt"))
    run(short, *flags, "--lambda-scale", "0", name="zero")
    run(short, *flags, "--no-retentive", name="off")
    assert same_weights(short / "zero" / "model.pt", short / "off" / "model.pt")
    assert not same_weights(short / "zero" / "model.pt", short / "run" / "model.pt")


def test_plain_alone_no_plain_and_a_phase_one_checkpoint_give_the_full_run_s_nets(short):
    names = lambda result: [stage["name"] for stage in result["stages"]]
    whole = json.loads((short / "run" / "result.json").read_text())
    plain = run(short, *SHORT, "--plain", name="plain")
    assert names(plain) == ["plain"] and plain["all"] == whole["stages"][0]["all"]
    assert not (short / "plain" / "phase_one.pt").exists() and not (short / "plain" / "model.pt").exists()
    assert same_weights(short / "plain" / "plain.pt", short / "run" / "plain.pt")
    without = run(short, *SHORT, "--no-plain", name="without")
    assert names(without) == STAGES[1:] and not (short / "without" / "plain.pt").exists()
    checkpoint = str(short / "without" / "phase_one.pt")
    later = run(short, *SHORT, "--no-plain", "--phase-one-checkpoint", checkpoint, name="later")
    assert names(later) == STAGES[1:]
    for name, result in (("without", without), ("later", later)):
        assert same_weights(short / name / "model.pt", short / "run" / "model.pt")
        assert [stage["per_class_accuracy"] for stage in result["stages"]] == [
            stage["per_class_accuracy"] for stage in whole["stages"][1:]]
        assert result["best_all"] == whole["best_all"]
    lines = (short / "later" / "log.jsonl").read_text().splitlines()[1:]
    assert {json.loads(line)["stage"] for line in lines} == {"two phases"}  # nothing else was trained


def test_phases_have_learning_rates_and_epochs_of_their_own_and_so_has_the_backbone(tmp_path, monkeypatch):
    rates = []

    class Recorder(torch.optim.SGD):
        def step(self):
            rates.append([group["lr"] for group in self.param_groups])
            super().step()
    monkeypatch.setattr(torch.optim, "SGD", Recorder)
    flags = ("--no-plain", "--epochs", "2", "--batch-size", "128", "--schedule", "step", "--milestones",
             "0.5", "--lr-gamma", "0.1", "--lr", "0.2", "--phase-two-lr", "0.4")  # a step an epoch
    run(tmp_path, *flags, "--phase-two-epochs", "4", "--feature-lr", "0.02")
    expected = [[0.02, 0.2], [0.002, 0.02]] + [[0.02, 0.4]] * 2 + [[0.002, 0.04]] * 2
    assert np.allclose(rates, expected)
    rates.clear()
    run(tmp_path, *flags, "--phase-two-epochs", "1", name="one rate")
    assert np.allclose(rates, [[0.2, 0.2], [0.02, 0.02], [0.4, 0.4]])


def test_a_class_with_fewer_images_than_its_memory_gives_all_and_one_note_says_so(short, capsys):
    flags = (*SHORT, "--no-plain", "--phase-one-checkpoint", str(short / "run" / "phase_one.pt"))
    seen = observed_run(short, *flags, "--memory-per-class", "40", name="forty")
    targets = torch.from_numpy(load(str(seen.npz)).train.targets)
    assert torch.bincount(targets[seen.drawn["two phases"][0]]).tolist() == [8, 40, 3, 30, 12]
    assert capsys.readouterr().out.count("note: a phase-one class with fewer than 40 images") == 1


# ---------------------------------------------------------------- gradients

def test_gradient_norms_are_those_of_the_direct_gradient(tmp_path):
    data = load(tiny_npz(tmp_path / "tiny.npz"))
    torch.manual_seed(0)
    model = async_lt.AsyncNet("resnet14", 5)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    images = normalise(torch.from_numpy(data.train.images[3:23]).permute(0, 3, 1, 2), data.mean, data.std)
    targets = torch.from_numpy(data.train.targets[3:23])
    batches = zip(images.split(7), targets.split(7))  # a whole over batches of other sizes
    found = gradient_norms(model, batches, torch.tensor([1, 3]), contextlib.nullcontext)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    flat = lambda loss: torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
    losses = lambda: F.cross_entropy(model.eval()(images)[0], targets, reduction="none")
    of_head = torch.isin(targets, torch.tensor([1, 3]))
    whole, head, tail = (flat((part * losses()).mean()) for part in (torch.ones(20), of_head, ~of_head))
    assert found == pytest.approx({
        "cosine_head": (head @ whole / head.norm() / whole.norm()).item(), "norm_head": head.norm().item(),
        "cosine_tail": (tail @ whole / tail.norm() / whole.norm()).item(), "norm_tail": tail.norm().item(),
        "norm": whole.norm().item()}, rel=1e-3)


def test_tracking_gradients_logs_them_every_epoch_and_changes_no_weight(short):
    run(short, *SHORT, "--track-gradients", name="tracked")
    for file in FILES:
        assert same_weights(short / "tracked" / file, short / "run" / file)
    rows = [json.loads(line) for line in (short / "tracked" / "log.jsonl").read_text().splitlines()[1:]]
    assert len(rows) == 6
    for row in rows:
        assert {"cosine_head", "cosine_tail", "norm_head", "norm_tail", "norm"} <= row.keys()
        assert row["norm"] <= row["norm_head"] + row["norm_tail"] + 1e-6
        if row["stage"] == "phase one":  # no tail yet
            assert row["norm_tail"] == 0 and row["cosine_head"] == pytest.approx(1, abs=1e-3)
        else:
            assert row["norm_tail"] > 0 and abs(row["cosine_tail"]) <= 1.001
    assert "norm" not in json.loads((short / "run" / "log.jsonl").read_text().splitlines()[1])


def test_the_gradients_probe_is_the_same_512_images_for_every_epoch_and_net(tmp_path, monkeypatch):
    tiny_npz(tmp_path / "tiny.npz", counts=(400, 150, 50))
    probes = []
    monkeypatch.setattr(common.run, "gradient_norms", lambda model, batches, head, autocast:
                        probes.append([(y.tolist(), head.tolist()) for _, y, *_ in batches]) or {})
    run(tmp_path, "--plain", "--phase-one-classes", "2", "--track-gradients", "--epochs", "2",
        "--batch-size", "600")
    assert len(probes) == 2 and probes[0] == probes[1]  # one probe, or epochs could not be compared
    assert sum(len(targets) for targets, _ in probes[0]) == 512 and probes[0][0][1] == [0, 1]


def test_figure_1_s_balanced_run_has_the_head_classes_of_the_long_tailed_one(tmp_path, monkeypatch):
    tiny_npz(tmp_path / "tiny.npz", counts=[250] * 5)
    heads = []
    monkeypatch.setattr(common.run, "gradient_norms", lambda model, batches, head, autocast:
                        heads.append(head.tolist()) or {})
    flags = ("--plain", "--epochs", "1", "--batch-size", "1250", "--track-gradients")
    run(tmp_path, *flags, name="balanced")
    run(tmp_path, *flags, "--imb-factor", "100", name="long-tailed")  # 250 79 25 7 2
    assert heads == [[0, 1, 2], [0, 1, 2]]


# ---------------------------------------------------------------- bad input

refused = functools.partial(one_error, run)


@pytest.mark.parametrize("flags, words", [
    (["--phase-one-classes", "0"], "--phase-one-classes: must be at least 1"),
    (["--phase-one-classes", "99"], "choose --phase-one-classes between 1 and 4"),
    (["--phase-one-classes", "5"], "would have 5 of the 5 classes"),
    (["--temperature", "0"], "--temperature: must be positive"),
    (["--scale", "0"], "--scale"),
    (["--lambda-scale", "1e20"], "--lambda-scale: must be 0, or lie in"),
    (["--graph-similarity", "dot"], "invalid choice"),
    (["--memory-per-class", "0"], "--memory-per-class"),
    (["--phase-two-lr", "-0.1"], "--phase-two-lr"),
    (["--plain-lr", "nan"], "--plain-lr"),
    (["--feature-lr", "nan"], "--feature-lr"),
    (["--milestones", "160", "180"], "--milestones: must lie in [0, 1]"),  # these would never be reached
    (["--plain", "--phase-one-checkpoint", "phase_one.pt"], "leave out --phase-one-checkpoint"),
    (["--no-retentive", "--graph-similarity", "self"], "leave out --no-retentive"),
    (["--evaluate", "a.pt", "--phase-one-checkpoint", "phase_one.pt"], "leave out --phase-one-checkpoint"),
    (["--arch", "resnet18", "--pretrained"], "no ImageNet weights"),
])
def test_bad_input_is_one_error_line_and_writes_nothing(tmp_path, capsys, flags, words):
    assert words in refused(capsys, tmp_path, *flags)


def test_a_checkpoint_of_another_split_or_architecture_is_refused(short, tmp_path, capsys):
    checkpoint = ("--phase-one-checkpoint", str(short / "run" / "phase_one.pt"))
    assert "trained on other classes than the 3" in refused(
        capsys, tmp_path, *checkpoint, "--phase-one-classes", "3")
    assert "trained on other classes" in refused(  # a net of all classes is none of phase one
        capsys, tmp_path, "--phase-one-checkpoint", str(short / "run" / "model.pt"))
    assert "a resnet14, not a resnet20" in refused(capsys, tmp_path, *checkpoint, "--arch", "resnet20")
    other = tiny_npz(tmp_path / "other.npz", (60, 8, 30, 3, 12))  # as many classes; 0 and 2 are the largest
    assert "trained on other classes than the 2" in refused(capsys, tmp_path, *checkpoint, "--dataset", other)


def test_a_phase_one_net_meets_classes_of_other_ids_by_their_names(tmp_path):
    tiny_npz(tmp_path / "tiny.npz")
    arrays, there = dict(np.load(tmp_path / "tiny.npz")), np.array([3, 0, 4, 2, 1])  # id there of each class
    names = np.array(["ant", "bee", "cat", "dog", "eel"])
    np.savez(tmp_path / "tiny.npz", **arrays, class_names=names)
    arrays |= {key: there[arrays[key]] for key in ("y_train", "y_test")}
    np.savez(tmp_path / "other.npz", **arrays, class_names=names[there.argsort()])
    other = ("--dataset", str(tmp_path / "other.npz"))
    here = run(tmp_path, *SHORT, "--no-plain")
    phase_one = str(tmp_path / "run" / "phase_one.pt")
    later = run(tmp_path, *other, *SHORT, "--no-plain", "--phase-one-checkpoint", phase_one, name="later")
    before, after = (result["stages"][0]["per_class_accuracy"] for result in (here, later))
    assert [after[there[c]] for c in range(5)] == before
    assert max(before) > 0 and weights(tmp_path / "later" / "model.pt")["known"].all()


# ---------------------------------------------------------------- found by tests, mended

@pytest.mark.parametrize("broken", ["a/03.png", "b/02.png"])  # of phase one, of the rest
def test_unreadable_images_are_left_out_of_the_memory_bank_and_the_imprinting(tmp_path, broken):
    image_folder(tmp_path, counts=(21, 5), test=2)
    (tmp_path / "train" / broken).write_bytes(b"not an image")
    result = run(tmp_path, "--dataset", "folder", "--data-dir", str(tmp_path), "--workers", "0", "--no-plain",
                 "--skip-bad-images", "--epochs", "1", "--phase-two-epochs", "1", "--memory-per-class", "20")
    assert [stage["name"] for stage in result["stages"]] == STAGES[1:]
    assert all(value.isfinite().all() for value in weights(tmp_path / "run" / "model.pt").values())


def test_a_net_that_diverges_in_the_last_step_of_an_epoch_ends_the_run_with_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:  # one step an epoch: its loss was still finite
        run(tmp_path, "--plain", "--lr", "1e12", "--batch-size", "256", "--epochs", "2")
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
