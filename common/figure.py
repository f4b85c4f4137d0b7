"""Panels of lines, dots, bars and images, drawn by matplotlib, for a paper's column."""
import math
import textwrap
from pathlib import Path

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
    half = Path(out).with_name(f"unfinished_{Path(out).name}")  # a picture is whole, or not there
    with matplotlib.rc_context(LOOK):
        draw(panels).savefig(half)
    half.replace(out)


def draw(panels):
    """A matplotlib figure of the panels, two in a row. Raises ValueError.

    A panel is a dict: title; x, y: their labels; lines or bars: [(label, xs, ys)]. It may have dots: (xs, ys)
    of each line; x_log, x_falls: True; level: where to draw a thin line, "y = x" or a height. Or instead of
    all these it has images, in rows: [(label, pixels [H, W, 3] in [0, 1] of each, their frames' colours)].
    """
    from matplotlib.figure import Figure

    labels = [[label for label, xs, _ in panel.get("lines", []) + panel.get("bars", []) if len(xs)]
              for panel in panels]
    if not panels or not all(each or panel.get("images") for each, panel in zip(labels, panels)):
        raise ValueError("these runs do not have what this picture shows")
    most = max(labels, key=len)
    if len(most) > len(COLOURS):
        raise ValueError(f"{len(most)} lines in one panel, and {len(COLOURS)} can be told apart; choose with "
                         f"--stages from {', '.join(map(repr, most))}")

    columns, shared = min(2, len(panels)), all(each == most for each in labels)
    rows = math.ceil(len(panels) / columns)
    legend = 0.15 * max(sum(len(textwrap.wrap(label, WIDTH)) for label in each) for each in labels)
    height = 0.9 * COLUMN if any("images" in panel for panel in panels) else 2.2
    size = COLUMN * columns, height * rows + legend * (1 if shared else rows)
    figure = Figure(figsize=size, layout="constrained")
    for i, panel in enumerate(panels, 1):
        ax = figure.add_subplot(rows, columns, i)
        draw_panel(ax, panel)
        if "images" in panel:
            draw_images(ax, panel["images"])
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

    if panel["y"] == "accuracy, %":  # so that panels side by side can be compared
        ax.set_ylim(0, 100)
    if panel.get("level") == "y = x":
        ax.axline((0, 0), slope=1, color="#777777", linewidth=0.8)
        ax.set_xlim(0, 100)
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


def draw_images(ax, rows):
    """Rows of framed images, as `draw` has them, into matplotlib's axes."""
    from matplotlib.patches import Rectangle

    for y, (_, images, colours) in enumerate(rows):
        for x, (image, colour) in enumerate(zip(images, colours)):
            ax.add_patch(Rectangle((x, y), 0.95, 0.95, color=colour))
            ax.imshow(image, extent=(x + 0.07, x + 0.88, y + 0.88, y + 0.07), zorder=2)

    ax.set(xlim=(0, len(rows[0][1])), ylim=(len(rows), 0), xticks=[])
    ax.set_yticks([y + 0.5 for y in range(len(rows))], [label for label, _, _ in rows])
    ax.tick_params(length=0)
    ax.grid(False)
    ax.spines[:].set_visible(False)
