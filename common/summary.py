"""Mean and standard deviation over seeds, as a Markdown table:  python -m common.summary RUNS...

RUNS are folders with a result.json, or result.json files. A row is a stage (a teacher, an ensemble, a
student); runs of one method, data set and stage are averaged over their seeds. A stage that several runs
share (a teacher loaded from a checkpoint) is counted once a seed.
"""
import argparse
import json
import statistics
import sys
from pathlib import Path

SHARED_FLAGS = ("imb_factor", "subset_seed", "evaluate_on", "arch", "epochs", "batch_size", "lr",
                "weight_decay", "resolutions", "kl_reduction", "fixed_lambda")
COLUMNS = (("many", "many"), ("medium", "medium"), ("few", "few"), ("head", "head"), ("median", "median"),
           ("tail", "tail"), ("all", "all"), ("best_all", "best all"), ("ncm", "NCM"), ("ece", "ECE"),
           ("mce", "MCE"), ("seconds", "seconds"))


def read_results(paths):
    """The contents of the result.json files at or in `paths`. Raises ValueError, naming what is missing."""
    results = []
    for path in map(Path, paths):
        path = path / "result.json" if path.is_dir() else path
        try:
            results.append(json.loads(path.read_text()))
        except (OSError, json.JSONDecodeError) as reason:
            raise ValueError(f"cannot read {path}: {reason}") from reason
    return results


def check_same_settings(results):
    """Raise ValueError when runs of one method and data set differ in a flag that every stage depends on."""
    first = {}
    for result in results:
        settings = {flag: result["args"].get(flag) for flag in SHARED_FLAGS}
        expected = first.setdefault((result["method"], result["dataset"]), settings)
        for flag in SHARED_FLAGS:
            if settings[flag] != expected[flag]:
                raise ValueError(f"runs of {result['dataset']} differ in --{flag.replace('_', '-')}: "
                                 f"{expected[flag]} and {settings[flag]}; summarise them apart")


def group_stages(results):
    """{(method, data set, stage name): {seed: stage}}, in the order of first appearance. Raises ValueError
    for runs that must not be averaged: other settings, or other scores under one name and seed."""
    check_same_settings(results)
    groups = {}
    for result in results:
        for stage in result["stages"]:
            seeds = groups.setdefault((result["method"], result["dataset"], stage["name"]), {})
            same = seeds.setdefault(result["seed"], stage)
            if stage["all"] is not None and \
                    abs(same["all"] - stage["all"]) > 0.5:  # another machine's rounding moves less than that
                raise ValueError(f"two runs of {result['dataset']} have a stage {stage['name']!r} of seed "
                                 f"{result['seed']} with other scores; summarise them apart")
            if stage.get("seconds"):  # the run that trained it knows how long that took
                seeds[result["seed"]] = stage
    return groups


def cell(values):
    """"mean +- std" of percentages or seconds (sample standard deviation; the mean alone of a single
    seed)."""
    values = [value for value in values if value is not None]
    if not values:
        return "-"
    mean = f"{statistics.mean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.1f}"


def markdown(groups):
    """A Markdown table for each method and data set."""
    lines = []
    for method, dataset in dict.fromkeys(key[:2] for key in groups):
        rows = [(name, list(s.values())) for (*here, name), s in groups.items() if here == [method, dataset]]
        columns = [column for column in COLUMNS if any(column[0] in s for _, stages in rows for s in stages)]
        lines += [f"| {method}, {dataset} | seeds | " + " | ".join(head for _, head in columns) + " |",
                  "|---" * (len(columns) + 2) + "|"]
        for name, stages in rows:
            cells = [cell([stage.get(key) for stage in stages]) for key, _ in columns]
            lines.append(f"| {name} | {len(stages)} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", metavar="RUNS")
    try:
        print(markdown(group_stages(read_results(parser.parse_args(argv).runs))))
    except ValueError as reason:
        print(f"error: {reason}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
