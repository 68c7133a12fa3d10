"""A strict parser of OpenMetrics text 1.0, as far as fleecefs writes it: whatever it does not know is
an error. parse() gives {family: Family}; a sample is (suffix, labels, value)."""
import re

TYPES = {"gauge", "counter", "info", "stateset", "unknown"}
NAME = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*")
LABEL = re.compile(r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\\n]|\\[\\n"])*)"')
VALUE = re.compile(r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:e[+-]?[0-9]+)?\Z")


class Family:
    def __init__(self, name):
        self.name, self.type, self.unit, self.help, self.samples = name, None, None, None, []


def unescape(text):
    return re.sub(r"\\(.)", lambda m: "\n" if m[1] == "n" else m[1], text)


def labels_of(text):
    labels, at = {}, 0
    while at < len(text):
        m = LABEL.match(text, at)
        assert m, f"labels: {text!r}"
        assert m[1] not in labels and not m[1].startswith("__"), f"label {m[1]}"
        labels[m[1]] = unescape(m[2])
        at = m.end()
        assert at == len(text) or (text[at] == "," and at + 1 < len(text)), f"labels: {text!r}"
        at += 1
    return labels


def sample(line, family):
    m = NAME.match(line)
    assert m and m[0].startswith(family.name), f"{line!r} is not of {family.name}"
    suffix, rest, labels = m[0][len(family.name):], line[m.end():], {}
    if rest.startswith("{"):
        end = re.match(r'\{((?:[^"}]|"(?:[^"\\]|\\.)*")*)\}', rest)
        assert end, f"labels do not end: {line!r}"
        labels, rest = labels_of(end[1]), rest[end.end():]
    assert rest.startswith(" ") and VALUE.match(rest[1:]), f"value: {line!r}"
    expected = {"counter": "_total", "info": "_info"}.get(family.type, "")
    assert suffix == expected, f"{line!r}: {family.type} wants {expected!r}"
    value = float(rest[1:])
    if family.type == "counter":
        assert value >= 0
    if family.type == "stateset":
        assert value in (0, 1) and family.name in labels, line
    if family.type == "info":
        assert value == 1
    return suffix, labels, value


def parse(data):
    text = data.decode("utf-8")
    assert text.endswith("# EOF\n") and text.count("# EOF\n") == 1, "no end, or not at the end"
    families, current = {}, None
    for line in text[:-len("# EOF\n")].splitlines() if "\r" not in text else text.split("\n")[:-2]:
        if line.startswith("#"):
            hash_, what, name, value = line.split(" ", 3)
            assert hash_ == "#" and what in ("TYPE", "UNIT", "HELP") and NAME.fullmatch(name), line
            if not current or current.name != name:
                assert name not in families, f"{name} twice"
                current = families[name] = Family(name)
            assert not current.samples, f"{line!r} after samples"
            field = what.lower()
            assert getattr(current, field) is None, f"{line!r} twice"
            setattr(current, field, value)
            if what == "TYPE":
                assert value in TYPES, line
            if what == "UNIT":
                assert name.endswith("_" + value), line
            continue
        assert current and current.type, f"{line!r} without a type"
        current.samples.append(sample(line, current))
    for family in families.values():
        assert family.type and family.help, f"{family.name} lacks something"
        seen = [(s, tuple(sorted(labels.items()))) for s, labels, _ in family.samples]
        assert len(seen) == len(set(seen)), f"{family.name} has a sample twice"
    return families
