"""common/plot.py: each kind of picture shows the numbers of result.json and log.jsonl, and can be read."""
import argparse
import importlib.util
import json
import math
import sys
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from common.augment import normalise
from common.figure import COLOURS, LOOK, draw
from common.plot import KINDS, main, read_run, running_mean
from common.predict import load_any
from tests.tiny import ROOT

COUNTS = [10, 500, 100, 25]  # by id; from the most to the least frequent: classes 1, 2, 3, 0


def stage(name, accuracy, seconds=6.0, **more):
    bins = {"images": [0, 30, 10], "confidence": [None, 50.0, 90.0], "accuracy": [None, accuracy[0], 80.0]}
    return {"name": name, "all": fmean(accuracy), "many": accuracy[1], "ece": 5.0, "reliability": bins,
            "per_class_accuracy": accuracy, "weight_norms": [2.0, 1.5, 1.0, accuracy[0] / 10],
            "seconds": seconds, "peak_memory_mb": 100 * (seconds or 0), **more}


def write_run(folder, *stages, method="cbd", seed=0, finished=True, **flags):
    """A run's folder with these stages, and a log of two epochs of each."""
    args = {"dataset": "set", "seed": seed, "out": str(folder), "alpha": 0.4, "lr": 0.1, **flags}
    log = [{"stage": each["name"], "epoch": epoch, "loss": 1 / epoch, "all": (each["all"] or 0) + epoch,
            "lambda": epoch / 2, "seconds": (each["seconds"] or 0) * epoch / 2}
           for each in stages for epoch in (1, 2)]
    folder.mkdir()
    (folder / "log.jsonl").write_text("\n".join(map(json.dumps, [{"method": method, "args": args}, *log])))
    if finished:
        (folder / "result.json").write_text(json.dumps({
            "method": method, "dataset": "data/set.npz", "seed": seed, "class_counts": COUNTS,
            "stages": stages, "args": args}))
    return str(folder)


def panels(kind, *runs, stages=None, values=("all",), flag=None):
    return KINDS[kind]([read_run(run) for run in runs],
                       argparse.Namespace(kind=kind, stages=stages, values=values, flag=flag))


@pytest.fixture
def two_seeds(tmp_path):
    return [write_run(tmp_path / f"run{seed}", stage("teacher 1", [20.0 + seed, 90.0, 60.0, 40.0]),
                      stage("student", [40.0 + seed, 85.0, 65.0, 50.0]), seed=seed) for seed in (0, 2)]


def test_classes_are_dots_and_their_running_mean_for_each_method_s_baseline_and_itself(tmp_path, two_seeds):
    panel, = panels("classes", *two_seeds)
    sizes, accuracy = panel["dots"][0]
    assert list(sizes) == [500, 100, 25, 10] and panel["x_log"] and panel["x_falls"]
    assert list(accuracy) == pytest.approx([90, 60, 40, 21])  # class 0: the mean of 20 and 22
    label, xs, ys = panel["lines"][0]  # of four classes the line joins the dots
    assert label == "teacher 1" and ys == pytest.approx(accuracy) and xs == pytest.approx(sizes)
    xs, ys = running_mean([100, 50, *[10] * 8], [90, 60, *[30] * 8])
    assert ys == pytest.approx([75, 60, 40, *[30] * 7]) and xs[1] == pytest.approx((100 * 50 * 10) ** (1 / 3))

    livt = write_run(tmp_path / "livt", {"name": "mgp", "all": None, "seconds": 3.0},
                     stage("bce, Bayes decoding", [1.0] * 4, seconds=None), stage("bce", [2.0] * 4),
                     stage("balanced-bce", [3.0] * 4), method="livt")
    alphas = [write_run(tmp_path / str(a), stage("student", [a] * 4), alpha=a) for a in (0.2, 0.8)]
    for runs, stages, *shown in (
            ([*two_seeds, livt], None, ("cbd, set", ["teacher 1", "student"]),
             ("livt, set", ["bce", "balanced-bce"])),
            ([*two_seeds, livt], ["student", "bce"], ("cbd, set", ["student"]), ("livt, set", ["bce"])),
            (alphas, None, ("cbd, set", ["student, alpha 0.2", "student, alpha 0.8"]))):
        found = panels("classes", *runs, stages=stages)
        assert [(panel["title"], [label for label, *_ in panel["lines"]]) for panel in found] == shown


