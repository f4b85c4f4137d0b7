"""common/summary.py: mean and standard deviation over seeds; results/ shows what its raw files say."""
import csv
import json
import re
import runpy
import sys
from statistics import stdev

import pytest

from common.summary import main
from tests.tiny import METHODS, ROOT


def result(seed, accuracy, name="student", seconds=10.0, dataset="set", more=(), **args):
    stage = {"name": name, "all": accuracy, "many": accuracy + 1, "medium": None, "few": accuracy - 1,
             "mce": 40.0, "seconds": seconds, "per_class_accuracy": [accuracy], **dict(more)}
    return {"method": "cbd", "dataset": dataset, "seed": seed, "stages": [stage],
            "args": {"lr": 0.1, "alpha": 0.4, "binarize": True, **args}}


@pytest.fixture
def summary(tmp_path, capsys):
    """summary(results, *argv): what the command prints of runs with these results, in TMP_PATH/0, ..., or the
    error that it ends with."""
    def of(results, *argv):
        folders = [tmp_path / str(number) for number in range(len(results))]
        for folder, content in zip(folders, results):
            folder.mkdir(exist_ok=True)
            (folder / "result.json").write_text(json.dumps(content))
        try:
            main([*map(str, folders), *map(str, argv)])
        except SystemExit as stop:
            error = capsys.readouterr().err.splitlines()[-1]
            assert stop.code == 2 and error.startswith("error: ")
            return error
        return capsys.readouterr().out
    return of


def test_a_row_is_the_mean_and_the_sample_standard_deviation_over_seeds_of_what_a_stage_has(summary):
    values = [70.0, 74.0, 75.0]
    runs, deviation = [result(seed, value) for seed, value in enumerate(values)], stdev(values)
    for run in runs:
        run["stages"].insert(0, {"name": "mgp", "all": None, "seconds": 5.0})  # does not classify
    text = summary(runs)
    assert f"| student | 3 | 74.0 ± {deviation:.1f} | - |" in text  # no medium
    assert f"73.0 ± {deviation:.1f} | 10.0 ± 0.0 |" in text
    assert "| mgp | 3 | - | - | - | - | 5.0 ± 0.0 |" in text
    assert "settings" not in text and "40.0" not in text  # MCE is in result.json and in the CSV alone


def test_a_stage_counts_once_a_seed_and_may_differ_by_a_machine_s_rounding_where_it_is_scored_again(summary):
    for scores, *words in (  # of two nets, trained from other checkpoints, say; the second trained or not
            ([(70.0, None), (70.0, 8.0), (70.0, None)], "| student | 1 | 71.0 | - | 69.0 | 70.0 | 8.0 |"),
            ([(70.0, 10.0), (70.1, 10.0)], "error: ", "70.00 and 70.10", "/0 and ", "/1 are of one seed"),
            ([(70.0, 10.0), (70.4, None)], "| student | 1 | 71.0 "),
            ([(70.0, 10.0), (70.6, None)], "error: ", "70.00 and 70.60")):
        text = summary([result(0, accuracy, seconds=seconds) for accuracy, seconds in scores])
        assert all(word in text for word in words), text


