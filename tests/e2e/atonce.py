#!/usr/bin/env python3
"""Everything at once on one disk: see atonce.sh.

    atonce.py make FILE                        the disk
    atonce.py run MOUNT STATE SECONDS SEED
    atonce.py check MOUNT STATE

Writers each have a part of the disk; a freeze waits until none is in a write, so what each snapshot
must hold is known. Beside them snapshots are made, read through the page cache and past it, made
checkpoints, given up in parts, dropped, and compared with each other. Those that are left at the end
are told of in STATE, which "check" compares with what there is.
"""

import ctypes
import errno
import hashlib
import json
import os
import random
import subprocess
import sys
import threading
import time
import traceback

LIBC = ctypes.CDLL(None, use_errno=True)
PUNCH = 3
PAGE = 4096
SIZE = 12 * 1048576 + 777
PAGES = (SIZE + PAGE - 1) // PAGE
WRITERS, SNAPSHOTS = 3, 5


class Snapshot:
    """GONE: pages that were given up. MAYBE: and those that are about to be."""

    def __init__(self, number):
        self.number, self.name = number, f"s{number}"
        self.data, self.gone, self.maybe = b"", set(), set()
        self.checkpoint = self.maybe_checkpoint = self.dropped = False


class World:
    """All that the threads share."""

    def __init__(self, mount, scratch):
        self.scratch = scratch
        self.disk, self.snaps = f"{mount}/disk", f"{mount}/snapshots"
        with open(self.disk, "rb") as f:
            self.live = bytearray(f.read())
        self.ended = threading.Event()
        self.lock = threading.Lock()  # list and counts
        self.gates = [threading.Lock() for _ in range(WRITERS)]
        self.list, self.counts = [], {}

    def count(self, what):
        with self.lock:
            self.counts[what] = self.counts.get(what, 0) + 1

    def pick(self, rng):
        with self.lock:
            return rng.choice(self.list) if self.list else None

    def path(self, snap, *rest):
        return "/".join((self.snaps, snap.name) + rest)


def writer(w, rng, number):
    begin, end = SIZE * number // WRITERS // PAGE * PAGE, SIZE * (number + 1) // WRITERS // PAGE * PAGE
    end = SIZE if number == WRITERS - 1 else end
    fd = os.open(w.disk, os.O_RDWR)
    while not w.ended.is_set():
        with w.gates[number]:
            for _ in range(20):
                off = rng.randrange(begin, end)
                off -= off % PAGE if rng.random() < 0.6 else 0
                size = min(end - off, rng.choice((100, PAGE, 2 * PAGE, 70000)))
                data = bytes(size) if rng.random() < 0.1 else rng.randbytes(size)
                assert os.pwrite(fd, data, off) == size
                w.live[off : off + size] = data
        w.count("writes")
        time.sleep(0.002)
    os.close(fd)


def freezer(w, rng, _):
    number = 0
    while not w.ended.is_set():
        if len(w.list) < SNAPSHOTS:
            number += 1
            snap = Snapshot(number)
            for gate in w.gates:
                gate.acquire()
            os.mkdir(w.path(snap))
            snap.data = bytes(w.live)
            for gate in w.gates:
                gate.release()
            with w.lock:
                w.list.append(snap)
            w.count("freezes")
        time.sleep(rng.random() * 0.2)


def give_up(w, rng, snap):
    first = rng.randrange(PAGES)
    count = rng.choice((1, 75, rng.randrange(1, PAGES)))
    snap.maybe |= set(range(first, min(first + count, PAGES)))
    os.setxattr(w.path(snap, "disk"), "user.fleecefs.consume", b"1")
    fd = os.open(w.path(snap, "disk"), os.O_WRONLY)
    try:
        if LIBC.fallocate64(fd, PUNCH, ctypes.c_long(first * PAGE), ctypes.c_long(count * PAGE)):
            raise OSError(ctypes.get_errno(), "fallocate")
    finally:
        os.close(fd)
    snap.gone |= set(range(first, min(first + count, PAGES)))


def drop(w, snap):
    with w.lock:
        if snap.dropped:
            return
        snap.dropped = True
    try:
        os.rmdir(w.path(snap))
    except OSError:
        snap.dropped = False
        raise
    with w.lock:
        w.list.remove(snap)


def changer(w, rng, _):
    """Of snapshots. One that is read is busy; another changer may have been there before."""
    while not w.ended.is_set():
        time.sleep(rng.random() * 0.15)
        snap = w.pick(rng)
        what = rng.choice(("drops", "drops", "checkpoints", "holes", "holes"))
        try:
            if not snap:
                continue
            if what == "drops":
                drop(w, snap)
            elif what == "holes":
                give_up(w, rng, snap)
            else:
                snap.maybe_checkpoint = True
                os.setxattr(w.path(snap), "user.fleecefs.checkpoint", b"1")
                snap.checkpoint = True
            w.count(what)
        except OSError as e:
            fine = {errno.EBUSY} | ({errno.ENOENT, errno.ESTALE} if snap.dropped else set())
            if e.errno not in fine | ({errno.EIO} if snap.maybe_checkpoint else set()):
                raise


