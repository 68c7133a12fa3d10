"""Results for machines (JSON) and for people (Markdown)."""
import json
import os
import platform

from table import PAIRED, RATIO, VALUE, Row, reached


def number(value):
    """Three significant digits, without the exponent of %g."""
    if value == 0:
        return "0"
    digits = 2 if abs(value) < 10 else 1 if abs(value) < 100 else 0
    text = f"{value:.{digits}f}"
    return text.replace("0.", ".", 1) if text.startswith("0.") else text


def cell(row, system):
    summary = row.summary(system)
    if not summary:
        return "-"
    text = number(summary["median"])
    if summary["rounds"] > 1:
        text += f" ({number(summary['min'])} to {number(summary['max'])})"
    if system in row.notes and "after" in row.notes[system] and row.key != "first":
        text += "*"
    return text


def markdown(result):
    """The table: one line a row, one column a system."""
    rows = [Row.from_dict(d) for d in result["rows"]]
    titles = result["systems"]
    names = [n for n in titles if n != "plain"]
    lines = ["| work | plain ext4 | " + " | ".join(titles[n] for n in names) + " | to reach |",
             "|---" * (len(names) + 3) + "|"]
    for row in rows:
        plain = row.summary("plain")
        unit = "" if row.unit == "ratio" or row.kind == RATIO else f" {row.unit}"
        base = f"{number(plain['value'])} {row.unit}" if plain and row.kind == RATIO else \
            cell(row, "plain") + unit if plain else "-"
        cells = [(cell(row, n) + (unit if row.summary(n) else "")) for n in names]
        verdict = reached(row)
        target = row.target.replace(">=", "≥").replace("<=", "≤")
        if verdict is not None and "fleecefs" in names:
            target += "" if verdict else " (missed)"
        lines.append(f"| {row.title} | {base} | " + " | ".join(cells) + f" | {target} |")
    return "\n".join((lines if rows else []) + curve_tables(result) + ["", *legend(result, rows)]) + "\n"


def points(curve):
    """A curve in one line."""
    return "; ".join(f"{name} " + ", ".join(f"{p['x']}: {number(p['median'])}" for p in series)
                     for name, series in curve["series"].items()) + f" ({curve['y']})"


def curve_tables(result):
    lines = []
    for curve in result.get("curves", []):
        columns = list(curve["series"])
        lines += ["", f"**{curve['title']}** ({curve['y']})", "",
                  f"| {curve['x']} | " + " | ".join(columns) + " |",
                  "|---" * (len(columns) + 1) + "|"]
        for i, point in enumerate(curve["series"][columns[0]]):
            cells = [curve["series"][c][i] for c in columns]
            lines.append(f"| {point['x']} | " + " | ".join(
                f"{number(p['median'])} ({number(p['min'])} to {number(p['max'])})"
                for p in cells) + " |")
    return lines


def legend(result, rows):
    kinds = {row.kind for row in rows}
    lines = []
    if RATIO in kinds:
        lines.append("Figures without a unit are ratios to plain ext4 in the same round: median "
                     "(least to greatest).")
    if PAIRED in kinds:
        lines.append("\"To no ...\": the ratio of two runs of the same system in one round.")
    if VALUE in kinds:
        lines.append("Figures with a unit are as measured.")
    seen = set()
    for row in rows:
        for system, note in row.notes.items():
            if (system, note) not in seen and not note.startswith("every write"):
                lines.append(f"- {result['systems'][system]}, {row.title}: {note}")
                seen.add((system, note))
    for system, reason in result["missing"].items():
        lines.append(f"- not measured: {system}: {reason}")
    machine = result["machine"]
    lines += ["", "; ".join(f"{k}: {v}" for k, v in machine.items() if v)]
    lines.append(f"Disk {result['size']}, {result['rounds']} rounds, runs of {result['seconds']} s, "
                 f"{result['checks']} hashes of frozen views, all right.")
    return lines


def machine():
    """Where it was measured."""
    model, memory = "", ""
    with open("/proc/cpuinfo", encoding="utf-8") as f:
        for line in f:
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    with open("/proc/meminfo", encoding="utf-8") as f:
        memory = f"{int(f.readline().split()[1]) >> 20} GiB"
    return {"cpu": f"{os.cpu_count()} x {model or platform.machine()}", "memory": memory,
            "kernel": os.uname().release}


def write(result, directory, name="bench"):
    """JSON and Markdown; returns their paths."""
    os.makedirs(directory, exist_ok=True)
    paths = [os.path.join(directory, f"{name}.{end}") for end in ("json", "md")]
    for path, text in zip(paths, (json.dumps(result, indent=1) + "\n", markdown(result))):
        with open(path + ".new", "w", encoding="utf-8") as f:
            f.write(text)
        os.replace(path + ".new", path)
    return paths
