"""common/plot.py: each kind of picture shows the numbers of result.json and log.jsonl, and can be read."""
import argparse
import importlib.util
import json
import math
import statistics
import sys
from pathlib import Path

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
BY_SIZE = [1, 2, 3, 0]


def stage(name, accuracy, seconds=6.0, **more):
    return {"name": name, "all": statistics.fmean(accuracy), "many": accuracy[1], "ece": 5.0,
            "per_class_accuracy": accuracy, "weight_norms": [2.0, 1.5, 1.0, accuracy[0] / 10],
            "seconds": seconds, "peak_memory_mb": 100 * (seconds or 0),
            "reliability": {"images": [0, 30, 10], "confidence": [None, 50.0, 90.0],
                            "accuracy": [None, accuracy[0], 80.0]}, **more}


def write_run(folder, *stages, method="cbd", seed=0, lines=(), finished=True, **flags):
    """A run's folder with these stages, and a log of two epochs each unless `lines` says another."""
    args = {"dataset": "set", "seed": seed, "out": str(folder), "alpha": 0.4, "lr": 0.1, **flags}
    lines = lines or [
        {"stage": each["name"], "epoch": epoch, "loss": 1 / epoch, "all": (each["all"] or 0) + epoch,
         "lambda": epoch / 2, "seconds": (each["seconds"] or 0) * epoch / 2}
        for each in stages for epoch in (1, 2)]
    folder.mkdir()
    log = [{"method": method, "args": args}, *lines]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    if finished:
        (folder / "result.json").write_text(json.dumps({
            "method": method, "dataset": "data/set.npz", "seed": seed, "class_counts": COUNTS,
            "stages": list(stages), "args": args}))
    return str(folder)


def panels(kind, *runs, stages=None, values=("all",), flag=None):
    return KINDS[kind]([read_run(run) for run in runs],
                       argparse.Namespace(kind=kind, stages=stages, values=values, flag=flag))


@pytest.fixture
def two_seeds(tmp_path):
    return [write_run(tmp_path / f"run{seed}", stage("teacher 1", [20.0 + seed, 90.0, 60.0, 40.0]),
                      stage("student", [40.0 + seed, 85.0, 65.0, 50.0]), seed=seed) for seed in (0, 2)]


def test_classes_are_dots_by_size_with_their_running_mean_over_seeds(two_seeds):
    panel, = panels("classes", *two_seeds)
    assert panel["title"] == "cbd, set"
    assert [label for label, *_ in panel["lines"]] == ["teacher 1", "student"]
    sizes, accuracy = panel["dots"][0]
    assert list(sizes) == [COUNTS[c] for c in BY_SIZE]
    assert list(accuracy) == pytest.approx([90, 60, 40, 21])  # class 0: the mean of 20 and 22
    _, xs, ys = panel["lines"][0]  # of four classes the line joins the dots
    assert ys == pytest.approx(accuracy) and xs == pytest.approx(sizes)
    assert panel["x_log"] and panel["x_falls"]

    xs, ys = running_mean([100, 50, *[10] * 8], [90, 60, *[30] * 8])
    assert ys == pytest.approx([75, 60, 40, *[30] * 7])
    assert xs[1] == pytest.approx((100 * 50 * 10) ** (1 / 3))


def test_each_method_has_a_panel_with_its_baseline_and_itself(tmp_path, two_seeds):
    other = write_run(tmp_path / "livt", {"name": "mgp", "all": None, "seconds": 3.0},
                      stage("bce, Bayes decoding", [1.0] * 4, seconds=None), stage("bce", [2.0] * 4),
                      stage("balanced-bce", [3.0] * 4), method="livt")
    for stages, cbd, livt in ((None, ["teacher 1", "student"], ["bce", "balanced-bce"]),
                              (["student", "bce"], ["student"], ["bce"])):
        found = panels("classes", *two_seeds, other, stages=stages)
        assert [(panel["title"], [label for label, *_ in panel["lines"]]) for panel in found] == [
            ("cbd, set", cbd), ("livt, set", livt)]


def test_runs_of_other_settings_have_lines_that_name_them(tmp_path):
    runs = [write_run(tmp_path / str(alpha), stage("student", [alpha] * 4), alpha=alpha)
            for alpha in (0.2, 0.8)]
    panel, = panels("classes", *runs)
    assert [label for label, *_ in panel["lines"]] == ["student, alpha 0.2", "student, alpha 0.8"]


def test_gain_is_a_bar_a_class_by_rank_in_its_group_s_colour(two_seeds):
    panel, = panels("gain", *two_seeds)
    assert panel["title"] == "cbd, set: student - teacher 1"
    assert panel["bars"] == [("many: -5.0", [1], [-5.0]), ("medium: +7.5", [2, 3], [5.0, 10.0]),
                             ("few: +20.0", [4], [20.0])]


