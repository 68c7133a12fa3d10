#!/usr/bin/env python3
"""Checks of a frozen tree that need system calls rather than commands.

read FILE REF        mmap and pread of any size and place give the bytes of REF
holes FILE REF       SEEK_DATA and SEEK_HOLE: in order, complete, no data hidden, no more data than
                     REF's map has in whole clusters; st_blocks agrees
same-stat LIVE FROZEN   the two trees have the same metadata, but for the inode numbers
refuse DIR           every way to change the frozen tree DIR gives EROFS
"""

import errno
import mmap
import os
import random
import stat
import sys

GRAIN = 4096


def read_check(path, ref_path):
    rng = random.Random(3)
    with open(ref_path, "rb") as f:
        ref = f.read()
    fd = os.open(path, os.O_RDONLY)
    assert os.fstat(fd).st_size == len(ref), f"{path}: size"
    if ref:
        with mmap.mmap(fd, 0, mmap.MAP_SHARED, mmap.PROT_READ) as shared:
            for _ in range(200):
                off = rng.randrange(len(ref))
                assert shared[off:off + 9000] == ref[off:off + 9000], f"{path}: mmap at {off}"
        with mmap.mmap(fd, 0, mmap.MAP_PRIVATE, mmap.PROT_READ) as private:
            assert private[:] == ref, f"{path}: private mmap"
    for _ in range(200):
        off = rng.randrange(len(ref) + 5000)
        length = rng.choice([1, 511, 4096, 70_000, 1_000_000, 3_000_000])
        assert os.pread(fd, length, off) == ref[off:off + length], f"{path}: {length} at {off}"
    assert os.pread(fd, 10, len(ref)) == b"", f"{path}: data past the end"
    os.close(fd)


def data_map(fd):
    """The runs of data as (start, end), by lseek."""
    size, pos, runs = os.fstat(fd).st_size, 0, []
    while pos < size:
        try:
            start = os.lseek(fd, pos, os.SEEK_DATA)
        except OSError as e:
            assert e.errno == errno.ENXIO, e
            break
        end = os.lseek(fd, start, os.SEEK_HOLE)
        assert pos <= start < end <= size, f"the map goes wrong at {pos}: {start} {end} {size}"
        assert os.lseek(fd, start, os.SEEK_DATA) == start
        runs.append((start, end))
        pos = end
    try:
        os.lseek(fd, size, os.SEEK_HOLE)
        assert False, "SEEK_HOLE at the end of the file must give ENXIO"
    except OSError as e:
        assert e.errno == errno.ENXIO, e
    return runs


def grains(runs):
    return {g for start, end in runs for g in range(start // GRAIN, (end - 1) // GRAIN + 1)}


def holes_check(path, ref_path):
    fd, ref_fd = os.open(path, os.O_RDONLY), os.open(ref_path, os.O_RDONLY)
    runs = data_map(fd)
    mine, theirs = grains(runs), grains(data_map(ref_fd))
    assert mine <= theirs, f"{path}: {len(mine - theirs)} clusters of data where a hole was"
    size = os.fstat(ref_fd).st_size
    pos = 0
    for start, end in runs + [(size, size)]:
        assert not any(os.pread(ref_fd, start - pos, pos)), f"{path}: data hidden in a hole at {pos}"
        pos = end
    blocks = os.fstat(fd).st_blocks * 512
    slack = 1 << 20
    assert len(theirs) * GRAIN - slack <= blocks <= len(theirs) * GRAIN + slack, \
        f"{path}: st_blocks says {blocks} bytes, the map {len(theirs) * GRAIN}"


def tree(root):
    yield "."
    for where, dirs, files in os.walk(root):
        for name in sorted(dirs + files):
            yield os.path.relpath(os.path.join(where, name), root)


def same_stat(live, frozen):
    names = [n for n in tree(live) if n.split("/")[0] != ".fleecefs"]
    assert sorted(names) == sorted(tree(frozen)), "the names differ"
    for name in names:
        a, b = os.lstat(os.path.join(live, name)), os.lstat(os.path.join(frozen, name))
        fields = ["st_mode", "st_uid", "st_gid", "st_mtime_ns", "st_ctime_ns"]
        if not stat.S_ISDIR(a.st_mode):
            fields += ["st_size", "st_nlink", "st_blocks"]
        for field in fields:
            x, y = getattr(a, field), getattr(b, field)
            assert x == y, f"{name}: {field} is {y}, was {x}"
        if stat.S_ISLNK(a.st_mode):
            assert os.readlink(os.path.join(live, name)) == os.readlink(os.path.join(frozen, name))


def refused(what, call):
    try:
        call()
    except OSError as e:
        assert e.errno == errno.EROFS, f"{what}: {e.strerror}, not EROFS"
        return
    raise AssertionError(f"{what} was allowed in a frozen tree")


def refuse(root):
    def at(name):
        return os.path.join(root, name)

    a, new = at("big.img"), at("new")
    for flags in ("O_WRONLY", "O_RDWR"):
        refused(flags, lambda: os.open(a, getattr(os, flags)))
    refused("O_TRUNC", lambda: os.open(a, os.O_RDWR | os.O_TRUNC))
    refused("O_CREAT", lambda: os.open(new, os.O_WRONLY | os.O_CREAT))
    refused("truncate", lambda: os.truncate(a, 5))
    refused("unlink", lambda: os.unlink(a))
    refused("unlink of a symlink", lambda: os.unlink(at("link")))
    refused("rmdir", lambda: os.rmdir(at("sub/deep/empty")))
    refused("mkdir", lambda: os.mkdir(new))
    refused("mkdir below", lambda: os.mkdir(at("sub/deep/new")))
    refused("rename", lambda: os.rename(a, new))
    refused("rename over", lambda: os.rename(a, at("tiny.img")))
    refused("link", lambda: os.link(a, new))
    refused("symlink", lambda: os.symlink("x", new))
    refused("mkfifo", lambda: os.mkfifo(new))
    refused("chmod", lambda: os.chmod(a, 0o600))
    refused("chown", lambda: os.chown(a, 1, 1))
    refused("utime", lambda: os.utime(a, (1, 1)))
    refused("setxattr", lambda: os.setxattr(a, "user.x", b"y"))
    refused("removexattr", lambda: os.removexattr(a, "user.x"))
    refused("utime of the root", lambda: os.utime(root, (1, 1)))
    refused("chmod of the root", lambda: os.chmod(root, 0o777))


def main():
    commands = {"read": read_check, "holes": holes_check, "same-stat": same_stat, "refuse": refuse}
    try:
        commands[sys.argv[1]](*sys.argv[2:])
    except AssertionError as e:
        sys.exit(f"FAIL: {e}")


if __name__ == "__main__":
    main()
