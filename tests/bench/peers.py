"""
The systems that are compared. Each has one disk of the same content on a filesystem made for the
purpose: `live` is the file that the guest uses, `source` the file that holds its bytes, `frozen` the
view of the snapshot. snapshot() returns how long it took; drop() takes the snapshot back.
"""
import fcntl
import os
import shutil
import subprocess
import time

from area import BenchError, allocated, end_process, sync_fs, unmount
from verify import forget_pages

FICLONE = 0x40049409


class System:
    """
    What all have in common. make_disk(path) makes the disk's file; the label tells the disks of one
    kind of system apart.
    """

    name = title = None
    stores = ("disk",)  # where saved data can go: the same disk, or tmpfs as well
    snapshots = True
    wrong = None  # says that a frozen view was not what had been frozen

    def __init__(self, bench, label=""):
        self.bench = bench
        self.label = self.name + label
        self.store = "disk"
        self.live = self.source = self.frozen = None

    def prepare(self, make_disk):
        raise NotImplementedError

    def close(self):
        """Ends it and deletes its disk."""
        os.unlink(self.source)

    def snapshot(self):
        raise NotImplementedError

    def drop(self):
        raise NotImplementedError

    def stored(self):
        """Bytes of storage taken by what the snapshot saved."""
        raise NotImplementedError

    def use_store(self, store):
        """Where the following snapshots save."""
        self.store = store

    def settle(self):
        """Nothing of what was done before disturbs what is measured next."""
        sync_fs(os.path.dirname(self.source))
        forget_pages(self.source)

    def memory(self):
        """Resident bytes of the process that serves, if there is one."""
        return None


class Plain(System):
    """A file on ext4. There are no snapshots: what is read instead of a frozen file is the file."""

    name, title = "plain", "plain ext4"
    snapshots = False

    def prepare(self, make_disk):
        self.live = os.path.join(self.bench.filesystem("ext4"), f"{self.label}.img")
        self.source = self.frozen = self.live
        make_disk(self.live)

    def snapshot(self):
        return 0.0

    def drop(self):
        pass

    def stored(self):
        return 0


class Reflink(System):
    """The frozen file is a reflink; the guest goes on using the original."""

    used = 0

    def prepare(self, make_disk):
        directory = self.bench.filesystem(self.name)
        self.live = self.source = os.path.join(directory, f"{self.label}.img")
        self.frozen = os.path.join(directory, f"{self.label}.frozen")
        make_disk(self.live)

    def snapshot(self):
        self.settle()
        self.used = self._used()
        start = time.monotonic()
        with open(self.frozen, "xb") as to, open(self.live, "rb") as of:
            fcntl.ioctl(to, FICLONE, of.fileno())
        return time.monotonic() - start

    def drop(self):
        os.unlink(self.frozen)
        self.settle()

    def _used(self):
        state = os.statvfs(os.path.dirname(self.live))
        return (state.f_blocks - state.f_bfree) * state.f_frsize

    def stored(self):
        self.settle()
        return self._used() - self.used


class Xfs(Reflink):
    """reflink=1 is the default of mkfs.xfs."""

    name, title = "xfs", "XFS reflink"


class Btrfs(Reflink):
    """With checksums, as is its default."""

    name, title = "btrfs", "btrfs reflink"


class Fleecefs(System):
    """fleecefs in the foreground, as a child."""

    name, title = "fleecefs", "fleecefs"
    stores = ("disk", "tmpfs")
    process = fleece = None

    def __init__(self, bench, label="", options=()):
        super().__init__(bench, label)
        self.options = list(options)
        self.base = os.path.join(bench.filesystem("ext4"), self.label)
        self.mount_point = bench.area.directory(f"{self.label}-mount")
        os.makedirs(os.path.join(self.base, "source"))
        self.source = os.path.join(self.base, "source", "disk.img")
        self.live = os.path.join(self.mount_point, "disk.img")
        self.frozen = self.view("s")

    def prepare(self, make_disk):
        make_disk(self.source)
        self.mount()

    def close(self):
        self.unmount()
        shutil.rmtree(self.base)

    def view(self, name, disk="disk.img"):
        return os.path.join(self.mount_point, "snapshots", name, disk)

    def mount(self):
        place = self.bench.tmpfs() if self.store == "tmpfs" else self.base
        self.fleece = os.path.join(place, f"fleece-{self.label}")
        os.makedirs(self.fleece, mode=0o700, exist_ok=True)
        log = os.path.join(self.bench.area.path, f"{self.label}.log")
        with open(log, "ab") as out:
            self.process = subprocess.Popen(
                [self.bench.program, os.path.join(self.base, "source"), self.mount_point, "-f",
                 f"--fleece-dir={self.fleece}", *self.options],
                stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True)
        self.bench.area.undo(self.unmount, self.process)
        while not os.path.isdir(os.path.join(self.mount_point, "snapshots")):
            if self.process.poll() is not None:
                with open(log, encoding="utf-8", errors="replace") as f:
                    raise BenchError(f"{self.bench.program} does not mount: {f.read().strip()}")
            time.sleep(0.01)

    def unmount(self, process=None):
        process = process or self.process
        if process.poll() is None:
            unmount(self.mount_point)
        end_process(process)

    def use_store(self, store):
        if store != self.store:
            self.unmount()
            self.store = store
            self.mount()

    def snapshot(self, name="s"):
        start = time.monotonic()
        os.mkdir(os.path.join(self.mount_point, "snapshots", name))
        return time.monotonic() - start

    def drop(self, name="s"):
        start = time.monotonic()
        os.rmdir(os.path.join(self.mount_point, "snapshots", name))
        return time.monotonic() - start

    def stored(self, name="s"):
        sync_fs(self.fleece)
        return allocated(os.path.join(self.fleece, name))

    def memory(self):
        return resident(self.process.pid)


def resident(pid):
    with open(f"/proc/{pid}/status", encoding="ascii") as f:
        for line in f:
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
    raise BenchError(f"process {pid} has ended")
