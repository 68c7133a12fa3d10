"""
How fleecefs's cost grows: with snapshots alive, disks in the tree, the size of a disk, threads. Each
function measures some curves; a point is the median of as many samples as there are rounds, and what
is a ratio is one to plain ext4 in the same round.
"""
import contextlib
import functools
import os
import random
import statistics

from area import BLOCK, GIB, MIB, TIB, BenchError
from load import cold_dd, fill
from pause import Writers
from verify import Mismatch, forget_pages, hash_file, hash_range
from works import under_snapshot
from works_read import write_about


class Curve:
    """Samples over x, for some series."""

    def __init__(self, key, title, x, y, *, log=True):
        self.key, self.title, self.x, self.y, self.log = key, title, x, y, log
        self.samples = {}

    def add(self, series, at, value):
        self.samples.setdefault(series, {}).setdefault(at, []).append(value)

    def as_dict(self):
        series = {name: [{"x": at, "median": statistics.median(v), "min": min(v), "max": max(v),
                          "samples": v} for at, v in sorted(points.items())]
                  for name, points in self.samples.items()}
        return {"key": self.key, "title": self.title, "x": self.x, "y": self.y, "log": self.log,
                "series": series}


@contextlib.contextmanager
def pair(bench, label, make_disk):
    """plain ext4 and fleecefs with disks of their own, for a while."""
    with contextlib.ExitStack() as stack:
        systems = []
        for name in ("plain", "fleecefs"):
            system = bench.make(name, label)
            stack.callback(system.close)
            system.prepare(make_disk)
            systems.append(system)
        yield systems


def random_writes(bench, system, **options):
    return bench.fio.run(system.live, "randwrite", seconds=bench.seconds, once=True,
                         **{"size": bench.size, **options})["iops"]


def ratio_of_first(bench, plain, ours, i, **options):
    """First writes to those of plain ext4; who begins alternates."""
    def load(system):
        return under_snapshot(bench, system, functools.partial(random_writes, bench, system,
                                                               **options))
    found = {s.name: load(s) for s in ((plain, ours) if i % 2 else (ours, plain))}
    return found["fleecefs"] / found["plain"]


def add_snapshots(ours, have, count, rng):
    """Snapshots up to that number; after each, few blocks are overwritten."""
    size = os.stat(ours.source).st_size
    for i in range(have, count):
        ours.snapshot(f"s{i}")
        write_about(ours.live, size, 8, rng)


def snapshots(bench):
    """1 to 256 snapshots alive."""
    cost = Curve("snapshots-first", "First writes, by snapshots alive", "snapshots",
                 "ratio to plain ext4")
    reads = Curve("snapshots-read", "Frozen read of the oldest to the newest snapshot, dd bs=1M",
                  "snapshots", "ratio")
    counts = (1, 8, 64, 256)
    rng = random.Random(bench.args.seed)
    with pair(bench, "-chain", lambda path: fill(path, bench.size)) as (_, ours):
        oldest = hash_file(ours.source)
        for have, count in zip((0, *counts), counts):
            add_snapshots(ours, have, count, rng)
            ours.settle()
            newest = ours.view(f"s{count - 1}")
            for i in range(bench.rounds):
                pair_of = [ours.view("s0"), newest]
                rate = {v: cold_dd(v, "1M", bench.patience) for v in pair_of[::(-1) ** i]}
                reads.add("oldest to newest", count, rate[pair_of[0]] / rate[newest])
            bench.verify.check(ours, oldest, ours.view("s0"))
    with pair(bench, "-chain2", lambda path: fill(path, bench.size)) as (plain, ours):
        oldest = hash_file(ours.source)
        for have, count in zip((0, *[c - 1 for c in counts]), counts):
            add_snapshots(ours, have, count - 1, rng)  # the measured one is the last
            bench.verify.written(ours)
            for i in range(bench.rounds):
                cost.add("fleecefs", count, ratio_of_first(bench, plain, ours, i))
            if count > 1:
                bench.verify.check(ours, oldest, ours.view("s0"))
            else:
                oldest = hash_file(ours.source)
    return [cost, reads]


def tree_of(path, count, writers):
    """Disks: those of the writers with data to overwrite, the others small."""
    os.makedirs(path)
    for i in range(count):
        with open(os.path.join(path, f"disk{i:05}.img"), "wb") as f:
            if i < writers:
                f.write(os.urandom(4 * MIB))
            else:
                f.write(os.urandom(BLOCK))
                f.truncate(MIB)


