"""The room common/evaluate.py: groups, accuracy, calibration, nearest class mean, prediction, tables."""
import contextlib

import numpy as np
import pytest
import torch

from common.data import long_tail_counts
from common.evaluate import (calibration_error, class_sums, classifier_by_frequency, classifier_weight_norms,
                             head_median_tail, nearest_class_mean, predict, scores, shot_accuracy,
                             shot_groups, table)


# ---------------------------------------------------------------- groups and accuracy

def test_groups_are_over_100_from_20_to_100_and_under_20_or_as_asked_for():
    groups = shot_groups([101, 100, 20, 19, 0, 5000])
    assert {name: mask.tolist() for name, mask in groups.items()} == {
        "many": [True, False, False, False, False, True],
        "medium": [False, True, True, False, False, False],
        "few": [False, False, False, True, True, False]}

    groups = shot_groups(np.array([11, 10, 5, 4]), many=10, few=5)
    assert torch.stack(list(groups.values())).int().tolist() == [[1, 0, 0, 0], [0, 1, 1, 0], [0, 0, 0, 1]]

    for counts, boundaries in (([], {}), ([[5, 6]], {}), (5, {}), ([5, 6], dict(many=10, few=11))):
        with pytest.raises(ValueError):
            shot_groups(counts, **boundaries)


@pytest.mark.parametrize("factor, sizes", [(100, [35, 35, 30]), (50, [41, 41, 18]), (10, [69, 31, 0])])
def test_groups_of_cifar100_lt_have_the_published_sizes(factor, sizes):
    groups = shot_groups(torch.tensor(long_tail_counts(100, 500, factor)))
    assert [int(groups[name].sum()) for name in ("many", "medium", "few")] == sizes


def mean(values):
    return sum(values) / len(values) if values else None


def slow_shot_accuracy(predictions, targets, class_counts):
    """The definition, one image and one class at a time."""
    hits = [100 * int(p == t) for p, t in zip(predictions, targets)]
    per_class = [mean([hit for hit, t in zip(hits, targets) if t == c]) for c in range(len(class_counts))]

    result = {"all": pytest.approx(mean(hits)), "per_class": pytest.approx(per_class), "group_sizes": {}}
    inside = {"many": lambda n: n > 100, "medium": lambda n: 20 <= n <= 100, "few": lambda n: n < 20}
    for name, belongs in inside.items():
        members = [c for c, n in enumerate(class_counts) if belongs(n)]
        result["group_sizes"][name] = len(members)
        result[name] = pytest.approx(mean([per_class[c] for c in members if per_class[c] is not None]))
    return result


@pytest.mark.parametrize("class_counts", [[500, 101, 100, 60, 20, 19, 3], [3, 500, 20, 19, 101, 60, 100],
                                          [500] * 7, [3, 3, 3, 500, 3, 3, 3]])
def test_accuracy_is_that_of_a_slow_loop(class_counts):
    rng = np.random.RandomState(0)
    for _ in range(5):
        targets = rng.randint(0, rng.randint(1, 8), 40)  # often not every class is tested
        predictions = np.where(rng.rand(40) < 0.5, targets, rng.randint(0, 7, 40))
        expected = slow_shot_accuracy(predictions.tolist(), targets.tolist(), class_counts)
        for as_type in (torch.tensor, lambda values: values, np.ndarray.tolist):
            assert shot_accuracy(as_type(predictions), as_type(targets), class_counts) == expected


def test_bad_predictions_are_refused():
    for predictions, targets in (([0, 1], [0]), ([], []), ([[0]], [[0]]), ([0], [2]), ([0], [-1])):
        with pytest.raises(ValueError):
            shot_accuracy(torch.tensor(predictions).long(), torch.tensor(targets).long(), [50, 50])


def test_head_median_and_tail_go_by_rank_and_leave_untested_classes_out():
    accuracy, counts = [10.0, 20.0, None, 40.0, 90.0], [7, 30, 7, 500, 2]  # ranks: 3, 1, 0, 2, 4
    assert head_median_tail(accuracy, counts, (2 / 5, 4 / 5)) == {"head": 30.0, "median": 10.0, "tail": 90.0}
    assert head_median_tail(accuracy, counts, (0, 1)) == {"head": None, "median": 40.0, "tail": None}

    places = head_median_tail([float(c) for c in range(365)], list(range(365, 0, -1)), (131 / 365, 259 / 365))
    assert places == {"head": 65.0, "median": (131 + 258) / 2, "tail": (259 + 364) / 2}

    for given, ends in ((5, (0.8, 0.4)), (5, (-0.1, 0.5)), (5, (0.5, 1.1)), (4, (0.2, 0.4))):
        with pytest.raises(ValueError):
            head_median_tail(accuracy[:given], counts, ends)


# ---------------------------------------------------------------- calibration

def slow_bins(probabilities, targets, bins):
    """Guo et al., sections 2 and 3: each bin (lo, hi]'s images, as lists of confidences and of hits."""
    images = [(max(p), float(p.index(max(p)) == t)) for p, t in zip(probabilities.tolist(), targets.tolist())]
    inside = [[image for image in images if b / bins < image[0] <= (b + 1) / bins] for b in range(bins)]
    return [([confidence for confidence, _ in part], [hit for _, hit in part]) for part in inside]


