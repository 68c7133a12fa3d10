"""
Checks of the benchmark itself, in a few seconds: the figures and tables it writes, and above all that
its verification notices a frozen view that is wrong. The last part mounts, so it needs root.
"""
import argparse
import json
import os
import random
import shutil
import tempfile

import peers
import report
import works
from area import BLOCK, MIB, Area, BenchError, say, show_size, size_of
from load import fill
from table import PAIRED, Row, interleave, reached
from verify import Mismatch, Verifier


def expect(condition, what):
    if not condition:
        raise BenchError(f"self-test: {what}")


def refuses(kind, function, *args):
    try:
        function(*args)
    except kind:
        return True
    return False


def figures():
    row = Row("k", "a work", "IOPS", target=">= .50")
    for plain, ours in ((100, 60), (200, 80), (50, 45)):
        row.add("plain", plain)
        row.add("fleecefs", ours)
    summary = row.summary("fleecefs")
    expect((summary["median"], summary["min"], summary["max"]) == (.6, .4, .9), "ratios of a round")
    expect(reached(row) is True, "a target that is reached")
    row.target = ">= .61"
    expect(reached(row) is False, "a target that is missed")
    less = Row("l", "another", "ratio", kind=PAIRED, target="<= 1.2", better="lower")
    less.add("fleecefs", 1.3)
    expect(reached(less) is False, "a target from above")
    expect([o[0] for o in interleave([1, 2, 3], 4)] == [1, 2, 3, 1], "each begins a round in turn")
    expect(size_of("4G") == 4 << 30 and show_size(4 << 30) == "4 GiB", "sizes")
    expect(refuses(ValueError, size_of, "x"), "a size that is none")
    return [row, less]


def tables(rows, directory):
    result = {"systems": {"plain": "plain ext4", "fleecefs": "fleecefs"}, "missing": {"xfs": "no"},
              "machine": report.machine(), "size": "1 GiB", "rounds": 3, "seconds": 1, "checks": 7,
              "rows": [r.as_dict() for r in rows]}
    paths = report.write(result, directory)
    with open(paths[0], encoding="utf-8") as f:
        back = json.load(f)
    expect(back == json.loads(json.dumps(result)), "JSON holds everything")
    with open(paths[1], encoding="utf-8") as f:
        text = f.read()
    expect("| a work | 100 IOPS | .60 (.40 to .90) | ≥ .61 (missed) |" in text, f"table:\n{text}")
    expect(text == report.markdown(back), "the table can be made of the JSON")


class Files:
    """A system whose frozen view is a file that can be damaged."""

    name = "files"

    def __init__(self, directory):
        self.source = os.path.join(directory, "live")
        self.frozen = os.path.join(directory, "frozen")
        fill(self.source, MIB)
        shutil.copy(self.source, self.frozen)


def verification(directory):
    system, verify = Files(directory), Verifier()
    expected = verify.content(system)
    verify.check(system, expected)
    verify.written(system)
    expect(refuses(Mismatch, verify.content, system), "a write that changes nothing is noticed")
    works.spoil(system)
    expect(verify.content(system) != expected, "a change of the live disk is noticed")
    verify.check(system, expected)
    with open(system.frozen, "r+b") as f:
        f.seek(MIB // 2)
        byte = f.read(1)
        f.seek(MIB // 2)
        f.write(bytes([byte[0] ^ 1]))
    expect(refuses(Mismatch, verify.check, system, expected), "one bit of a frozen view is noticed")


class SmallBench:
    """As much of a Bench as one system needs, without fio."""

    def __init__(self, area, program, spoil):
        self.area, self.program, self.verify = area, program, Verifier()
        self.args = argparse.Namespace(spoil=spoil)

    def check(self, *what):
        self.verify.check(*what)

    def filesystem(self, _):
        return self.area.path


def mounted(program, spoil):
    """fleecefs itself under the check: right when left alone, wrong when its disk is changed."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as place, Area(place, False) as area:
        bench = SmallBench(area, program, spoil)
        system = peers.Fleecefs(bench)
        system.prepare(lambda path: fill(path, 4 * MIB))

        def load():
            rng = random.Random(1)
            with open(system.live, "r+b", buffering=0) as f:
                for _ in range(200):
                    f.seek(rng.randrange(1, 4 * MIB // BLOCK) * BLOCK)
                    f.write(os.urandom(BLOCK))
            return system.stored()
        expect(works.under_snapshot(bench, system, load) > 0, "first writes are saved")
        system.close()


def run(args):
    with tempfile.TemporaryDirectory() as directory:
        tables(figures(), directory)
        verification(directory)
    if os.geteuid() != 0 or not os.path.exists("/dev/fuse"):
        say("self-test: right, without the part that mounts, which needs root and /dev/fuse")
        return 0
    mounted(args.program, False)
    expect(refuses(Mismatch, mounted, args.program, True),
           "a disk that was changed behind the mount's back is noticed")
    say("self-test: right")
    return 0
