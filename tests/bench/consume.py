#!/usr/bin/env python3
"""
What a full backup costs in fleece storage while a guest overwrites its disk at random, with
user.fleecefs.consume and without: the peak of what the images take, and how many saves there were.

    tests/bench/consume.py --program build/fleecefs [--dir DIR] [--size MIB] [--pace MIB_PER_SECOND]
                           [--writes PER_SECOND] [--hot PERCENT] [--rounds N]

The backup reads the frozen disk once, from one end to the other, at a steady pace, as a slow target
makes it; what it reads is compared with a sum taken before. Needs root.
"""
import argparse
import hashlib
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time

MIB, BLOCK = 1 << 20, 4096


class Writer(threading.Thread):
    """4K writes to random places: a part of them to the first tenth of the disk."""

    def __init__(self, path, size, rate, hot, seed):
        super().__init__()
        self.path, self.blocks, self.rate, self.hot = path, size // BLOCK, rate, hot
        self.random = random.Random(seed)
        self.ended = threading.Event()
        self.done = 0

    def run(self):
        fd = os.open(self.path, os.O_WRONLY)
        begin = time.monotonic()
        while not self.ended.is_set():
            due = int((time.monotonic() - begin) * self.rate)
            while self.done < due and not self.ended.is_set():
                hot = self.random.random() * 100 < self.hot
                at = self.random.randrange(self.blocks // 10 if hot else self.blocks)
                os.pwrite(fd, self.random.randbytes(BLOCK), at * BLOCK)
                self.done += 1
            time.sleep(.002)
        os.close(fd)


class Peak(threading.Thread):
    """Looks at what fleece storage is used, again and again."""

    def __init__(self, mount):
        super().__init__()
        self.mount, self.ended, self.most, self.last = mount, threading.Event(), 0, {}

    def run(self):
        while True:
            with open(f"{self.mount}/.fleecefs/status.json", encoding="utf-8") as f:
                self.last = json.load(f)
            self.most = max(self.most, self.last["fleece"]["used_bytes"])
            if self.ended.wait(.05):
                return


def backup(path, size, pace):
    """Reads it all, and says what its bytes add up to."""
    total = hashlib.blake2b()
    begin = time.monotonic()
    with open(path, "rb", buffering=0) as f:
        for at in range(0, size, MIB):
            data = f.read(MIB)
            if len(data) != MIB:
                raise SystemExit(f"{path}: short at {at}")
            total.update(data)
            time.sleep(max(0, begin + (at / MIB + 1) / pace - time.monotonic()))
    return total.digest()


def sum_of(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "blake2b").digest()


def run(args, root, consume, seed):
    source, mount, fleece = (os.path.join(root, d) for d in ("source", "mount", "fleece"))
    disk, size = os.path.join(mount, "disk.img"), args.size * MIB
    subprocess.run([args.program, source, mount, f"--fleece-dir={fleece}"], check=True)
    try:
        want = sum_of(os.path.join(source, "disk.img"))
        snapshot = os.path.join(mount, "snapshots", "backup")
        os.mkdir(snapshot)
        if consume:
            os.setxattr(snapshot, "user.fleecefs.consume", b"1")
        writer, peak = Writer(disk, size, args.writes, args.hot, seed), Peak(mount)
        writer.start()
        peak.start()
        try:
            got = backup(os.path.join(snapshot, "disk.img"), size, args.pace)
        finally:
            writer.ended.set()
            writer.join()
            peak.ended.set()
            peak.join()
        if got != want:
            raise SystemExit("the backup is not what was frozen")
        saves, done = peak.last["guest"]["saves"], writer.done
        os.rmdir(snapshot)
    finally:
        while subprocess.run(["umount", mount], check=False).returncode:
            time.sleep(.2)
    return {"peak": peak.most / MIB, "saves": saves, "writes": done}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    parser.add_argument("--program", required=True)
    parser.add_argument("--dir", default="/var/tmp")
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--pace", type=float, default=64)
    parser.add_argument("--writes", type=int, default=4000)
    parser.add_argument("--hot", type=float, default=0)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    args.program = os.path.realpath(args.program)
    root = tempfile.mkdtemp(prefix="fleecefs-consume-", dir=args.dir)
    try:
        for d in ("source", "mount", "fleece"):
            os.mkdir(os.path.join(root, d))
        with open(os.path.join(root, "source", "disk.img"), "wb") as f:
            for _ in range(args.size):
                f.write(os.urandom(MIB))
        print(f"disk of {args.size} MiB, backup at {args.pace:g} MiB/s, {args.writes} writes of 4K "
              f"a second, {args.hot:g} % of them to the first tenth; medians of {args.rounds}")
        results = {False: [], True: []}
        for i in range(args.rounds):
            for consume in (False, True):
                # what is written must be new: the same bytes again are not saved
                results[consume].append(run(args, root, consume, 2 * i + consume))
        for consume, rows in results.items():
            middle = {k: statistics.median(r[k] for r in rows) for k in rows[0]}
            print(f"{'consume' if consume else 'without':8} peak {middle['peak']:7.1f} MiB, "
                  f"{middle['saves']:.0f} saves of {middle['writes']:.0f} writes")
    finally:
        shutil.rmtree(root)


if __name__ == "__main__":
    sys.exit(main())
