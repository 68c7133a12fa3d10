#!/usr/bin/env python3
"""changes.py MOUNT MODEL: changes disks in MOUNT in every way there is, around two snapshots, and
compares the frozen files with copies kept in MODEL/first and MODEL/second; MODEL/live is what the
live tree must be at the end (the same calls on plain files)."""

import ctypes
import errno
import mmap
import os
import random
import shutil
import sys

SIZE = 700_001
KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE = 1, 2, 16
RENAME_EXCHANGE = 2
AT_FDCWD = -100
libc = ctypes.CDLL(None, use_errno=True)


def checked(result):
    if result:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def fallocate(path, mode, off, length):
    fd = os.open(path, os.O_RDWR)
    try:
        checked(libc.fallocate(fd, mode, ctypes.c_long(off), ctypes.c_long(length)))
    finally:
        os.close(fd)


def write(path, rng, flags=0):
    fd = os.open(path, os.O_RDWR | flags)
    for off in (0, 5000, 65_536, 262_143, SIZE - 10, SIZE + 100_000):
        os.pwrite(fd, rng.randbytes(rng.randrange(1, 80_000)), off)
    os.close(fd)


def write_direct(path, rng):
    fd = os.open(path, os.O_RDWR | os.O_DIRECT)
    with mmap.mmap(-1, 16384) as aligned:
        for off in (0, 16384, 65_536, 262_144):
            aligned[:] = rng.randbytes(16384)
            os.pwrite(fd, aligned, off)
    os.close(fd)


def append(path, rng):
    fd = os.open(path, os.O_WRONLY | os.O_APPEND)
    for _ in range(5):
        os.write(fd, rng.randbytes(rng.randrange(1, 9000)))
    os.close(fd)


def open_trunc(path, rng):
    fd = os.open(path, os.O_RDWR | os.O_TRUNC)
    os.write(fd, rng.randbytes(12_345))
    os.close(fd)


def truncate_down(path, rng):
    os.truncate(path, 100_001)
    os.truncate(path, 0)
    os.truncate(path, 50_000)


def truncate_up(path, rng):
    os.truncate(path, SIZE + 400_000)
    fd = os.open(path, os.O_RDWR)
    os.pwrite(fd, rng.randbytes(5000), SIZE + 200_000)
    os.close(fd)


def punch(path, rng):
    for off, length in ((0, 4096), (10_000, 30_001), (65_536, 131_072), (SIZE - 3000, 9000)):
        fallocate(path, KEEP_SIZE | PUNCH_HOLE, off, length)


def zero_range(path, rng):
    fallocate(path, KEEP_SIZE | ZERO_RANGE, 20_001, 99_999)
    fallocate(path, ZERO_RANGE, SIZE - 5000, 50_000)


def allocate(path, rng):
    fallocate(path, 0, SIZE, 100_000)
    fallocate(path, KEEP_SIZE, 0, SIZE + 300_000)


def copy_range(path, rng):
    fd = os.open(path, os.O_RDWR)
    source = os.open(os.path.join(os.path.dirname(path), "donor.img"), os.O_RDONLY)
    for src_off, off, length in ((0, 4096, 8192), (777, 100_000, 150_000), (5, SIZE - 7, 20_000)):
        while length:
            n = os.copy_file_range(source, fd, length, src_off, off)
            assert n > 0
            src_off, off, length = src_off + n, off + n, length - n
    n = os.copy_file_range(fd, fd, 50_000, 0, 400_000)
    assert n > 0
    os.close(source)
    os.close(fd)


def mmap_write(path, rng):
    data = [(off, rng.randbytes(3000)) for off in (0, 4095, 200_000, SIZE - 3000)]
    fd = os.open(path, os.O_RDWR)
    try:
        with mmap.mmap(fd, 0, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE) as shared:
            for off, chunk in data:
                shared[off:off + len(chunk)] = chunk
            shared.flush()
    except OSError as e:
        if e.errno != errno.ENODEV:
            raise
        print("note: this kernel maps no live file shared and writable")
        for off, chunk in data:
            os.pwrite(fd, chunk, off)
    os.close(fd)


