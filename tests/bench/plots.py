#!/usr/bin/env python3
"""
Draws what a run has measured: growth.svg, the growth curves, and table.svg, the ratios to plain ext4.
Needs matplotlib (python3-matplotlib). By itself, also for runs of some curves each, drawn as one:
tests/bench/plots.py RESULTS/bench.json... [DIRECTORY]
"""
import json
import os
import subprocess
import sys

COLOURS = ("#1b6ca8", "#d1495b", "#66a182", "#edae49", "#7d5ba6", "#555555")


def curve_axes(ax, curve):
    for colour, (name, points) in zip(COLOURS, curve["series"].items()):
        x = [p["x"] for p in points]
        y = [p["median"] for p in points]
        low = [p["median"] - p["min"] for p in points]
        high = [p["max"] - p["median"] for p in points]
        ax.errorbar(x, y, yerr=[low, high], label=name, color=colour, marker="o", markersize=3,
                    linewidth=1.2, elinewidth=.7, capsize=2)
    ax.set_xscale("log", base=2 if max(x) <= 256 else 10)
    ax.set_xticks(x, [f"{v:,}" for v in x])
    ax.minorticks_off()
    ax.set_ylim(bottom=0)
    ax.set_title(curve["title"], fontsize=9)
    ax.set_xlabel(curve["x"], fontsize=8)
    ax.set_ylabel(curve["y"], fontsize=8)
    ax.tick_params(labelsize=7)
    ax.grid(alpha=.25)
    if len(curve["series"]) > 1:
        ax.legend(fontsize=7, frameon=False)


def growth(plt, result, path):
    curves = result["curves"]
    columns = 3 if len(curves) > 2 else len(curves)
    lines = -(-len(curves) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(4 * columns, 2.9 * lines), squeeze=False)
    flat = [ax for line in axes for ax in line]
    for ax, curve in zip(flat, curves):
        curve_axes(ax, curve)
    for ax in flat[len(curves):]:
        ax.set_axis_off()
    save(plt, figure, path)


def table(plt, result, path):
    """One group of bars for each row whose figures are ratios to plain ext4 in which more is better."""
    rows = [r for r in result["rows"] if r["kind"] == "ratio" and r["better"] == "higher"]
    names = [n for n in result["systems"] if n != "plain"]
    figure, ax = plt.subplots(figsize=(10, .34 * len(rows) * max(2, len(names)) / 2 + 1))
    width = .8 / len(names)
    for k, name in enumerate(names):
        found = [(i, r["summary"][name]) for i, r in enumerate(rows) if r["summary"].get(name)]
        middle = [s["median"] for _, s in found]
        ax.barh([i + (k + .5) * width - .4 for i, _ in found], middle, width,
                color=COLOURS[k % len(COLOURS)], label=result["systems"][name],
                xerr=[[m - s["min"] for m, (_, s) in zip(middle, found)],
                      [s["max"] - m for m, (_, s) in zip(middle, found)]],
                error_kw={"elinewidth": .6, "alpha": .6})
    ax.axvline(1, color="black", linewidth=.8)
    ax.set_yticks(range(len(rows)), [r["title"] for r in rows], fontsize=7)
    ax.invert_yaxis()
    ax.set_xlim(0, 1.5)
    ax.set_xlabel("ratio to plain ext4, median; lines from the least to the greatest", fontsize=8)
    ax.legend(fontsize=7, frameon=False, loc="lower right")
    save(plt, figure, path)


def save(plt, figure, path):
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def main(argv):
    import matplotlib  # pylint: disable=import-outside-toplevel
    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.fonttype": "none", "font.family": "sans-serif",
                                "svg.hashsalt": "fleecefs"})
    import matplotlib.pyplot as plt  # pylint: disable=import-outside-toplevel
    results = [name for name in argv if name.endswith(".json")]
    result = {"rows": [], "curves": [], "systems": {}}
    for name in results:
        with open(name, encoding="utf-8") as f:
            one = json.load(f)
        for key in ("rows", "curves"):
            result[key] += one[key]
        result["systems"].update(one["systems"])
    directory = argv[-1] if argv[-1] not in results else os.path.dirname(argv[0]) or "."
    for name, wanted, draw_it in (("growth.svg", result["curves"], growth),
                                  ("table.svg", result["rows"], table)):
        if wanted:
            path = os.path.join(directory, name)
            draw_it(plt, result, path)
            print(path)
    return 0


def draw(results):
    """Draws with whichever Python has matplotlib; the paths, or none with a line that says why."""
    for python in (sys.executable, "/usr/bin/python3"):
        probe = subprocess.run([python, "-c", "import matplotlib"], capture_output=True, check=False)
        if probe.returncode == 0:
            done = subprocess.run([python, os.path.realpath(__file__), results], text=True,
                                  stdout=subprocess.PIPE, check=True)
            return done.stdout.split("\n")[:-1]
    return ["no plots: matplotlib is not there (apt-get install python3-matplotlib)"]


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__.strip())
    sys.exit(main(sys.argv[1:]))
