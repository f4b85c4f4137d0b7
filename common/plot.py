"""Pictures of runs, for a paper's column:

    python -m common.plot KIND RUNS... [--out FILE.png|.svg|.pdf]

    classes      accuracy of each class against its number of training images
    gain         accuracy of each class above the first of --stages (CANDLE,
                 Figures 9 to 11)
    curves       --values over the epochs: all, few, loss, ece, lambda (CANDLE,
                 Figure 6), ...
    reliability  accuracy against confidence, with the calibration error
    norms        norm of each class's row of the classifier (CANDLE, Figure 2)
    norm-gap     the same, of one of --stages less the next (CANDLE, Figure 1)
    cost         seconds of an epoch and peak of memory (CANDLE, Figure 5)
    gradients    of head and tail, after async_lt.py --track-gradients
                 (Asynchronous Modeling, Figure 1)
    sweep        --values over a --flag: alpha, beta (CBD, Figures 2 and 3),
                 memory_per_class, lambda_scale, phase_one_classes (Asynchronous
                 Modeling, Figures 2 and 3), tau, ...
    margins      what the balanced losses ask of a class beyond what CE and BCE
                 ask (LiVT)
    neighbours   training images nearest to test images of the rarest classes
                 (CBD, Figure 4)

Runs lie over one another, averaged over their seeds, a panel for each method
and data set. --stages picks rows of the final table. Needs matplotlib, which
requirements.txt leaves to you: pip install matplotlib
"""
import argparse
import json
import math
import statistics
import sys
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F

from common.data import load
from common.evaluate import COLUMNS, predict, shot_groups
from common.figure import COLOURS, save
from common.loader import Cut, make_loader
from common.predict import load_any
from common.ranks import fail
from common.summary import differing_flags, group_stages, once_a_seed

SIZE, RANK = "training images of the class", "class, most to least frequent"
BINS = "images", "confidence", "accuracy"
HEADINGS = {key: f"{heading}, %" for key, heading in COLUMNS}


# ---------------------------------------------------------------- runs and their rows

def read_run(path):
    """result.json's content of a run's folder, with log.jsonl's lines as "log"; where the run is not finished
    what its log says, and no stages. Raises ValueError."""
    folder = Path(path)
    try:
        head, *log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        run = {**head, "dataset": head["args"]["dataset"], "seed": head["args"]["seed"], "stages": []}
        if (folder / "result.json").exists():
            run = json.loads((folder / "result.json").read_text())
        else:
            print(f"note: {folder} is not finished: its curves can be drawn, nothing else", file=sys.stderr)
    except (OSError, ValueError, KeyError) as reason:
        raise ValueError(f"{folder} is not the folder of a run: {reason!r}") from reason
    return {**run, "log": log, "path": str(folder), "dataset": Path(run["dataset"]).stem}


def rows_of(groups):
    """{panel title: {label: [(run, stage), ...]}} of what `group_stages` returns."""
    panels = {}
    for (method, dataset, name, settings), members in groups.items():
        label = f"{name}, {settings}" if settings else name
        panels.setdefault(f"{method}, {dataset}", {})[label] = members
    return panels


def scored_rows(runs, key, names=None):
    """{panel title: {label: (a run, its stages, one a seed)}} of the stages that have `key`.

    names: which stages, in this order. None: each run's own, its last one; before these the first, or where a
    run trained several the first that it trained. Raises ValueError.
    """
    scored, first, own = [], [], []
    for run in runs:
        stages = [stage for stage in run["stages"] if stage.get(key) is not None]
        if stages:
            trained = [stage for stage in stages[:-1] if stage.get("seconds")]
            first.append((trained or stages)[0]["name"])
            own.append(stages[-1]["name"])
            scored.append({**run, "stages": stages})

    names, groups = names or first + own, group_stages(scored)
    there = dict.fromkeys(name for _, _, name, _ in groups)
    if not there or not set(names) <= set(there):
        raise ValueError(f"{key!r} is known of {', '.join(map(repr, there)) or 'no stage of these runs'}"
                         + "".join(f", not of {name!r}" for name in names if name not in there))

    panels = rows_of({key: groups[key] for name in dict.fromkeys(names) for key in groups if key[2] == name})
    for rows in panels.values():
        for label, members in rows.items():
            rows[label] = members[0][0], list(once_a_seed(members).values())
    return panels