def test_gain_norms_their_gap_margins_and_reliability_of_several_seeds(tmp_path, two_seeds):
    panel, = panels("gain", *two_seeds)  # a bar a class in its group's colour
    assert panel["title"] == "cbd, set: student - teacher 1"
    assert panel["bars"] == [("many: -5.0", [1], [-5.0]), ("medium: +7.5", [2, 3], [5.0, 10.0]),
                             ("few: +20.0", [4], [20.0])]
    panel, = panels("norms", *two_seeds)
    assert panel["lines"] == [("teacher 1", range(1, 5), pytest.approx([2, 1.5, 1, 2.1])),
                              ("student", range(1, 5), pytest.approx([2, 1.5, 1, 4.1]))]
    panel, = panels("norm-gap", *two_seeds, stages=["student", "teacher 1"])
    assert panel["lines"] == [("student less teacher 1", range(1, 5), pytest.approx([0, 0, 0, 2]))]
    with pytest.raises(ValueError, match="even number"):
        panels("norm-gap", *two_seeds, stages=["student"])
    panel, = panels("margins", *two_seeds)
    (_, sizes, _), (_, _, ce), (_, _, bce) = panel["lines"]
    assert sizes == [500, 100, 25, 10] and ce == pytest.approx([math.log(635 / n) for n in sizes])
    assert bce == pytest.approx([math.log((635 - n) / n) for n in sizes])

    more = stage("student", [70.0, 0.0, 0.0, 0.0], ece=8.0)
    more["reliability"].update(images=[0, 90, 0], accuracy=[None, 70.0, None], confidence=[None, 60.0, None])
    runs = two_seeds[0], write_run(tmp_path / "more", more, seed=5)
    panel, = panels("reliability", *runs, stages=["student"])  # bins of both seeds, weighed by their images
    assert panel["lines"] == [("student: ECE 6.5", pytest.approx([(30 * 50 + 90 * 60) / 120, 90]),
                               pytest.approx([(30 * 40 + 90 * 70) / 120, 80]))] and panel["level"] == "y = x"


def test_curves_and_gradients_are_the_log_s_means_over_seeds_even_unfinished(tmp_path, two_seeds, capsys):
    last = stage("student", [44.0, 85.0, 65.0, 50.0])
    cut_off = write_run(tmp_path / "cut_off", last, seed=3, finished=False)
    accuracy, lambdas = panels("curves", *two_seeds, cut_off, values=["all", "lambda"], stages=["student"])
    assert "cut_off" in capsys.readouterr().err
    assert accuracy["lines"] == [("student", [1, 2], pytest.approx([242 / 4 + 1, 242 / 4 + 2]))]
    assert lambdas["lines"] == [("student", [1, 2], [0.5, 1.0])] and lambdas["y"] == "lambda"

    folder = ROOT / "results/async_lt/gradients"
    log = [*map(json.loads, (folder / "log.jsonl").read_text().splitlines()[1:])]
    log = [line for line in log if line["stage"] == "two phases"]
    keys = ["cosine_head", "cosine_tail"], ["norm_head", "norm_tail", "norm"]
    for panel, keys in zip(panels("gradients", folder, stages=["two phases"]), keys, strict=True):
        assert [line[1:] for line in panel["lines"]] == [
            ([line["epoch"] for line in log], [line[key] for line in log]) for key in keys]


def test_cost_is_the_median_over_runs_and_a_sweep_goes_over_its_flag_with_a_line_a_setting(tmp_path):
    runs = [write_run(tmp_path / f"{sizes}{i}", stage("student", sizes * 4, seconds), resolutions=sizes)
            for sizes in ([32], [16, 32]) for i, seconds in enumerate((4.0, 6.0, 20.0))]
    time, memory = panels("cost", *runs)
    labels = "student, resolutions 32", "student, resolutions 16 32"
    assert time["bars"] == [(label, [i], [3.0]) for i, label in enumerate(labels)]
    assert [values for _, _, values in memory["bars"]] == [[600.0], [600.0]]

    runs = [write_run(tmp_path / f"{a}-{lr}-{i}", stage("student", [100 * a + 10 * lr + i] * 4), seed=i,
                      alpha=a, lr=lr) for lr in (0.1, 0.2) for a in (0.4, 0.0) for i in (0, 1)]
    accuracy, many = panels("sweep", *runs, flag="alpha", values=["all", "many"])
    assert accuracy["lines"] == [("student, lr 0.1", [0.0, 0.4], [1.5, 41.5]),
                                 ("student, lr 0.2", [0.0, 0.4], [2.5, 42.5])]
    assert accuracy["x"] == "alpha" and many["y"] == "many, %"
    for flag, message in (None, "these runs differ in: alpha, lr"), ("out", "no number as out"):
        with pytest.raises(ValueError, match=message):
            panels("sweep", *runs, flag=flag)


def test_neighbours_are_the_training_images_of_the_largest_cosine(whole, tmp_path):
    folder, _ = whole("cbd")
    arrays = np.load(folder.parent / "images.npz")
    sizes = np.bincount(arrays["y_train"])
    for panel, file in zip(panels("neighbours", folder), ("teacher_1.pt", "student.pt"), strict=True):
        model, saved = load_any(folder / file)

        def feature(image):  # of one image alone
            image = torch.tensor(image).permute(2, 0, 1)[None]
            return model(normalise(image, saved["mean"], saved["std"]))[1][0].detach()
        known = [feature(image) for image in arrays["x_train"]]
        assert [label for label, _, _ in panel["images"]] == [
            f"{c} ({sizes[c]})" for c in np.argsort(sizes, kind="stable")[::-1]]
        for label, (query, *nearest), (_, *colours) in panel["images"]:
            c = int(label.split()[0])
            first = arrays["x_test"][arrays["y_test"] == c][0]
            cosines = [F.cosine_similarity(feature(first), each, dim=0).item() for each in known]
            order = sorted(range(len(known)), key=lambda i: -cosines[i])[:5]
            assert np.allclose([query, *nearest], [first / 255, *arrays["x_train"][order] / 255], atol=1e-5)
            assert colours == [COLOURS[0] if arrays["y_train"][i] == c else COLOURS[1] for i in order]
    if importlib.util.find_spec("matplotlib"):
        main(["neighbours", str(folder), "--out", str(tmp_path / "picture.png")])


