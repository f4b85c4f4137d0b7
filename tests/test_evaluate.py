"""The room common/evaluate.py: groups, accuracy, calibration, nearest class mean, prediction, tables."""
from contextlib import nullcontext
from itertools import product

import numpy as np
import pytest
import torch

from common.data import long_tail_counts
from common.evaluate import (calibration_error, class_sums, classifier_by_frequency, classifier_weight_norms,
                             head_median_tail, nearest_class_mean, predict, scores, shot_accuracy,
                             shot_groups, table)


def mean(values):
    return sum(values) / len(values) if values else None


def test_groups_go_by_size_and_have_the_published_sizes_and_head_median_and_tail_go_by_rank():
    groups = {name: mask.tolist() for name, mask in shot_groups([101, 100, 20, 19, 0, 5000]).items()}
    assert groups == {"many": [1, 0, 0, 0, 0, 1], "medium": [0, 1, 1, 0, 0, 0], "few": [0, 0, 0, 1, 1, 0]}
    groups = shot_groups(np.array([11, 10, 5, 4]), many=10, few=5)
    assert torch.stack(list(groups.values())).tolist() == [[1, 0, 0, 0], [0, 1, 1, 0], [0, 0, 0, 1]]
    for factor, sizes in (100, [35, 35, 30]), (50, [41, 41, 18]), (10, [69, 31, 0]):  # of CIFAR-100-LT
        groups = shot_groups(torch.tensor(long_tail_counts(100, 500, factor)))
        assert [int(groups[name].sum()) for name in ("many", "medium", "few")] == sizes

    accuracy, counts = [10.0, 20.0, None, 40.0, 90.0], [7, 30, 7, 500, 2]  # one untested; ranks 3, 1, 0, 2, 4
    assert head_median_tail(accuracy, counts, (2 / 5, 4 / 5)) == {"head": 30.0, "median": 10.0, "tail": 90.0}
    assert head_median_tail(accuracy, counts, (0, 1)) == {"head": None, "median": 40.0, "tail": None}
    places = head_median_tail([float(c) for c in range(365)], list(range(365, 0, -1)), (131 / 365, 259 / 365))
    assert places == {"head": 65.0, "median": (131 + 258) / 2, "tail": (259 + 364) / 2}


def slow_shot_accuracy(predictions, targets, class_counts):
    """The definition, one image and one class at a time."""
    hits = [(t, 100 * int(p == t)) for p, t in zip(predictions, targets)]
    per_class = [mean([hit for t, hit in hits if t == c]) for c in range(len(class_counts))]
    result = {"all": mean([hit for _, hit in hits]), "per_class": per_class, "group_sizes": {}}
    for name, sizes in ("many", range(101, 501)), ("medium", range(20, 101)), ("few", range(20)):
        group = [accuracy for accuracy, n in zip(per_class, class_counts) if n in sizes]
        result["group_sizes"][name] = len(group)
        result[name] = mean([accuracy for accuracy in group if accuracy is not None])
    return {key: pytest.approx(value) for key, value in result.items()}


@pytest.mark.parametrize("class_counts", [[500, 101, 100, 60, 20, 19, 3], [3, 500, 20, 19, 101, 60, 100],
                                          [500] * 7, [3, 3, 3, 500, 3, 3, 3]])
def test_accuracy_is_that_of_a_slow_loop(class_counts):
    rng = np.random.RandomState(0)
    for _ in range(5):
        targets = rng.randint(0, rng.randint(1, 8), 40)  # often not every class is tested
        predictions = np.where(rng.rand(40) < 0.5, targets, rng.randint(0, 7, 40))
        expected = slow_shot_accuracy(predictions.tolist(), targets.tolist(), class_counts)
        for as_type in (torch.tensor, np.asarray, np.ndarray.tolist):
            assert shot_accuracy(as_type(predictions), as_type(targets), class_counts) == expected


def slow_bins(probabilities, targets, bins):
    """Guo et al., sections 2 and 3: each bin (lo, hi]'s images, as lists of confidences and of hits."""
    images = [(max(p), float(p.index(max(p)) == t)) for p, t in zip(probabilities.tolist(), targets.tolist())]
    inside = [[image for image in images if b / bins < image[0] <= (b + 1) / bins] for b in range(bins)]
    return [([confidence for confidence, _ in part], [hit for _, hit in part]) for part in inside]


def random_logits(num_classes):
    generator = torch.Generator().manual_seed(num_classes)
    logits = 2 * torch.randn(300, num_classes, generator=generator, dtype=torch.float64)
    return logits, torch.randint(0, num_classes, (300,), generator=generator)


