"""Which files are backed up."""
import ctypes
import os
import stat
import sys

LIBC = ctypes.CDLL(None)
ABOUT = "about/.fleece-backup"  # goes along into borg's archives


def matches(globs, path):
    """As fleecefs matches exclude=GLOB: by path or by name, and * stands for a slash, too."""
    name = os.path.basename(path)
    return any(LIBC.fnmatch(glob, text, 0) == 0 for glob in globs for text in (path, name))


class Chooser:
    def __init__(self, root, include, exclude, skip):
        self.root, self.include, self.exclude, self.skip = os.fsencode(root), include, exclude, skip
        self.chosen, self.left = [], []
        self.files = self.bytes = self.allocated = 0
        self.seen = set()

    def walk(self, below, all_in):
        """Is anything below it chosen?"""
        some = False
        at, left = len(self.chosen), len(self.left)
        self.chosen.append(below)
        with os.scandir(os.path.join(self.root, below)) as entries:
            entries = sorted(entries, key=lambda e: e.name)
        for entry in entries:
            path = os.path.join(below, entry.name) if below else entry.name
            if path in self.skip:
                continue
            if matches(self.exclude, path):
                self.left.append(path)
                continue
            inside = all_in or matches(self.include, path)
            if entry.is_dir(follow_symlinks=False):
                some = self.walk(path, inside) or some
            elif inside:
                self.take(path, entry.stat(follow_symlinks=False))
                some = True
            else:
                self.left.append(path)
        if not some and not all_in and below:
            # nothing in it: as a whole it is left out
            del self.chosen[at:], self.left[left:]
            self.left.append(below)
        return some or all_in

    def take(self, path, status):
        self.chosen.append(path)
        if not stat.S_ISREG(status.st_mode):
            return
        self.files += 1
        if status.st_nlink == 1 or status.st_ino not in self.seen:
            self.bytes += status.st_size
            self.allocated += min(status.st_blocks * 512, status.st_size)
        self.seen.add(status.st_ino)


def write_list(path, names):
    with open(path, "wb") as f:
        for name in names:
            f.write(name + b"\0")


def read_list(path):
    with open(path, "rb") as f:
        return f.read().split(b"\0")[:-1]


def choose(*words):
    globs = {"--include": [], "--exclude": []}
    skip = set()
    if words[0] == "--live":
        skip, words = {b"snapshots", b".fleecefs"}, words[1:]
    root, path = words[:2]
    for word in words[2:]:
        option, glob = word.split("=", 1)
        globs[option].append(os.fsencode(glob))
    chooser = Chooser(root, globs["--include"], globs["--exclude"], skip)
    chooser.walk(b"", not globs["--include"])
    names = [b"./" + name if name else b"." for name in chooser.chosen]
    write_list(path, names)
    write_list(os.path.join(os.path.dirname(path), "left"), chooser.left)
    about = os.path.join(os.path.dirname(path), ABOUT)
    write_list(f"{path}.borg", [*names, os.fsencode(about)])
    try:
        created = os.getxattr(root, "user.fleecefs.created").decode()
    except OSError:
        created = "-"
    print(chooser.files, chooser.bytes, chooser.allocated, created)


def patterns(tool, left, root=""):
    for name in read_list(left):
        path = os.fsencode(root) + b"/" + name
        wild = any(c in path for c in b"*?[")
        if tool == "restic":
            if b"\n" in path:
                raise ValueError(f"restic cannot leave out a name with a newline: {name!r}")
            # it strips blanks at the end, and replaces $NAME
            path = b"".join({b"\\": b"\\\\", b"*": b"\\*", b"?": b"\\?", b"[": b"\\[", b"$": b"$$"}
                            .get(c, c) for c in (path[i:i + 1] for i in range(len(path))))
            if path[-1:].isspace():
                path = path[:-1] + b"[" + path[-1:] + b"]"
            sys.stdout.buffer.write(path + b"\n")
            continue
        if wild:  # else rsync takes a backslash for itself
            path = b"".join(b"\\" + c if c in (b"\\", b"*", b"?", b"[") else c
                            for c in (path[i:i + 1] for i in range(len(path))))
        sys.stdout.buffer.write(path + b"\0")
