"""
The rows of the table, what the guest notices: each function measures some and yields them. All follow
one pattern: know the disk's content, freeze, load, compare the frozen view with that content, drop.
"""
import functools

from area import MIB, BLOCK
from load import DEPTHS, Reader
from table import PAIRED, VALUE, Row, interleave, measure


def live(bench):
    """Nothing is frozen."""
    goals = {"randwrite": (">= .85", ">= .75", ">= .80"), "randread": (">= .85", ">= .75", ">= .80")}
    for rw, what in (("randwrite", "write"), ("randread", "read")):
        for (depth, options), target in zip(DEPTHS, goals[rw]):
            def sample(system, rw=rw, options=options):
                result = bench.fio.run(system.live, rw, size=bench.size, seconds=bench.seconds,
                                       **options)
                if rw == "randwrite":
                    bench.verify.written(system)
                return result["iops"]
            row = Row(f"live-{what}-{options['engine']}-{options.get('jobs', 1)}",
                      f"live, no snapshot: 4K random {what}, {depth}", "IOPS", target=target)
            yield measure(row, bench.systems, bench.rounds, sample)
    for rw, target in (("write", ">= .85"), ("read", ">= .90")):
        def sample(system, rw=rw):
            result = bench.fio.run(system.live, rw, size=bench.size, seconds=bench.seconds, bs=MIB)
            if rw == "write":
                bench.verify.written(system)
            return result["rate"]
        row = Row(f"live-seq-{rw}", f"live, no snapshot: 1M sequential {rw}", "MiB/s",
                  target=target)
        yield measure(row, bench.systems, bench.rounds, sample)


def under_snapshot(bench, system, load):
    """Runs load() with a fresh snapshot, whose view is checked afterwards; returns what it returns."""
    system.settle()
    if not system.snapshots:
        bench.verify.written(system)
        return load()
    expected = bench.verify.content(system)
    system.snapshot()
    if bench.args.spoil:
        spoil(system)
    result = load()
    bench.verify.written(system)
    bench.check(system, expected)
    system.drop()
    system.settle()
    return result


def spoil(system):
    """Changes a block of the disk where the system cannot see it. The frozen view is then wrong."""
    with open(system.source, "r+b", buffering=0) as f:
        block = f.read(BLOCK)
        f.seek(0)
        f.write(bytes(b ^ 0xff for b in block))


def first(bench):
    """The first write to each block after a snapshot: the old one has to be saved."""
    for (depth, options), target in zip(DEPTHS, (">= .50", ">= .35", ">= .45")):
        row = Row(f"first-{options['engine']}-{options.get('jobs', 1)}",
                  f"first writes after a snapshot: 4K random, {depth}", "IOPS", target=target)

        def sample(system, options=options, row=row):
            result = under_snapshot(bench, system, lambda: bench.fio.run(
                system.live, "randwrite", size=bench.size, seconds=bench.seconds, once=True,
                **options))
            row.note(system.name, "every write was the first to its block; the last run wrote "
                     f"{100 * result['ios'] * BLOCK / bench.size:.0f} % of the disk")
            return result["iops"]
        yield measure(row, bench.sound(), bench.rounds, sample)


def overwrite(bench):
    """The whole disk, front to back."""
    for store, target in (("disk", ">= .33"), ("tmpfs", ">= .50")):
        systems = [s for s in bench.sound() if store in s.stores or not s.snapshots]
        if len(systems) < 2:
            continue
        for system in systems:
            system.use_store(store)

        def sample(system):
            return under_snapshot(bench, system, lambda: bench.fio.run(
                system.live, "write", size=bench.size, bs=MIB, total=bench.size))["rate"]
        where = "the same disk" if store == "disk" else "tmpfs"
        row = Row(f"overwrite-{store}",
                  f"first overwrite of the whole disk, 1M sequential, saved to {where}", "MiB/s",
                  target=target)
        yield measure(row, systems, bench.rounds, sample)
        for system in systems:
            system.use_store("disk")


def second(bench):
    """Writes to what was saved already, against no snapshot at all, which is measured before or after."""
    region = max(16 * MIB, min(bench.size // 4, 256 * MIB))
    rows = [Row(f"second-{o['engine']}-{o.get('jobs', 1)}",
                f"second writes to saved clusters: 4K random, {d}, to no snapshot", "ratio",
                kind=PAIRED, target=">= .97") for d, o in DEPTHS]

    def loads(system):
        return [bench.fio.run(system.live, "randwrite", size=region, seconds=bench.seconds,
                              **options)["iops"] for _, options in DEPTHS]

    def with_saved(system):
        bench.fio.run(system.live, "write", size=region, bs=MIB, total=region)
        system.settle()
        return loads(system)

    def without(system):
        system.settle()
        bench.verify.written(system)
        return loads(system)
    systems = bench.sound(snapshots=True)
    for i, order in enumerate(interleave(systems, bench.rounds)):
        for system in order:
            if system.wrong:
                continue
            none = without(system) if i % 2 else None
            saved = under_snapshot(bench, system, functools.partial(with_saved, system))
            none = none or without(system)
            for k, row in enumerate(rows):
                row.add(system.name, saved[k] / none[k])
    yield from rows


def latency(bench):
    """How the guest's slowest writes change when somebody reads the snapshot, slowly or not at all."""
    rows = {"slow": Row("latency-slow", "live 4K write p99 with a reader of 4 MiB/s, to no reader",
                        "ratio", kind=PAIRED, target="<= 1.2", better="lower"),
            "stopped": Row("latency-stopped", "live 4K write p99 with a reader that stopped in the "
                           "middle, to no reader", "ratio", kind=PAIRED, target="<= 1.2",
                           better="lower")}
    base = Row("latency-none", "live 4K write p99 with a snapshot, no reader", "us", kind=VALUE,
               better="lower")

    def load(system, rate):
        run = functools.partial(bench.fio.run, system.live, "randwrite", size=bench.size,
                                seconds=bench.seconds, once=True)
        if rate is None:
            return run()["p99"]
        with Reader(system.frozen, rate):
            return run()["p99"]
    cases = [("none", None), ("slow", 4 * MIB), ("stopped", 0)]
    systems = bench.sound(snapshots=True)
    for i, order in enumerate(interleave(systems, bench.rounds)):
        for system in order:
            if system.wrong:
                continue
            p99 = {name: under_snapshot(bench, system, functools.partial(load, system, rate))
                   for name, rate in cases[i % 3:] + cases[:i % 3]}
            base.add(system.name, p99["none"])
            for name, row in rows.items():
                row.add(system.name, p99[name] / p99["none"])
    yield from rows.values()
    yield base