def logged_lines(runs, key, names=None):
    """{panel title: {label: (epochs, means over the seeds)}} of `key` in the logs. names: which stages; None:
    all that have it. Raises ValueError."""
    logged = []
    for run in runs:
        stages = {}
        for line in run["log"]:
            if line.get(key) is not None and (names is None or line["stage"] in names):
                stages.setdefault(line["stage"], {})[line["epoch"]] = line[key]
        stages = [{"name": name, "all": None, "at": values} for name, values in stages.items()]
        logged.append({**run, "stages": stages})

    panels = {title: {label: mean_at(stage["at"] for _, stage in members) for label, members in rows.items()}
              for title, rows in rows_of(group_stages(logged)).items()}
    if not panels:
        there = dict.fromkeys(key for run in runs for line in run["log"] for key in line)
        raise ValueError(f"no log of these runs has {key!r} of such a stage; there are: {', '.join(there)}")
    return panels


def mean_at(series):
    """(sorted xs, means) of several {x: y}."""
    values = {}
    for each in series:
        for x, y in each.items():
            values.setdefault(x, []).append(y)
    return sorted(values), [statistics.fmean(values[x]) for x in sorted(values)]


def mean_of(stages, key):
    """Class by class the mean over stages of a list; None where one has none."""
    return [None if None in values else statistics.fmean(values) for values in zip(*(s[key] for s in stages))]


# ---------------------------------------------------------------- kinds: (runs, args) -> panels for `draw`

def classes(runs, args):
    """Light dots for the classes, and a line of their running mean."""
    panels = []
    for title, rows in scored_rows(runs, "per_class_accuracy", args.stages).items():
        lines, dots = [], []
        for label, (run, stages) in rows.items():
            pairs = zip(run["class_counts"], mean_of(stages, "per_class_accuracy"))
            pairs = sorted((pair for pair in pairs if pair[1] is not None), key=lambda pair: -pair[0])
            sizes, accuracy = zip(*pairs)
            dots.append((sizes, accuracy))
            lines.append((label, *running_mean(sizes, accuracy)))
        factors = {run["args"].get("imb_factor") for run, _ in rows.values()}
        if len(factors) == 1 and None not in factors:
            title += f", factor {factors.pop():g}"
        panels.append(dict(title=title, x=SIZE, y="accuracy, %", lines=lines, dots=dots, x_log=True,
                           x_falls=True))
    return panels


def running_mean(sizes, values):
    """Means over each class and a tenth of all on either side, by rank: (geometric of sizes, of values)."""
    reach = len(sizes) // 10  # under ten classes: the classes themselves
    around = [slice(max(0, i - reach), i + reach + 1) for i in range(len(sizes))]
    return ([math.exp(statistics.fmean(math.log(max(size, 1)) for size in sizes[near])) for near in around],
            [statistics.fmean(values[near]) for near in around])


def gain(runs, args):
    """A bar for each class, a panel for each stage but the first; the legend has the groups' means."""
    panels = []
    for title, rows in scored_rows(runs, "per_class_accuracy", args.stages).items():
        (base, (_, stages)), *others = rows.items()
        before = mean_of(stages, "per_class_accuracy")
        for label, (run, stages) in others:
            after, counts, bars = mean_of(stages, "per_class_accuracy"), run["class_counts"], []
            order = sorted(range(len(counts)), key=lambda c: -counts[c])
            for group, members in shot_groups(counts).items():
                gains = {rank: after[c] - before[c] for rank, c in enumerate(order, 1)
                         if members[c] and None not in (after[c], before[c])}
                if gains:
                    mean = statistics.fmean(gains.values())
                    bars.append((f"{group}: {mean:+.1f}", list(gains), list(gains.values())))
            panels.append(dict(title=f"{title}: {label} - {base}", x=RANK, y="gain, points", bars=bars,
                               level=0))
    return panels


def curves(runs, args):
    """A panel for each of --values."""
    panels = []
    for value in args.values:
        for title, rows in logged_lines(runs, value, args.stages).items():
            lines = [(label, *line) for label, line in rows.items()]
            panels.append(dict(title=title, x="epoch", y=HEADINGS.get(value, value), lines=lines))
    return panels


def gradients(runs, args):
    """Two panels for each stage: cosines of the head's and the tail's part with the whole, and norms."""
    parts, panels = {"head": "head classes", "tail": "tail classes", "norm": "all classes"}, {}
    for key in ("cosine_head", "cosine_tail", "norm_head", "norm_tail", "norm"):
        y = "cosine with the whole" if key.startswith("cosine") else "norm of the gradient"
        for title, rows in logged_lines(runs, key, args.stages).items():
            for label, line in rows.items():
                panel = panels.setdefault((title, label, y), dict(
                    title=f"{title}: {label}", x="epoch", y=y, lines=[]))
                panel["lines"].append((parts[key.split("_")[-1]], *line))
    return list(panels.values())


