"""
The rows of the table that are about the backup: reading a frozen disk, holes, space, the freeze itself.
"""
import contextlib
import os
import random

from area import BLOCK, GIB, MIB, TIB, show_size
from load import DEPTHS, cold_dd, tar_frozen
from table import VALUE, Row, measure
from works import under_snapshot


def read_rows(bench, systems, when, text, target):
    """Reads the frozen file with a cold cache, as backup tools do."""
    def tar_rate(system, row):
        took, total, _ = tar_frozen(bench, system, row)
        return total / MIB / took
    row = Row(f"frozen-{when}-dd-1M", f"frozen read {text}: dd bs=1M", "MiB/s", target=target)
    yield measure(row, systems, bench.rounds,
                  lambda s: cold_dd(s.frozen, "1M", bench.patience))
    row = Row(f"frozen-{when}-dd-10k", f"frozen read {text}: dd bs=10k", "MiB/s", target=target)
    yield measure(row, systems, bench.rounds,
                  lambda s: cold_dd(s.frozen, "10k", bench.patience))
    row = Row(f"frozen-{when}-tar", f"frozen read {text}: tar -S", "MiB/s", target=target)
    yield measure(row, systems, bench.rounds, lambda s, row=row: tar_rate(s, row))


def overwrite_blocks(bench, system, share):
    """Overwrites that share of the disk's blocks, each once, in random order; the bytes written."""
    total = bench.size // BLOCK // share * BLOCK
    bench.fio.run(system.live, "randwrite", size=bench.size, once=True, total=total,
                  **DEPTHS[1][1])
    bench.verify.written(system)
    return total


def stored_row(share, text):
    return Row(f"stored-{share}", f"bytes stored per byte of the guest's 4K random writes, {text} "
               "of the disk", "ratio", kind=VALUE, target="<= 1.05", better="lower")


def stored(bench):
    """A small part of the disk overwritten: what the granularity costs."""
    row = stored_row(128, "1/128")

    def sample(system):
        return under_snapshot(bench, system, lambda: stored_share(bench, system, 128))
    systems = bench.sound(snapshots=True)
    yield measure(row, systems, 1, sample)


def stored_share(bench, system, share):
    empty = system.stored()
    total = overwrite_blocks(bench, system, share)
    return (system.stored() - empty) / total


def frozen(bench):
    """Before any write, and after a quarter of the blocks was overwritten at random."""
    systems, expected = bench.sound(), {}
    for system in systems:
        system.settle()
        if system.snapshots:
            expected[system.name] = bench.verify.content(system)
            system.snapshot()
    yield from read_rows(bench, systems, "before", "before any write", ">= .90")
    row = stored_row(4, "1/4")
    for system in systems:
        share = stored_share(bench, system, 4)
        if system.snapshots:
            row.add(system.name, share)
        system.settle()
    yield row
    yield from read_rows(bench, systems, "after", "after 1/4 of the 4K blocks was overwritten", ">= .75")
    for system in systems:
        if system.snapshots:
            bench.check(system, expected[system.name])
            system.drop()
        system.settle()


def sparse_disk(size, data, chunk=MIB):
    """Makes a sparse disk with that much data, in chunks evenly spread."""
    def make_disk(path):
        with open(path, "wb") as f:
            f.truncate(size)
            count = data // chunk
            for i in range(count):
                f.seek(size // count * i // BLOCK * BLOCK)
                f.write(os.urandom(chunk))
            os.fsync(f.fileno())
    return make_disk


@contextlib.contextmanager
def other_disks(bench, label, make_disk):
    """The same systems with a disk of another kind, for a while."""
    with contextlib.ExitStack() as stack:
        systems = []
        for name in [s.name for s in bench.sound()]:
            system = bench.make(name, label)
            system.prepare(make_disk)
            stack.callback(system.close)
            systems.append(system)
        yield systems


def sparse(bench):
    """Holes are not read."""
    size, data = 64 * GIB, 64 * MIB if bench.args.short else GIB
    row = Row("sparse-tar", f"{show_size(size)} sparse disk with {show_size(data)} of data: tar -S",
              "s", target="<= 1.5", better="lower")

    def sample(system):
        took, total, ended = tar_frozen(bench, system, row)
        if ended and total < data:
            raise AssertionError("tar left data out")
        return took
    with other_disks(bench, "-sparse", sparse_disk(size, data)) as systems:
        for system in systems:
            system.settle()
            system.snapshot()
        yield measure(row, systems, bench.rounds, sample)
        for system in systems:
            system.drop()


def freeze(bench):
    """mkdir of a huge disk: time, and memory after writes all over it."""
    time_row = Row("mkdir-1T", "snapshot of a 1 TiB sparse disk", "ms", kind=VALUE,
                   target="<= 5", better="lower")
    memory = Row("memory-1T", "memory of the process with it", "MiB", kind=VALUE,
                 target="<= 16", better="lower")
    used = Row("memory-1T-used", "memory of the process after 10,000 writes all over it", "MiB",
               kind=VALUE, better="lower")

    def sample(system):
        system.settle()
        took = system.snapshot()
        if system.memory() and len(used.samples.get(system.name, [])) < 2:
            memory.add(system.name, system.memory() / MIB)
            write_about(system.live, TIB, 10000, random.Random(bench.args.seed))
            used.add(system.name, system.memory() / MIB)
        system.drop()
        return took * 1000
    with other_disks(bench, "-huge", sparse_disk(TIB, 64 * MIB)) as systems:
        yield measure(time_row, [s for s in systems if s.snapshots], bench.rounds, sample)
    yield memory
    yield used


def write_about(path, size, count, rng):
    fd = os.open(path, os.O_WRONLY)
    block = os.urandom(BLOCK)
    try:
        for _ in range(count):
            os.pwrite(fd, block, rng.randrange(size // BLOCK) * BLOCK)
    finally:
        os.close(fd)