def mmap_write_closed(path, rng):
    """As above, but the mapping alone keeps the file open, and its end writes it back."""
    data = rng.randbytes(5000)
    fd = os.open(path, os.O_RDWR)
    try:
        shared = mmap.mmap(fd, 0, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
    except OSError as e:
        if e.errno != errno.ENODEV:
            raise
        os.pwrite(fd, data, 300_000)
        os.close(fd)
        return
    os.close(fd)
    shared[300_000:305_000] = data
    shared.close()
    with open(path, "rb") as f:
        os.fsync(f.fileno())


def unlink(path, rng):
    os.unlink(path)


def unlink_open(path, rng):
    """Unlinked while open, and written to after that."""
    fd = os.open(path, os.O_RDWR)
    os.unlink(path)
    os.pwrite(fd, rng.randbytes(100_000), 30_000)
    os.close(fd)


def rename_over(path, rng):
    fresh = path + ".new"
    with open(fresh, "wb") as f:
        f.write(rng.randbytes(5000))
    os.rename(fresh, path)


def rename_away(path, rng):
    moved = os.path.join(os.path.dirname(path), "elsewhere")
    os.makedirs(moved, exist_ok=True)
    target = os.path.join(moved, f"moved-{rng.randrange(10**9)}.img")
    os.rename(path, target)
    write(target, rng)


def hard_link(path, rng):
    other = f"{path}.{rng.randrange(10**9)}"
    os.link(path, other)
    write(other, rng)
    os.unlink(path)


def exchange(path, rng):
    other = path.replace("-a.img", "-b.img")
    if not os.path.exists(other):
        return
    checked(libc.renameat2(AT_FDCWD, path.encode(), AT_FDCWD, other.encode(), RENAME_EXCHANGE))
    write(path, rng)
    append(other, rng)


def nothing(path, rng):
    pass


WAYS = {
    "write": write, "write-direct": write_direct, "append": append, "open-trunc": open_trunc,
    "truncate-down": truncate_down, "truncate-up": truncate_up, "punch": punch,
    "zero-range": zero_range, "allocate": allocate, "copy-range": copy_range,
    "mmap-write": mmap_write, "mmap-write-closed": mmap_write_closed, "unlink": unlink,
    "unlink-open": unlink_open, "rename-over": rename_over, "rename-away": rename_away,
    "hard-link": hard_link, "exchange-a": exchange, "exchange-b": nothing, "donor": nothing,
}


def read(path):
    with open(path, "rb") as f:
        return f.read()


def compare(want, got):
    want_names = {os.path.relpath(os.path.join(w, n), want) for w, _, f in os.walk(want) for n in f}
    got_names = {os.path.relpath(os.path.join(w, n), got) for w, _, f in os.walk(got) for n in f}
    got_names = {n for n in got_names if not n.startswith("snapshots/")}
    assert want_names == got_names, f"{got}: names differ: {want_names ^ got_names}"
    for name in sorted(want_names):
        a, b = read(os.path.join(want, name)), read(os.path.join(got, name))
        if a != b:
            at = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
            raise AssertionError(f"{got}/{name}: differs at byte {at} ({len(a)}, {len(b)} bytes)")


def run(live, model):
    rng = random.Random(11)
    os.makedirs(model)
    plain = os.path.join(model, "live")
    os.mkdir(plain)
    for name in WAYS:
        data = rng.randbytes(SIZE)
        for root in (live, plain):
            with open(os.path.join(root, name + ".img"), "wb") as f:
                f.write(data)
    frozen = {}
    for round_number, snap in enumerate(("first", "second")):
        os.mkdir(os.path.join(live, "snapshots", snap))
        frozen[snap] = os.path.join(model, snap)
        shutil.copytree(plain, frozen[snap])
        for name, way in WAYS.items():
            for root in (live, plain):
                path = os.path.join(root, name + ".img")
                if os.path.exists(path):
                    way(path, random.Random(f"{name} {round_number}"))
            for made, want in frozen.items():
                compare_one = os.path.join(want, name + ".img")
                if os.path.exists(compare_one):
                    got = os.path.join(live, "snapshots", made, name + ".img")
                    assert read(compare_one) == read(got), f"{name} shows in snapshot {made}"
        compare(plain, live)
    for made, want in frozen.items():
        compare(want, os.path.join(live, "snapshots", made))
    print(f"{len(WAYS)} ways of changing a disk, two snapshots: all frozen bytes are right")


if __name__ == "__main__":
    try:
        run(sys.argv[1], sys.argv[2])
    except AssertionError as error:
        sys.exit(f"FAIL: {error}")
