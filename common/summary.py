"""Mean and standard deviation over seeds, as Markdown tables:  python -m common.summary runs/* [--csv]

RUNS are run folders, or result.json files; what has no result.json yet is left out. A row is a stage (a
teacher, an ensemble, a student) of a method on a data set, over its seeds. Where a stage was trained with
several settings, each has a row of its own, which names them. A stage that several runs share (a teacher
loaded from a checkpoint) is counted once a seed. --csv has every score, Markdown those of a run's own table.
"""
import argparse
import csv
import json
import statistics
import sys
from pathlib import Path

from common.evaluate import columns_of, legend

SCORES = ("many", "medium", "few", "head", "median", "tail", "all", "mean", "best_all", "ncm", "ece", "mce",
          "seconds", "images_per_second", "peak_memory_mb")
NOT_SETTINGS = {  # flags that say where a run computes, which stages, and what it keeps, not how it trains
    "seed", "out", "resume", "device", "workers", "data_dir", "time_limit", "compile", "skip_bad_images",
    "evaluate", "evaluate_every", "export", "save_logits", "recipe", "quick", "plain", "baseline", "ablation",
    "teachers", "only_teacher", "stage"}


SAME = ("per_class_accuracy", "ece")  # of one net, scored twice; two that know a single class differ in ECE


def read_results(paths):
    """The contents of the result.json files at or in `paths`, each with its "path"; and the paths that have
    none. Raises ValueError, naming what is missing or cannot be read."""
    results, unfinished = [], []
    for path in map(Path, paths):
        if not path.exists():
            raise ValueError(f"there is no {path}")
        file = path / "result.json" if path.is_dir() else path
        if file.name != "result.json" or not file.exists():
            unfinished.append(str(path))
            continue
        try:
            results.append({**json.loads(file.read_text()), "path": str(path)})
        except (OSError, ValueError) as reason:
            raise ValueError(f"cannot read {file}: {reason}") from reason
    return results, unfinished


def differing_flags(results):
    """The flags, of those that all these runs know, that set what is computed and that they do not share."""
    known = set.intersection(*(set(result["args"]) for result in results)) - NOT_SETTINGS
    known = {flag for flag in known if "checkpoint" not in flag}  # a path: it differs from seed to seed
    first = results[0]["args"]
    return sorted(flag for flag in known if any(result["args"][flag] != first[flag] for result in results))


def in_words(args, flags):
    """"lr 0.1, no binarize", say: these flags as a heading."""
    def word(flag):
        name, value = flag.replace("_", " "), args[flag]
        if isinstance(value, bool):
            return name if value else f"no {name}"
        return f"{name} {' '.join(map(str, value)) if isinstance(value, list) else value}"
    return ", ".join(word(flag) for flag in flags)


def group_stages(results):
    """{(method, data set, stage name, settings): [(result, stage), ...]}, in the order of first appearance.

    data set: its name, of a folder the folder's. settings: "" where a stage has but one group, else the flags
    that tell its groups apart. A stage joins a group where another has its settings, or is the same one: of
    its seed, with its scores.
    """
    runs, stages = {}, {}
    for result in results:
        folder = f" {Path(result['args']['data_dir']).name}" if result["dataset"] == "folder" else ""
        key = result["method"], result["dataset"] + folder
        runs.setdefault(key, []).append(result)
        for stage in result["stages"]:
            stages.setdefault((*key, stage["name"]), []).append((result, stage))

    groups = {}
    for key, members in stages.items():
        flags = differing_flags(runs[key[:2]])
        apart = _set_apart(members, flags)
        for group in apart:
            settings = in_words(group[0][0]["args"], _telling(apart, flags)) if len(apart) > 1 else ""
            groups.setdefault((*key, settings), []).extend(group)
    return groups


