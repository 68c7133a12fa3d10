#!/usr/bin/env python3
"""Damages one fleecing image, or another file of a fleece directory, in a way that is told.

usage: imgdamage.py KIND FILE [ARGUMENT]

Positions come from the image's own header, by the qcow2 specification. "any" flips some bytes
anywhere, by the number in ARGUMENT.
"""

import os
import random
import struct
import subprocess
import sys

COPIED = 1 << 63


class Image:
    def __init__(self, path):
        self.fd = os.open(path, os.O_RDWR)
        head = os.pread(self.fd, 112, 0)
        self.cluster = 1 << struct.unpack_from(">I", head, 20)[0]
        self.l1_entries, self.l1 = struct.unpack_from(">IQ", head, 36)
        self.refcounts = struct.unpack_from(">Q", head, 48)[0]

    def get(self, off):
        return struct.unpack(">Q", os.pread(self.fd, 8, off))[0]

    def put(self, off, value):
        os.pwrite(self.fd, struct.pack(">Q", value), off)

    def entries(self):
        """(offset of the L2 entry, its value) of each saved cluster."""
        for i in range(self.l1_entries):
            table = self.get(self.l1 + i * 8) & ~COPIED
            for k in range(self.cluster // 8) if table else ():
                value = self.get(table + k * 8)
                if value:
                    yield table + k * 8, value

    def data(self):
        return [(at, value) for at, value in self.entries() if value & COPIED]


def backing(path, name):
    """Gives the header another backing file, with a right checksum."""
    image = Image(path)
    head = bytearray(os.pread(image.fd, 4096, 0))
    start, length = struct.unpack_from(">QI", head, 8)
    at = 112
    while head[at:at + 4] != b"flec":
        at += 8 + (struct.unpack_from(">I", head, at + 4)[0] + 7) // 8 * 8
    at += 8 + 48
    head[start:start + length] = bytes(length)
    head[start:start + len(name)] = name.encode()
    struct.pack_into(">I", head, 16, len(name))
    head[at:at + 8] = bytes(8)
    out = subprocess.run(["xxhsum", "-H3"], input=bytes(head), stdout=subprocess.PIPE, check=True)
    line = out.stdout.decode()
    digest = line.split("=")[1] if "=" in line else line.split()[0]
    head[at:at + 8] = bytes.fromhex(digest.strip().removeprefix("XXH3_"))
    os.pwrite(image.fd, head, 0)


def flip(path, off, mask=0xff):
    fd = os.open(path, os.O_RDWR)
    byte = os.pread(fd, 1, off)
    os.pwrite(fd, bytes([byte[0] ^ mask]), off)


def anywhere(path, seed):
    """Bytes in what is not a hole."""
    rng = random.Random(seed)
    fd = os.open(path, os.O_RDWR)
    size = os.fstat(fd).st_size
    for _ in range(rng.choice([1, 1, 2, 16])):
        at = rng.randrange(size)
        try:
            at = os.lseek(fd, at, os.SEEK_DATA)
            at = rng.randrange(at, min(os.lseek(fd, at, os.SEEK_HOLE), at + 8192))
        except OSError:
            at = rng.randrange(min(size, 4096))
        flip(path, at, rng.randrange(1, 256))
    if rng.random() < .2:
        os.ftruncate(fd, rng.randrange(size))


def main():
    kind, path = sys.argv[1:3]
    argument = sys.argv[3] if len(sys.argv) > 3 else None
    if kind == "backing":
        return backing(path, argument)
    if kind == "any":
        return anywhere(path, int(argument))
    if kind == "byte":
        return flip(path, int(argument))
    image = Image(path)
    first, value = image.data()[0]
    last = image.data()[-1][1]
    if kind == "data":
        flip(path, (value & ~COPIED) + 77)
    elif kind == "entry-other":
        image.put(first, last)
    elif kind == "entry-wild":
        image.put(first, value | 1 << 61)
    elif kind == "entry-beyond":
        image.put(first, COPIED | 1 << 40)
    elif kind == "entry-gone":
        image.put(first, 0)
    elif kind == "table":
        image.put(image.l1, image.get(image.l1) + image.cluster)
    elif kind == "block":
        image.put(image.refcounts, image.get(image.refcounts) + image.cluster)
    elif kind in ("refcount", "leak"):
        host = (value & ~COPIED) // image.cluster if kind == "refcount" else \
            os.fstat(image.fd).st_size // image.cluster + 9
        flip(path, image.get(image.refcounts) + host // 8, 1 << host % 8)
    elif kind == "cut":
        os.ftruncate(image.fd, max(v & ~COPIED for _, v in image.data()) + 100)
    elif kind == "short":
        os.ftruncate(image.fd, 10000)
    else:
        sys.exit(f"no such kind: {kind}")


main()