@pytest.mark.parametrize("kind", sorted(KINDS.keys() - {"neighbours"}))
def test_the_figure_draws_every_number_and_nothing_hides_or_is_cut_off(kind, tmp_path):
    matplotlib = pytest.importorskip("matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    names = "balanced-bce, from scratch, Bayes decoding", "candle, full precision, learned balance, by itself"
    runs = [ROOT / "results/async_lt/gradients"] if kind == "gradients" else [
        write_run(tmp_path / f"{method}{a}", *(stage(name, [10.0, 90.0, 50.0, 30 * a]) for name in names),
                  method=method, alpha=a) for method in ("livt", "candle", "async_lt") for a in (0.5, 1.0)]
    shown = panels(kind, *runs, stages=names if kind == "norm-gap" else None, flag="alpha")
    with matplotlib.rc_context(LOOK):
        figure = draw(shown)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()

    def place(artist):
        """Where a legend or a label is; it must lie on the page."""
        box, page = artist.get_window_extent(canvas.get_renderer()), figure.bbox.padded(1)
        assert page.contains(box.x0, box.y0) and page.contains(box.x1, box.y1), artist
        return box
    legends = [*figure.legends, *(ax.get_legend() for ax in figure.axes if ax.get_legend())]
    assert legends
    for ax, panel in zip(figure.axes, shown, strict=True):
        drawn = [line.get_xydata().tolist() for line in ax.lines]
        assert all([[x, y] for x, y in zip(xs, ys)] in drawn for _, xs, ys in panel.get("lines", ()))
        assert [bar.get_height() for bar in ax.patches] == [y for *_, ys in panel.get("bars", ()) for y in ys]
        assert ax.bbox.height > 100  # at 100 dots an inch: the labels have not squeezed it
        assert all(place(text) for text in (ax.title, ax.xaxis.label, ax.yaxis.label))
        assert not any(place(legend).overlaps(ax.bbox) for legend in legends)


def told(capsys, *argv):
    """What the command prints, or the one line that it ends with."""
    try:
        main([str(word) for word in argv])
    except SystemExit as stop:
        error = capsys.readouterr().err
        assert stop.code == 2 and error.startswith("error: ") and error.count("\n") == 1
        return error
    return capsys.readouterr().out


def test_a_picture_is_written_as_its_name_says_whole_or_not_at_all(two_seeds, tmp_path, monkeypatch, capsys):
    figure = pytest.importorskip("matplotlib.figure")
    for suffix, begins in ("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF"):
        out = tmp_path / f"picture.{suffix}"
        assert told(capsys, "classes", *two_seeds, "--out", out) == f"wrote {out}\n"
        assert out.read_bytes().startswith(begins) and not list(tmp_path.glob("unfinished*"))

    def killed(self, file):
        Path(file).write_bytes(b"half")
        raise KeyboardInterrupt
    monkeypatch.setattr(figure.Figure, "savefig", killed)
    with pytest.raises(KeyboardInterrupt):
        told(capsys, "classes", *two_seeds, "--out", tmp_path / "half.png")
    assert not (tmp_path / "half.png").exists()


def test_what_cannot_be_drawn_is_one_line_that_says_what_there_is(tmp_path, two_seeds, capsys, monkeypatch):
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "matplotlib", None)  # its import fails
        error = told(capsys, "classes", *two_seeds)
    assert error == "error: pictures need matplotlib: pip install matplotlib\n"
    pytest.importorskip("matplotlib")
    many = write_run(tmp_path / "many", *(stage(f"teacher {i}", [i] * 4) for i in range(9)))
    for argv, words in (
            (["pie", tmp_path], "invalid choice: 'pie'"),
            (["classes", tmp_path / "nowhere"], "not the folder of a run"),
            (["classes", __file__], f"there is no folder of a run among {__file__}"),
            (["classes", *two_seeds, "--out", "picture.gif"], ".png, .svg or .pdf"),
            (["classes", *two_seeds, "--stages", "studnet"], "'teacher 1', 'student', not of 'studnet'"),
            (["curves", *two_seeds, "--values", "accuracy"], "loss"),
            (["curves", many], "--stages from 'teacher 0'")):
        assert words in told(capsys, *argv)
    assert "wrote" in told(capsys, "classes", *two_seeds, __file__, "--out", tmp_path / "picture.png")