def reliability(runs, args):
    """Accuracy against mean confidence of each bin that has images, those of all seeds together."""
    panels = []
    for title, rows in scored_rows(runs, "reliability", args.stages).items():
        lines = []
        for label, (_, stages) in rows.items():
            points = []
            for in_bin in zip(*(zip(*(stage["reliability"][key] for key in BINS)) for stage in stages)):
                in_bin = [each for each in in_bin if each[0]]
                images = sum(n for n, _, _ in in_bin)
                if images:
                    points.append([sum(each[0] * each[i] for each in in_bin) / images for i in (1, 2)])
            ece = statistics.fmean(stage["ece"] for stage in stages)
            lines.append((f"{label}: ECE {ece:.1f}", *zip(*points)))
        panels.append(dict(title=title, x="confidence, %", y="accuracy, %", lines=lines, level="y = x"))
    return panels


def norms(runs, args):
    """A line for each stage."""
    panels = []
    for title, rows in scored_rows(runs, "weight_norms", args.stages).items():
        values = {label: mean_of(stages, "weight_norms") for label, (_, stages) in rows.items()}
        lines = [(label, range(1, len(norms) + 1), norms) for label, norms in values.items()]
        panels.append(dict(title=title, x=RANK, y="norm of the classifier's row", lines=lines))
    return panels


def norm_gap(runs, args):
    """A line for each two stages. Raises ValueError where one is left over."""
    panels = norms(runs, args)
    for panel in panels:
        if len(panel["lines"]) % 2:
            raise ValueError("norm-gap needs an even number of --stages: A B draws A less B")
        lines = []
        for (a, ranks, of_a), (b, _, of_b) in zip(panel["lines"][::2], panel["lines"][1::2]):
            lines.append((f"{a} less {b}", ranks, [x - y for x, y in zip(of_a, of_b)]))
        panel.update(y="gap of the norms", lines=lines, level=0)
    return panels


def cost(runs, args):
    """A bar for each stage, by default each run's own: the median over its runs."""
    names = args.stages or [run["stages"][-1]["name"] for run in runs if run["stages"]]
    groups, time, memory = group_stages(runs), [], []
    for rows in rows_of({key: groups[key] for key in groups if key[2] in names}).values():
        for label, members in rows.items():
            logs = [[line for line in run["log"] if line["stage"] == stage["name"]] for run, stage in members]
            seconds = [log[-1]["seconds"] / log[-1]["epoch"] for log in logs if log]
            peaks = [stage["peak_memory_mb"] for _, stage in members if stage.get("peak_memory_mb")]
            for bars, values in ((time, seconds), (memory, peaks)):
                if values:
                    bars.append((label, [len(bars)], [statistics.median(values)]))
    return [dict(title="time", x="", y="seconds of an epoch", bars=time),
            dict(title="memory", x="", y="peak, MiB", bars=memory)]


def sweep(runs, args):
    """A panel for each of --values; runs of other settings than --flag's have lines of their own."""
    if not args.flag:
        raise ValueError(f"sweep needs --flag; these runs differ in: {', '.join(differing_flags(runs))}")
    swept = []
    for run in runs:
        setting = run["args"].get(args.flag)
        if isinstance(setting, bool) or not isinstance(setting, (int, float)):
            raise ValueError(f"{run['path']} has no number as {args.flag}, but {setting!r}")
        names = args.stages or [stage["name"] for stage in run["stages"][-1:]]
        stages = [{**stage, "setting": setting} for stage in run["stages"] if stage["name"] in names]
        others = {flag: value for flag, value in run["args"].items() if flag != args.flag}
        swept.append({**run, "args": others, "stages": stages})

    panels = []
    for value in args.values:
        for title, rows in rows_of(group_stages(swept)).items():
            lines = []
            for label, members in rows.items():
                have = [stage for _, stage in members if stage.get(value) is not None]
                lines.append((label, *mean_at({stage["setting"]: stage[value]} for stage in have)))
            settings = [x for _, xs, _ in lines for x in xs]
            x_log = bool(settings) and 0 < 20 * min(settings) <= max(settings)
            panels.append(dict(title=title, x=args.flag.replace("_", " "), y=HEADINGS.get(value, value),
                               lines=lines, x_log=x_log))
    return panels


