"""
The frozen view stays right while it is measured. Before a snapshot the content of the disk is hashed,
from the file beneath; after each measured run the frozen file is hashed and must be the same. One
mismatch of fleecefs ends the whole run, and no table is written; a peer's ends what is measured of
that peer's snapshots.
"""
import hashlib
import os
import shutil

from area import MIB, BenchError, call


class Mismatch(BenchError):
    """A frozen view is not what the disk was. What was measured of it does not count."""


def forget_pages(path):
    """The next read of the file asks whoever serves it, not the kernel's cache."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def hash_file(path):
    if shutil.which("xxh128sum"):
        return call("xxh128sum", "-q", path, timeout=3600).split()[0]
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb", buffering=0) as f:
        while part := f.read(4 * MIB):
            digest.update(part)
    return digest.hexdigest()


def hash_range(path, offset, size):
    """Of a part of a disk that is too large to be read as a whole."""
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb", buffering=0) as f:
        f.seek(offset)
        while size:
            part = f.read(min(size, 4 * MIB))
            if not part:
                raise BenchError(f"{path} ends too early")
            digest.update(part)
            size -= len(part)
    return digest.hexdigest()


class Verifier:
    """Knows what each disk holds now. A hash is taken again only after the disk was written to."""

    def __init__(self):
        self.known = {}
        self.before = {}
        self.checks = 0

    def content(self, system):
        """The hash of the live disk."""
        if system.name not in self.known:
            found = hash_file(system.source)
            forget_pages(system.source)
            if self.before.get(system.name) == found:
                raise Mismatch(f"{system.name}: what was written changed nothing, so a frozen view "
                               "that follows the live disk would not be noticed")
            self.known[system.name] = found
        return self.known[system.name]

    def written(self, system):
        """The live disk was written to."""
        if system.name in self.known:
            self.before[system.name] = self.known.pop(system.name)

    def check(self, system, expected, frozen=None):
        """The frozen view must have the content whose hash is expected."""
        frozen = frozen or system.frozen
        forget_pages(frozen)
        found = hash_file(frozen)
        self.checks += 1
        if found != expected:
            raise Mismatch(f"{system.name}: {frozen} is not what was frozen: hash {found}, "
                           f"expected {expected}")
