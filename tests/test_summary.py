"""common/summary.py: mean and standard deviation over seeds; results/ shows what its raw files say."""
import json
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from common.summary import group_stages, main, markdown, read_results

ROOT = Path(__file__).parent.parent


def result(seed, accuracy, name="student", seconds=10.0, dataset="set", lr=0.1):
    stage = {"name": name, "all": accuracy, "many": accuracy + 1, "medium": None, "few": accuracy - 1,
             "seconds": seconds, "per_class_accuracy": [accuracy]}
    return {"method": "cbd", "dataset": dataset, "seed": seed, "stages": [stage], "args": {"lr": lr}}


def write(tmp_path, *results):
    for number, content in enumerate(results):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "result.json").write_text(json.dumps(content))
    return [str(tmp_path / str(number)) for number in range(len(results))]


def test_a_row_is_the_mean_and_the_sample_standard_deviation_over_seeds(tmp_path):
    values = [70.0, 74.0, 75.0]
    paths = write(tmp_path, *(result(seed, value) for seed, value in enumerate(values)))
    text = markdown(group_stages(read_results(paths)))
    assert f"| student | 3 | 74.0 ± {statistics.stdev(values):.1f} | - |" in text  # no medium
    assert f"73.0 ± {statistics.stdev(values):.1f} | 10.0 ± 0.0 |" in text


def test_a_stage_that_two_runs_share_counts_once_a_seed_with_the_time_of_the_run_that_trained_it(tmp_path):
    paths = write(tmp_path, *(result(0, 70.0, seconds=seconds) for seconds in (None, 8.0, None)))
    text = markdown(group_stages(read_results(paths)))
    assert "| student | 1 | 71.0 | - | 69.0 | 70.0 | 8.0 |" in text


def test_a_stage_that_does_not_classify_has_no_scores(tmp_path):
    paths = write(tmp_path, *(result(seed, 70.0) for seed in (0, 1)))
    for path in paths:
        content = json.loads((Path(path) / "result.json").read_text())
        content["stages"].insert(0, {"name": "mgp", "all": None, "seconds": 5.0})
        (Path(path) / "result.json").write_text(json.dumps(content))
    assert "| mgp | 2 | - | - | - | - | 5.0 ± 0.0 |" in markdown(group_stages(read_results(paths)))


def test_runs_that_differ_under_one_name_and_seed_are_refused(tmp_path, capsys):
    paths = write(tmp_path, result(0, 70.0), result(0, 75.0))
    with pytest.raises(SystemExit) as stop:
        main(paths)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1


def test_runs_of_other_settings_are_not_averaged(tmp_path):
    paths = write(tmp_path, result(0, 70.0), result(1, 71.0, lr=0.2))
    with pytest.raises(ValueError, match="differ in --lr: 0.1 and 0.2"):
        group_stages(read_results(paths))


def test_data_sets_get_tables_of_their_own_and_a_missing_run_is_named(tmp_path, capsys):
    paths = write(tmp_path, result(0, 70.0), result(0, 20.0, dataset="other"))
    text = markdown(group_stages(read_results(paths)))
    assert "| cbd, set | seeds |" in text and "| cbd, other | seeds |" in text
    with pytest.raises(SystemExit) as stop:
        main([str(tmp_path / "nowhere")])
    assert stop.value.code == 2 and "nowhere" in capsys.readouterr().err


def test_every_table_in_results_is_what_summary_prints_from_the_raw_files():
    pages = sorted((ROOT / "results").glob("*.md"))
    assert pages
    for page in pages:
        text = page.read_text()
        commands = re.findall(r"^python -m common\.summary (.+)$", text, re.M)
        assert commands, page
        for command in commands:
            runs = [path for pattern in command.split() for path in sorted(ROOT.glob(pattern))]
            printed = subprocess.run([sys.executable, "-m", "common.summary", *map(str, runs)], cwd=ROOT,
                                     text=True, capture_output=True, check=True).stdout
            for line in printed.strip().splitlines():
                assert line in text, (page, line)
        for log in {path.parent for path in (ROOT / "results").rglob("result.json")}:
            assert (log / "log.jsonl").exists(), log


def test_every_row_of_the_readme_s_results_table_stands_in_results():
    readme = (ROOT / "README.md").read_text()
    rows = [line for line in readme.split("## Start")[0].splitlines() if re.match(r"\| .*\d", line)]
    shown = "".join(page.read_text() for page in (ROOT / "results").glob("*.md"))
    assert rows
    for row in rows:
        numbers = re.findall(r"\d+\.\d(?: ± \d+\.\d)?", row)
        assert any(all(number in line for number in numbers) for line in shown.splitlines()), row