def margins(runs, args):
    """What the bias of each class takes off its logit in training, for a class of share p of the images."""
    panels = {}
    for run in runs:
        sizes, tau = sorted(run.get("class_counts", ()), reverse=True), run["args"].get("tau") or 1.0
        share = [size / sum(sizes) for size in sizes]
        lines = [("CE, BCE", sizes, [0.0] * len(sizes)),
                 ("Bal-CE: -log p", sizes, [-tau * math.log(p) for p in share]),
                 ("Bal-BCE: log(1 - p) - log p", sizes, [tau * math.log((1 - p) / p) for p in share])]
        title = f"{run['dataset']}, tau {tau:g}"
        panels[title] = dict(title=title, x=SIZE, y="margin of a class", lines=lines, x_log=True,
                             x_falls=True)
    return list(panels.values())


def neighbours(runs, args):
    """A panel for each net: the first test images of the six rarest classes, and the five training images
    nearest to each by the cosine of their features."""
    panels = []
    for run in runs:
        flags = run["args"]
        data = load(flags["dataset"], flags["data_dir"], flags["imb_factor"], flags["subset_seed"],
                    **{key: flags.get(key) for key in ("train_list", "test_list", "test_fraction")})
        for file in ("teacher_1.pt", "student.pt"):
            rows = nearest_images(data, *load_any(Path(run["path"]) / file))
            panels.append(dict(title=f"{run['method']}, {run['dataset']}: {file}", images=rows, y="",
                               x="left: test; blue: of the same class"))
    return panels


def nearest_images(data, model, saved):
    """Rows of `draw`'s images, for `neighbours`; the rarest class is the last row."""
    data.image_size, data.mean, data.std = saved["image_size"], saved["mean"], saved["std"]
    test, train = (make_loader(split, data, Cut(256), "cpu") for split in (data.test, data.train))
    rarest = [c for c in data.class_counts.argsort(kind="stable") if c in data.test.targets][5::-1]
    chosen = [(data.test.targets == c).argmax() for c in rarest]

    parts = (test, chosen), (train, range(len(data.train)))
    tested, trained = (F.normalize(predict(model, loader.batches(indices), nullcontext)[1], dim=1)
                       for loader, indices in parts)
    nearest = (tested @ trained.t()).topk(5).indices.numpy()  # [rows, 5]

    def pixels(loader, indices):
        images = next(iter(loader.batches(indices))).images.permute(0, 2, 3, 1)
        return (images * torch.tensor(data.std) + torch.tensor(data.mean)).clamp(0, 1).numpy()

    rows = []
    for c, query, indices in zip(rarest, pixels(test, chosen), nearest):
        colours = [COLOURS[0] if own else COLOURS[1] for own in data.train.targets[indices] == c]
        rows.append((f"{data.class_names[c]} ({data.class_counts[c]})", [query, *pixels(train, indices)],
                     ["#777777", *colours]))
    return rows


KINDS = {"classes": classes, "gain": gain, "curves": curves, "reliability": reliability, "norms": norms,
         "norm-gap": norm_gap, "cost": cost, "gradients": gradients, "sweep": sweep, "margins": margins,
         "neighbours": neighbours}


def main(argv=None):
    parser = argparse.ArgumentParser("python -m common.plot", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    add = parser.add_argument
    add("kind", choices=KINDS, metavar="KIND", help="as above")
    add("runs", nargs="+", metavar="RUNS", help="run folders")
    add("--stages", nargs="+", metavar="NAME", help="rows of the final table, in this order")
    add("--values", nargs="+", default=["all"], metavar="KEY", help="of curves and sweep: log.jsonl's (all)")
    add("--flag", help="of sweep: a flag of the runs' own commands")
    add("--out", metavar="FILE", help="ends in .png, .svg or .pdf (KIND.png)")
    args = parser.parse_args(argv)
    args.flag = args.flag and args.flag.strip("-").replace("-", "_")
    out, files = args.out or f"{args.kind}.png", [path for path in args.runs if Path(path).is_file()]
    try:
        runs = [read_run(path) for path in args.runs if path not in files]  # `runs/*` may hold other files
        if not runs:
            raise ValueError(f"there is no folder of a run among {', '.join(files)}")
        save(KINDS[args.kind](runs, args), out)
    except (ValueError, OSError) as reason:
        fail(reason)
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
