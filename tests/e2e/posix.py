#!/usr/bin/env python3
"""Does the live tree behave like the filesystem below it?

Runs the same operations on a plain directory and on a fleecefs mount of another one, each as root
and as an ordinary user, and compares results, errno, stat, xattrs and directory contents exactly.

    posix.py FLEECEFS

Exit status: 0 the same, 1 a difference, 77 cannot run here.
"""

import ctypes
import errno
import fcntl
import mmap
import os
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import time

USER, OTHER = 54321, 54322
LIBC = ctypes.CDLL(None, use_errno=True)
NOREPLACE, EXCHANGE, WHITEOUT = 1, 2, 4
NEW_NAMESPACE, MS_REC, MS_PRIVATE = 0x20000, 1 << 14, 1 << 18
KEEP_SIZE, PUNCH_HOLE, COLLAPSE, ZERO_RANGE = 1, 2, 8, 16


def call(function, *args):
    """A libc function; OSError on failure."""
    result = function(*args)
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def renameat2(old, new, flags):
    call(LIBC.renameat2, -100, old.encode(), -100, new.encode(), flags)


def fallocate(fd, mode, offset, length):
    call(LIBC.fallocate, fd, mode, ctypes.c_int64(offset), ctypes.c_int64(length))


def acl(*entries):
    """A POSIX ACL as its xattr value; entries are (tag, permissions, id)."""
    value = (2).to_bytes(4, "little")
    for tag, perm, who in entries:
        value += tag.to_bytes(2, "little") + perm.to_bytes(2, "little")
        value += (who & 0xFFFFFFFF).to_bytes(4, "little")
    return value


ACL_USER = acl((1, 7, -1), (2, 7, USER), (4, 5, -1), (16, 7, -1), (32, 0, -1))
ACL_OTHER = acl((1, 6, -1), (2, 4, OTHER), (4, 4, -1), (16, 4, -1), (32, 0, -1))


class Recorder:
    """Performs operations in one directory and notes what each gave."""

    def __init__(self):
        self.notes = []

    def note(self, what, value):
        self.notes.append((what, value))

    def do(self, what, function, *args, **kwargs):
        """Notes the result of a call, or its errno; returns the result or None."""
        try:
            result = function(*args, **kwargs)
        except OSError as error:
            self.note(what, "errno " + errno.errorcode.get(error.errno, str(error.errno)))
            return None
        self.note(what, repr(result) if isinstance(result, (int, bytes, str, list)) else "ok")
        return result

    def fd(self, what, path, flags, mode=0o666):
        """Opens; the number itself is not compared."""
        try:
            fd = os.open(path, flags, mode)
        except OSError as error:
            self.note(what, "errno " + errno.errorcode.get(error.errno, str(error.errno)))
            return None
        self.note(what, "ok")
        return fd

    def touch(self, path, mode=0o666, data=b""):
        fd = self.fd(f"create {path}", path, os.O_CREAT | os.O_EXCL | os.O_RDWR, mode)
        if fd is not None:
            if data:
                self.do(f"write {path}", os.write, fd, data)
            os.close(fd)

    def stat(self, path):
        """What stat tells, less what must differ: device, inode number, recent times."""
        try:
            st = os.lstat(path)
        except OSError as error:
            self.note(f"stat {path}", errno.errorcode[error.errno])
            return
        size = st.st_size if not stat.S_ISDIR(st.st_mode) else 0
        # the filesystem may need a block more for its own tables
        sparse = stat.S_ISREG(st.st_mode) and st.st_blocks * 512 + 16384 < size
        self.note(
            f"stat {path}",
            f"{stat.filemode(st.st_mode)} {st.st_nlink} {st.st_uid}:{st.st_gid} {size}"
            f" rdev {st.st_rdev} sparse {sparse} blksize {st.st_blksize}",
        )

    def times(self, path):
        st = os.lstat(path)
        self.note(f"times {path}", f"{st.st_atime_ns} {st.st_mtime_ns}")

    def moved_on(self, path, function, *args):
        """Which of the three times did this change?"""
        before = os.lstat(path)
        time.sleep(0.012)
        try:
            function(*args)
        except OSError as error:
            self.note(f"{function.__name__} {path}", errno.errorcode[error.errno])
        after = os.lstat(path)
        self.note(
            f"times changed by {getattr(function, '__name__', 'call')} {path}",
            [
                before.st_mtime_ns != after.st_mtime_ns,
                before.st_ctime_ns != after.st_ctime_ns,
            ],
        )

    def content(self, path):
        try:
            with open(path, "rb") as file:
                self.note(f"content {path}", hash(file.read()))
        except OSError as error:
            self.note(f"content {path}", errno.errorcode[error.errno])

    def tree(self, top="."):
        """Everything below: names, types, stat, xattrs."""
        for where, dirs, files in os.walk(top):
            dirs.sort()
            self.note(f"list {where}", sorted(dirs) + sorted(files))
            for name in sorted(dirs) + sorted(files):
                path = os.path.join(where, name)
                self.stat(path)
                self.do(f"listxattr {path}", lambda p=path: sorted(os.listxattr(p, follow_symlinks=False)))