def _set_apart(members, flags):
    """Lists of (result, stage) that belong together, as `group_stages` says."""
    def belongs(result, stage, group):
        return any(all(result["args"][flag] == other["args"][flag] for flag in flags) or (
            result["seed"] == other["seed"] and stage["all"] is not None
            and all(stage.get(key) == same.get(key) for key in SAME)) for other, same in group)

    groups = []
    for result, stage in members:
        joined = [group for group in groups if belongs(result, stage, group)]
        if joined:
            joined[0] += [pair for group in joined[1:] for pair in group] + [(result, stage)]
            groups = [group for group in groups if not any(group is other for other in joined[1:])]
        else:
            groups.append([(result, stage)])
    return groups


def _telling(groups, flags):
    """Of the flags in which these groups' first members differ, those that do not vary inside a group."""
    first = [group[0][0]["args"] for group in groups]
    differing = [flag for flag in flags if any(args[flag] != first[0][flag] for args in first)]
    constant = [flag for flag in differing if all(
        result["args"][flag] == args[flag] for args, group in zip(first, groups) for result, _ in group)]
    return constant or differing


def once_a_seed(members):
    """{seed: stage} of a group's (result, stage) pairs. Raises ValueError where one seed has two scores."""
    seeds, paths = {}, {}
    for result, stage in members:
        seed = result["seed"]
        same, path = seeds.setdefault(seed, stage), paths.setdefault(seed, result["path"])
        both_trained = same.get("seconds") and stage.get("seconds")
        # a net that is scored again, on another machine, moves by less than .5
        if stage["all"] is not None and abs(same["all"] - stage["all"]) > (0 if both_trained else 0.5):
            raise ValueError(f"{path} and {result['path']} are of one seed and the same settings, "
                             f"but {stage['name']!r} has {same['all']:.2f} and {stage['all']:.2f}; give one")
        if stage.get("seconds"):  # the run that trained it knows how long that took
            seeds[seed] = stage
    return seeds


# ---------------------------------------------------------------- Markdown and CSV

def cell(values):
    """"mean ± std" of percentages or seconds (sample standard deviation; the mean alone of one seed)."""
    values = [value for value in values if value is not None]
    if not values:
        return "-"
    mean = f"{statistics.mean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.1f}"


def markdown(groups):
    """A Markdown table for each method and data set, and a legend."""
    lines, shown = [], {}
    for method, dataset in dict.fromkeys(key[:2] for key in groups):
        rows = {key[2:]: list(once_a_seed(members).values()) for key, members in groups.items()
                if key[:2] == (method, dataset)}
        stages = [stage for row in rows.values() for stage in row]
        columns = columns_of(stages) + [("seconds", "seconds")]
        shown.update(columns)

        has_settings = any(settings for _, settings in rows)
        head = [f"{method}, {dataset}", *["settings"] * has_settings, "seeds", *(head for _, head in columns)]
        lines += [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
        for (name, settings), row in rows.items():
            cells = [cell([stage.get(key) for stage in row]) for key, _ in columns]
            cells = [name, *[settings] * has_settings, str(len(row)), *cells]
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join([*lines, legend(shown.items())]).strip()


def write_csv(groups, file):
    """A line for each stage and its settings: every score's mean and, where there are seeds, deviation."""
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["method", "dataset", "stage", "settings", "seeds",
                     *(f"{key}{suffix}" for key in SCORES for suffix in ("", "_std"))])
    for key, members in groups.items():
        row = list(once_a_seed(members).values())
        cells = []
        for score in SCORES:
            values = [stage[score] for stage in row if stage.get(score) is not None]
            cells += [round(statistics.mean(values), 4) if values else "",
                      round(statistics.stdev(values), 4) if len(values) > 1 else ""]
        writer.writerow([*key, len(row), *cells])


def main(argv=None):
    parser = argparse.ArgumentParser("python -m common.summary", description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", metavar="RUNS", help="run folders, or result.json files")
    parser.add_argument("--csv", action="store_true", help="every score, as comma-separated values")
    args = parser.parse_args(argv)
    try:
        results, unfinished = read_results(args.runs)
        if unfinished:
            print(f"note: left out, without a result.json: {', '.join(unfinished)}", file=sys.stderr)
        if not results:
            raise ValueError("none of these runs is finished")
        groups = group_stages(results)
        write_csv(groups, sys.stdout) if args.csv else print(markdown(groups))
    except ValueError as reason:
        print(f"error: {reason}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
