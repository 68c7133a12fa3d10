"""Which of the dated files of a pattern are too old. What the pattern cannot have made is not looked at."""
import os
import re
import sys

FIELDS = {"Y": "[0-9]{4}", "y": "[0-9]{2}", "m": "(?:0[1-9]|1[0-2])", "d": "(?:0[1-9]|[12][0-9]|3[01])",
          "j": "[0-3][0-9]{2}", "H": "[0-2][0-9]", "M": "[0-5][0-9]", "S": "[0-6][0-9]", "s": "[0-9]+"}
SHORT = {"F": "%Y-%m-%d", "T": "%H:%M:%S", "R": "%H:%M", "D": "%m/%d/%y"}


def compile_pattern(base):
    """The regular expression of the names, and the fields' names from the greatest on."""
    base = re.sub("%([FTRD])", lambda m: SHORT[m[1]], base)
    seen, out = set(), ""
    for literal, field in re.findall("([^%]+)|%(.?)", base):
        if literal:
            out += re.escape(literal)
        elif field == "%":
            out += "%"
        elif field not in FIELDS:
            raise ValueError(f"--keep-last does not know %{field} in a name; "
                             "it knows %F %T %R %Y %y %m %d %j %H %M %S %s")
        elif field in seen:
            out += f"(?P={field})"
        else:
            seen.add(field)
            out += f"(?P<{field}>{FIELDS[field]})"
    if "s" in seen:
        order = "s"
    elif seen & set("Yy") and ("j" in seen or {"m", "d"} <= seen):
        order = [f for f in "YyjmdHMS" if f in seen]
        if "m" in seen:
            order = [f for f in order if f != "j"]
    else:
        raise ValueError("--keep-last needs a whole date in the name's last part, such as %F")
    return re.compile(out), order


def prune(*words):
    if words[0] == "--check":
        folder, base = os.path.split(words[1])
        if "%" in folder.replace("%%", ""):
            raise ValueError("--keep-last: the date must be in the name's last part alone")
        compile_pattern(base)
        return
    dry = words[0] == "--dry"
    pattern, keep, newest = words[dry:]
    folder, base = os.path.split(pattern)
    folder = folder.replace("%%", "%")
    expression, order = compile_pattern(base)
    want_file = bool(re.search(r"\.tar(\.[a-z]+)?$", newest)) or os.path.isfile(newest)
    found = {}
    if os.path.isdir(folder):
        for entry in os.scandir(folder):
            match = expression.fullmatch(entry.name)
            if not match or entry.is_symlink():
                continue
            if want_file and entry.is_file() or \
                    not want_file and os.path.isfile(os.path.join(entry.path, ".fleece-backup")):
                found[entry.path] = tuple(int(match[f]) for f in order)
    if dry:
        match = expression.fullmatch(os.path.basename(newest))
        found[newest] = tuple(int(match[f]) for f in order)
    others = sorted((p for p in found if p != newest), key=found.get, reverse=True)
    for path in others[int(keep) - 1:]:
        sys.stdout.buffer.write(os.fsencode(path) + b"\0")