def test_calibration_is_that_of_a_slow_loop_and_every_bin_edge_is_right_closed():
    for num_classes, *bins in (2,), (10,), (10, 1), (3, 40):
        logits, targets = random_logits(num_classes)
        parts = slow_bins(logits.softmax(1), targets, *bins or [15])
        gaps = [(len(hits), 100 * abs(mean(hits) - mean(found))) for found, hits in parts if hits]
        expected = sum(n * gap for n, gap in gaps) / 300, max(gap for _, gap in gaps)
        for dtype, tolerance in (torch.float64, 1e-9), (torch.float32, 1e-4):
            found = calibration_error(logits.softmax(1).to(dtype), targets, *bins)
            assert found == pytest.approx(expected, abs=tolerance), (num_classes, bins)

    for i, dtype in product(range(8, 15), (torch.float32, torch.float64)):
        edge, above = i / 15, i / 15 + 1e-3
        probabilities = torch.tensor([[edge, 1 - edge], [above, 1 - above]], dtype=torch.float64).to(dtype)
        ece, _ = calibration_error(probabilities, torch.tensor([0, 1]))
        assert ece == pytest.approx(100 * (1 - edge + above) / 2, abs=1e-3), i  # two bins, or the gaps cancel
        assert calibration_error(torch.eye(2, dtype=dtype), torch.tensor([0, 0])) == (50, 50)  # certainty too


def sums_of_unit_features(train, targets):
    return [sum(v / v.norm() for v, t in zip(train, targets) if t == c) for c in range(5)]


def random_features(seed):
    generator = torch.Generator().manual_seed(seed)
    targets = torch.cat([torch.arange(5), torch.randint(0, 5, (30,), generator=generator)])
    # lengths differ a hundredfold: means of features that were not made unit first would be other means
    train = 10 ** (2 * torch.rand(35, 1, generator=generator)) * torch.randn(35, 4, generator=generator)
    return train, targets, torch.randn(80, 4, generator=generator)


def test_nearest_class_mean_is_that_of_a_slow_loop():
    for train, targets, test in map(random_features, range(3)):
        found = nearest_class_mean(train, targets, test, 5)
        unit_means = [total / total.norm() for total in sums_of_unit_features(train, targets)]
        assert found.tolist() == [max(range(5), key=lambda c: (v @ unit_means[c]).item()) for v in test]
        assert torch.equal(nearest_class_mean(100 * train, targets, 0.01 * test, 5), found)  # no lengths


TRAIN, TARGETS, TEST = random_features(0)
HALVES, NEGATIVE, SIZES, TWO = torch.full((35, 2), 0.5), torch.tensor([[1.5, -0.5]] * 35), [50, 50], [9.0] * 2
NAN = torch.tensor([[0.5, 0.5]] * 34 + [[float("nan")] * 2])


@pytest.mark.parametrize("function, message, cases", [
    (shot_groups, "must be a vector", [([],), ([[5, 6]],), (5,)]),
    (shot_groups, "must not exceed", [([5, 6], 10, 11)]),
    (shot_accuracy, "of one length", [([0, 1], [0], SIZES), ([], [], SIZES), ([[0]], [[0]], SIZES)]),
    (shot_accuracy, "must lie in", [([0], [2], SIZES), ([0], [-1], SIZES)]),
    (head_median_tail, "must end in", [(TWO, SIZES, (0.8, 0.4)), (TWO, SIZES, (-0.1, 0.5)),
                                       (TWO, SIZES, (0.5, 1.1)), (TWO[:1], SIZES, (0.2, 0.4))]),
    (calibration_error, "that sum to 1", [(bad, TARGETS) for bad in (2 * HALVES, HALVES - 1, NEGATIVE, NAN)]),
    (calibration_error, "and targets", [(HALVES[:9], TARGETS), (HALVES[0], TARGETS[:2]),
                                        (HALVES[:0], TARGETS[:0])]),
    (calibration_error, "bins must be at least 1", [(HALVES, TARGETS, 0)]),
    (nearest_class_mean, "needs a training feature", [(TRAIN, TARGETS, TEST, 6), (TRAIN, TARGETS, TEST, 4)]),
    (nearest_class_mean, "not belong", [(TRAIN, TARGETS, TEST[:, 1:], 5), (TRAIN[1:], TARGETS, TEST, 5)])])
def test_bad_arguments_are_refused(function, message, cases):
    for case in cases:
        with pytest.raises(ValueError, match=message):
            function(*case)


class Passing(torch.nn.Module):
    """Its images are the features; logits are twice those. Dropout tells training mode from eval mode."""

    def forward(self, images):
        images = torch.nn.functional.dropout(images, training=self.training)
        return 2 * images, images