def random_logits(num_classes, n=300):
    generator = torch.Generator().manual_seed(num_classes)
    logits = 2 * torch.randn(n, num_classes, generator=generator, dtype=torch.float64)
    return logits, torch.randint(0, num_classes, (n,), generator=generator)


@pytest.mark.parametrize("num_classes, bins", [(2, 15), (10, 15), (10, 1), (3, 40)])
def test_calibration_is_that_of_a_slow_loop(num_classes, bins):
    logits, targets = random_logits(num_classes)
    probabilities = logits.softmax(1)
    gaps = [(len(hits), 100 * abs(mean(hits) - mean(confidences)))
            for confidences, hits in slow_bins(probabilities, targets, bins) if hits]
    expected = sum(n * gap for n, gap in gaps) / 300, max(gap for _, gap in gaps)
    asked = () if bins == 15 else (bins,)
    assert calibration_error(probabilities, targets, *asked) == pytest.approx(expected, abs=1e-9)
    assert calibration_error(probabilities.float(), targets, *asked) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_bin_edge_is_right_closed(dtype):
    for i in range(8, 15):
        edge = i / 15
        above = edge + 1e-3
        probabilities = torch.tensor([[edge, 1 - edge], [above, 1 - above]], dtype=torch.float64).to(dtype)
        ece, _ = calibration_error(probabilities, torch.tensor([0, 1]))
        assert ece == pytest.approx(100 * (1 - edge + above) / 2, abs=1e-3), i  # two bins, or the gaps cancel
    assert calibration_error(torch.eye(2, dtype=dtype), torch.tensor([0, 0])) == (50, 50)  # certainty has one


def test_bad_probabilities_are_refused():
    good, targets = torch.full((3, 2), 0.5), torch.tensor([0, 1, 0])
    nan = torch.tensor([[0.5, 0.5], [float("nan")] * 2, [0.5, 0.5]])
    for bad in (2 * good, good - 1, torch.tensor([[1.5, -0.5]] * 3), good[:2], good[0], nan):
        with pytest.raises(ValueError):
            calibration_error(bad, targets)
    for bad in ((good[:0], targets[:0]), (good, targets, 0)):
        with pytest.raises(ValueError):
            calibration_error(*bad)


# ---------------------------------------------------------------- nearest class mean

def slow_nearest_class_mean(train, train_targets, test, num_classes):
    """The largest cosine with a class's mean of unit features, one image at a time."""
    unit = lambda vector: vector / vector.norm()
    means = [sum(unit(v) for v, t in zip(train, train_targets) if t == c) for c in range(num_classes)]
    return [max(range(num_classes), key=lambda c: (v @ unit(means[c])).item()) for v in test]


def random_features(seed=0, num_classes=5):
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(0, num_classes, (30,), generator=generator)
    targets = torch.cat([torch.arange(num_classes), drawn])
    # lengths differ a hundredfold: means of features that were not made unit first would be other means
    lengths = 10 ** (2 * torch.rand(len(targets), 1, generator=generator))
    train = lengths * torch.randn(len(targets), 4, generator=generator)
    return train, targets, torch.randn(80, 4, generator=generator)


@pytest.mark.parametrize("seed", range(3))
def test_nearest_class_mean_is_that_of_a_slow_loop(seed):
    train, targets, test = random_features(seed)
    found = nearest_class_mean(train, targets, test, 5)
    assert found.tolist() == slow_nearest_class_mean(train, targets, test, 5)
    assert torch.equal(nearest_class_mean(100 * train, targets, 0.01 * test, 5), found)  # cosine: no lengths


def test_nearest_class_mean_refuses_what_has_no_mean():
    train, targets, test = random_features()
    with pytest.raises(ValueError, match="needs a training feature"):
        nearest_class_mean(train, targets, test, 6)
    for bad in ((train, targets, test[:, :3], 5), (train[:-1], targets, test, 5), (train, targets, test, 4)):
        with pytest.raises(ValueError):
            nearest_class_mean(*bad)


# ---------------------------------------------------------------- what a net gives

class Passing(torch.nn.Module):
    """Its images are the features; logits are twice those. Dropout tells training mode from eval mode."""

    def forward(self, images):
        images = torch.nn.functional.dropout(images, training=self.training)
        return 2 * images, images


def batches_of(images, targets):
    """Batches of four, with one between them of which no image could be read: its share is 0."""
    batches = [(*parts, 1.0, True) for parts in zip(images.split(4), targets.split(4))]
    return [batches[0], (torch.ones_like(images[:1]), targets[:1], 0, True), *batches[1:]]


def test_predict_keeps_the_order_of_the_batches():
    images, targets, model = torch.randn(10, 3), torch.arange(10), Passing().train()
    logits, features, found = predict(model, batches_of(images, targets), contextlib.nullcontext)
    assert torch.equal(logits, 2 * images) and torch.equal(features, images)  # no dropout: eval mode
    assert torch.equal(found, targets) and not model.training


