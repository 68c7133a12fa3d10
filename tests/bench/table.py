"""
What was measured: rows of samples. Each sample of a round stands beside one of plain ext4 of the same
round, and the ratio of the two is what counts, for the machine is never quiet. A row's figure is the
median of those ratios; rows of another kind say so.
"""
import statistics

RATIO = "ratio"    # each sample to plain ext4's of the same round
PAIRED = "paired"  # ratios taken by the work itself, from two runs of one system in one round
VALUE = "value"    # the samples themselves


class Row:
    """One line of the table."""

    def __init__(self, key, title, unit, *, kind=RATIO, target="", better="higher"):
        self.key, self.title, self.unit = key, title, unit
        self.kind, self.target, self.better = kind, target, better
        self.samples = {}
        self.notes = {}

    def add(self, system, value):
        self.samples.setdefault(system, []).append(value)

    def note(self, system, text):
        self.notes[system] = text

    def forget(self, system):
        self.samples.pop(system, None)
        self.notes.pop(system, None)

    def figures(self, system):
        """What the figure is taken from, one for each round."""
        own = self.samples.get(system, [])
        if self.kind != RATIO:
            return own
        return [a / b for a, b in zip(own, self.samples.get("plain", [])) if b]

    def summary(self, system):
        """median, least, greatest; and the median of the samples themselves."""
        figures = self.figures(system)
        if not figures:
            return None
        return {"median": statistics.median(figures), "min": min(figures), "max": max(figures),
                "rounds": len(figures), "value": statistics.median(self.samples[system])}

    def as_dict(self):
        return {"key": self.key, "title": self.title, "unit": self.unit, "kind": self.kind,
                "target": self.target, "better": self.better, "notes": self.notes,
                "samples": self.samples,
                "summary": {s: self.summary(s) for s in self.samples}}

    @classmethod
    def from_dict(cls, d):
        row = cls(d["key"], d["title"], d["unit"], kind=d["kind"], target=d["target"],
                  better=d["better"])
        row.samples, row.notes = d["samples"], d["notes"]
        return row


def reached(row, system="fleecefs"):
    """Is the target reached? None if there is none: 'a' <= figure, or figure <= 'a'."""
    summary = row.summary(system)
    if not row.target or not summary:
        return None
    sign, number = row.target.split()[:2]
    if sign == ">=":
        return summary["median"] >= float(number)
    return summary["median"] <= float(number)


def interleave(systems, rounds):
    """Each round has every system, in another order than the round before."""
    for i in range(rounds):
        k = i % len(systems)
        yield systems[k:] + systems[:k]


def measure(row, systems, rounds, sample):
    """Takes a sample of each system in each round, but of none whose view turned out to be wrong."""
    for order in interleave(systems, rounds):
        for system in order:
            value = None if system.wrong else sample(system)
            if value is not None:
                row.add(system.name, value)
    return row
