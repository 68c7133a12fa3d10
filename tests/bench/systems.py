"""All systems, by name."""
import os

import peers
import qemu
from area import BenchError, call


def make(bench, name, label=""):
    """The system of that name; Skip says why it cannot be had here."""
    makers = {
        "plain": peers.Plain,
        "fleecefs": peers.Fleecefs,
        "qemu": qemu.StorageDaemon,
        "qemu-new": qemu.NewStorageDaemon,
        "xfs": peers.Xfs,
        "btrfs": peers.Btrfs,
    }
    return makers[name](bench, label)


def versions(bench):
    """What was measured with what."""
    def first(*args):
        try:
            return call(*args).splitlines()[0].strip()
        except (BenchError, OSError, IndexError):
            return None
    found = {"fleecefs": call(bench.program, "-V").strip().replace("\n", ", "),
             "fio": first("fio", "--version"), "kernel": os.uname().release}
    return {k: v for k, v in found.items() if v}
