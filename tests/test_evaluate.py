"""The room common/evaluate.py: groups, accuracy, calibration, nearest class mean, prediction, tables."""
import contextlib
import math

import numpy as np
import pytest
import torch

from common.data import long_tail_counts
from common.evaluate import (calibration_error, class_sums, classifier_by_frequency, classifier_weight_norms,
                             head_median_tail, nearest_class_mean, predict, scores, shot_accuracy,
                             shot_groups, table)

# ---------------------------------------------------------------- groups and accuracy


def test_groups_are_over_100_from_20_to_100_and_under_20():
    groups = shot_groups([101, 100, 20, 19, 0, 5000])
    assert groups["many"].tolist() == [True, False, False, False, False, True]
    assert groups["medium"].tolist() == [False, True, True, False, False, False]
    assert groups["few"].tolist() == [False, False, False, True, True, False]
    assert all(mask.dtype == torch.bool for mask in groups.values())


def test_groups_take_other_boundaries():
    groups = shot_groups(np.array([11, 10, 5, 4]), many=10, few=5)
    assert [groups[name].tolist() for name in ("many", "medium", "few")] == [
        [True, False, False, False], [False, True, True, False], [False, False, False, True]]


@pytest.mark.parametrize("factor, sizes", [(100, (35, 35, 30)), (50, (41, 41, 18)), (10, (69, 31, 0))])
def test_groups_of_cifar100_lt_have_the_published_sizes(factor, sizes):
    groups = shot_groups(torch.tensor(long_tail_counts(100, 500, factor)))
    assert tuple(int(groups[name].sum()) for name in ("many", "medium", "few")) == sizes


def test_bad_counts_are_refused():
    for bad in ([], [[5, 6]], 5):
        with pytest.raises(ValueError):
            shot_groups(bad)
    with pytest.raises(ValueError):
        shot_groups([5, 6], many=10, few=11)


def slow_shot_accuracy(predictions, targets, class_counts):
    """The definition, one image and one class at a time."""
    per_class = []
    for c in range(len(class_counts)):
        hits = [int(p == t) for p, t in zip(predictions, targets) if t == c]
        per_class.append(100 * sum(hits) / len(hits) if hits else None)
    result = {"all": 100 * sum(int(p == t) for p, t in zip(predictions, targets)) / len(targets),
              "per_class": per_class, "group_sizes": {}}
    inside = {"many": lambda n: n > 100, "medium": lambda n: 20 <= n <= 100, "few": lambda n: n < 20}
    for name, belongs in inside.items():
        members = [c for c, n in enumerate(class_counts) if belongs(n)]
        tested = [per_class[c] for c in members if per_class[c] is not None]
        result["group_sizes"][name] = len(members)
        result[name] = sum(tested) / len(tested) if tested else None
    return result


def same_score(found, expected):
    return found is None if expected is None else found == pytest.approx(expected)


@pytest.mark.parametrize("class_counts", [[500, 101, 100, 60, 20, 19, 3], [3, 500, 20, 19, 101, 60, 100],
                                          [500] * 7, [3, 3, 3, 500, 3, 3, 3]])
def test_accuracy_is_that_of_a_slow_loop(class_counts):
    rng = np.random.RandomState(0)
    for _ in range(5):
        targets = rng.randint(0, rng.randint(1, 8), 40)  # often not every class is tested
        predictions = np.where(rng.rand(40) < 0.5, targets, rng.randint(0, 7, 40))
        expected = slow_shot_accuracy(predictions.tolist(), targets.tolist(), class_counts)
        for as_type in (torch.tensor, lambda values: values, np.ndarray.tolist):
            found = shot_accuracy(as_type(predictions), as_type(targets), class_counts)
            assert sorted(found) == ["all", "few", "group_sizes", "many", "medium", "per_class"]
            for key in ("all", "many", "medium", "few"):
                assert same_score(found[key], expected[key])
            assert found["group_sizes"] == expected["group_sizes"]
            for a, b in zip(found["per_class"], expected["per_class"], strict=True):
                assert same_score(a, b)


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
    for bad in ((0.8, 0.4), (-0.1, 0.5), (0.5, 1.1)):
        with pytest.raises(ValueError):
            head_median_tail(accuracy, counts, bad)
    with pytest.raises(ValueError):
        head_median_tail(accuracy[:4], counts, (0.2, 0.4))


# ---------------------------------------------------------------- calibration

