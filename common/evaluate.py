"""Scores: many/medium/few/all, calibration error, nearest class mean, classifier weight norms."""
import textwrap

import torch
import torch.nn.functional as F

COLUMNS = (  # of every table: keys of a stage's scores, and their headings
    ("many", "many"), ("medium", "medium"), ("few", "few"), ("head", "head"), ("median", "median"),
    ("tail", "tail"), ("all", "all"), ("mean", "mean"), ("ncm", "NCM"), ("ece", "ECE"))
LEGEND = {"mean": "mean: over classes, all: over images", "ncm": "NCM: nearest class mean",
          "ece": "ECE: expected calibration error"}


def shot_groups(class_counts, many=100, few=20):
    """Masks of the classes with many (> 100), medium (20..100) and few (< 20) training images.

    class_counts: training images per class [C]. Returns {"many", "medium", "few"}: bool tensors [C].
    Raises ValueError. classifier-balancing@f162ade's boundaries (OLTR's own differ at exactly 100 and 20).
    """
    counts = torch.as_tensor(class_counts)
    if counts.ndim != 1 or len(counts) == 0:
        raise ValueError(f"class_counts must be a vector, one count a class, got shape {list(counts.shape)}")
    if few > many:
        raise ValueError(f"few ({few}) must not exceed many ({many})")
    return {"many": counts > many, "medium": (counts >= few) & (counts <= many), "few": counts < few}


def shot_accuracy(predictions, targets, class_counts):
    """Top-1 accuracy, overall and by group, in percent.

    predictions, targets: class ids [N]. class_counts: training images per class [C].
    Returns {"all": over images; "many", "medium", "few": mean over the group's classes of per-class accuracy,
    None for a group without (tested) classes; "group_sizes": classes in each; "per_class": C percentages,
    None where the class has no test image}. Raises ValueError.
    """
    predictions, targets = torch.as_tensor(predictions).cpu(), torch.as_tensor(targets).cpu()
    counts = torch.as_tensor(class_counts).cpu()
    groups = shot_groups(counts)
    num_classes = len(counts)
    if predictions.shape != targets.shape or targets.ndim != 1 or len(targets) == 0:
        raise ValueError(f"predictions {list(predictions.shape)} and targets {list(targets.shape)} must be "
                         "vectors of one length, not empty")
    if targets.min() < 0 or targets.max() >= num_classes:
        raise ValueError(f"targets must lie in 0..{num_classes - 1}")
    correct = (predictions == targets).double()
    tested = torch.bincount(targets, minlength=num_classes).double()
    per_class = 100 * torch.bincount(targets, correct, minlength=num_classes) / tested  # nan where untested
    scores = {"all": 100 * correct.mean().item()}
    for name, members in groups.items():
        accuracies = per_class[members & (tested > 0)]
        scores[name] = accuracies.mean().item() if len(accuracies) else None
    scores["group_sizes"] = {name: int(members.sum()) for name, members in groups.items()}
    scores["per_class"] = [None if n == 0 else a for a, n in zip(per_class.tolist(), tested.tolist())]
    return scores


def head_median_tail(per_class_accuracy, class_counts, ends):
    """Mean per-class accuracy of the most frequent classes, of the next and of the rest, by rank alone.

    per_class_accuracy: C percentages, None where the class has no test image. class_counts: [C]; ties go by
    id. ends: where head and median end, as fractions of the C classes. Returns {"head", "median", "tail"}:
    percent, None for a group without (tested) classes. Raises ValueError.
    """
    counts = torch.as_tensor(class_counts)
    if len(per_class_accuracy) != len(counts) or not 0 <= ends[0] <= ends[1] <= 1:
        raise ValueError(f"{len(counts)} classes, {len(per_class_accuracy)} accuracies; head and median must "
                         f"end in this order within [0, 1], got {list(ends)}")
    order = counts.argsort(descending=True, stable=True).tolist()
    first, second = (round(end * len(order)) for end in ends)
    result = {}
    for name, members in (("head", order[:first]), ("median", order[first:second]), ("tail", order[second:])):
        tested = [per_class_accuracy[c] for c in members if per_class_accuracy[c] is not None]
        result[name] = sum(tested) / len(tested) if tested else None
    return result


