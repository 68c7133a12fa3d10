#!/usr/bin/env python3
"""Random changes of a block device by its live file, checked against a model in memory.

LIVE is the live file, DEVICE the device behind it, SNAPS the directory of snapshots. Each step
writes through the page cache or past it (O_DIRECT), punches, zeros, writes what is there already,
or makes, reads or drops a snapshot; what the live file, the device and each frozen file have is at
any moment what the model says. While there is no snapshot the device is written directly as well.
"""

import argparse
import ctypes
import mmap
import os
import random
import sys

KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE = 1, 2, 16
libc = ctypes.CDLL(None, use_errno=True)


def fallocate(fd, mode, off, length):
    if libc.fallocate(fd, mode, ctypes.c_long(off), ctypes.c_long(length)):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


class World:
    def __init__(self, args):
        self.rng = random.Random(args.seed)
        self.args = args
        self.live = os.open(args.live, os.O_RDWR)
        self.direct = os.open(args.live, os.O_RDWR | os.O_DIRECT)
        self.size = os.lseek(os.open(args.device, os.O_RDONLY), 0, os.SEEK_END)
        self.model = bytearray(self.read(self.live, 0, self.size))
        self.frozen = {}
        self.made = 0

    def read(self, fd, off, length):
        out = b""
        while len(out) < length:
            got = os.pread(fd, length - len(out), off + len(out))
            assert got, f"short at {off + len(out)}"
            out += got
        return out

    def place(self, align):
        length = self.rng.choice([1, 512, 4096, 4097, 65536, self.rng.randrange(1, 400_000)])
        off = self.rng.randrange(self.size)
        if self.rng.random() < 0.05:
            off = self.size - 1
        if align or self.rng.random() < 0.3:
            off -= off % 4096
        if align:
            length += -length % 4096
        return off, min(length, self.size - off)

    def same(self, what, got, expected, off):
        if got == expected:
            return
        at = next(i for i, (a, b) in enumerate(zip(got, expected)) if a != b)
        sys.exit(f"{what}: byte {off + at} of {self.size} is wrong (seed {self.args.seed})")

    def put(self, off, data):
        self.model[off:off + len(data)] = data

    def write(self):
        off, length = self.place(False)
        data = self.rng.choice([self.rng.randbytes(length), bytes(length),
                                bytes(self.model[off:off + length])])
        assert os.pwrite(self.live, data, off) == length
        self.put(off, data)

    def write_direct(self):
        off, length = self.place(True)
        data = self.rng.randbytes(length)
        with mmap.mmap(-1, length) as buf:
            buf[:] = data
            assert os.pwrite(self.direct, buf, off) == length
        self.put(off, data)

    def write_behind(self):
        """Nothing is frozen: who writes to the device itself is seen by the live file."""
        if self.frozen:
            return
        off, length = self.place(False)
        data = self.rng.randbytes(length)
        fd = os.open(self.args.device, os.O_WRONLY)
        assert os.pwrite(fd, data, off) == length
        os.close(fd)
        self.put(off, data)

    def zero(self):
        off, length = self.place(False)
        if self.rng.random() < 0.2:
            length = self.rng.randrange(1, self.size - off + 1)
        fallocate(self.rng.choice([self.live, self.direct]),
                  self.rng.choice([KEEP_SIZE | PUNCH_HOLE, ZERO_RANGE]), off, length)
        self.put(off, bytes(length))

    def sync(self):
        os.fsync(self.rng.choice([self.live, self.direct]))

    def look(self):
        off, length = self.place(True)
        fd = os.open(self.args.device, os.O_RDONLY)
        with mmap.mmap(-1, length) as buf:
            assert os.preadv(self.direct, [buf], off) == length
            past = buf[:]
        for what, got in [("live", self.read(self.live, off, length)), ("live, direct", past),
                          ("the device", self.read(fd, off, length))]:
            self.same(what, got, self.model[off:off + length], off)
        os.close(fd)

    def freeze(self):
        if len(self.frozen) == 4:
            self.drop()
        self.made += 1
        name = f"r{self.made}"
        os.mkdir(os.path.join(self.args.snaps, name))
        self.frozen[name] = bytes(self.model)

    def drop(self):
        if self.frozen:
            name = self.rng.choice(sorted(self.frozen))
            os.rmdir(os.path.join(self.args.snaps, name))
            del self.frozen[name]

    def look_at_frozen(self):
        if not self.frozen:
            return
        name = self.rng.choice(sorted(self.frozen))
        path = os.path.join(self.args.snaps, name, os.path.basename(self.args.live))
        fd = os.open(path, os.O_RDONLY | self.rng.choice([0, os.O_DIRECT]))
        off, length = self.place(False)
        if self.rng.random() < 0.1:
            off, length = 0, self.size
        assert os.fstat(fd).st_size == self.size
        self.same(name, self.read(fd, off, length), self.frozen[name][off:off + length], off)
        os.close(fd)

    def run(self):
        steps = [(self.write, 40), (self.write_direct, 25), (self.write_behind, 8), (self.zero, 8),
                 (self.sync, 4), (self.look, 12), (self.freeze, 3), (self.drop, 2),
                 (self.look_at_frozen, 20)]
        for _ in range(self.args.steps):
            self.rng.choices([s for s, _ in steps], [n for _, n in steps])[0]()
        for name in sorted(self.frozen):
            path = os.path.join(self.args.snaps, name, os.path.basename(self.args.live))
            with open(path, "rb") as f:
                self.same(name, f.read(), self.frozen[name], 0)
            os.rmdir(os.path.join(self.args.snaps, name))
        self.same("live", self.read(self.live, 0, self.size), bytes(self.model), 0)
        print(f"{self.args.steps} steps, {self.made} snapshots, seed {self.args.seed}")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("live")
    parser.add_argument("device")
    parser.add_argument("snaps")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    parser.add_argument("--steps", type=int, default=1000)
    World(parser.parse_args()).run()


if __name__ == "__main__":
    main()