def test_curves_are_the_log_s_means_over_seeds_and_go_without_a_result(tmp_path, two_seeds, capsys):
    cut_off = write_run(tmp_path / "cut_off", stage("student", [44.0, 85.0, 65.0, 50.0]), seed=3,
                        finished=False)
    accuracy, lambdas = panels("curves", *two_seeds, cut_off, values=["all", "lambda"], stages=["student"])
    assert "cut_off" in capsys.readouterr().err
    mean = statistics.fmean([240 / 4, 242 / 4, 244 / 4])
    assert accuracy["lines"] == [("student", [1, 2], pytest.approx([mean + 1, mean + 2]))]
    assert lambdas["lines"] == [("student", [1, 2], [0.5, 1.0])] and lambdas["y"] == "lambda"


def test_reliability_weighs_the_seeds_bins_by_their_images(tmp_path, two_seeds):
    more = stage("student", [70.0, 0.0, 0.0, 0.0], ece=8.0)
    more["reliability"].update(images=[0, 90, 0], accuracy=[None, 70.0, None], confidence=[None, 60.0, None])
    runs = [two_seeds[0], write_run(tmp_path / "more", more, seed=5)]
    panel, = panels("reliability", *runs, stages=["student"])
    (label, confidence, accuracy), = panel["lines"]
    assert label == "student: ECE 6.5" and panel["level"] == "y = x"
    assert confidence == pytest.approx([(30 * 50 + 90 * 60) / 120, 90])
    assert accuracy == pytest.approx([(30 * 40 + 90 * 70) / 120, 80])


def test_norms_and_their_gap(two_seeds):
    panel, = panels("norms", *two_seeds)
    assert panel["lines"] == [("teacher 1", range(1, 5), pytest.approx([2, 1.5, 1, 2.1])),
                              ("student", range(1, 5), pytest.approx([2, 1.5, 1, 4.1]))]
    panel, = panels("norm-gap", *two_seeds, stages=["student", "teacher 1"])
    assert panel["lines"] == [("student less teacher 1", range(1, 5), pytest.approx([0, 0, 0, 2]))]
    with pytest.raises(ValueError, match="even number"):
        panels("norm-gap", *two_seeds, stages=["student"])


def test_cost_is_the_median_over_runs_of_each_setting(tmp_path):
    runs = [write_run(tmp_path / f"{sizes}{i}", stage("student", sizes * 4, seconds), resolutions=sizes)
            for sizes in ([32], [16, 32]) for i, seconds in enumerate((4.0, 6.0, 20.0))]
    time, memory = panels("cost", *runs)
    assert time["bars"] == [("student, resolutions 32", [0], [3.0]),
                            ("student, resolutions 16 32", [1], [3.0])]
    assert [values for _, _, values in memory["bars"]] == [[600.0], [600.0]]


def test_gradients_are_those_of_the_log():
    cosine, norm = panels("gradients", ROOT / "results/async_lt/gradients", stages=["two phases"])
    log = (ROOT / "results/async_lt/gradients/log.jsonl").read_text().splitlines()
    log = [line for line in map(json.loads, log[1:]) if line["stage"] == "two phases"]
    for panel, keys in ((cosine, ["cosine_head", "cosine_tail"]), (norm, ["norm_head", "norm_tail", "norm"])):
        assert [(xs, ys) for _, xs, ys in panel["lines"]] == [
            ([line["epoch"] for line in log], [line[key] for line in log]) for key in keys]


def test_a_sweep_goes_over_its_flag_with_a_line_for_each_other_setting(tmp_path):
    runs = [write_run(tmp_path / f"{alpha}-{lr}-{seed}", stage("student", [100 * alpha + 10 * lr + seed] * 4),
                      seed=seed, alpha=alpha, lr=lr)
            for lr in (0.1, 0.2) for alpha in (0.4, 0.0) for seed in (0, 1)]
    accuracy, many = panels("sweep", *runs, flag="alpha", values=["all", "many"])
    assert accuracy["lines"] == [("student, lr 0.1", [0.0, 0.4], [1.5, 41.5]),
                                 ("student, lr 0.2", [0.0, 0.4], [2.5, 42.5])]
    assert accuracy["x"] == "alpha" and many["y"] == "many, %"
    with pytest.raises(ValueError, match="these runs differ in: alpha, lr"):
        panels("sweep", *runs)
    with pytest.raises(ValueError, match="no number as out"):
        panels("sweep", *runs, flag="out")


def test_margins_are_the_balanced_losses_biases(two_seeds):
    panel, = panels("margins", *two_seeds)
    (_, sizes, _), (_, _, ce), (_, _, bce) = panel["lines"]
    assert sizes == [500, 100, 25, 10]
    assert ce == pytest.approx([math.log(635 / n) for n in sizes])
    assert bce == pytest.approx([math.log((635 - n) / n) for n in sizes])