def reliability(probabilities, targets, bins=15):
    """What a reliability diagram shows (Guo et al., ICML 2017), by bins of the confidence.

    probabilities: [N, C], rows summing to 1 (softmax of the logits for every model). targets: [N].
    Confidence is the largest probability; bins are equal and right-closed, (lo, hi]. Returns {"images": how
    many are in the bin; "confidence", "accuracy": sums over these}, float64 [bins]. Raises ValueError.
    """
    probabilities, targets = torch.as_tensor(probabilities).cpu(), torch.as_tensor(targets).cpu()
    if probabilities.dtype != torch.float64:
        probabilities = probabilities.float()
    if probabilities.ndim != 2 or targets.shape != probabilities.shape[:1] or len(targets) == 0:
        raise ValueError(f"probabilities must be [N, C] and targets [N], got {list(probabilities.shape)} and "
                         f"{list(targets.shape)}")
    if bins < 1:
        raise ValueError(f"bins must be at least 1, got {bins}")
    if not ((probabilities >= 0).all() and ((probabilities.sum(1) - 1).abs() <= 1e-3).all()):  # nan neither
        raise ValueError("probabilities must be non-negative with rows that sum to 1")
    confidence, predictions = probabilities.max(1)

    # edges i / bins in the confidences' own precision, so that .8 lies on its edge in float32 too;
    # bucketize: edges[i-1] < confidence <= edges[i], so a confidence on an edge falls into the bin below it
    edges = (torch.arange(bins + 1, dtype=torch.float64) / bins).to(confidence.dtype)
    index = (torch.bucketize(confidence, edges) - 1).clamp(0, bins - 1)

    return {"images": torch.bincount(index, minlength=bins).double(),
            "confidence": torch.bincount(index, confidence.double(), minlength=bins),
            "accuracy": torch.bincount(index, (predictions == targets).double(), minlength=bins)}


def calibration_error(probabilities, targets, bins=15):
    """Expected and maximum calibration error (Guo et al., ICML 2017), in percent: the gap between accuracy
    and confidence, averaged over the images, and of the worst bin. Empty bins count as 0.

    Arguments and errors are those of `reliability`. Returns (ece, mce).
    """
    return _errors(reliability(probabilities, targets, bins))


def _errors(in_bins):
    gap = (in_bins["accuracy"] - in_bins["confidence"]).abs()
    size = in_bins["images"]
    return 100 * (gap.sum() / size.sum()).item(), 100 * (gap / size.clamp(min=1)).max().item()


def nearest_class_mean(train_features, train_targets, test_features, num_classes):
    """Classify by the nearest class mean in cosine: means of unit features, made unit length again.

    train_features: [n, D], train_targets: [n], test_features: [N, D]. Returns predictions [N].
    Raises ValueError for a class without a training feature. CBD (BMVC 2021), appendix A.5.
    """
    train_targets = torch.as_tensor(train_targets, device=train_features.device)
    if train_features.shape[1:] != test_features.shape[1:] or train_targets.shape != train_features.shape[:1]:
        raise ValueError(f"train features {list(train_features.shape)}, targets {list(train_targets.shape)} "
                         f"and test features {list(test_features.shape)} do not belong together")
    sizes = torch.bincount(train_targets, minlength=num_classes)
    if len(sizes) > num_classes or (sizes == 0).any():
        raise ValueError(f"every class in 0..{num_classes - 1}, and no other, needs a training feature")
    means = torch.zeros(num_classes, train_features.shape[1], device=train_features.device)
    means.index_add_(0, train_targets, F.normalize(train_features.float(), dim=1))  # direction of the sum
    return (F.normalize(test_features.float(), dim=1) @ F.normalize(means, dim=1).t()).argmax(1)


def classifier_weight_norms(weight):
    """Euclidean norm of every class's weight vector: [C, D] -> a list of C floats."""
    return weight.detach().float().norm(dim=1).tolist()


def classifier_by_frequency(classifier, class_counts):
    """A linear or cosine classifier's rows from the most to the least frequent class (ties by id):
    {"weight_norms": C floats, "biases": C floats, or None for a classifier without a bias}."""
    order = torch.as_tensor(class_counts).argsort(descending=True, stable=True).tolist()
    bias = getattr(classifier, "bias", None)
    return {"weight_norms": classifier_weight_norms(classifier.weight[order]),
            "biases": None if bias is None else bias[order].tolist()}


def add_gains_over_baseline(stages):
    """Where the first of these dicts of scores is named "baseline", give each other its gain over it for each
    class: "gain_over_baseline", C points, None where the class has no test image."""
    for stage in stages[1:] if stages[0]["name"].startswith("baseline") else []:
        pairs = zip(stage["per_class_accuracy"], stages[0]["per_class_accuracy"])
        stage["gain_over_baseline"] = [None if ours is None else ours - base for ours, base in pairs]


class Diverged(ValueError):
    """A net whose outputs are not numbers."""


def scores(logits, targets, class_counts):
    """What every model is judged by, from its logits [N, C], in percent. Raises Diverged if one is nan.

    all, many, medium, few, group_sizes and per_class_accuracy: as `shot_accuracy` has them. mean: over the
    tested classes. ece, mce. reliability: for each of 15 bins its images, and their mean confidence and
    accuracy, None in an empty bin.
    """
    logits = logits.float()
    if logits.isnan().any():
        raise Diverged("the net's outputs became nan: training diverged; try a smaller learning rate")
    result = shot_accuracy(logits.argmax(1), targets, class_counts)
    result["per_class_accuracy"] = result.pop("per_class")
    tested = [accuracy for accuracy in result["per_class_accuracy"] if accuracy is not None]
    result["mean"] = sum(tested) / len(tested)

    in_bins = reliability(logits.softmax(1), targets)
    result["ece"], result["mce"] = _errors(in_bins)
    images = in_bins.pop("images").int().tolist()
    result["reliability"] = {"images": images, **{
        key: [100 * total / n if n else None for total, n in zip(sums.tolist(), images)]
        for key, sums in in_bins.items()}}
    return result


