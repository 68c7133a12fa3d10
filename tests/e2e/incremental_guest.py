#!/usr/bin/env python3
"""Drives the guest of guest.py for incremental_guest.sh: it works on its ext4 while each night fleece-backup --incremental
runs. WORK/nights gets a line for each: the folder, and between which of the guest's operations it was frozen."""

import argparse
import os
import random
import subprocess
import sys
import threading

from guest import Guest, numbers, wait_until, work


def night(args, log_path, failures, options):
    acked, begun = numbers(log_path)
    wait_until(log_path, begun + 10, failures)
    acked, _ = numbers(log_path)
    before = set(os.listdir(args.out))
    done = subprocess.run([args.script, "--on", args.live, "--incremental", args.out, *options], stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=120, check=False)
    if done.returncode:
        raise RuntimeError(f"fleece-backup: status {done.returncode}: {done.stdout.decode()}")
    _, begun = numbers(log_path)
    new, = (name for name in set(os.listdir(args.out)) - before if not name.startswith("."))
    print(f"{new}: between operations {acked} and {begun}", flush=True)
    with open(os.path.join(args.work, "nights"), "a", encoding="ascii") as f:
        f.write(f"{new} {acked} {begun}\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("root", "live", "disk", "work", "out", "script"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--nights", type=int, default=10)
    parser.add_argument("--limit", type=int, default=800)
    args = parser.parse_args()
    log_path = os.path.join(args.work, "guest.log")
    open(log_path, "w", encoding="ascii").close()
    guest = Guest(args)
    stopping, failures = threading.Event(), []
    thread = threading.Thread(target=work, args=(guest, log_path, stopping, failures), daemon=True)
    rng = random.Random(7)
    try:
        guest.expect("READY")
        thread.start()
        wait_until(log_path, 20, failures)
        for number in range(args.nights):
            night(args, log_path, failures, ["--full-every", "6", *(["--verify"] if rng.random() < 0.5 else [])])
            print(f"night {number + 1}", flush=True)
        stopping.set()
        thread.join(60)
        if failures:
            raise failures[0]
        guest.send("0 off")
        guest.process.wait(60)
    finally:
        if guest.process.poll() is None:
            guest.process.terminate()
            guest.process.wait(20)


if __name__ == "__main__":
    try:
        main()
    except (RuntimeError, OSError, ValueError, subprocess.SubprocessError) as error:
        sys.exit(f"incremental_guest.py: {error}")
