#!/usr/bin/env python3
"""A busy user of a filesystem, and the check of a copy of it.

write DIR LOG   writes and deletes files in DIR, one operation after the other, until SIGTERM. Each
                operation is made durable (fsync of file and directory) before it is acknowledged.
                LOG, kept elsewhere, gets a line "BEGIN n what" before and "ACK n" after each.
check DIR LOG --acked A --begun B
                DIR must be what DIR was after some operation p, A <= p <= B: everything up to p is
                there, byte for byte, and nothing after it, but for the one file which operation
                p + 1 may have been at work on.

A file says what it is: its lines are its name and the number of the operation that wrote it, the
last line the SHA-256 of those before it.
"""

import argparse
import hashlib
import os
import random
import signal
import sys
import time


def content(name, number, size):
    """The bytes that operation NUMBER writes to the file NAME; SIZE does not count the last line."""
    line = f"{name} op {number}\n".encode()
    body = (line * (size // len(line) + 1))[:size]
    return body + b"sha256 " + hashlib.sha256(body).hexdigest().encode() + b"\n"


def choose(rng, names, number, biggest):
    """The next operation, as the words of its BEGIN line, given the set of NAMES that exist."""
    if names and (len(names) > 150 or rng.random() < 0.3):
        return ["delete", rng.choice(sorted(names))]
    fresh = not names or rng.random() < 0.6
    name = f"file-{number}" if fresh else rng.choice(sorted(names))
    return ["write", name, str(rng.randrange(0, biggest))]


def write(args):
    rng = random.Random(args.seed)
    stopping = []
    signal.signal(signal.SIGTERM, lambda *_: stopping.append(True))
    directory = os.open(args.dir, os.O_RDONLY | os.O_DIRECTORY)
    log = os.open(args.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    names = set()
    number = 0
    while not stopping:
        number += 1
        words = choose(rng, names, number, args.biggest)
        os.write(log, f"BEGIN {number} {' '.join(words)}\n".encode())
        if words[0] == "write":
            path = os.path.join(args.dir, words[1])
            with open(path, "wb", buffering=0) as f:
                data = memoryview(content(words[1], number, int(words[2])))
                while data:
                    data = data[f.write(data):]
                os.fsync(f.fileno())
            names.add(words[1])
        else:
            os.unlink(os.path.join(args.dir, words[1]))
            names.remove(words[1])
        os.fsync(directory)
        os.write(log, f"ACK {number}\n".encode())
        time.sleep(args.pause)


def read_log(path):
    """The operations in the order of their beginning, and the number of the last acknowledged."""
    operations, acked = [], 0
    with open(path, encoding="ascii") as log:
        for line in log:
            words = line.split()
            if not line.endswith("\n") or not words:
                continue
            if words[0] == "BEGIN":
                operations.append(words[2:])
                assert len(operations) == int(words[1]), line
            elif words[0] == "ACK":
                acked = int(words[1])
    return operations, acked


def read_files(directory):
    files = {}
    for entry in os.scandir(directory):
        with open(entry.path, "rb") as f:
            files[entry.name] = f.read()
    return files


def find_moment(operations, actual, acked, begun):
    """The p at which ACTUAL is the state after p operations, or None and the least differences."""
    best = None
    state = {}
    for p in range(begun + 1):
        if p:
            words = operations[p - 1]
            if words[0] == "write":
                state[words[1]] = content(words[1], p, int(words[2]))
            else:
                del state[words[1]]
        if p < acked:
            continue
        wrong = {n for n in state.keys() | actual.keys() if state.get(n) != actual.get(n)}
        allowed = {operations[p][1]} if p < begun else set()
        if wrong <= allowed:
            return p, set()
        if best is None or len(wrong) < len(best):
            best = wrong
    return None, best


def check(args):
    operations, _ = read_log(args.log)
    actual = read_files(args.dir)
    p, wrong = find_moment(operations, actual, args.acked, args.begun)
    if p is None:
        sys.exit(f"{args.dir}: no moment between operation {args.acked} and {args.begun} looked "
                 f"like this; wrong or missing: {' '.join(sorted(wrong)[:10])}")
    print(f"the copy is the state after operation {p} ({len(actual)} files); "
          f"{args.acked} was acknowledged before the snapshot, {args.begun} begun after it")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    sub = commands.add_parser("write")
    sub.add_argument("dir")
    sub.add_argument("log")
    sub.add_argument("--seed", type=int, default=1)
    sub.add_argument("--biggest", type=int, default=200_000)
    sub.add_argument("--pause", type=float, default=0.002)
    sub.set_defaults(run=write)
    sub = commands.add_parser("check")
    sub.add_argument("dir")
    sub.add_argument("log")
    sub.add_argument("--acked", type=int, required=True)
    sub.add_argument("--begun", type=int, required=True)
    sub.set_defaults(run=check)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