def names(r):
    """Making, finding, linking, renaming and removing names."""
    r.do("mkdir", os.mkdir, "d", 0o755)
    r.do("mkdir again", os.mkdir, "d")
    r.do("mkdir deep", os.makedirs, "d/a/b/c/d/e/f")
    r.touch("d/file", 0o640, b"hello")
    r.fd("O_EXCL on existing", "d/file", os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    r.fd("O_DIRECTORY on file", "d/file", os.O_RDONLY | os.O_DIRECTORY)
    r.fd("write a directory", "d", os.O_WRONLY)
    r.fd("O_CREAT on a directory", "d", os.O_WRONLY | os.O_CREAT)
    r.fd("missing", "d/none", os.O_RDONLY)
    r.fd("through a file", "d/file/x", os.O_RDONLY)
    r.fd("trailing slash", "d/file/", os.O_RDONLY)
    r.do("255", os.mkdir, "n" * 255)
    r.do("256", os.mkdir, "n" * 256)
    for name in ("\n", "\\", "ü", " ", "%s", "-o", "..."):
        r.touch(name)
    r.do("bytes", os.mkdir, b"\xff\xfe")
    r.do("symlink", os.symlink, "d/file", "l")
    r.do("symlink again", os.symlink, "x", "l")
    r.do("dangling", os.symlink, "nowhere/at/all", "dangling")
    r.do("readlink", os.readlink, "l")
    r.do("readlink file", os.readlink, "d/file")
    r.do("long symlink", os.symlink, "s" * 4095, "long")
    r.do("long readlink", os.readlink, "long")
    r.do("empty symlink", os.symlink, "", "empty")
    r.do("loop", os.symlink, "loop", "loop")
    r.fd("open loop", "loop", os.O_RDONLY)
    r.fd("O_NOFOLLOW", "l", os.O_RDONLY | os.O_NOFOLLOW)
    r.fd("create through dangling", "dangling", os.O_CREAT | os.O_WRONLY)
    r.do("link", os.link, "d/file", "hard")
    r.do("link again", os.link, "d/file", "hard")
    r.do("link directory", os.link, "d", "hard-d")
    r.do("link symlink", os.link, "l", "hard-l", follow_symlinks=False)
    r.do("samefile", os.path.samefile, "d/file", "hard")
    r.do("fifo", os.mkfifo, "fifo", 0o640)
    r.do("link fifo", os.link, "fifo", "fifo2")
    r.do("mknod file", os.mknod, "mknod", stat.S_IFREG | 0o604)
    r.do("mknod device", os.mknod, "dev", stat.S_IFCHR | 0o600, os.makedev(1, 3))
    with socket.socket(socket.AF_UNIX) as unix:
        r.do("bind", unix.bind, "socket")
    r.tree()
    r.do("rmdir full", os.rmdir, "d")
    r.do("rmdir file", os.rmdir, "d/file")
    r.do("unlink dir", os.unlink, "d")
    r.do("unlink missing", os.unlink, "none")
    r.do("rename missing", os.rename, "none", "x")
    r.do("rename into itself", os.rename, "d", "d/a/x")
    r.do("rename same inode", os.rename, "hard", "d/file")
    r.do("rename over", os.rename, "mknod", "hard")
    r.do("rename file over dir", os.rename, "hard", "d")
    r.do("rename dir over file", os.rename, "d", "hard")
    r.do("mkdir e", os.mkdir, "e")
    r.do("rename dir over full dir", os.rename, "e", "d")
    r.do("rename dir over empty dir", os.rename, "d/a/b/c/d/e", "e")
    r.touch("one", data=b"1")
    r.touch("two", data=b"22")
    for flags in (NOREPLACE, EXCHANGE, NOREPLACE | EXCHANGE, 64):
        r.do(f"renameat2 {flags}", renameat2, "one", "two", flags)
        r.do(f"renameat2 new {flags}", renameat2, "one", f"three{flags}", flags)
        r.stat("one")
        r.stat("two")
    r.do("exchange file and dir", renameat2, "two", "d", EXCHANGE)
    r.do("exchange file and symlink", renameat2, "d", "l", EXCHANGE)
    r.do("unlink long", os.unlink, "long")
    r.tree()


def attributes(r):
    """Modes, owners, times, xattrs, ACLs."""
    r.touch("f", 0o600, b"x" * 5000)
    r.do("mkdir", os.mkdir, "d", 0o700)
    r.do("symlink", os.symlink, "f", "l")
    for mode in (0, 0o7777, 0o4755, 0o2755, 0o2644, 0o1777, 0o6711, 0o644):
        for path in ("f", "d"):
            r.do(f"chmod {mode:o} {path}", os.chmod, path, mode)
            r.stat(path)
    for who in ((0, 0), (USER, USER), (OTHER, -1), (-1, OTHER), (-1, -1), (os.geteuid(), -1)):
        for path in ("f", "d", "l"):
            r.do(f"chmod {path}", os.chmod, "f" if path == "l" else path, 0o6755)
            r.do(f"chown {who} {path}", os.chown, path, *who, follow_symlinks=False)
            r.stat(path)
    r.do("chmod back", os.chmod, "f", 0o6755)
    fd = r.fd("open", "f", os.O_RDWR)
    if fd is not None:
        r.do("write clears set-id", os.write, fd, b"y")
        r.stat("f")
        r.do("chmod", os.fchmod, fd, 0o6755)
        r.do("truncate clears set-id", os.ftruncate, fd, 100)
        r.stat("f")
        os.close(fd)
    r.do("chmod", os.chmod, "f", 0o644)
    for ns in ((1, 2), (10**18 + 123456789, 10**18 + 987654321), (2**33 * 10**9, 5), (-(10**9), -1)):
        for path in ("f", "d", "l"):
            r.do(f"utime {ns} {path}", os.utime, path, ns=ns, follow_symlinks=False)
            r.times(path)
    timespec = ctypes.c_long * 4
    now, omit = (1 << 30) - 1, (1 << 30) - 2
    for values in ((0, omit, 77, 7), (55, 5, 0, omit), (0, omit, 0, omit)):
        r.do(f"utimensat {values}", call, LIBC.utimensat, -100, b"f", timespec(*values), 0)
        r.times("f")
    r.moved_on("f", call, LIBC.utimensat, -100, b"f", timespec(0, now, 0, now), 0)
    r.moved_on("f", os.chmod, "f", 0o640)
    r.moved_on("f", os.truncate, "f", 50)
    r.moved_on("f", os.truncate, "f", 50)
    r.moved_on("d", os.mkdir, "d/x")
    r.moved_on("f", os.link, "f", "d/f")
    r.moved_on("d", os.rmdir, "d/x")
    r.moved_on("f", rename_there_and_back, "f", "g")
    r.moved_on("f", os.setxattr, "f", "user.t", b"")
    xattrs(r)


def rename_there_and_back(old, new):
    os.rename(old, new)
    os.rename(new, old)


def xattrs(r):
    for path in ("f", "d", "l"):
        for name in ("user.a", "user.", "trusted.a", "security.a", "system.a", "none.a", "user." + "n" * 250, "user." + "n" * 251):
            r.do(f"setxattr {path} {name}", os.setxattr, path, name, b"value", follow_symlinks=False)
            r.do(f"getxattr {path} {name}", os.getxattr, path, name, follow_symlinks=False)
        r.do("create", os.setxattr, path, "user.a", b"2", os.XATTR_CREATE, follow_symlinks=False)
        r.do("replace", os.setxattr, path, "user.a", b"", os.XATTR_REPLACE, follow_symlinks=False)
        r.do("replace none", os.setxattr, path, "user.b", b"", os.XATTR_REPLACE, follow_symlinks=False)
        r.do("big", os.setxattr, path, "user.big", b"b" * 3000, follow_symlinks=False)
        r.do("huge", os.setxattr, path, "user.huge", b"b" * 65537, follow_symlinks=False)
        r.do("list", lambda p=path: sorted(os.listxattr(p, follow_symlinks=False)))
        r.do("remove", os.removexattr, path, "user.a", follow_symlinks=False)
        r.do("remove again", os.removexattr, path, "user.a", follow_symlinks=False)
        r.do("list", lambda p=path: sorted(os.listxattr(p, follow_symlinks=False)))
    r.do("acl", os.setxattr, "f", "system.posix_acl_access", ACL_OTHER)
    r.do("get acl", os.getxattr, "f", "system.posix_acl_access")
    r.stat("f")
    r.do("chmod with acl", os.chmod, "f", 0o600)
    r.do("get acl", os.getxattr, "f", "system.posix_acl_access")
    r.do("bad acl", os.setxattr, "f", "system.posix_acl_access", b"\2\0\0\0bad")
    r.do("remove acl", os.removexattr, "f", "system.posix_acl_access")
    r.do("chmod setgid", os.chmod, "f", 0o2755)
    r.do("acl on setgid", os.setxattr, "f", "system.posix_acl_access", ACL_OTHER)
    r.stat("f")
    r.do("default acl on file", os.setxattr, "f", "system.posix_acl_default", ACL_USER)
    for path, mask in (("d/plain", 0o077), ("d/acl", 0o077), ("d/acl0", 0)):
        if path == "d/acl":
            r.do("default acl", os.setxattr, "d", "system.posix_acl_default", ACL_USER)
        old = os.umask(mask)
        r.touch(path + "-file", 0o666)
        r.do("mkdir", os.mkdir, path + "-dir", 0o777)
        r.do("fifo", os.mkfifo, path + "-fifo", 0o666)
        r.do("mknod", os.mknod, path + "-mknod", stat.S_IFREG | 0o666)
        os.umask(old)
        for kind in ("-file", "-dir", "-fifo", "-mknod"):
            r.stat(path + kind)
            for which in ("access", "default"):
                r.do(f"{which} of {path}{kind}", os.getxattr, path + kind, "system.posix_acl_" + which)
    r.tree()


def data(r):
    """Reading, writing, appending, holes, sizes, mmap, direct I/O, locks."""
    block = bytes(range(256)) * 64
    r.touch("f", data=block)
    fd = r.fd("rw", "f", os.O_RDWR)
    r.do("pwrite", os.pwrite, fd, b"middle", 5000)
    r.do("pwrite beyond", os.pwrite, fd, b"end", 1000001)
    r.do("pread", os.pread, fd, 100, 4990)
    r.do("pread hole", os.pread, fd, 100, 500000)
    r.do("pread end", os.pread, fd, 100, 1000000)
    r.do("pread beyond", os.pread, fd, 100, 2000000)
    for whence in (os.SEEK_DATA, os.SEEK_HOLE):
        for offset in (0, 5000, 16384, 20000, 1000003, 1000004, 2000000):
            r.do(f"seek {whence} {offset}", os.lseek, fd, offset, whence)
    r.do("seek end", os.lseek, fd, -1, os.SEEK_END)
    r.do("seek negative", os.lseek, fd, -1, os.SEEK_SET)
    for size in (1000, 0, 12345, 3 * 10**6, 8192):
        r.do(f"truncate {size}", os.ftruncate, fd, size)
        r.stat("f")
        r.content("f")
    r.do("truncate negative", os.ftruncate, fd, -1)
    for mode in (0, KEEP_SIZE, PUNCH_HOLE, PUNCH_HOLE | KEEP_SIZE, ZERO_RANGE, ZERO_RANGE | KEEP_SIZE):
        r.do(f"fill", os.pwrite, fd, block * 2, 0)
        for offset, length in ((4096, 8192), (100, 5000), (30000, 20000), (0, 0), (-1, 1), (60000, 4096)):
            r.do(f"fallocate {mode} {offset} {length}", fallocate, fd, mode, offset, length)
            r.stat("f")
        r.content("f")
        r.do("shrink", os.ftruncate, fd, 32768)
    r.do("fsync", os.fsync, fd)
    r.do("fdatasync", os.fdatasync, fd)
    os.close(fd)
    append(r)
    copies(r)
    mapped(r)
    direct(r)
    locks(r)
    unlinked(r)


def append(r):
    fd = r.fd("append", "f", os.O_WRONLY | os.O_APPEND)
    other = r.fd("append too", "f", os.O_WRONLY | os.O_APPEND)
    for i in range(10):
        r.do("write", os.write, fd if i % 2 else other, b"append %d" % i)
    r.do("pwrite appends", os.pwrite, fd, b"not at 0", 0)
    os.close(other)
    fcntl.fcntl(fd, fcntl.F_SETFL, 0)
    r.do("pwrite no more", os.pwrite, fd, b"at 0", 0)
    os.close(fd)
    r.content("f")
    for flags in (os.O_RDONLY, os.O_WRONLY, os.O_RDWR):
        fd = r.fd(f"flags {flags}", "f", flags)
        r.do("read", os.pread, fd, 10, 0)
        r.do("write", os.pwrite, fd, b"w", 0)
        r.do("truncate", os.ftruncate, fd, 30000)
        r.do("fallocate", fallocate, fd, 0, 0, 10)
        os.close(fd)
    for flags in (os.O_RDONLY, os.O_WRONLY):
        r.do("size", os.truncate, "f", 20000)
        fd = r.fd(f"O_TRUNC {flags}", "f", flags | os.O_TRUNC)
        if fd is not None:
            os.close(fd)
        r.stat("f")
    fd = r.fd("O_CREAT existing", "f", os.O_CREAT | os.O_RDWR | os.O_TRUNC, 0o600)
    os.close(fd)
    for name, flags in (("s", os.O_SYNC), ("ds", os.O_DSYNC)):
        fd = r.fd(name, "f", os.O_RDWR | flags)
        r.do("write", os.write, fd, b"sync")
        os.close(fd)
    fd = r.fd("write only, no read mode", "w", os.O_CREAT | os.O_WRONLY, 0o200)
    r.do("write", os.write, fd, b"secret")
    os.close(fd)
    fd = r.fd("created without any mode", "m", os.O_CREAT | os.O_RDWR, 0)
    r.do("write", os.write, fd, b"secret")
    r.do("read", os.pread, fd, 10, 0)
    os.close(fd)
    r.fd("open it again", "m", os.O_RDONLY) if os.geteuid() else None
    r.tree()


def copies(r):
    with open("src", "wb") as file:
        file.write(os.urandom(1) * 0 + bytes(range(251)) * 1000)
    fd = os.open("src", os.O_RDWR)
    out = os.open("dst", os.O_CREAT | os.O_RDWR)
    r.do("copy", os.copy_file_range, fd, out, 100000, 0, 50)
    r.do("copy beyond", os.copy_file_range, fd, out, 1000, 250900, 200000)
    r.do("copy at end", os.copy_file_range, fd, out, 1000, 300000, 0)
    r.do("copy within", os.copy_file_range, fd, fd, 1000, 0, 100000)
    r.do("copy overlapping", os.copy_file_range, fd, fd, 1000, 0, 500)
    read_only = os.open("dst", os.O_RDONLY)
    r.do("copy to read only", os.copy_file_range, fd, read_only, 10, 0, 0)
    os.close(read_only)
    os.close(fd)
    os.close(out)
    r.content("src")
    r.content("dst")
    r.stat("dst")


def mapped(r):
    fd = os.open("map", os.O_CREAT | os.O_RDWR)
    os.ftruncate(fd, 100000)
    for flags in (mmap.MAP_SHARED, mmap.MAP_PRIVATE):
        with mmap.mmap(fd, 100000, flags=flags) as m:
            r.note("mapped read", m[50000:50010])
            m[50000:50005] = b"store"
            os.pwrite(fd, b"write", 70000)
            r.note("mapped read", [m[50000:50010], m[70000:70005]])
            r.do("msync", m.flush)
            r.do("pread", os.pread, fd, 10, 50000)
    r.do("fsync", os.fsync, fd)
    os.close(fd)
    r.content("map")


def direct(r):
    buf = mmap.mmap(-1, 1 << 20)
    buf.write(bytes(range(256)) * 4096)
    fd = r.fd("O_DIRECT", "direct", os.O_CREAT | os.O_RDWR | os.O_DIRECT)
    if fd is None:
        return
    view = memoryview(buf)
    r.do("write", os.pwritev, fd, [view], 0)
    r.do("write 4096", os.pwritev, fd, [view[4096:8192]], 1 << 20)
    r.do("write odd length", os.pwritev, fd, [view[:1000]], 0)
    r.do("write odd offset", os.pwritev, fd, [view[:4096]], 100)
    r.do("read", os.preadv, fd, [view], 4096)
    r.do("read odd", os.preadv, fd, [view[:100]], 0)
    r.do("read odd offset", os.preadv, fd, [view[:4096]], 100)
    r.note("buffer", hash(bytes(view)))
    r.do("truncate", os.ftruncate, fd, 10000)
    r.do("read end", os.preadv, fd, [view[:8192]], 8192)
    r.note("end", bytes(view[:1808]))
    r.do("read past", os.preadv, fd, [view[:8192]], 12288)
    # what a short read leaves in the rest of the buffer is anybody's guess
    view[:8192] = b"z" * 8192
    view.release()
    os.close(fd)
    r.content("direct")
    fd = r.fd("O_DIRECT append", "direct", os.O_WRONLY | os.O_DIRECT | os.O_APPEND)
    os.ftruncate(fd, 8192)
    r.do("append", os.writev, fd, [memoryview(buf)[:4096]])
    r.do("append", os.writev, fd, [memoryview(buf)[4096:8192]])
    os.close(fd)
    r.content("direct")
    fd = r.fd("O_DIRECT O_SYNC", "direct", os.O_WRONLY | os.O_DIRECT | os.O_SYNC | os.O_TRUNC)
    r.do("write", os.writev, fd, [memoryview(buf)[:8192]])
    os.close(fd)
    r.content("direct")


def locks(r):
    a, b = os.open("src", os.O_RDWR), os.open("src", os.O_RDWR)
    for kind in (fcntl.LOCK_EX, fcntl.LOCK_SH, fcntl.LOCK_UN):
        r.do(f"flock {kind}", fcntl.flock, a, kind | fcntl.LOCK_NB)
        r.do(f"flock other {kind}", fcntl.flock, b, fcntl.LOCK_EX | fcntl.LOCK_NB)
        r.do("unlock", fcntl.flock, b, fcntl.LOCK_UN)
    lock = fcntl.F_OFD_SETLK if hasattr(fcntl, "F_OFD_SETLK") else 37
    import struct

    for fd in (a, b):
        r.do("ofd lock", fcntl.fcntl, fd, lock, struct.pack("hhqqi4x", fcntl.F_WRLCK, 0, 0, 10, 0))
    r.do("posix lock", fcntl.lockf, a, fcntl.LOCK_EX | fcntl.LOCK_NB, 10, 100)
    pid = os.fork()
    if pid == 0:
        try:
            fcntl.lockf(b, fcntl.LOCK_EX | fcntl.LOCK_NB, 10, 105)
        except OSError as error:
            os._exit(error.errno)
        os._exit(0)
    r.note("posix lock by a child", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    os.close(a)
    os.close(b)


def unlinked(r):
    fd = os.open("gone", os.O_CREAT | os.O_RDWR)
    os.write(fd, b"still here")
    r.do("unlink", os.unlink, "gone")
    r.do("read", os.pread, fd, 20, 0)
    r.do("write", os.pwrite, fd, b"more", 10)
    r.do("truncate", os.ftruncate, fd, 3)
    r.do("chmod", os.fchmod, fd, 0o600)
    r.note("nlink", os.fstat(fd).st_nlink)
    r.note("size", os.fstat(fd).st_size)
    r.do("link back", os.link, f"/proc/self/fd/{fd}", "back")
    os.close(fd)
    os.mkdir("gd")
    fd = os.open("gd", os.O_RDONLY)
    os.rmdir("gd")
    r.do("list removed", os.listdir, fd)
    r.do("create in removed", os.open, "x", os.O_CREAT | os.O_WRONLY, dir_fd=fd)
    r.do("fsync removed", os.fsync, fd)
    os.close(fd)


def directories(r):
    """Listing big directories, also while they change; seeking in them."""
    os.mkdir("big")
    for i in range(3000):
        os.close(os.open(f"big/file-{i:05d}", os.O_CREAT | os.O_WRONLY))
    r.note("big", sorted(os.listdir("big")))
    r.note("types", sorted({entry.is_file(follow_symlinks=False) for entry in os.scandir("big")}))
    with os.scandir("big") as entries:
        seen = []
        for entry in entries:
            seen.append(entry.name)
            os.unlink(os.path.join("big", entry.name))
    r.note("removed while listing", sorted(seen))
    r.note("left", os.listdir("big"))
    for i in range(500):
        os.mkdir(f"big/d{i}")
    r.note("offsets are good for seekdir", seek_everywhere("big"))
    r.stat("big")
    shutil.rmtree("big")
    fd = os.open(".", os.O_RDONLY)
    r.do("fsync", os.fsync, fd)
    r.do("fdatasync", os.fdatasync, fd)
    r.do("read directory", os.read, fd, 10)
    r.do("ioctl", fcntl.ioctl, fd, 0x12345678)
    os.close(fd)


def seek_everywhere(path):
    """telldir before each entry, then seekdir to some of them: the same entries?"""
    LIBC.opendir.restype = ctypes.c_void_p
    LIBC.readdir.restype = ctypes.c_void_p
    LIBC.telldir.restype = ctypes.c_long
    directory = ctypes.c_void_p(LIBC.opendir(path.encode()))
    at = []
    while True:
        where = LIBC.telldir(directory)
        entry = LIBC.readdir(directory)
        if not entry:
            break
        at.append((where, ctypes.string_at(entry + 19)))
    same = True
    for where, name in at[::-7]:
        LIBC.seekdir(directory, ctypes.c_long(where))
        same = same and ctypes.string_at(LIBC.readdir(directory) + 19) == name
    LIBC.rewinddir(directory)
    same = same and ctypes.string_at(LIBC.readdir(directory) + 19) == at[0][1]
    LIBC.closedir(directory)
    return [len(at), len({name for _, name in at}), same]


def shared_rules(r):
    """What an ordinary user may do with what root prepared (see prepare())."""
    for path in ("sticky/roots", "sticky/users", "closed/x", "group/file", "read"):
        r.fd(f"read {path}", path, os.O_RDONLY)
        r.fd(f"write {path}", path, os.O_WRONLY)
        r.do(f"truncate {path}", os.truncate, path, 0)
        r.do(f"chmod {path}", os.chmod, path, 0o4777)
        r.do(f"chown {path}", os.chown, path, os.geteuid(), -1)
        r.do(f"utime {path}", os.utime, path, (1, 1))
        r.do(f"touch {path}", os.utime, path)
        r.do(f"setxattr {path}", os.setxattr, path, "user.x", b"")
        r.do(f"link {path}", os.link, path, "open/link-" + path.replace("/", "-"))
        r.do(f"rename {path}", os.rename, path, path + "2")
        r.do(f"rename back {path}", os.rename, path + "2", path)
        r.do(f"exchange {path}", renameat2, path, "open/mine", EXCHANGE)
        r.do(f"unlink {path}", os.unlink, path)
        r.do(f"access {path}", os.access, path, os.W_OK)
    for directory in ("sticky", "closed", "setgid", "open", "group", "acl"):
        r.touch(directory + "/new", 0o6777)
        r.do(f"mkdir {directory}", os.mkdir, directory + "/newdir", 0o2777)
        r.do(f"symlink {directory}", os.symlink, "x", directory + "/newlink")
        r.do(f"fifo {directory}", os.mkfifo, directory + "/newfifo")
        r.do(f"mknod {directory}", os.mknod, directory + "/newdev", stat.S_IFCHR, os.makedev(1, 3))
        r.do(f"chmod setgid {directory}", os.chmod, directory + "/new", 0o6755)
        r.do(f"stranger's group {directory}", os.chown, directory + "/new", -1, OTHER)
        r.do(f"give away {directory}", os.chown, directory + "/new", OTHER, -1)
        for name in ("new", "newdir", "newlink", "newfifo"):
            r.stat(f"{directory}/{name}")
        r.do(f"list {directory}", lambda d=directory: sorted(os.listdir(d)))
    for path in ("suid", "sgid"):
        fd = r.fd(f"open {path}", path, os.O_WRONLY)
        if fd is not None:
            r.do("write clears", os.write, fd, b"x")
            os.close(fd)
        r.stat(path)
    fd = r.fd("open suid direct", "suid-direct", os.O_WRONLY | os.O_DIRECT)
    if fd is not None:
        r.do("write clears", os.writev, fd, [mmap.mmap(-1, 4096)])
        os.close(fd)
    r.stat("suid-direct")
    fd = r.fd("O_TRUNC suid", "suid-trunc", os.O_WRONLY | os.O_TRUNC)
    if fd is not None:
        os.close(fd)
    r.stat("suid-trunc")
    r.stat("trusted")
    r.do("list trusted", os.listxattr, "trusted")
    r.do("get trusted", os.getxattr, "trusted", "trusted.t")
    r.tree("open")


def prepare(top):
    """What shared_rules() finds."""
    for name, mode in (("sticky", 0o1777), ("closed", 0o755), ("setgid", 0o2777), ("open", 0o777), ("group", 0o2770), ("acl", 0o700)):
        os.mkdir(f"{top}/{name}")
        os.chmod(f"{top}/{name}", mode)
    os.chown(f"{top}/setgid", 0, OTHER)
    os.chown(f"{top}/group", 0, USER)
    os.setxattr(f"{top}/acl", "system.posix_acl_access", ACL_USER)
    os.setxattr(f"{top}/acl", "system.posix_acl_default", ACL_USER)
    for name, mode, owner in (
        ("sticky/roots", 0o666, 0),
        ("sticky/users", 0o644, USER),
        ("closed/x", 0o666, 0),
        ("group/file", 0o660, 0),
        ("read", 0o444, 0),
        ("open/mine", 0o644, USER),
        ("suid", 0o6777, 0),
        ("sgid", 0o2767, OTHER),
        ("suid-direct", 0o6777, 0),
        ("suid-trunc", 0o6777, 0),
        ("trusted", 0o666, 0),
    ):
        with open(f"{top}/{name}", "wb") as file:
            file.write(b"prepared")
        os.chown(f"{top}/{name}", owner, owner)
        os.chmod(f"{top}/{name}", mode)
    os.setxattr(f"{top}/trusted", "trusted.t", b"t")
    os.setxattr(f"{top}/trusted", "user.u", b"u")


GROUPS = {
    "names": names,
    "attributes": attributes,
    "data": data,
    "directories": directories,
    "rules": shared_rules,
}


def perform(directory, group, uid):
    """Runs one group in DIRECTORY as UID, in a child; returns its notes."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        r = Recorder()
        try:
            os.chdir(directory)
            os.umask(0o022)
            if uid:
                os.setgroups([])
                os.setresgid(uid, uid, uid)
                os.setresuid(uid, uid, uid)
            GROUPS[group](r)
        except Exception as error:  # the other side must then fail in the same place
            r.note("stopped", f"{type(error).__name__} {error}")
        with os.fdopen(write, "w") as out:
            out.write(repr(r.notes))
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as source:
        text = source.read()
    os.waitpid(pid, 0)
    return eval(text)  # our own child's repr


def compare(plain, mounted):
    """Prints the differences of two lists of notes; returns their number."""
    differences = 0
    for i, (a, b) in enumerate(zip(plain, mounted)):
        if a != b:
            differences += 1
            if differences <= 20:
                print(f"  DIFFERS {i}: {a[0]!r}\n    plain:    {a[1]}\n    fleecefs: {b[0]!r} {b[1]}")
    if len(plain) != len(mounted):
        differences += 1
        print(f"  DIFFERS: {len(plain)} results on the plain directory, {len(mounted)} on the mount")
    return differences


def run(fleecefs, top, extra):
    """All groups on a plain directory and on a mount. Returns the number of differences."""
    for name in ("plain", "source", "mnt", "fleece"):
        os.mkdir(f"{top}/{name}")
        os.chmod(f"{top}/{name}", 0o755)
    subprocess.run(
        [fleecefs, f"{top}/source", f"{top}/mnt", f"--fleece-dir={top}/fleece", "-o", "allow_other", *extra],
        check=True,
        stdin=subprocess.DEVNULL,
    )
    differences = 0
    try:
        for uid in (0, USER):
            for group in GROUPS:
                where = f"{group}-{uid}"
                notes = []
                for side in ("plain", "mnt"):
                    base = f"{top}/{'source' if side == 'mnt' else side}/{where}"
                    os.mkdir(base)
                    os.chmod(base, 0o755)
                    if group == "rules":
                        prepare(base)
                    else:
                        os.chown(base, uid, uid)
                    notes.append(perform(f"{top}/{side}/{where}", group, uid))
                found = compare(*notes)
                stopped = [value for what, value in notes[0] if what == "stopped"]
                if stopped:
                    print(f"  the operations stopped early: {stopped[0]}")
                    found += 1
                differences += found
                who = "root" if uid == 0 else "an ordinary user"
                print(f"{group} as {who}: {len(notes[0])} results compared, {found} differ")
    finally:
        subprocess.run(["umount", f"{top}/mnt"], check=False)
    return differences


def main():
    if len(sys.argv) < 2:
        print(f"usage: {sys.argv[0]} FLEECEFS [option...]", file=sys.stderr)
        return 2
    if os.geteuid() != 0:
        print("SKIP: needs root, to mount and to become other users")
        return 77
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR))
    except OSError as error:
        print(f"SKIP: /dev/fuse cannot be opened here: {error.strerror}")
        return 77
    sys.stdout.reconfigure(line_buffering=True)
    # as in lib.sh: other tests' namespaces are not to hold what is mounted here
    if LIBC.unshare(NEW_NAMESPACE) == 0:
        LIBC.mount(None, b"/", None, ctypes.c_ulong(MS_REC | MS_PRIVATE), None)
    top = tempfile.mkdtemp(prefix="fleecefs-posix.", dir=os.environ.get("TMPDIR", "/var/tmp"))
    os.chmod(top, 0o755)
    try:
        differences = run(os.path.realpath(sys.argv[1]), top, sys.argv[2:])
    finally:
        time.sleep(0.2)
        shutil.rmtree(top, ignore_errors=True)
    print(f"{differences} differences")
    return 1 if differences else 0


if __name__ == "__main__":
    sys.exit(main())
