#!/usr/bin/env python3
"""For incremental.sh.

change MNT SEED NIGHT   a day in the life of the disks in MNT: some are written to at random, given back in part,
                        grown, cut, renamed, deleted, and new ones come, under names as bad as they get
about FOLDER            what kind of folder it is, its parent, and the disks of an increment that are full images
forge FOLDER WHAT       makes something in FOLDER what it should never be
"""
import ctypes
import json
import os
import random
import struct
import sys

LIBC = ctypes.CDLL(None, use_errno=True)
KEEP_SIZE, PUNCH_HOLE = 1, 2
MOST = 1 << 20
# the test's own scribbler is at work on a.img and b.img
BUSY = (b"a.img", b"b.img")
NAMES = (b"plain.img", b"deep/er/disk 1.raw", b"it's \"quoted\"", b"line\nbreak.img", b"r\xff\xfew.img", b"x.qcow2",
         b"x", b"deep/x.qcow2.qcow2", b"json:{}", b"a:b.img", "Plätte.img".encode(), b"-v", b"%u%p,x=y", b"$(x) `y`",
         b"back\\slash", b"l" * 255)


def tree(mnt):
    """Its files; not those of snapshots."""
    for where, names, files in os.walk(mnt):
        if where == mnt:
            names.remove(b"snapshots")
        for name in files:
            yield os.path.relpath(os.path.join(where, name), mnt)


def write(rng, fd, size):
    off = rng.randrange(size + 1)
    length = rng.choice((1, 511, 512, 4096, 5000, 70000))
    what = rng.random()
    data = rng.randbytes(length) if what < 0.7 else bytes(length) if what < 0.85 else os.pread(fd, length, off)
    os.pwrite(fd, data, min(off, MOST))


def change_disk(rng, path):
    fd = os.open(path, os.O_RDWR)
    try:
        for _ in range(rng.randrange(8)):
            size = os.fstat(fd).st_size
            what = rng.random()
            if what < 0.7:
                write(rng, fd, size)
            elif what < 0.85 and size:
                if LIBC.fallocate(fd, KEEP_SIZE | PUNCH_HOLE, ctypes.c_long(rng.randrange(size)), ctypes.c_long(30000)):
                    raise OSError(ctypes.get_errno(), "fallocate")
            else:
                os.ftruncate(fd, rng.choice((0, size // 2, size + 1, size + 77777, rng.randrange(MOST))))
    finally:
        os.close(fd)


def create(rng, path):
    if os.path.exists(path):
        return
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as f:
        f.write(rng.randbytes(rng.choice((0, 1, 511, 512, 4097, 100001))))
        f.truncate(rng.choice((0, 1, 100000, 300001, MOST)))
    os.chmod(path, rng.choice((0o600, 0o644, 0o400)))
    os.utime(path, ns=(0, rng.randrange(1 << 60)))


def change(mnt, seed, night):
    rng = random.Random(f"{seed} {night}")
    mnt = os.fsencode(mnt)
    for name in rng.sample(NAMES, 4):
        if len(list(tree(mnt))) < 5:
            create(rng, os.path.join(mnt, name))
    for name in sorted(tree(mnt)):
        path = os.path.join(mnt, name)
        if name in BUSY or os.path.islink(path) or rng.random() < 0.3:
            continue
        what = rng.random()
        if what < 0.75:
            change_disk(rng, path)
        elif what < 0.9:
            new = os.path.join(mnt, rng.choice(NAMES))
            if not os.path.exists(new):
                os.makedirs(os.path.dirname(new), exist_ok=True)
                os.rename(path, new)
        else:
            os.unlink(path)
    link = os.path.join(mnt, b"link")
    if rng.random() < 0.5 and os.path.lexists(link):
        os.unlink(link)
    if not os.path.lexists(link):
        os.symlink(rng.choice((b"a.img", b"/nowhere/at all")), link)


def load(folder):
    with open(os.path.join(folder, "manifest.json"), encoding="ascii") as f:
        return json.load(f)


def about(folder):
    found = load(folder)
    lines = [f"{found['kind']} {found['parent']}"]
    for entry in found["entries"]:
        if entry["type"] == "file" and "parent_image" not in entry and found["parent"]:
            lines.append(entry["path"])
    print("\n".join(lines))


def forge(folder, what):
    found = load(folder)
    entry = next(e for e in found["entries"] if e.get("path") == "a.img")
    image = os.path.join(folder, entry["image"])
    if what in ("../x", "/x", "sub/../../x", "a//b", ".", ""):
        entry["path"] = what
    elif what == "image":
        entry["image"] = "../../secret"
    elif what == "parent":
        found["parent"] = "../" + found["name"]
    elif what == "loop":
        found["parent"] = found["name"]
        entry["parent_image"] = entry["image"]
    elif what == "size":
        entry["size"] = 1 << 62
    elif what == "version":
        found["version"] = 2
    elif what == "symlink":
        os.rename(image, image + ".real")
        os.symlink(os.path.basename(image) + ".real", image)
    elif what == "fifo":
        os.unlink(image)
        os.mkfifo(image)
    elif what == "backing":
        with open(image, "r+b") as f:
            name = os.path.realpath(os.path.join(folder, "../../secret")).encode()
            f.seek(8)
            f.write(struct.pack(">QI", 600, len(name)))
            f.seek(600)
            f.write(name)
    elif what == "data":
        with open(image, "r+b") as f:
            f.seek(72)
            f.write(struct.pack(">Q", 4))
    elif what == "flip":
        with open(image, "r+b") as f:
            f.seek(-5, 2)
            byte = f.read(1)[0]
            f.seek(-1, 1)
            f.write(bytes([byte ^ 1]))
    elif what == "json":
        with open(os.path.join(folder, "manifest.json"), "w", encoding="ascii") as f:
            f.write("[" * 100000)
        return
    elif what == "cut":
        os.truncate(image, os.path.getsize(image) - 4096)
    else:
        raise ValueError(what)
    with open(os.path.join(folder, "manifest.json"), "w", encoding="ascii") as f:
        json.dump(found, f)


if __name__ == "__main__":
    {"change": change, "about": about, "forge": forge}[sys.argv[1]](*sys.argv[2:])