def test_predict_and_class_sums_take_the_images_that_count_in_eval_mode_and_give_float32_under_autocast():
    batches = [(*parts, 1.0, True) for parts in zip(TRAIN.split(4), TARGETS.split(4))]
    batches.insert(1, (torch.ones(1, 4), TARGETS[:1], 0, True))  # no image could be read: its share is 0
    model = Passing().train()
    assert all(map(torch.equal, predict(model, batches, nullcontext), (2 * TRAIN, TRAIN, TARGETS)))
    assert not model.training  # no dropout, either
    sums, by_hand = class_sums(model.train(), batches, 5, nullcontext), sums_of_unit_features(TRAIN, TARGETS)
    torch.testing.assert_close(sums, torch.stack(by_hand), rtol=0, atol=1e-5)
    assert not model.training

    linear, model.forward = torch.nn.Linear(4, 2), lambda images: (linear(images), linear(images))
    for output in predict(model, [batches[0][:2]], lambda: torch.autocast("cpu", torch.bfloat16))[:2]:
        assert output.dtype == torch.float32 and not output.requires_grad
        assert torch.equal(output, output.bfloat16().float())  # computed in bf16: the context was entered


def test_scores_are_accuracy_calibration_and_the_reliability_diagram():
    logits, targets = random_logits(4)
    logits, targets = logits.bfloat16(), targets.clamp(max=2)  # the last class is not tested
    found, probabilities = scores(logits, targets, [200, 50, 20, 5]), logits.float().softmax(1)
    diagram, expected = found.pop("reliability"), shot_accuracy(logits.argmax(1), targets, [200, 50, 20, 5])
    accuracy, (ece, mce) = expected.pop("per_class"), calibration_error(probabilities, targets)
    assert found == {**expected, "per_class_accuracy": accuracy, "mean": mean(accuracy[:3]), "ece": ece,
                     "mce": mce}
    bins = slow_bins(probabilities, targets, 15)
    assert diagram["images"] == [len(hits) for _, hits in bins]
    for key, values in zip(("confidence", "accuracy"), zip(*bins)):
        assert diagram[key] == pytest.approx([100 * mean(each) if each else None for each in values])


def test_a_classifier_s_rows_go_from_the_most_to_the_least_frequent_class():
    classifier = torch.nn.Linear(2, 3)
    classifier.weight.data = torch.tensor([[3.0, 4.0], [0.0, 1.0], [6.0, 8.0]])
    classifier.bias.data = torch.tensor([0.5, -1.0, 2.0])
    assert classifier_weight_norms(classifier.weight) == [5, 1, 10]
    found = classifier_by_frequency(classifier, np.array([5, 90, 5]))
    assert found == {"weight_norms": [1.0, 5.0, 10.0], "biases": [-1.0, 0.5, 2.0]}
    classifier.bias = None
    assert classifier_by_frequency(classifier, [1, 2, 3]) == {"weight_norms": [10, 1, 5], "biases": None}


def test_a_table_has_dashes_no_unused_column_the_mean_where_it_differs_and_fits_80_characters():
    rows = [("teacher 1", dict(many=71.26, medium=None, few=0.0, all=5, ece=3.14, mce=100.0, best_all=9.0)),
            ("student", dict(many=1.0, medium=2.0, few=3.0, all=4.0, ece=5.0, mce=6.0, ncm=7.0))]
    lines = table(rows).splitlines()
    assert [line.split() for line in lines[:3]] == [
        ["many", "medium", "few", "all", "NCM", "ECE"],  # result.json alone has mce and best_all
        ["teacher", "1", "71.3", "-", "0.0", "5.0", "-", "3.1"],
        ["student", "1.0", "2.0", "3.0", "4.0", "7.0", "5.0"]]
    assert lines[3:] == ["NCM: nearest class mean; ECE: expected calibration error"]
    assert len({len(line) for line in lines[:3]}) == 1  # columns stand under their heads
    assert "NCM" not in table(rows[:1])
    balanced, skewed = ("net", dict(all=50.0, mean=50.0)), ("constant", dict(all=90.0, mean=33.3))
    assert "mean" not in table([balanced])
    assert table([balanced, skewed]).splitlines()[2].split() == ["constant", "90.0", "33.3"]

    keys = "many", "medium", "few", "head", "median", "tail", "all", "mean", "ncm", "ece"
    row = {**dict.fromkeys(keys, 100.0), "mean": 1.0}
    names = ["balanced-bce, from scratch, Bayes decoding", "runs/" + "x" * 200, "candle"]
    lines = table([(name, row) for name in names]).splitlines()
    assert max(map(len, lines)) <= 80
    cells = [line[10:].split() for line in lines if line.count("100.0") > 1]
    assert cells == [["100.0"] * 7 + ["1.0", "100.0", "100.0"]] * 3
    names_column = "".join(line[:10].strip() for line in lines if not line.startswith(("mean:", "calib")))
    assert "balanced-bce,fromscratch," in names_column.replace(" ", "") and "x" * 200 in names_column
