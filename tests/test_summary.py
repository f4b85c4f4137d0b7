"""common/summary.py: mean and standard deviation over seeds; results/ shows what its raw files say."""
import csv
import json
import re
import runpy
import statistics
import sys

import pytest

from common.summary import main
from tests.tiny import ROOT


def result(seed, accuracy, name="student", seconds=10.0, dataset="set", **args):
    stage = {"name": name, "all": accuracy, "many": accuracy + 1, "medium": None, "few": accuracy - 1,
             "mce": 40.0, "seconds": seconds, "per_class_accuracy": [accuracy]}
    return {"method": "cbd", "dataset": dataset, "seed": seed, "stages": [stage],
            "args": {"lr": 0.1, "alpha": 0.4, "binarize": True, **args}}


@pytest.fixture
def summary(tmp_path, capsys):
    """summary(results, *flags): what the command prints of runs with these results, in TMP_PATH/0, ..."""
    def of(results, *flags):
        for number, content in enumerate(results):
            (tmp_path / str(number)).mkdir()
            (tmp_path / str(number) / "result.json").write_text(json.dumps(content))
        main([*(str(tmp_path / str(number)) for number in range(len(results))), *flags])
        return capsys.readouterr().out
    return of


@pytest.fixture
def error(capsys):
    """error(run, *argv): the one line that run(*argv) ends with."""
    def of(run, *argv):
        with pytest.raises(SystemExit) as stop:
            run(*argv)
        line = capsys.readouterr().err.splitlines()[-1]
        assert stop.value.code == 2 and line.startswith("error: ")
        return line
    return of


def test_a_row_is_the_mean_and_the_sample_standard_deviation_over_seeds(summary):
    values = [70.0, 74.0, 75.0]
    text = summary([result(seed, value) for seed, value in enumerate(values)])
    assert f"| student | 3 | 74.0 ± {statistics.stdev(values):.1f} | - |" in text  # no medium
    assert f"73.0 ± {statistics.stdev(values):.1f} | 10.0 ± 0.0 |" in text
    assert "settings" not in text and "40.0" not in text  # MCE is in result.json and in the CSV alone


def test_a_stage_that_two_runs_share_counts_once_a_seed_with_the_time_of_the_run_that_trained_it(summary):
    text = summary([result(0, 70.0, seconds=seconds) for seconds in (None, 8.0, None)])
    assert "| student | 1 | 71.0 | - | 69.0 | 70.0 | 8.0 |" in text


def test_a_stage_that_does_not_classify_has_no_scores(summary):
    runs = [result(seed, 70.0) for seed in (0, 1)]
    for run in runs:
        run["stages"].insert(0, {"name": "mgp", "all": None, "seconds": 5.0})
    assert "| mgp | 2 | - | - | - | - | 5.0 ± 0.0 |" in summary(runs)


def test_runs_that_differ_under_one_name_seed_and_settings_are_refused(summary, error, tmp_path):
    line = error(summary, [result(0, 70.0), result(0, 70.1)])  # from other checkpoints, say
    assert f"{tmp_path}/0" in line and f"{tmp_path}/1" in line and "70.00 and 70.10" in line


def test_a_net_scored_again_may_differ_by_another_machine_s_rounding(summary):
    assert "| student | 1 | 71.0 " in summary([result(0, 70.0), result(0, 70.4, seconds=None)])


def test_a_net_scored_again_may_not_differ_by_more(summary, error):
    assert "70.00 and 70.60" in error(summary, [result(0, 70.0), result(0, 70.6, seconds=None)])


def test_two_nets_that_know_one_class_alone_and_two_folders_are_kept_apart(summary):
    runs = [result(0, 50.0, lr=lr) for lr in (0.1, 0.2)]
    for run, ece in zip(runs, (9.0, 8.0)):
        run["stages"][0]["ece"] = ece
    runs += [result(seed, 70.0 + seed, dataset="folder", data_dir=f"/data/{place}")
             for seed, place in enumerate(("birds", "bees"))]
    text = summary(runs)
    assert "| student | lr 0.1 | 1 |" in text and "| student | lr 0.2 | 1 |" in text
    assert "| cbd, folder birds |" in text and "| cbd, folder bees |" in text