def test_other_settings_nets_and_folders_have_rows_or_tables_of_their_own_but_not_a_shared_teacher(summary):
    text = summary([result(0, 70.0, out="a"), result(1, 72.0, out="b"), result(1, 60.0, lr=0.2),
                    result(0, 50.0, lr=0.2, binarize=False), result(0, 20.0, dataset="other", lr=0.3)])
    assert "| cbd, set | settings | seeds |" in text and "| cbd, other | seeds |" in text
    assert "| student | binarize, lr 0.1 | 2 | 72.0 ± 1.4 |" in text  # over seeds, whatever --out says
    assert "| student | binarize, lr 0.2 | 1 | 61.0 |" in text
    assert "| student | no binarize, lr 0.2 | 1 | 51.0 |" in text
    runs = [result(0, 50.0, lr=lr, more={"ece": 90 * lr}) for lr in (0.1, 0.2)]  # both know one class alone
    text = summary([*runs, *(result(seed, 70.0 + seed, dataset="folder", data_dir=f"/data/{place}")
                             for seed, place in enumerate(("birds", "bees")))])
    for row in "student | lr 0.1 | 1", "student | lr 0.2 | 1", "cbd, folder birds", "cbd, folder bees":
        assert f"| {row} |" in text

    # a teacher that runs of other settings share has one row
    runs = []
    for alpha, seed in ((0.2, 0), (0.2, 1), (0.4, 0), (0.4, 1)):
        how = dict(alpha=alpha, teacher_checkpoints=[f"runs/{seed}.pt"])
        runs.append(result(seed, 66.0 + 20 * alpha + seed, **how))
        runs[-1]["stages"] = result(seed, 60.0 + seed, "teacher 1", None)["stages"] + runs[-1]["stages"]
    text = summary([*runs[1:], runs[0]])  # in no order
    assert text.count("| teacher 1 |") == 1 and "| teacher 1 |  | 2 | 61.5 ± 0.7 |" in text
    assert "| student | alpha 0.2 | 2 |" in text and "| student | alpha 0.4 | 2 |" in text


def test_what_is_unfinished_missing_or_broken_is_named(summary, tmp_path, capsys):
    for file in "cut_off/log.jsonl", "queue.log":
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text("{}\n")
    summary([result(0, 70.0)])
    main([str(tmp_path / name) for name in ("0", "cut_off", "queue.log")])
    out, err = capsys.readouterr()
    assert "| student | 1 | 71.0 |" in out and err.startswith("note: ") and err.count("\n") == 1
    assert "cut_off" in err and "queue.log" in err
    (tmp_path / "0" / "result.json").write_text("{")
    for name, words in ("cut_off", "none of these runs is"), ("nowhere", "nowhere"), ("0", "result.json"):
        error = summary([], tmp_path / name)
        assert error.startswith("error: ") and words in error


def test_csv_holds_every_score(summary):
    runs = [result(0, 70.0), result(1, 72.0), result(0, 60.0, lr=0.2, resolutions=[16, 32])]
    first, second = csv.DictReader(summary(runs, "--csv").splitlines())
    assert list(first.values())[:5] == ["cbd", "set", "student", "lr 0.1", "2"]
    assert (float(first["all"]), float(first["all_std"])) == (71.0, round(2 ** 0.5, 4))
    assert (first["medium"], first["mce"], first["ncm"]) == ("", "40.0", "")
    assert (second["settings"], second["all"], second["all_std"]) == ("lr 0.2", "60.0", "")


def test_every_table_in_results_is_what_the_command_prints_and_has_the_readme_s_scores(capsys, monkeypatch):
    pages = {page: page.read_text() for page in sorted((ROOT / "results").glob("*.md"))}
    for page, text in pages.items():
        commands = re.findall(r"^python -m common\.summary (.+)$", text, re.M)
        assert commands or page.stem not in METHODS, page
        for command in commands:
            paths = [str(path) for pattern in command.split() for path in sorted(ROOT.glob(pattern))]
            monkeypatch.setattr(sys, "argv", ["summary.py", *paths])
            runpy.run_path(str(ROOT / "common" / "summary.py"), run_name="__main__")
            for line in capsys.readouterr().out.strip().splitlines():
                assert line in text, (page, line)
    for log in {path.parent for path in (ROOT / "results").rglob("result.json")}:
        assert (log / "log.jsonl").exists(), log

    lines = (ROOT / "README.md").read_text().split("## The commands")[0].splitlines()
    rows, shown = [line.split("|") for line in lines if re.search(r"\d ->", line)], "".join(pages.values())
    assert [row[1].strip() for row in rows] == [f"`{method}.py`" for method in METHODS]
    for row in rows:
        numbers = re.findall(r"\d+\.\d(?: ± \d+\.\d)?", row[4])  # baseline -> method, twice at the most
        assert len(numbers) in (2, 4) and all(f"| {number} |" in shown for number in numbers), row
