"""Panels of lines, dots and bars, drawn by matplotlib, for a paper's column."""
import math
import textwrap

COLOURS = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"  # Okabe and Ito's
STYLES = "-", "--", "-.", ":", "-", "--", "-."
COLUMN, WIDTH = 3.3, 48  # one column of a paper's two in inches, and in letters
LOOK = {
    "font.size": 8, "axes.titlesize": 8, "axes.labelsize": 8, "legend.fontsize": 7, "xtick.labelsize": 7,
    "ytick.labelsize": 7, "lines.linewidth": 1.3, "lines.markersize": 3, "legend.frameon": False,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True,
    "grid.color": "#dddddd", "grid.linewidth": 0.5, "savefig.dpi": 300, "pdf.fonttype": 42}  # no Type 3


def save(panels, out):
    """Draw the panels into a file, as its name ends: .png, .svg or .pdf. Raises ValueError."""
    try:
        import matplotlib
    except ImportError as reason:
        raise ValueError("pictures need matplotlib: pip install matplotlib") from reason

    if not str(out).endswith((".png", ".svg", ".pdf")):
        raise ValueError(f"a picture's file must end in .png, .svg or .pdf, got {out}")
    with matplotlib.rc_context(LOOK):
        draw(panels).savefig(out)


def draw(panels):
    """A matplotlib figure of the panels, two in a row. Raises ValueError.

    A panel is a dict: title; x, y: their labels; lines or bars: [(label, xs, ys)]. It may have dots: (xs, ys)
    of each line; x_log, x_falls: True; level: where to draw a thin line, "y = x" or a height.
    """
    from matplotlib.figure import Figure

    labels = [[label for label, xs, _ in panel.get("lines", []) + panel.get("bars", []) if len(xs)]
              for panel in panels]
    if not panels or not all(labels):
        raise ValueError("these runs do not have what this picture shows")
    most = max(labels, key=len)
    if len(most) > len(COLOURS):
        raise ValueError(f"{len(most)} lines in one panel, and {len(COLOURS)} can be told apart; choose with "
                         f"--stages from {', '.join(map(repr, most))}")

    columns, shared = min(2, len(panels)), all(each == most for each in labels)
    rows = math.ceil(len(panels) / columns)
    legend = 0.15 * max(sum(len(textwrap.wrap(label, WIDTH)) for label in each) for each in labels)
    size = COLUMN * columns, 2.2 * rows + legend * (1 if shared else rows)
    figure = Figure(figsize=size, layout="constrained")
    for i, panel in enumerate(panels, 1):
        ax = figure.add_subplot(rows, columns, i)
        draw_panel(ax, panel)
        if not shared:  # below the panel, where nothing is hidden
            ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2))
    if shared:
        figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center")
    return figure


def draw_panel(ax, panel):
    """One panel of `draw`, into matplotlib's axes."""
    ax.set(title=textwrap.fill(panel["title"], WIDTH), xlabel=panel["x"], ylabel=panel["y"])
    for (xs, ys), colour in zip(panel.get("dots", ()), COLOURS):
        ax.plot(xs, ys, "o", color=colour, alpha=0.3, markeredgewidth=0)
    for (label, xs, ys), colour, style in zip(panel.get("lines", ()), COLOURS, STYLES):
        marker = "" if panel.get("dots") or len(xs) > 20 else "o"
        ax.plot(xs, ys, style, color=colour, label=textwrap.fill(label, WIDTH), marker=marker)
    for (label, xs, ys), colour in zip(panel.get("bars", ()), COLOURS):
        ax.bar(xs, ys, color=colour, label=textwrap.fill(label, WIDTH))

    if panel.get("level") == "y = x":
        ax.axline((0, 0), slope=1, color="#777777", linewidth=0.8)
        ax.set(xlim=(0, 100), ylim=(0, 100))
    elif "level" in panel:
        ax.axhline(panel["level"], color="#777777", linewidth=0.8)

    if not panel["x"]:
        ax.set_xticks([])
    if panel.get("x_log"):
        ax.set_xscale("log", subs=[])
        low, high = ax.get_xlim()
        ticks = [mantissa * 10**exponent for exponent in range(-12, 13) for mantissa in (1, 2, 5)]
        ax.set_xticks([tick for tick in ticks if low <= tick <= high])
        ax.xaxis.set_major_formatter("{x:g}")
    if panel.get("x_falls"):
        ax.invert_xaxis()
