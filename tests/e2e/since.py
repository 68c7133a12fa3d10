#!/usr/bin/env python3
"""Random life of some disks, with incremental copies of each snapshot: every copy is the frozen disk.

    since.py FLEECEFS DIR [--seed N] [--nights N]

Each night something happens to the disks (writes, also through mappings, copied ranges, zeros,
holes, growing, shrinking, renaming, exchanging, replacing, deleting, new ones, hard links, writes
of what is there already), then a snapshot is made, and copied twice, as increments to some older
one that is still there, while a thread goes on writing: both copies have the same bytes. Old
snapshots are dropped, or made checkpoints, at random, the daemon is killed or mounted anew, with
another cluster size; then copies that can be made once more come out the same again. In the end
qemu-img reads each copy of each disk as that was frozen; what the copies have allocated are
clusters that were touched, and all that differ.
"""

import argparse
import collections
import ctypes
import filecmp
import json
import mmap
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time

MOST = 3 << 20


def run(*command):
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120)
    if done.returncode:
        raise SystemExit(f"FAIL: {' '.join(map(str, command))}: status {done.returncode}\n{done.stdout}")
    return done.stdout


def copy_uncached(source, target):
    """A copy that asks past the kernel's cache, so that what is read is made again."""
    fd = os.open(source, os.O_RDONLY | os.O_DIRECT)
    buffer = mmap.mmap(-1, 1 << 20)
    try:
        with open(target, "wb") as out:
            while n := os.readv(fd, [buffer]):
                out.write(buffer[:n])
    finally:
        os.close(fd)


class Disk:
    """A file as it should be, and what was touched since each snapshot, as a set of clusters."""

    def __init__(self, number):
        self.number = number
        self.data = bytearray()
        self.shortest = {}  # by snapshot: the least size since
        self.touched = {}  # by snapshot: set of (first, end) in bytes

    def touch(self, first, end):
        for ranges in self.touched.values():
            ranges.append((first, end))

    def sized(self):
        for name in self.shortest:
            self.shortest[name] = min(self.shortest[name], len(self.data))