def test_neighbours_are_the_training_images_of_the_largest_cosine(whole, tmp_path):
    folder, _ = whole("cbd")
    arrays = np.load(folder.parent / "images.npz")
    shown = panels("neighbours", str(folder))
    for panel, file in zip(shown, ("teacher_1.pt", "student.pt"), strict=True):
        model, saved = load_any(folder / file)

        def feature(image):  # of one image alone
            image = torch.tensor(image).permute(2, 0, 1)[None]
            return model(normalise(image, saved["mean"], saved["std"]))[1][0].detach()

        known = [feature(image) for image in arrays["x_train"]]
        sizes = np.bincount(arrays["y_train"])
        assert [label for label, _, _ in panel["images"]] == [
            f"{c} ({sizes[c]})" for c in np.argsort(sizes, kind="stable")[::-1]]
        for label, (query, *nearest), (_, *colours) in panel["images"]:
            c = int(label.split()[0])
            first = arrays["x_test"][arrays["y_test"] == c][0]
            assert np.allclose(query, first / 255, atol=1e-5)
            cosines = [F.cosine_similarity(feature(first), each, dim=0).item() for each in known]
            order = sorted(range(len(known)), key=lambda i: -cosines[i])[:5]
            assert np.allclose(nearest, arrays["x_train"][order] / 255, atol=1e-5)
            assert colours == [COLOURS[0] if arrays["y_train"][i] == c else COLOURS[1] for i in order]
    if importlib.util.find_spec("matplotlib"):
        main(["neighbours", str(folder), "--out", str(tmp_path / "picture.png")])


@pytest.mark.parametrize("kind", sorted(KINDS.keys() - {"neighbours"}))
def test_the_figure_draws_every_number_and_nothing_hides_or_is_cut_off(kind, tmp_path):
    matplotlib = pytest.importorskip("matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    names = "balanced-bce, from scratch, Bayes decoding", "candle, full precision, learned balance, by itself"
    runs = [ROOT / "results/async_lt/gradients"] if kind == "gradients" else [
        write_run(tmp_path / f"{method}{alpha}",
                  *(stage(name, [10.0, 90.0, 50.0, 30.0 * alpha]) for name in names),
                  method=method, alpha=alpha)
        for method in ("livt", "candle", "async_lt") for alpha in (0.5, 1.0)]
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
    assert legends and len(figure.axes) == len(shown)
    for ax, panel in zip(figure.axes, shown):
        drawn = [line.get_xydata().tolist() for line in ax.lines]
        for _, xs, ys in panel.get("lines", ()):
            assert [list(point) for point in zip(xs, ys)] in drawn
        heights = [bar.get_height() for bar in ax.patches]
        assert heights == [y for _, _, ys in panel.get("bars", ()) for y in ys]
        assert ax.bbox.height > 100  # at 100 dots an inch: the labels have not squeezed it
        assert all(place(text) for text in (ax.title, ax.xaxis.label, ax.yaxis.label))
        assert not any(place(legend).overlaps(ax.bbox) for legend in legends)


@pytest.fixture
def picture(capsys):
    """picture(*argv): what the command prints, or the one line that it ends with."""
    def of(*argv):
        try:
            main([str(word) for word in argv])
        except SystemExit as stop:
            error = capsys.readouterr().err
            assert stop.code == 2 and error.startswith("error: ") and error.count("\n") == 1
            return error
        return capsys.readouterr().out
    return of


@pytest.mark.parametrize("suffix, begins", [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_a_picture_is_written_as_its_name_says(two_seeds, tmp_path, suffix, begins, picture):
    pytest.importorskip("matplotlib")
    out = tmp_path / f"picture.{suffix}"
    assert picture("classes", *two_seeds, "--out", out) == f"wrote {out}\n"
    assert out.read_bytes().startswith(begins)
    assert not list(tmp_path.glob("unfinished*"))


def test_a_picture_is_whole_or_not_there(two_seeds, tmp_path, monkeypatch):
    figure = pytest.importorskip("matplotlib.figure")

    def killed(self, file):
        Path(file).write_bytes(b"half")
        raise KeyboardInterrupt
    monkeypatch.setattr(figure.Figure, "savefig", killed)
    with pytest.raises(KeyboardInterrupt):
        main(["classes", *map(str, two_seeds), "--out", str(tmp_path / "picture.png")])
    assert not (tmp_path / "picture.png").exists()


def test_what_cannot_be_drawn_is_one_line_that_says_what_there_is(tmp_path, two_seeds, picture):
    pytest.importorskip("matplotlib")
    assert "not the folder of a run" in picture("classes", tmp_path / "nowhere")
    assert ".png, .svg or .pdf" in picture("classes", *two_seeds, "--out", "picture.gif")
    error = picture("classes", *two_seeds, "--stages", "studnet")
    assert "'teacher 1', 'student'" in error and "'studnet'" in error
    assert "loss" in picture("curves", *two_seeds, "--values", "accuracy")
    many = write_run(tmp_path / "many", *(stage(f"teacher {i}", [i] * 4) for i in range(9)))
    assert "--stages from 'teacher 0'" in picture("curves", many)


def test_without_matplotlib_one_line_says_how_to_get_it(two_seeds, picture, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # its import fails
    assert picture("classes", *two_seeds) == "error: pictures need matplotlib: pip install matplotlib\n"
