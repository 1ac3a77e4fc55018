"""The README's table and pictures from the logs in runs/: python .github/figures.py"""

import json
from pathlib import Path

import numpy as np

SUMS, MAXIMA = "eval/exact_match/+", "eval/exact_match/,"
ARMS = ("OPD", "random-filter", "filter-only", "reweight-only", "FiRe-OPD", "hard-tokens",
        "as-released", "threshold", "without-maxima")
SHARES = (0.05, 0.1, 0.2, 0.3, 0.5)
FILTERS = ("0", "10", "20", "40", "60", "threshold")

def evaluations(name, metric):
    """Exact match of all evaluations of a run. -> [seeds, evaluations]"""
    table = []
    for log in sorted(Path("runs", name).glob("*/metrics.jsonl")):
        rows = [json.loads(line) for line in open(log)]
        table.append([row[metric] for row in rows if metric in row])
    return np.array(table)

def difference(a, b, metric):
    """Last exact match of one arm minus another's, paired by seed, with its 95 % interval."""
    gains = evaluations(a, metric)[:, -1] - evaluations(b, metric)[:, -1]
    half = 2.7764 * gains.std(ddof=1) / 5**0.5  # Student's t for five seeds
    return f"{gains.mean():+.3f} ± {half:.3f}"

def print_table():
    """Last exact match of each arm, and its difference from OPD."""
    columns = (("foreign", SUMS), ("foreign", MAXIMA), ("single", SUMS))
    print("before", [f"{evaluations(task + '/OPD', metric)[:, 0].mean():.3f}"
                     for task, metric in columns])
    for arm in ARMS:
        cells = []
        for task, metric in columns:
            table = evaluations(f"{task}/{arm}", metric)
            if len(table):
                gain = difference(f"{task}/{arm}", task + "/OPD", metric)
                cells.append(f"{table[:, -1].mean():.3f} ({gain})")
        print(f"| {arm} | " + " | ".join(cells) + " |")
    print("FiRe-OPD minus filter only", [difference(task + "/FiRe-OPD", task + "/filter-only", metric)
                                         for task, metric in columns])

def svg(width, height, shapes):
    """A picture with a white background, so that it can be read in a dark theme too."""
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            f'font-family="sans-serif" font-size="13"><rect width="{width}" height="{height}" '
            'fill="white"/>' + "\n".join(shapes) + "</svg>\n")

def text(x, y, words, anchor="start", color="#222", extra=""):
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}" fill="{color}" {extra}>{words}</text>'

def draw_curves():
    """Maxima over the steps: means as lines, lowest to highest seed as bands."""
    shapes = [text(50, 22, "Exact match on maxima, a skill the teacher lacks", extra='font-size="15"')]
    for value in (0, 0.2, 0.4, 0.6, 0.8, 1):
        y = 260 - 220 * value
        shapes.append(f'<path d="M50 {y} H500" stroke="#ddd"/>' + text(44, y + 4, value, "end"))
    for step in range(0, 60, 10):
        shapes.append(text(50 + 9 * step, 278, step, "middle"))
    shapes.append(text(275, 296, "training step", "middle"))
    for arm, label, color, dy in (("FiRe-OPD", "FiRe-OPD", "#16a34a", 4),
                                  ("random-filter", "random filter", "#d97706", -5),
                                  ("OPD", "OPD", "#2563eb", 10)):
        table = evaluations("foreign/" + arm, MAXIMA)
        x = [50 + 90 * i for i in range(table.shape[1])]
        low, high, mean = (260 - 220 * f(table, axis=0) for f in (np.min, np.max, np.mean))
        line = " ".join(f"{a},{b:.1f}" for a, b in zip(x, mean))
        band = " ".join(f"{a},{b:.1f}" for a, b in [*zip(x, low), *reversed([*zip(x, high)])])
        shapes.append(f'<polygon points="{band}" fill="{color}" fill-opacity="0.15"/>')
        shapes.append(f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="2.5"/>')
        shapes.append(text(508, mean[-1] + dy, label, color=color, extra='font-weight="bold"'))
    Path(".github/maxima.svg").write_text(svg(620, 304, shapes))

def draw_map():
    """Last exact match by the share of prompts that ask for maxima and by what the filter drops."""
    shapes = []
    for panel, (metric, title) in enumerate(((MAXIMA, "maxima, which the teacher lacks"),
                                             (SUMS, "sums, which it knows"))):
        left = 70 + 400 * panel
        shapes.append(text(left, 22, title, extra='font-size="15"'))
        for j, name in enumerate(FILTERS):
            label = "&#8805; &#8722;2.5" if name == "threshold" else name + "%"
            shapes.append(text(left + 28 + 56 * j, 46, label, "middle"))
        border = f"M{left} 54"
        for i, share in enumerate(SHARES):
            if panel == 0:
                shapes.append(text(left - 8, 76 + 34 * i, f"{100 * share:.0f}%", "end"))
            for j, name in enumerate(FILTERS):
                mean = evaluations(f"map/{share}-{name}", metric)[:, -1].mean()
                x, y = left + 56 * j, 54 + 34 * i
                shapes.append(f'<rect x="{x}" y="{y}" width="55" height="33" fill="#16a34a" '
                              f'fill-opacity="{0.8 * mean:.2f}"/>')
                shapes.append(text(x + 28, y + 22, f"{mean:.2f}", "middle"))
            below = sum(float(name) <= 100 * share for name in FILTERS[:-1])
            border += f" H{left + 56 * below - 0.5} V{54 + 34 * (i + 1)}"
        shapes.append(f'<path d="{border}" fill="none" stroke="#111" stroke-width="2"/>')
    shapes.append(text(70, 248, "rows: share of maxima among the prompts; columns: share of rollouts "
                       "that the filter drops, or its threshold"))
    Path(".github/map.svg").write_text(svg(820, 262, shapes))

print_table()
draw_curves()
draw_map()
