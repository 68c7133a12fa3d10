#!/usr/bin/env python3
"""Drives the guest of guest.py for incremental_guest.sh: it works on its ext4 while each night fleece-backup --incremental
runs. WORK/nights gets a line for each: the folder, and between which of the guest's operations it was frozen."""

import os
import subprocess
import sys

from guest import day, numbers, parser, wait_until


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
    options = parser(__doc__)
    options.add_argument("--out", required=True, help="where the folders go")
    options.add_argument("--script", required=True, help="fleece-backup")
    options.add_argument("--nights", type=int, default=10)
    options.set_defaults(limit=800)
    args = options.parse_args()

    def nights(log_path, failures):
        for number in range(args.nights):
            night(args, log_path, failures, ["--full-every", "6", *(["--verify"] if number % 3 == 1 else [])])
    day(args, nights)


if __name__ == "__main__":
    try:
        main()
    except (RuntimeError, OSError, ValueError, subprocess.SubprocessError) as error:
        sys.exit(f"incremental_guest.py: {error}")
