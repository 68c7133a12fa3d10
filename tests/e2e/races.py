#!/usr/bin/env python3
"""Names that are replaced all the time, and work on them: the two sides of races.sh.

    races.py flip DIR SECONDS           in DIR, exchanges "flip" with the symlink "link", and "file"
                                        with "file-link" and then with "file-fifo"
    races.py work MOUNT SECONDS SEED    operations in MOUNT/*/flip and on MOUNT/*/file
    races.py snaps SNAPSHOTS SECONDS    makes and reads snapshots; mkdir must not fail
    races.py frozen DIR                 reads one of them

None of the last three follows a symlink itself, so whatever they see behind one was followed by
fleecefs. The canary holds names and bytes that exist nowhere else.
"""

import ctypes
import errno
import os
import random
import stat
import sys
import time

LIBC = ctypes.CDLL(None, use_errno=True)
EXCHANGE = 2
MARK = b"CANARY"
# what may become of an operation on a name that is replaced meanwhile
FINE = {
    errno.ENOENT,
    errno.EEXIST,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ELOOP,
    errno.ENOTEMPTY,
    errno.ENXIO,
    errno.EINVAL,
    errno.ENOTSUP,
    errno.ENODATA,
    errno.ESTALE,
    errno.EBUSY,
    errno.EXDEV,
}


def exchange(a, b):
    return LIBC.renameat2(-100, a.encode(), -100, b.encode(), EXCHANGE)


def flip(top, seconds):
    """Back in order at the end, so that the next run begins as the first."""
    os.chdir(top)
    end = time.monotonic() + seconds
    count = 0
    while time.monotonic() < end:
        for a, b in ("flip", "link"), ("file", "file-link"), ("file", "file-fifo"):
            for _ in range(2):
                if exchange(a, b):
                    sys.exit(f"cannot exchange {a} and {b}: {os.strerror(ctypes.get_errno())}")
                count += 1
    print(f"{count} exchanges in {top}")


class Work:
    """Operations below one mount."""

    def __init__(self, mount, seed):
        self.random = random.Random(seed)
        self.areas = [os.path.join(mount, name) for name in ("behind", "through")]
        self.mount = mount
        self.done = 0

    def try_one(self, function, *args, **kwargs):
        try:
            result = function(*args, **kwargs)
            self.done += 1
            return result
        except OSError as error:
            if error.errno not in FINE:
                raise
            return None

    def read(self, path, dir_fd=None):
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
        fd = os.open(path, flags, dir_fd=dir_fd)
        try:
            if stat.S_ISREG(os.fstat(fd).st_mode) and MARK in os.read(fd, 100):
                sys.exit(f"{path}: bytes of the canary were read")
        finally:
            os.close(fd)

    def write(self, path, flags, dir_fd=None):
        fd = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK | flags, 0o666, dir_fd=dir_fd)
        try:
            if stat.S_ISREG(os.fstat(fd).st_mode):
                os.pwrite(fd, b"written" * 1000, self.random.randrange(20000))
                os.fchmod(fd, self.random.choice((0o600, 0o755)))
                os.setxattr(fd, "user.race", b"x")
        finally:
            os.close(fd)

    def in_directory(self, area):
        fd = os.open(os.path.join(area, "flip"), os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        a, b = (self.random.choice(("one", "two", "secret", "sub")) for _ in range(2))
        try:
            self.try_one(self.write, a, os.O_CREAT, dir_fd=fd)
            self.try_one(self.read, a, dir_fd=fd)
            self.try_one(os.rename, a, b, src_dir_fd=fd, dst_dir_fd=fd)
            self.try_one(os.link, b, "hard", src_dir_fd=fd, dst_dir_fd=fd)
            self.try_one(os.mkdir, "sub", dir_fd=fd)
            self.try_one(os.symlink, "one", "s", dir_fd=fd)
            self.try_one(os.chmod, b, 0o640, dir_fd=fd)
            self.try_one(os.utime, b, ns=(5, 5), dir_fd=fd, follow_symlinks=False)
            if "only-in-canary" in os.listdir(fd):
                sys.exit(f"{area}/flip: the canary is listed")
            for name in ("s", "hard", a):
                self.try_one(os.unlink, name, dir_fd=fd)
            self.try_one(os.rmdir, "sub", dir_fd=fd)
        finally:
            os.close(fd)

    def step(self):
        area = self.random.choice(self.areas)
        file = os.path.join(area, "file")
        self.try_one(self.in_directory, area)
        self.try_one(self.write, file, self.random.choice((0, os.O_TRUNC)))
        self.try_one(self.read, file)
        self.try_one(os.lstat, file)
        self.try_one(os.setxattr, file, "user.race", b"y", follow_symlinks=False)
        self.try_one(os.lchown, file, 0, 0)


def work(mount, seconds, seed):
    w = Work(mount, seed)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            w.step()
        except PermissionError:
            pass  # user.* of a symlink, a FIFO
    print(f"{w.done} operations, seed {seed}")
    if w.done < 100:
        sys.exit("hardly anything was done")


def frozen(top):
    for where, dirs, files in os.walk(top):
        if "only-in-canary" in dirs + files:
            sys.exit(f"{where}: the canary was frozen")
        for name in files:
            path = os.path.join(where, name)
            if not stat.S_ISREG(os.lstat(path).st_mode):
                continue
            try:
                with open(path, "rb") as file:
                    if MARK in file.read(100):
                        sys.exit(f"{path}: bytes of the canary")
            except OSError as error:  # moved behind the mount, it may not be found this instant
                if error.errno != errno.EIO or "/behind/" not in path:
                    raise


def snaps(top, seconds):
    """Makes snapshots and looks through them; every tenth is kept under another name."""
    end = time.monotonic() + seconds
    made = 0
    while time.monotonic() < end:
        name = os.path.join(top, "s")
        os.mkdir(name)
        frozen(name)
        if made % 10:
            os.rmdir(name)
        else:
            os.rename(name, os.path.join(top, f"kept{made}"))
        made += 1
    print(f"{made} snapshots")
    if made < 10:
        sys.exit("hardly any snapshot was made")


if __name__ == "__main__":
    if sys.argv[1] == "flip":
        flip(sys.argv[2], float(sys.argv[3]))
    elif sys.argv[1] == "work":
        work(sys.argv[2], float(sys.argv[3]), int(sys.argv[4]))
    elif sys.argv[1] == "snaps":
        snaps(sys.argv[2], float(sys.argv[3]))
    else:
        frozen(sys.argv[2])
