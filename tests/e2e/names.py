#!/usr/bin/env python3
"""Names that no shell likes, for names.sh.

    names.py fill DIR           files of all such names, with random bytes, in DIR
    names.py overwrite DIR      new bytes into each file of DIR, as a guest would
    names.py snapshots DIR      which names of snapshots may be made in DIR
    names.py deep DIR FROM TO   directories FROM to TO of a chain that begins in DIR/deep, each with a file
    names.py deep-move DIR      moves about at the end of that chain
    names.py deep-check DIR REF LIMIT
                                the chain in DIR is that of REF where a path has up to LIMIT bytes, and
                                below that an I/O error
"""

import errno
import os
import sys

NAMES = [
    b"plain",
    b"n" * 255,
    b"m" * 254 + b"\xff",
    "\u00e4".encode() * 127 + b"x",
    b"\xff\xfe\xfd",
    b"\x80",
    b"new\nline",
    b"\n",
    b"\x1b[31mred\x07",
    b"%s%n%d",
    b"-rf",
    b"--help",
    b" ",
    b" lead and trail ",
    b"back\\slash\\",
    b"quote\"'`$(x)",
    b"*?[a]{b}",
    b"nbd:unix:x",
    b"json:{}",
    b"a,b=c,,d",
    b"...",
    b"manifest",
    b"x-fleece-1.qcow2",
    b"x.xxh3",
    b"x-fleece-1.zeros",
    b"x-fleece-1.zero~",
    b"snap~0123456789abcdef",
    b".hidden",
    b".dropped-1",
]
DIRS = [b"", b"d\n" + b"r" * 253, b"\xff dir", b"manifest.tmp", b"y-fleece-1.qcow2", b"y-fleece-1.zeros"]
DEEP = b"p" * 200


def files(top):
    return [os.path.join(top, d, n) for d in DIRS for n in NAMES if n not in (b"manifest",) or d]


def write(path, flags):
    fd = os.open(path, os.O_WRONLY | flags, 0o644)
    os.pwrite(fd, os.urandom(9000), 0)
    os.close(fd)


def fill(top):
    for d in DIRS[1:]:
        os.mkdir(os.path.join(top, d))
    for path in files(top):
        write(path, os.O_CREAT | os.O_EXCL)


def overwrite(top):
    for path in files(top):
        write(path, 0)


def error_of(call, *args):
    try:
        call(*args)
    except OSError as e:
        return e.errno
    return 0


def snapshots(top):
    good = [b"a", b"b" * 200, b"\xff" * 200, b"new\nline", b"-", b"%n", b" ", b"a\\b", b"\x1b[0m", b"~"]
    bad = [b"c" * 201, b"d" * 255, b"e" * 256, b".a", b"..a", b"...", b".dropped-1", b".lock", b".fleecefs"]
    for name in good:
        assert error_of(os.mkdir, os.path.join(top, name)) == 0, name
        assert name in os.listdir(top), name
        assert error_of(os.mkdir, os.path.join(top, name)) == errno.EEXIST, name
    for name in bad:
        assert error_of(os.mkdir, os.path.join(top, name)) == errno.EINVAL, name
        e = error_of(os.rename, os.path.join(top, b"a"), os.path.join(top, name))
        assert e == errno.EINVAL, (name, e)
        assert name not in os.listdir(top), name
    assert sorted(os.listdir(top)) == sorted(good)
    for old, new in zip(good, good[1:]):
        assert error_of(os.rename, os.path.join(top, old), os.path.join(top, b"moved")) == 0, old
        assert error_of(os.rename, os.path.join(top, b"moved"), os.path.join(top, old)) == 0, old
        assert error_of(os.rename, os.path.join(top, old), os.path.join(top, new)) != 0, (old, new)
    for name in good:
        assert error_of(os.rmdir, os.path.join(top, name)) == 0, name


def enter(fd, name, make):
    if make:
        os.mkdir(name, dir_fd=fd)
    sub = os.open(name, os.O_RDONLY | os.O_DIRECTORY, dir_fd=fd)
    os.close(fd)
    return sub


def deep(top, first, last):
    fd = os.open(top, os.O_RDONLY | os.O_DIRECTORY)
    fd = enter(fd, b"deep", first == 0)
    for i in range(last):
        fd = enter(fd, DEEP, i >= first)
        if i >= first:
            f = os.open(b"f", os.O_WRONLY | os.O_CREAT, dir_fd=fd)
            os.write(f, b"%d " % i * 3000)
            os.close(f)
    os.close(fd)


def deep_move(top):
    fd = os.open(top, os.O_RDONLY | os.O_DIRECTORY)
    upper = os.dup(fd)
    fd = enter(fd, b"deep", False)
    while DEEP.decode() in os.listdir(fd):
        fd = enter(fd, DEEP, False)
    data = read(b"f", fd)
    os.rename(b"f", b"g", src_dir_fd=fd, dst_dir_fd=fd)
    os.mkdir(b"sub", dir_fd=fd)
    os.rename(b"g", b"sub/h", src_dir_fd=fd, dst_dir_fd=fd)
    os.rename(b"sub", b"sub2", src_dir_fd=fd, dst_dir_fd=fd)
    assert os.listdir(fd) == ["sub2"]
    os.rename(b"sub2/h", b"up", src_dir_fd=fd, dst_dir_fd=upper)
    assert read(b"up", upper) == data
    assert error_of(lambda: os.rename(b"plain", b"down", src_dir_fd=upper, dst_dir_fd=fd)) == errno.ENAMETOOLONG
    os.unlink(b"up", dir_fd=upper)
    f = os.open(b"f", os.O_WRONLY | os.O_CREAT, dir_fd=fd)
    os.write(f, data)
    os.close(f)
    os.rmdir(b"sub2", dir_fd=fd)
    os.close(fd)
    os.close(upper)


def read(name, fd):
    f = os.open(name, os.O_RDONLY, dir_fd=fd)
    data = os.read(f, 1 << 20)
    os.close(f)
    return data


def deep_check(top, ref, limit):
    a, b = (os.open(d, os.O_RDONLY | os.O_DIRECTORY) for d in (top, ref))
    a, b = enter(a, b"deep", False), enter(b, b"deep", False)
    length, depth, failed = len("deep"), 0, False
    while True:
        length += 1 + len(DEEP)
        if length > limit:  # listed, and not to be entered
            st = os.stat(DEEP, dir_fd=a)
            assert st.st_mode == os.stat(DEEP, dir_fd=b).st_mode
            sub = os.open(DEEP, os.O_RDONLY | os.O_DIRECTORY, dir_fd=a)
            assert error_of(os.listdir, sub) == errno.EIO
            assert error_of(lambda: os.stat(b"f", dir_fd=sub)) == errno.EIO
            break
        a, b = enter(a, DEEP, False), enter(b, DEEP, False)
        if length + 2 > limit:
            assert error_of(read, b"f", a) == errno.EIO
        else:
            assert read(b"f", a) == read(b"f", b) == b"%d " % depth * 3000, depth
        depth += 1
    assert depth > 10


if __name__ == "__main__":
    top = os.fsencode(sys.argv[2])
    if sys.argv[1] == "deep":
        deep(top, int(sys.argv[3]), int(sys.argv[4]))
    elif sys.argv[1] == "deep-move":
        deep_move(top)
    elif sys.argv[1] == "deep-check":
        deep_check(top, os.fsencode(sys.argv[3]), int(sys.argv[4]))
    else:
        {"fill": fill, "overwrite": overwrite, "snapshots": snapshots}[sys.argv[1]](top)