def read_some(w, rng, snap, fd):
    for _ in range(rng.randrange(1, 40)):
        off = rng.randrange(PAGES) * PAGE
        size = min(SIZE - off, rng.choice((PAGE, 65536, 1 << 20)))
        pages = set(range(off // PAGE, (off + size + PAGE - 1) // PAGE))
        try:
            got = os.pread(fd, (size + PAGE - 1) // PAGE * PAGE, off)
        except OSError as e:
            assert e.errno == errno.EIO and pages & snap.maybe, (snap.name, off, size, e)
            w.count("errors")
            continue
        assert got == snap.data[off : off + len(got)], f"{snap.name}: wrong data in {len(got)} bytes at {off}"
        assert len(got) == size or pages & snap.maybe, f"{snap.name}: {len(got)} of {size} bytes at {off}"
        w.count("reads")


def reader(w, rng, _):
    while not w.ended.is_set():
        snap = w.pick(rng)
        if not snap:
            time.sleep(0.01)
            continue
        try:
            fd = os.open(w.path(snap, "disk"), os.O_RDONLY | rng.choice((0, os.O_DIRECT)))
        except OSError as e:
            if not (e.errno == errno.EIO and snap.maybe_checkpoint) and not snap.dropped:
                raise
            continue
        try:
            read_some(w, rng, snap, fd)
        finally:
            os.close(fd)


def comparer(w, rng, _):
    """An increment, on the bytes of the older snapshot, makes those of the newer one."""
    inc, old, new = (os.path.join(w.scratch, name) for name in ("inc", "old", "new"))
    while not w.ended.is_set():
        a, b = w.pick(rng), w.pick(rng)
        if not a or a.number >= b.number:
            time.sleep(0.01)
            continue
        try:
            with open(w.path(b, ".since", a.name, "disk.qcow2"), "rb") as f:
                data = f.read()
        except OSError:
            if not (a.dropped or b.dropped or b.maybe or b.maybe_checkpoint):
                raise
            continue
        for name, content in (inc, data), (old, a.data):
            with open(name, "wb") as f:
                f.write(content)
        subprocess.run(["qemu-img", "rebase", "-u", "-b", old, "-F", "raw", inc], check=True)
        subprocess.run(["qemu-img", "convert", "-O", "raw", inc, new], check=True)
        with open(new, "rb") as f:
            assert f.read()[:SIZE] == b.data, f"{b.name} since {a.name} is wrong"
        w.count("increments")


def view_sum(path, gone):
    """Of all that was not given up; the rest is an error."""
    total = hashlib.blake2b()
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    for page in range(PAGES):
        try:
            data = os.pread(fd, PAGE, page * PAGE)
        except OSError:
            assert page in gone, f"{path}: page {page} is lost"
            continue
        assert page not in gone, f"{path}: page {page}, which was given up, can be read"
        total.update(data)
    os.close(fd)
    return total.hexdigest()


def want_sum(snap):
    """The same, of what must be there."""
    total = hashlib.blake2b()
    for page in range(PAGES):
        if page not in snap.gone:
            total.update(snap.data[page * PAGE : (page + 1) * PAGE])
    return total.hexdigest()


def run(mount, state, seconds, seed):
    w = World(mount, os.path.dirname(state))
    failed = []

    def guarded(work, rng, number):
        try:
            work(w, rng, number)
        except BaseException:  # a thread that ends must not be overlooked, whatever it was
            failed.append(traceback.format_exc())
            w.ended.set()

    jobs = [(writer, WRITERS), (freezer, 1), (changer, 2), (reader, 3), (comparer, 1)]
    threads = [
        threading.Thread(target=guarded, args=(work, random.Random(f"{seed} {work.__name__} {i}"), i))
        for work, many in jobs
        for i in range(many)
    ]
    for t in threads:
        t.start()
    w.ended.wait(seconds)
    w.ended.set()
    for t in threads:
        t.join()
    if failed:
        sys.exit("".join(failed))
    print(w.counts)
    with open(w.disk, "rb") as f:
        assert f.read() == w.live, "the live disk is wrong"
    left = {s.name: {"checkpoint": s.checkpoint, "gone": sorted(s.gone), "sum": want_sum(s)} for s in w.list}
    with open(state, "w", encoding="utf-8") as f:
        json.dump(left, f)
    for what in "writes", "freezes", "drops", "checkpoints", "holes", "reads", "errors", "increments":
        assert w.counts.get(what), f"there were no {what}"


def check(mount, state):
    with open(state, encoding="utf-8") as f:
        left = json.load(f)
    assert sorted(os.listdir(f"{mount}/snapshots")) == sorted(left)
    for name, want in left.items():
        top = f"{mount}/snapshots/{name}"
        now = os.getxattr(top, "user.fleecefs.state").decode()
        assert now == ("checkpoint" if want["checkpoint"] else "ok"), f"{name} is {now}"
        if not want["checkpoint"]:
            assert view_sum(f"{top}/disk", set(want["gone"])) == want["sum"], f"{name} is wrong"


def make(path):
    with open(path, "wb") as f:
        f.write(os.urandom(SIZE))


def main():
    what, args = sys.argv[1], sys.argv[2:]
    if what == "run":
        run(args[0], args[1], float(args[2]), args[3])
    else:
        {"make": make, "check": check}[what](*args)


if __name__ == "__main__":
    main()