def test_predict_gives_float32_without_gradients_under_autocast():
    model = torch.nn.Linear(3, 2)
    with_features = torch.nn.Module()
    with_features.forward = lambda images: (model(images), model(images))
    logits, features, _ = predict(with_features, [(torch.randn(4, 3), torch.zeros(4))],
                                  lambda: torch.autocast("cpu", torch.bfloat16))
    for output in (logits, features):
        assert output.dtype == torch.float32 and not output.requires_grad
        assert torch.equal(output, output.bfloat16().float())  # computed in bf16: the context was entered


def test_class_sums_are_of_unit_features():
    train, targets, _ = random_features()
    model = Passing().train()
    sums = class_sums(model, batches_of(train, targets), 5, contextlib.nullcontext)
    by_hand = [sum(v / v.norm() for v, t in zip(train, targets) if t == c) for c in range(5)]
    torch.testing.assert_close(sums, torch.stack(by_hand), rtol=0, atol=1e-5)
    assert not model.training


def test_scores_are_accuracy_calibration_and_the_reliability_diagram():
    logits, targets = random_logits(4)
    targets = targets.clamp(max=2)  # the last class is not tested
    found = scores(logits.bfloat16(), targets, [200, 50, 20, 5])

    logits = logits.bfloat16().float()
    expected = shot_accuracy(logits.argmax(1), targets, [200, 50, 20, 5])
    expected["per_class_accuracy"] = expected.pop("per_class")
    expected["mean"] = mean(expected["per_class_accuracy"][:3])
    expected["ece"], expected["mce"] = calibration_error(logits.softmax(1), targets)
    diagram = found.pop("reliability")
    assert found == expected

    bins = slow_bins(logits.softmax(1), targets, 15)
    assert diagram["images"] == [len(hits) for _, hits in bins]
    for key, values in zip(("confidence", "accuracy"), zip(*bins)):
        assert diagram[key] == pytest.approx([100 * mean(each) if each else None for each in values])


def test_a_classifier_s_rows_go_from_the_most_to_the_least_frequent_class():
    classifier = torch.nn.Linear(2, 3)
    classifier.weight.data = torch.tensor([[3.0, 4.0], [0.0, 1.0], [6.0, 8.0]])
    classifier.bias.data = torch.tensor([0.5, -1.0, 2.0])
    assert classifier_weight_norms(classifier.weight) == [5, 1, 10]
    assert classifier_by_frequency(classifier, np.array([5, 90, 5])) == {
        "weight_norms": [1.0, 5.0, 10.0], "biases": [-1.0, 0.5, 2.0]}
    classifier.bias = None
    assert classifier_by_frequency(classifier, [1, 2, 3]) == {"weight_norms": [10.0, 1.0, 5.0],
                                                              "biases": None}


# ---------------------------------------------------------------- tables

def test_a_table_shows_a_dash_for_an_empty_group_and_leaves_out_unused_columns():
    rows = [("teacher 1", dict(many=71.26, medium=None, few=0.0, all=5, ece=3.14, mce=100.0, best_all=9.0)),
            ("student", dict(many=1.0, medium=2.0, few=3.0, all=4.0, ece=5.0, mce=6.0, ncm=7.0))]
    head, first, second, legend = (line.split() for line in table(rows).splitlines())
    assert head == ["many", "medium", "few", "all", "NCM", "ECE"]  # result.json alone has mce and best_all
    assert first == ["teacher", "1", "71.3", "-", "0.0", "5.0", "-", "3.1"]
    assert second == ["student", "1.0", "2.0", "3.0", "4.0", "7.0", "5.0"]
    assert " ".join(legend) == "NCM: nearest class mean; ECE: expected calibration error"
    assert len({len(line) for line in table(rows).splitlines()[:3]}) == 1  # columns stand under their heads
    assert "NCM" not in table(rows[:1])


def test_a_table_shows_the_mean_over_classes_where_it_is_not_that_over_images():
    balanced, skewed = dict(all=50.0, mean=50.0), dict(all=90.0, mean=33.3)
    assert "mean" not in table([("net", balanced)])
    lines = table([("net", balanced), ("constant", skewed)]).splitlines()
    assert lines[2].split() == ["constant", "90.0", "33.3"]


def test_a_table_of_long_names_and_every_column_fits_80_characters():
    keys = ("many", "medium", "few", "head", "median", "tail", "all", "mean", "ncm", "ece")
    row = {**dict.fromkeys(keys, 100.0), "mean": 1.0}
    names = ["balanced-bce, from scratch, Bayes decoding", "runs/" + "x" * 200, "candle"]
    lines = table([(name, row) for name in names]).splitlines()
    assert max(map(len, lines)) <= 80

    cells = [line[10:].split() for line in lines if line.count("100.0") > 1]
    assert cells == [["100.0"] * 7 + ["1.0", "100.0", "100.0"]] * 3
    names_column = "".join(line[:10].strip() for line in lines if not line.startswith(("mean:", "calib")))
    assert "balanced-bce,fromscratch," in names_column.replace(" ", "") and "x" * 200 in names_column