def test_other_settings_have_a_row_of_their_own_that_names_what_differs(summary):
    text = summary([result(0, 70.0, out="a"), result(1, 72.0, out="b"), result(1, 60.0, lr=0.2),
                    result(0, 50.0, lr=0.2, binarize=False), result(0, 20.0, dataset="other", lr=0.3)])
    assert "| cbd, set | settings | seeds |" in text
    assert "| student | binarize, lr 0.1 | 2 | 72.0 ± 1.4 |" in text  # over seeds, whatever --out says
    assert "| student | binarize, lr 0.2 | 1 | 61.0 |" in text
    assert "| student | no binarize, lr 0.2 | 1 | 51.0 |" in text
    assert "| cbd, other | seeds |" in text  # a table of its own


def test_a_teacher_that_runs_of_other_settings_share_has_one_row(summary):
    runs = []
    for alpha, scores in ((0.2, (70.0, 71.0)), (0.4, (75.0, 76.0))):
        for seed in (0, 1):
            runs.append(result(seed, scores[seed], alpha=alpha, teacher_checkpoints=[f"runs/{seed}.pt"]))
            teacher = result(seed, 60.0 + seed, "teacher 1", None, alpha=alpha)["stages"][0]
            runs[-1]["stages"].insert(0, teacher)
    text = summary([*runs[1:], runs[0]])  # in no order
    assert text.count("| teacher 1 |") == 1 and "| teacher 1 |  | 2 | 61.5 ± 0.7 |" in text
    assert "| student | alpha 0.2 | 2 |" in text and "| student | alpha 0.4 | 2 |" in text


def test_what_is_unfinished_missing_or_broken_is_named(summary, error, tmp_path, capsys):
    (tmp_path / "cut_off").mkdir()
    (tmp_path / "cut_off" / "log.jsonl").write_text("{}\n")
    (tmp_path / "queue.log").write_text("")
    summary([result(0, 70.0)])
    main([str(tmp_path / name) for name in ("0", "cut_off", "queue.log")])
    out, err = capsys.readouterr()
    assert "| student | 1 | 71.0 |" in out
    assert err.startswith("note: ") and err.count("\n") == 1 and "cut_off" in err and "queue.log" in err

    (tmp_path / "0" / "result.json").write_text("{")
    for name, words in (("cut_off", "none of these runs is finished"), ("nowhere", "nowhere"),
                        ("0", "result.json")):
        assert words in error(main, [str(tmp_path / name)])


def test_csv_holds_every_score(summary):
    runs = [result(0, 70.0), result(1, 72.0), result(0, 60.0, lr=0.2, resolutions=[16, 32])]
    first, second = csv.DictReader(summary(runs, "--csv").splitlines())
    assert list(first.values())[:5] == ["cbd", "set", "student", "lr 0.1", "2"]
    assert (float(first["all"]), float(first["all_std"])) == (71.0, round(2 ** 0.5, 4))
    assert (first["medium"], first["mce"], first["ncm"]) == ("", "40.0", "")
    assert (second["settings"], second["all"], second["all_std"]) == ("lr 0.2", "60.0", "")


def test_every_table_in_results_is_what_the_command_prints(capsys, monkeypatch):
    pages = sorted((ROOT / "results").glob("*.md"))
    assert pages
    for page in pages:
        text = page.read_text()
        commands = re.findall(r"^python -m common\.summary (.+)$", text, re.M)
        assert commands or page.stem not in ("cbd", "async_lt", "livt", "candle"), page
        for command in commands:
            paths = [str(path) for pattern in command.split() for path in sorted(ROOT.glob(pattern))]
            monkeypatch.setattr(sys, "argv", ["summary.py", *paths])
            runpy.run_path(str(ROOT / "common" / "summary.py"), run_name="__main__")
            for line in capsys.readouterr().out.strip().splitlines():
                assert line in text, (page, line)
    for log in {path.parent for path in (ROOT / "results").rglob("result.json")}:
        assert (log / "log.jsonl").exists(), log


def test_every_score_of_the_readme_s_results_table_is_a_cell_of_a_table_in_results():
    lines = (ROOT / "README.md").read_text().split("## The commands")[0].splitlines()
    rows = [line.split("|") for line in lines if re.search(r"\d ->", line)]
    shown = "".join(page.read_text() for page in (ROOT / "results").glob("*.md"))
    assert [row[1].strip() for row in rows] == ["`cbd.py`", "`async_lt.py`", "`livt.py`", "`candle.py`"]
    for row in rows:
        numbers = re.findall(r"\d+\.\d(?: ± \d+\.\d)?", row[4])  # baseline -> method
        assert len(numbers) == 2 and all(f"| {number} |" in shown for number in numbers), row