class Life:
    def __init__(self, fleecefs, directory, seed):
        self.rng = random.Random(seed)
        self.fleecefs = fleecefs
        self.dir = directory
        self.src, self.mnt, self.fleece, self.copies = (os.path.join(directory, n) for n in ("source", "mnt", "fleece", "copies"))
        for path in (self.src, self.mnt, self.fleece, self.copies):
            os.makedirs(path, exist_ok=True)
        self.disks = {}  # path: Disk
        self.frozen = {}  # snapshot: {path: (Disk, bytes)}
        self.base = {}  # snapshot: the one its copy is an increment to, "-"
        self.alive = []
        self.given_up = set()  # snapshots of which not all can be read
        self.numbers = 0
        self.daemon = None
        self.counts = collections.Counter()

    # --- the daemon ---
    def mount(self):
        size = self.rng.choice(("4K", "4K", "8K", "64K"))
        self.daemon = subprocess.Popen([self.fleecefs, self.src, self.mnt, "--fleece-dir=" + self.fleece, "--cluster-size=" + size, "-f"], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=open(os.path.join(self.dir, "log"), "a"))
        for _ in range(600):
            if os.path.ismount(self.mnt):
                return
            if self.daemon.poll() is not None:
                break
            time.sleep(0.05)
        raise SystemExit("FAIL: no mount: " + open(os.path.join(self.dir, "log")).read())

    def unmount(self, kill):
        if kill:
            self.daemon.send_signal(signal.SIGKILL)
            self.daemon.wait()
            subprocess.run(["umount", "-l", self.mnt], check=True)
        else:
            subprocess.run(["umount", self.mnt], check=True)
            self.daemon.wait(timeout=120)

    # --- changes ---
    def path(self, name):
        return os.path.join(self.mnt, name)

    def new_name(self):
        self.numbers += 1
        directory = self.rng.choice(("", "", "sub/", "sub/deep er/"))
        os.makedirs(self.path(directory), exist_ok=True)
        return directory + self.rng.choice(("disk%d", "d%d.qcow2", "r\u00e4w %d.img")) % self.numbers

    def create(self):
        name = self.new_name()
        disk = Disk(self.numbers)
        disk.data = bytearray(self.rng.choice((0, 1, 511, 4096, 100001, self.rng.randrange(MOST))))
        with open(self.path(name), "wb") as f:
            f.truncate(len(disk.data))
        self.disks[name] = disk

    def write(self, name, disk, rng):
        size = len(disk.data)
        off = rng.randrange(size + 1)
        n = rng.choice((1, 512, 4096, rng.randrange(1, 50000), rng.randrange(1, 400000)))
        if rng.random() < 0.9 or off + n > MOST:
            n = min(n, size - off)
        if not n:
            return
        what = rng.random()
        if what < 0.15:
            new = bytes(n)
        elif what < 0.3:
            new = bytes(disk.data[off : off + n]).ljust(n, b"\1")
        elif what < 0.4:
            new = rng.randbytes(1) * n
        else:
            new = rng.randbytes(n)
        with open(self.path(name), "r+b", buffering=0) as f:
            f.seek(off)
            if f.write(new) != n:
                raise SystemExit("FAIL: a short write")
        disk.touch(off, off + n)
        disk.data[off : off + n] = new

    def punch(self, name, disk):
        size = len(disk.data)
        if not size:
            return
        off = self.rng.randrange(size)
        n = min(size - off, self.rng.randrange(1, 300000))
        run("fallocate", self.rng.choice(("-p", "-z")), "-o", str(off), "-l", str(n), self.path(name))
        disk.touch(off, off + n)
        disk.data[off : off + n] = bytes(n)

    def resize(self, name, disk):
        size = self.rng.choice((0, self.rng.randrange(MOST), self.rng.randrange(MOST), max(0, len(disk.data) - 5000), len(disk.data) + 5000))
        os.truncate(self.path(name), size)
        old = len(disk.data)
        if size < old:
            disk.touch(size, old)
            del disk.data[size:]
        else:
            disk.data.extend(bytes(size - old))
        disk.sized()

    def copy_range(self, name, disk):
        """From another disk, past every write(2)."""
        other = self.rng.choice(sorted(self.disks))
        there = self.disks[other]
        if there is disk or not there.data:
            return
        at = self.rng.randrange(len(there.data))
        off, n = self.rng.randrange(len(disk.data) + 1), min(self.rng.randrange(1, 200000), len(there.data) - at)
        n = min(n, MOST - off)
        new = there.data[at : at + n]
        with open(self.path(other), "rb") as f, open(self.path(name), "r+b") as g:
            done = 0
            while done < n:
                done += os.copy_file_range(f.fileno(), g.fileno(), n - done, at + done, off + done)
        disk.touch(off, off + n)
        disk.data[off : off + n] = new

    def map(self, name, disk):
        if not disk.data:
            return
        off = self.rng.randrange(len(disk.data))
        new = self.rng.randbytes(min(5000, len(disk.data) - off))
        with open(self.path(name), "r+b") as f, mmap.mmap(f.fileno(), 0) as shared:
            shared[off : off + len(new)] = new
            shared.flush()
        # pages are written back as a whole
        disk.touch(off & -4096, (off + len(new) + 4095) & -4096)
        disk.data[off : off + len(new)] = new

    def exchange(self, name):
        """Two disks change names."""
        other = self.rng.choice(sorted(self.disks))
        if self.disks[other] is self.disks[name]:
            return
        if ctypes.CDLL(None).renameat2(-100, os.fsencode(self.path(name)), -100, os.fsencode(self.path(other)), 2):
            raise SystemExit("FAIL: renameat2")
        self.disks[name], self.disks[other] = self.disks[other], self.disks[name]

    def replace(self, name):
        """Another disk gets the name, by rename or after unlink."""
        fresh = self.path(name + ".new")
        if self.rng.random() < 0.5:
            fresh = self.path(name)
            os.unlink(fresh)
        self.numbers += 1
        disk = Disk(self.numbers)
        disk.data = bytearray(self.rng.randbytes(self.rng.randrange(1, 100000)))
        with open(fresh, "wb") as f:
            f.write(disk.data)
        os.rename(fresh, self.path(name))
        self.disks[name] = disk

    def change(self):
        rng = self.rng
        if not self.disks or (len(self.disks) < 5 and rng.random() < 0.1):
            return self.create()
        name = rng.choice(sorted(self.disks))
        disk = self.disks[name]
        what = rng.random()
        if what < 0.55:
            self.write(name, disk, rng)
        elif what < 0.6:
            self.copy_range(name, disk)
        elif what < 0.65:
            self.map(name, disk)
        elif what < 0.68:
            self.exchange(name)
        elif what < 0.7:
            self.replace(name)
        elif what < 0.8:
            self.punch(name, disk)
        elif what < 0.88:
            self.resize(name, disk)
        elif what < 0.93:
            new = self.new_name()
            os.rename(self.path(name), self.path(new))
            self.disks[new] = self.disks.pop(name)
        elif what < 0.96:
            new = self.new_name()
            os.link(self.path(name), self.path(new))
            self.disks[new] = disk
        elif len(self.disks) > 2:
            os.unlink(self.path(name))
            del self.disks[name]

    # --- snapshots ---
    def freeze(self, name):
        os.mkdir(os.path.join(self.mnt, "snapshots", name))
        self.frozen[name] = {path: (disk, bytes(disk.data)) for path, disk in self.disks.items()}
        for disk in self.disks.values():
            disk.touched[name] = []
            disk.shortest[name] = len(disk.data)
        self.alive.append(name)

    def copy(self, name):
        older = self.alive[:-1]
        base = self.rng.choice(older) if older and self.rng.random() < 0.85 else "-"
        if base != "-" and self.base.get(base) is None:
            base = "-"
        self.base[name] = base
        since = os.path.join(self.mnt, "snapshots", name, ".since", base) + "/"
        # what is allowed to be allocated, before the writer goes on
        for path, (disk, data) in self.frozen[name].items():
            if base != "-" and any(disk is e[0] for e in self.frozen[base].values()):
                self.frozen[name][path] = (disk, data, list(disk.touched[base]), disk.shortest[base])
            else:
                self.frozen[name][path] = (disk, data, None, 0)
        stop = threading.Event()
        seed = self.rng.randrange(1 << 32)

        def write():
            rng = random.Random(seed)
            names = sorted(self.disks)
            while names and not stop.is_set():
                disk = rng.choice(names)
                self.write(disk, self.disks[disk], rng)
                self.counts["writes meanwhile"] += 1

        writer = threading.Thread(target=write)
        writer.start()
        target, again = os.path.join(self.copies, name), os.path.join(self.dir, "again")
        try:
            run("rsync", "-aS", since, target)
            shutil.copytree(since, again, copy_function=copy_uncached)
            self.check_ranges(name, since)
        finally:
            stop.set()
            writer.join()
        self.same(target, again)
        shutil.rmtree(again)

    def same(self, one, other):
        names = {os.path.relpath(os.path.join(d, f), one) for d, _, fs in os.walk(one) for f in fs}
        if names != {os.path.relpath(os.path.join(d, f), other) for d, _, fs in os.walk(other) for f in fs}:
            raise SystemExit("FAIL: two copies have different files")
        for n in names:
            if not filecmp.cmp(os.path.join(one, n), os.path.join(other, n), shallow=False):
                raise SystemExit(f"FAIL: two copies of {n} differ")

    def check_ranges(self, name, since):
        """The sparse files and changes.json say the same, and have the frozen bytes."""
        with open(since + "changes.json") as f:
            said = json.load(f)
        told = {d["path"]: d for d in said["disks"]}
        if set(told) != set(self.frozen[name]):
            raise SystemExit(f"FAIL: changes.json tells of {sorted(told)}, not of {sorted(self.frozen[name])}")
        for path, entry in self.frozen[name].items():
            data, ranges = entry[1], told[path]["ranges"]
            if told[path]["size"] != len(data) or told[path]["new"] != (entry[2] is None):
                raise SystemExit(f"FAIL: changes.json: {told[path]}")
            for r in ranges:
                if r["zero"] and any(data[r["offset"] : r["offset"] + r["length"]]):
                    raise SystemExit(f"FAIL: {path}: {r} is not zeros")
            hidden = path.removesuffix(".qcow2") in self.frozen[name] and path.endswith(".qcow2")
            if hidden or self.base[name] == "-" and not ranges:
                continue
            merged = []
            for r in ranges:
                if merged and merged[-1][1] == r["offset"]:
                    merged[-1][1] += r["length"]
                else:
                    merged.append([r["offset"], r["offset"] + r["length"]])
            with open(since + path, "rb", buffering=0) as f:
                if os.fstat(f.fileno()).st_blocks != -(-sum(end - begin for begin, end in merged) // 512):
                    raise SystemExit(f"FAIL: st_blocks of {path}: {os.fstat(f.fileno())}, {merged}")
                at, seen = 0, []
                while at < len(data):
                    try:
                        begin = os.lseek(f.fileno(), at, os.SEEK_DATA)
                    except OSError:
                        break
                    at = os.lseek(f.fileno(), begin, os.SEEK_HOLE)
                    seen.append([begin, at])
                os.lseek(f.fileno(), 0, os.SEEK_SET)
                read = b""
                while True:
                    piece = f.read(1 << 20)
                    if not piece:
                        break
                    read += piece
            expect = bytearray(len(data))
            for begin, end in merged:
                expect[begin:end] = data[begin:end]
            if seen != merged or read != expect:
                raise SystemExit(f"FAIL: ranges of {path}: {seen}, {merged}, bytes are right: {read == expect}")
            self.counts["sparse files"] += 1

    def checkpoint(self):
        """One that is only compared with needs no data."""
        name = self.rng.choice(self.alive[:-1])
        snapshot = os.path.join(self.mnt, "snapshots", name)
        os.makedirs(os.path.join(snapshot, ".checkpoint"), exist_ok=True)
        if os.getxattr(snapshot, "user.fleecefs.state") != b"checkpoint":
            raise SystemExit(f"FAIL: {name} is no checkpoint")
        self.counts["checkpoints"] += 1

    def consume(self):
        """Nor does it need a part of a disk that nobody reads any more."""
        snapshot = os.path.join(self.mnt, "snapshots", self.rng.choice(self.alive[:-1]))
        paths = sorted(p for p, e in self.frozen[os.path.basename(snapshot)].items() if e[1])
        if not paths or os.getxattr(snapshot, "user.fleecefs.state") != b"ok":
            return
        path = self.rng.choice(paths)
        self.given_up.add(os.path.basename(snapshot))
        size = len(self.frozen[os.path.basename(snapshot)][path][1])
        os.setxattr(os.path.join(snapshot, path), "user.fleecefs.consume", b"1")
        off = self.rng.randrange(size) & -65536
        run("fallocate", "-n", "-p", "-o", str(off), "-l", str(65536 * self.rng.randrange(1, 20)), os.path.join(snapshot, path))
        self.counts["parts given up"] += 1

    def drop(self):
        name = self.rng.choice(self.alive[:-1])
        os.rmdir(os.path.join(self.mnt, "snapshots", name))
        self.alive.remove(name)

    def remount(self):
        kill = self.rng.random() < 0.5
        self.counts["kills" if kill else "mounts"] += 1
        self.unmount(kill)
        if self.rng.random() < 0.5:
            for name in set(self.disks):
                run("dd", "if=" + os.path.join(self.src, name), "iflag=nocache", "count=0", "status=none")
        self.mount()
        self.copy_again()

    def copy_again(self):
        """What was copied before this mount comes out the same."""
        again = os.path.join(self.dir, "again")
        for name in self.alive:
            snapshot, base = os.path.join(self.mnt, "snapshots", name), self.base[name]
            if base not in self.alive + ["-"] or name in self.given_up:
                continue
            if os.getxattr(snapshot, "user.fleecefs.state") != b"ok":
                continue
            shutil.copytree(os.path.join(snapshot, ".since", base), again, copy_function=copy_uncached)
            self.same(os.path.join(self.copies, name), again)
            shutil.rmtree(again)
            self.counts["copied again"] += 1

    # --- the end ---
    def check(self, name):
        for path, (disk, data, touched, shortest) in self.frozen[name].items():
            directory = os.path.join(self.copies, name)
            image = os.path.join(directory, path + ".qcow2")
            raw = os.path.join(self.dir, "raw")
            run("qemu-img", "check", "-q", "-f", "qcow2", image)
            run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", image, raw)
            with open(raw, "rb") as f:
                read = f.read()
            padded = data + bytes(-len(data) % 512)
            if read != padded:
                at = next((i for i, (a, b) in enumerate(zip(read, padded)) if a != b), min(len(read), len(padded)))
                raise SystemExit(f"FAIL: {image} is not the frozen disk: byte {at}, {len(read)} of {len(padded)} bytes")
            self.counts["images"] += 1
            self.check_allocated(name, path, image, data, touched, shortest)

    def check_allocated(self, name, path, image, data, touched, shortest):
        with open(image, "rb") as f:
            head = f.read(24)
        size = 1 << int.from_bytes(head[20:24], "big")
        clusters = -(-len(data) // size)
        mapped = json.loads(run("qemu-img", "map", "--output=json", "-f", "qcow2", image))
        own = set()
        for m in mapped:
            if m["depth"] == 0 and (m["data"] or touched is not None):
                own.update(range(m["start"] // size, -(-(m["start"] + m["length"]) // size)))
        if touched is None:
            needed = {i for i in range(clusters) if any(data[i * size : (i + 1) * size])}
            allowed = set(range(clusters))
        else:
            base = next(e for e in self.frozen[self.base[name]].values() if e[0] is self.frozen[name][path][0])[1]
            needed = {i for i in range(clusters) if data[i * size : (i + 1) * size].ljust(size, b"\0") != base[i * size : (i + 1) * size].ljust(size, b"\0")}
            allowed = set(range(shortest // size, clusters))
            for first, end in touched:
                allowed.update(range(first // size, -(-end // size)))
            self.counts["increments"] += 1
        if not needed <= own or not own <= allowed:
            raise SystemExit(f"FAIL: {image}: missing {sorted(needed - own)[:5]}, too many {sorted(own - allowed)[:5]}")


def live(life, nights):
    life.mount()
    for _ in range(4):
        life.create()
    for night in range(nights):
        for _ in range(life.rng.randrange(25)):
            life.change()
        life.freeze(f"n{night}")
        life.copy(f"n{night}")
        if len(life.alive) > 2 and life.rng.random() < 0.4:
            life.drop()
        if len(life.alive) > 1 and life.rng.random() < 0.5:
            life.checkpoint()
        if len(life.alive) > 1 and life.rng.random() < 0.5:
            life.consume()
        if life.rng.random() < 0.35:
            life.remount()
    life.unmount(False)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("fleecefs")
    parser.add_argument("dir")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    parser.add_argument("--nights", type=int, default=8)
    args = parser.parse_args()
    print(f"seed {args.seed}", flush=True)
    life = Life(os.path.abspath(args.fleecefs), os.path.abspath(args.dir), args.seed)
    try:
        live(life, args.nights)
    finally:
        if life.daemon.poll() is None and os.path.ismount(life.mnt):
            life.unmount(True)
    for name in life.frozen:
        life.check(name)
    print(", ".join(f"{n} {what}" for what, n in sorted(life.counts.items())))
    if not life.counts["increments"] and args.nights > 4:
        raise SystemExit("FAIL: no increment was checked")


main()