def disks(bench):
    """1 to 10,000 disks in the tree, 16 writers at work."""
    times = Curve("disks-mkdir", "mkdir for each disk of the tree", "disks", "ms a disk")
    total = Curve("disks-total", "Time of mkdir, by disks in the tree", "disks", "ms")
    pauses = Curve("disks-pause", "The longest write of 16 guests", "disks", "ms")
    for count in (1, 100, 1000) + ((10000,) if not bench.args.short else ()):
        ours = bench.make("fleecefs", f"-tree{count}")
        tree_of(os.path.join(ours.base, "source", "tree"), count, 16)
        ours.source = os.path.join(ours.base, "source", "tree", f"disk{count - 1:05}.img")
        ours.prepare(lambda path: None)
        tree = os.path.join(ours.mount_point, "tree")
        for entry in os.scandir(tree):
            entry.stat()  # so that the kernel knows them all, as it does when VMs use them
        quiet = hash_file(ours.source) if count > 16 else None
        names = [os.path.join(tree, f"disk{i % count:05}.img") for i in range(16)]
        for _ in range(bench.rounds):
            ours.settle()
            with Writers(names, 4 * MIB) as writers:
                took, longest, usual = writers.around(ours.snapshot)
            times.add("mkdir", count, took * 1000 / count)
            total.add("mkdir", count, took * 1000)
            pauses.add("while mkdir runs", count, longest * 1000)
            pauses.add("as long without", count, usual * 1000)
            if quiet:
                bench.verify.check(ours, quiet, ours.view("s", f"tree/disk{count - 1:05}.img"))
            ours.drop()
        ours.close()
    return [times, total, pauses]


def sizes(bench):
    """1 GiB to 16 TiB, sparse."""
    cost = Curve("sizes-first", "First writes, by size of the disk", "GiB", "ratio to plain ext4")
    times = Curve("sizes-mkdir", "Time of mkdir, by size of the disk", "GiB", "ms")
    memory = Curve("sizes-memory", "Memory of fleecefs, by size of the disk", "GiB", "MiB")
    data = min(bench.size // 2, 256 * MIB)
    for size in (GIB, 32 * GIB, TIB, 16 * TIB - BLOCK):  # the longest file that ext4 can have
        offset = size // 2 // MIB * MIB

        def make_disk(path, size=size, offset=offset):
            with open(path, "wb") as f:
                f.truncate(size)
                f.seek(offset)
                for _ in range(data // MIB):
                    f.write(os.urandom(MIB))
                os.fsync(f.fileno())
        at = max(1, round(size / GIB))
        with pair(bench, f"-size{at}", make_disk) as (plain, ours):
            for i in range(bench.rounds):
                ratio, took = sized_round(bench, plain, ours, i, offset=offset, size=data)
                cost.add("fleecefs", at, ratio)
                times.add("mkdir", at, took * 1000)
                memory.add("after the first writes", at, ours.memory() / MIB)
    return [cost, times, memory]


def sized_round(bench, plain, ours, i, *, offset, size):
    """The same as under_snapshot, but what is hashed is where the data is."""
    found = {}
    for system in (plain, ours) if i % 2 else (ours, plain):
        system.settle()
        expected = hash_range(system.source, offset, size)
        took = system.snapshot()
        found[system.name] = random_writes(bench, system, offset=offset, size=size)
        if system.snapshots:
            forget_pages(system.frozen)
            if hash_range(system.frozen, offset, size) != expected:
                raise Mismatch(f"{system.frozen} is not what was frozen. No result is written.")
            bench.verify.checks += 1
            mkdir = took
        elif hash_range(system.source, offset, size) == expected:
            raise BenchError("what was written changed nothing")
        system.drop()
    return found["fleecefs"] / found["plain"], mkdir


def threads(bench):
    """1 to 16 threads."""
    curves = [Curve(f"threads-{key}", f"4K random {what}, by threads", "threads", "IOPS")
              for key, what in (("write", "write, no snapshot"), ("read", "read, no snapshot"),
                                ("first", "write, first after a snapshot"))]
    plain, ours = [next(s for s in bench.systems if s.name == n) for n in ("plain", "fleecefs")]
    for count in (1, 2, 4, 8, 16):
        for i in range(bench.rounds):
            for system in (plain, ours) if i % 2 else (ours, plain):
                run = functools.partial(bench.fio.run, system.live, size=bench.size,
                                        seconds=bench.seconds, jobs=count)
                curves[0].add(system.title, count, run("randwrite")["iops"])
                bench.verify.written(system)
                curves[1].add(system.title, count, run("randread")["iops"])
                curves[2].add(system.title, count, under_snapshot(
                    bench, system, functools.partial(random_writes, bench, system, jobs=count)))
    return curves


CURVES = {"snapshots": snapshots, "disks": disks, "sizes": sizes, "threads": threads}
