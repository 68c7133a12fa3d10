#!/usr/bin/env python3
"""Damages the files of a fleece directory at random and asks fleecectl about it.

usage: ctl_damage.py FLEECE_DIR FLEECECTL [--rounds N] [--seed N]

Whatever a file says, fleecectl answers by an exit status of its own, names the file when it finds
damage, and changes nothing. (Built with the sanitizers, it would end in another way.) FLEECE_DIR is
as it was afterwards.
"""

import argparse
import os
import random
import subprocess
import sys

SANITIZER_EXIT = 99
KNOWN = {0, 1, 64, 66, 69, 70, 74}


def read(path):
    with open(path, "rb") as f:
        return f.read()


def write(path, data):
    """In place, and with holes where there are zeros."""
    with open(path, "r+b") as f:
        f.truncate(0)
        f.truncate(len(data))
        for at in range(0, len(data), 4096):
            if data[at:at + 4096].strip(b"\0"):
                f.seek(at)
                f.write(data[at:at + 4096])


def used(data):
    """Where bytes are that are no holes."""
    return [at for at in range(0, len(data), 4096) if data[at:at + 4096].strip(b"\0")]


def damaged(rng, data):
    out = bytearray(data)
    kind = rng.random()
    if kind < .1:
        del out[rng.randrange(len(out)):]
    elif kind < .15:
        out += rng.randbytes(rng.choice([1, 8, 4096]))
    elif kind < .25:
        at, off = rng.choice(used(data)), rng.randrange(500) * 8
        out[at + off:at + off + 8] = rng.choice(
            [b"\0" * 8, b"\xff" * 8, rng.randbytes(8), b"\x80" + rng.randbytes(7)])
        del out[len(data):]
    else:
        for _ in range(rng.choice([1, 1, 1, 4, 64])):
            at = rng.choice(used(data))
            at += rng.randrange(min(4096, len(data) - at))
            out[at] ^= rng.randrange(1, 256)
    return bytes(out)


def ask(ctl, args):
    env = dict(os.environ)
    for name in ("ASAN_OPTIONS", "UBSAN_OPTIONS"):
        env[name] = f"{env.get(name, 'halt_on_error=1')}:exitcode={SANITIZER_EXIT}"
    return subprocess.run([ctl, *args], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=env,
                          timeout=60, check=False)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("fleece")
    parser.add_argument("ctl")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    args = parser.parse_args()
    print(f"seed {args.seed}, {args.rounds} rounds", flush=True)
    rng = random.Random(args.seed)
    files = {}
    for top, _, names in os.walk(args.fleece):
        for name in names:
            path = os.path.join(top, name)
            if os.path.getsize(path):
                files[path] = read(path)
    found = 0
    for number in range(args.rounds):
        path = rng.choice(sorted(files))
        now = damaged(rng, files[path])
        write(path, now)
        for command in (["check", args.fleece],
                        rng.choice([["list", args.fleece], ["gc", "--dry-run", args.fleece],
                                    ["map", "--fleece-dir", args.fleece, "one/a.img"]])):
            done = ask(args.ctl, command)
            text = done.stdout.decode(errors="replace")
            where = f"round {number}, {path}: {command[0]}: status {done.returncode}: {text}"
            if done.returncode not in KNOWN or read(path) != now:
                sys.exit(where)
            if command[0] == "check" and done.returncode == 1:
                found += 1
                name = os.path.basename(path).removesuffix(".xxh3").removesuffix(".qcow2")
                if not os.path.basename(path).startswith(".") and name not in text:
                    sys.exit(f"the file is not named: {where}")
        write(path, files[path])
    done = ask(args.ctl, ["check", args.fleece])
    if done.returncode:
        sys.exit(f"in the end: {done.stdout.decode(errors='replace')}")
    print(f"damage was found in {found} rounds")
    if found * 3 < args.rounds:
        sys.exit("in too few")


main()
