#!/usr/bin/env python3
"""Changes disk images at random until SIGTERM: writes of any size and place, the same bytes again,
punched holes, truncation down and up. --count FILE is given the number of changes so far."""

import argparse
import ctypes
import errno
import os
import random
import signal
import sys
import time

KEEP_SIZE, PUNCH_HOLE = 1, 2
libc = ctypes.CDLL(None, use_errno=True)


def fallocate(fd, mode, off, length):
    if libc.fallocate(fd, mode, ctypes.c_long(off), ctypes.c_long(length)):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def change(rng, fd):
    size = os.fstat(fd).st_size
    off = rng.randrange(size + 1)
    length = rng.choice([1, 512, 4096, 4097, 65536, rng.randrange(1, 300_000)])
    if rng.random() < 0.5:
        off -= off % 4096
    kind = rng.random()
    if kind < 0.85:
        # No zeros: over a hole they are saved nowhere, yet the live file has no hole then.
        os.pwrite(fd, rng.randbytes(length).replace(b"\0", b"\1"), off)
    elif kind < 0.90:
        # Not over a hole, for the same reason.
        same = os.pread(fd, length, off)
        grains = range(off - off % 4096, off + len(same), 4096)
        if all(any(same[max(0, at - off):at - off + 4096]) for at in grains):
            os.pwrite(fd, same, off)
    elif kind < 0.96:
        fallocate(fd, KEEP_SIZE | PUNCH_HOLE, off, length)
    else:
        os.ftruncate(fd, max(0, size + rng.randrange(-100_000, 100_000)))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", required=True)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--until-error", action="store_true",
                        help="end with success when the mount goes away")
    parser.add_argument("--pause", type=float, default=0.003)
    parser.add_argument("disks", nargs="+")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    stopping = []
    signal.signal(signal.SIGTERM, lambda *_: stopping.append(True))
    disks = [os.open(path, os.O_RDWR) for path in args.disks]
    done = 0
    with open(args.count, "w", encoding="ascii") as count:
        while not stopping:
            try:
                change(rng, rng.choice(disks))
            except OSError as e:
                if args.until_error and e.errno in (errno.ENOTCONN, errno.ECONNABORTED, errno.EIO):
                    sys.exit(0)
                raise
            done += 1
            count.seek(0)
            count.write(str(done))
            count.flush()
            time.sleep(args.pause)


if __name__ == "__main__":
    main()