@torch.no_grad()
def predict(model, batches, autocast):
    """Run a model in eval mode over batches of (images, targets, ...); `model(images)` returns (logits,
    features).

    autocast: a function that returns the context to compute in. Returns (logits [n, C], features [n, D], both
    float32, targets [n]) in the order of the batches. The model is left in eval mode.
    """
    model.eval()
    outputs = []
    for images, targets, *rest in batches:
        with autocast():
            logits, features = model(images)
        kept = slice(0, 0) if rest and rest[0] == 0 else slice(None)  # share 0: none of its images counts
        outputs.append((logits[kept].float(), features[kept].float(), targets[kept]))
    return [torch.cat(parts) for parts in zip(*outputs)]


@torch.no_grad()
def class_sums(model, batches, num_classes, autocast):
    """Sum of the unit features of every class's images [C, D], without keeping the features: divided by the
    counts, these are the means that `nearest_class_mean` compares with. The model is left in eval mode."""
    model.eval()
    sums = None
    for images, targets, *rest in batches:
        with autocast():
            features = model(images)[1]
        features = F.normalize(features.float(), dim=1)
        sums = torch.zeros(num_classes, features.shape[1], device=features.device) if sums is None else sums
        kept = slice(0, 0) if rest and rest[0] == 0 else slice(None)  # as in `predict`
        sums.index_add_(0, targets[kept], features[kept])
    return sums


def gradient_norms(model, batches, head, autocast):
    """How much of the gradient of the mean cross-entropy comes from some classes (Figure 1 of Asynchronous
    Modeling): the cosines of their images' part, and of the others', with the whole, and the three norms.

    batches: of (images, targets, ...). head: ids of these classes. autocast: as in `predict`. Returns
    {"cosine_head", "norm_head", "cosine_tail", "norm_tail", "norm"}. The model is left in eval mode, so that
    batch norm's statistics stay, and without gradients.
    """
    model.eval()
    parameters, batches = list(model.parameters()), list(batches)
    num_images = sum(len(targets) for _, targets, *_ in batches)
    parts = []
    for in_part in (True, False):
        for images, targets, *_ in batches:
            with autocast():
                losses = F.cross_entropy(model(images)[0], targets, reduction="none") / num_images
            losses[torch.isin(targets, head) == in_part].sum().backward()
        parts.append(torch.cat([p.grad.reshape(-1) for p in parameters]))
        model.zero_grad()

    of_head, of_tail = parts
    whole = of_head + of_tail
    cosine = [F.cosine_similarity(part, whole, dim=0).item() for part in parts]
    return {"cosine_head": cosine[0], "norm_head": of_head.norm().item(), "cosine_tail": cosine[1],
            "norm_tail": of_tail.norm().item(), "norm": whole.norm().item()}


def columns_of(stages):
    """The (key, heading) of COLUMNS that a table of these scores needs: those that one of them has; `mean`
    where it is not `all`, as it is on a balanced test set."""
    def is_shown(key):
        if key == "mean":
            return any(abs(stage["mean"] - stage["all"]) > 0.05 for stage in stages if stage.get("mean"))
        return any(key in stage for stage in stages)

    return [(key, heading) for key, heading in COLUMNS if is_shown(key)]


def legend(columns):
    """One line that says what the headings of `columns` stand for, or "" where they speak for themselves."""
    return "; ".join(LEGEND[key] for key, _ in columns if key in LEGEND)


def table(rows, width=80):
    """The final table as text, at most `width` characters wide: a longer name goes over several lines.

    rows: [(name, scores)], scores a dict with the keys of COLUMNS, percent or None; keys that no row has are
    left out.
    """
    columns = columns_of([row for _, row in rows])
    room = max(width - 7 * len(columns), 10)
    names = [textwrap.wrap(name, room) or [""] for name, _ in rows]
    room = max(len(line) for lines in names for line in lines)

    text = [" " * room + "".join(f"{heading:>7}" for _, heading in columns)]
    for (_, row), (first, *more) in zip(rows, names):
        cells = ["-" if row.get(key) is None else f"{row[key]:.1f}" for key, _ in columns]
        text += [f"{first:{room}}" + "".join(f"{cell:>7}" for cell in cells), *more]
    if legend(columns):
        text += textwrap.wrap(legend(columns), width)
    return "\n".join(text)