def slow_calibration_error(probabilities, targets, bins):
    """Guo et al., equations (3) and (5), one image at a time, bins (lo, hi]."""
    ece, mce = 0.0, 0.0
    for b in range(bins):
        inside = [(max(p), p.index(max(p)) == t) for p, t in zip(probabilities, targets)
                  if b / bins < max(p) <= (b + 1) / bins]
        if inside:
            gap = abs(sum(right for _, right in inside) - sum(conf for conf, _ in inside)) / len(inside)
            ece, mce = ece + gap * len(inside) / len(targets), max(mce, gap)
    return 100 * ece, 100 * mce


@pytest.mark.parametrize("num_classes, bins", [(2, 15), (10, 15), (10, 1), (3, 40)])
def test_calibration_is_that_of_a_slow_loop(num_classes, bins):
    generator = torch.Generator().manual_seed(num_classes)
    logits = 2 * torch.randn(300, num_classes, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, num_classes, (300,), generator=generator)
    probabilities = logits.softmax(1)
    expected = slow_calibration_error(probabilities.tolist(), targets.tolist(), bins)
    assert calibration_error(probabilities, targets, bins) == pytest.approx(expected, abs=1e-9)
    assert calibration_error(probabilities.float(), targets, bins) == pytest.approx(expected, abs=1e-4)
    if bins == 15:
        assert calibration_error(probabilities, targets) == calibration_error(probabilities, targets, 15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_bin_edge_is_right_closed(dtype):
    for i in range(8, 15):
        edge = i / 15
        above = edge + 1e-3
        probabilities = torch.tensor([[edge, 1 - edge], [above, 1 - above]], dtype=torch.float64).to(dtype)
        ece, _ = calibration_error(probabilities, torch.tensor([0, 1]))
        assert ece == pytest.approx(100 * (1 - edge + above) / 2, abs=1e-3), i  # two bins, or the gaps cancel


def test_empty_bins_count_as_0_and_certainty_has_a_bin():
    probabilities = torch.tensor([[1.0, 0.0]] * 4)
    assert calibration_error(probabilities, torch.tensor([0] * 4)) == (0, 0)
    assert calibration_error(probabilities, torch.tensor([0, 0, 0, 1])) == pytest.approx((25, 25))


def test_bad_probabilities_are_refused():
    good, targets = torch.full((3, 2), 0.5), torch.tensor([0, 1, 0])
    nan = good.clone()
    nan[1] = float("nan")
    for bad in (2 * good, good - 1, torch.tensor([[1.5, -0.5]] * 3), good[:2], good[0], nan):
        with pytest.raises(ValueError):
            calibration_error(bad, targets)
    with pytest.raises(ValueError):
        calibration_error(good[:0], targets[:0])
    with pytest.raises(ValueError):
        calibration_error(good, targets, bins=0)


# ---------------------------------------------------------------- nearest class mean

def slow_nearest_class_mean(train, train_targets, test, num_classes):
    """In plain floats: unit features, their mean, the largest cosine."""
    def unit(v):
        return [x / math.hypot(*v) for x in v]
    means = []
    for c in range(num_classes):
        members = [unit(v) for v, t in zip(train, train_targets) if t == c]
        means.append(unit([sum(column) / len(members) for column in zip(*members)]))
    cosines = [[sum(a * b for a, b in zip(unit(v), mean)) for mean in means] for v in test]
    return [row.index(max(row)) for row in cosines]


def random_features(seed=0, num_classes=5):
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(0, num_classes, (30,), generator=generator)
    targets = torch.cat([torch.arange(num_classes), drawn])
    # Lengths differ a hundredfold: means of features that were not made unit first would be other means
    lengths = 10 ** (2 * torch.rand(len(targets), 1, generator=generator))
    train = lengths * torch.randn(len(targets), 4, generator=generator)
    return train, targets, torch.randn(80, 4, generator=generator)


@pytest.mark.parametrize("seed", range(3))
def test_nearest_class_mean_is_that_of_a_slow_loop(seed):
    train, targets, test = random_features(seed)
    found = nearest_class_mean(train, targets, test, 5)
    assert found.tolist() == slow_nearest_class_mean(train.tolist(), targets.tolist(), test.tolist(), 5)
    assert torch.equal(nearest_class_mean(100 * train, targets, 0.01 * test, 5), found)  # cosine: no lengths


def test_nearest_class_mean_refuses_what_has_no_mean():
    train, targets, test = random_features()
    with pytest.raises(ValueError, match="needs a training feature"):
        nearest_class_mean(train, targets, test, 6)
    for bad in ((train, targets, test[:, :3], 5), (train[:-1], targets, test, 5)):
        with pytest.raises(ValueError):
            nearest_class_mean(*bad)


def test_class_sums_stand_for_all_kept_features():
    train, targets, test = random_features()
    batches = [(part, labels) for part, labels in zip(train.split(8), targets.split(8))]
    uncounted = (train[:2], targets[:2], 0.0, True)  # share 0
    assert class_sums(Passing(), [uncounted], 5, contextlib.nullcontext).eq(0).all()
    batches.insert(1, uncounted)
    sums = class_sums(Passing(), batches, 5, contextlib.nullcontext)
    counts = torch.bincount(targets).view(-1, 1)
    from_sums = nearest_class_mean(sums / counts, torch.arange(5), test, 5)
    assert torch.equal(from_sums, nearest_class_mean(train, targets, test, 5))
    by_hand = [sum(v / v.norm() for v, t in zip(train, targets) if t == c) for c in range(5)]
    torch.testing.assert_close(sums, torch.stack(by_hand), rtol=0, atol=1e-5)


# ---------------------------------------------------------------- predict, scores, table

class Passing(torch.nn.Module):
    """Its images are the features; logits are twice those. Dropout tells training mode from eval mode."""

    def __init__(self):
        super().__init__()
        self.dropout = torch.nn.Dropout(0.5)

    def forward(self, images):
        return self.dropout(2 * images), images


def test_predict_keeps_the_order_of_the_batches():
    images, targets = torch.randn(10, 3), torch.arange(10)
    model = Passing().train()
    batches = [(images[i:i + 4], targets[i:i + 4], "share", "ends_step") for i in range(0, 10, 4)]
    batches.insert(1, (torch.zeros(1, 3), torch.zeros(1, dtype=torch.int64), 0, True))  # no readable image
    logits, features, found = predict(model, batches, contextlib.nullcontext)
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


def test_scores_are_accuracy_and_calibration_of_the_softmax():
    generator = torch.Generator().manual_seed(0)
    logits, targets = torch.randn(50, 3, generator=generator), torch.randint(0, 3, (50,), generator=generator)
    found = scores(logits.bfloat16(), targets, [200, 50, 5])
    logits = logits.bfloat16().float()
    expected = shot_accuracy(logits.argmax(1), targets, [200, 50, 5])
    assert found.pop("per_class_accuracy") == expected.pop("per_class")
    assert (found.pop("ece"), found.pop("mce")) == calibration_error(logits.softmax(1), targets)
    found.pop("mean"), found.pop("reliability")
    assert found == expected


def test_mean_is_over_the_tested_classes_and_all_over_images():
    logits = torch.eye(4)[[0] * 8 + [0, 1]]  # class 0: 8 of 8 images right; class 1: 1 of 2; class 3 untested
    found = scores(logits, torch.tensor([0] * 8 + [1, 1]), [200, 50, 50, 5])
    assert found["all"] == pytest.approx(90) and found["mean"] == pytest.approx(75)


def test_scores_hold_each_bin_of_the_reliability_diagram():
    generator = torch.Generator().manual_seed(0)
    logits, targets = torch.randn(90, 4, generator=generator), torch.randint(0, 4, (90,), generator=generator)
    found = scores(logits, targets, [200, 50, 20, 5])
    probabilities = logits.softmax(1).tolist()
    for b in range(15):
        inside = [(max(p), p.index(max(p)) == t) for p, t in zip(probabilities, targets.tolist())
                  if b / 15 < max(p) <= (b + 1) / 15]
        bin_of = {key: values[b] for key, values in found["reliability"].items()}
        assert bin_of["images"] == len(inside)
        for key, values in (("confidence", [c for c, _ in inside]), ("accuracy", [r for _, r in inside])):
            assert same_score(bin_of[key], 100 * sum(values) / len(values) if values else None)
    gaps = zip(*(found["reliability"][key] for key in ("images", "accuracy", "confidence")))
    assert found["ece"] == pytest.approx(sum(n * abs(a - c) for n, a, c in gaps if n) / 90)


def test_weight_norms_are_one_a_class():
    weight = torch.tensor([[3.0, 4.0], [0.0, 0.0], [-5.0, 12.0]], requires_grad=True)
    assert classifier_weight_norms(weight) == [5, 0, 13]


def test_a_classifier_s_rows_go_from_the_most_to_the_least_frequent_class():
    classifier = torch.nn.Linear(2, 3)
    classifier.weight.data = torch.tensor([[3.0, 4.0], [0.0, 1.0], [6.0, 8.0]])
    classifier.bias.data = torch.tensor([0.5, -1.0, 2.0])
    assert classifier_by_frequency(classifier, np.array([5, 90, 5])) == {
        "weight_norms": [1.0, 5.0, 10.0], "biases": [-1.0, 0.5, 2.0]}
    classifier.bias = None
    assert classifier_by_frequency(classifier, [1, 2, 3]) == {"weight_norms": [10.0, 1.0, 5.0],
                                                              "biases": None}


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
