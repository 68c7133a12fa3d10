"""
QEMU's storage daemon doing the same job: the disk is exported by FUSE as a file; a snapshot is a
copy-before-write filter put beneath that export, with a new qcow2 image as its target, and a
snapshot-access node of the filter exported as a second file. All through QMP, as a backup tool does it.

    live (raw, exported) -> [ cbw -> ] disk (file)        snap (snapshot-access, exported) -> cbw
                              \-> fleece (qcow2) -> fleece-file

The disk is opened past the page cache and with io_uring, which is its fastest way; the image goes through
the page cache, as fleecefs's does.
"""
import glob
import json
import os
import shutil
import socket
import subprocess
import time

from area import BenchError, Skip, allocated, call, end_process, is_mounted, sync_fs, unmount, \
    wait_for
from peers import System, resident


class Monitor:
    """A QMP connection."""

    def __init__(self, path, process):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(300)
        self.events = []

        def connects():
            if process.poll() is not None:
                raise BenchError(f"QEMU's storage daemon ended with status {process.returncode}")
            try:
                self.socket.connect(path)
            except OSError:
                return False
            return True
        wait_for(connects, 30, "the monitor of QEMU's storage daemon")
        self.stream = self.socket.makefile("rw", encoding="utf-8")
        self.stream.readline()
        self.command("qmp_capabilities")

    def _read(self):
        line = self.stream.readline()
        if not line:
            raise BenchError("QEMU's storage daemon has gone")
        return json.loads(line)

    def command(self, name, **arguments):
        self.stream.write(json.dumps({"execute": name, "arguments": arguments}))
        self.stream.flush()
        while "event" in (answer := self._read()):
            self.events.append(answer)
        if "error" in answer:
            raise BenchError(f"QEMU's storage daemon, {name}: {answer['error']['desc']}")
        return answer["return"]

    def event(self, wanted):
        """Waits for an event, which may have come already."""
        while True:
            for event in self.events:
                if wanted(event):
                    self.events.remove(event)
                    return
            answer = self._read()
            if "event" in answer:
                self.events.append(answer)

    def create(self, **options):
        """blockdev-create is a job."""
        self.command("blockdev-create", **{"job-id": "create", "options": options})
        self.event(lambda e: e["event"] == "JOB_STATUS_CHANGE" and
                   e["data"] == {"id": "create", "status": "concluded"})
        job = self.command("query-jobs")[0]
        if "error" in job:
            raise BenchError(f"QEMU's storage daemon, blockdev-create: {job['error']}")
        self.command("job-dismiss", id="create")
        self.events.clear()


class StorageDaemon(System):
    """The installed one."""

    name = "qemu"
    stores = ("disk", "tmpfs")
    process = monitor = image = None

    def __init__(self, bench, label=""):
        super().__init__(bench, label)
        self.argv = self.program()
        version = call(*self.argv, "--version").split()[2]
        self.title = f"QEMU {version} storage daemon"
        base = bench.filesystem("ext4")
        self.source = os.path.join(base, f"{self.label}.img")
        directory = bench.area.directory(self.label)
        self.live, self.frozen = [os.path.join(directory, n) for n in ("live", "frozen")]
        self.control = os.path.join(directory, "qmp")
        for path in (self.live, self.frozen):
            with open(path, "wb"):
                pass

    def program(self):
        if not shutil.which("qemu-storage-daemon"):
            raise Skip("qemu-storage-daemon is not installed")
        return ["qemu-storage-daemon"]

    def prepare(self, make_disk):
        make_disk(self.source)
        disk = {"driver": "file", "node-name": "disk", "filename": self.source, "aio": "io_uring",
                "cache": {"direct": True}}
        log = os.path.join(self.bench.area.path, f"{self.label}.log")
        with open(log, "ab") as out:
            self.process = subprocess.Popen(
                [*self.argv, "--chardev", f"socket,id=m,path={self.control},server=on,wait=off",
                 "--monitor", "chardev=m", "--blockdev", json.dumps(disk),
                 "--blockdev", json.dumps({"driver": "raw", "node-name": "live", "file": "disk"}),
                 "--export", json.dumps(self.export("live", self.live, True))],
                stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True)
        self.bench.area.undo(self.end)
        try:
            self.monitor = Monitor(self.control, self.process)
            wait_for(lambda: is_mounted(self.live), 30, f"the export {self.live}")
        except BenchError as error:
            with open(log, encoding="utf-8", errors="replace") as f:
                raise BenchError(f"{error}: {f.read().strip()}") from None

    @staticmethod
    def export(node, path, writable):
        return {"type": "fuse", "id": node, "node-name": node, "mountpoint": path,
                "writable": writable, "growable": writable, "allow-other": "off"}

    def end(self):
        if self.process.poll() is None:
            self.process.terminate()
        end_process(self.process)
        for path in (self.frozen, self.live):
            unmount(path)

    def close(self):
        self.end()
        super().close()

    def snapshot(self):
        qmp = self.monitor
        base = self.bench.tmpfs() if self.store == "tmpfs" else os.path.dirname(self.source)
        self.image = os.path.join(base, f"{self.label}-fleece.qcow2")
        size = os.stat(self.source).st_size
        start = time.monotonic()
        qmp.create(driver="file", filename=self.image, size=0)
        qmp.command("blockdev-add", **{"driver": "file", "node-name": "fleece-file",
                                       "filename": self.image})
        qmp.create(driver="qcow2", file="fleece-file", size=size)
        qmp.command("blockdev-add", **{"driver": "qcow2", "node-name": "fleece",
                                       "file": "fleece-file"})
        qmp.command("blockdev-add", **{"driver": "copy-before-write", "node-name": "cbw",
                                       "file": "disk", "target": "fleece"})
        self.insert("cbw")
        qmp.command("blockdev-add", **{"driver": "snapshot-access", "node-name": "snap",
                                       "file": "cbw"})
        qmp.command("block-export-add", **self.export("snap", self.frozen, False))
        took = time.monotonic() - start
        wait_for(lambda: is_mounted(self.frozen), 30, f"the export {self.frozen}")
        return took

    def insert(self, node):
        self.monitor.command("blockdev-reopen", options=[
            {"driver": "raw", "node-name": "live", "file": node}])

    def drop(self):
        qmp = self.monitor
        self.unexport()
        qmp.command("blockdev-del", **{"node-name": "snap"})
        self.insert("disk")
        for node in ("cbw", "fleece", "fleece-file"):
            qmp.command("blockdev-del", **{"node-name": node})
        os.unlink(self.image)

    def unexport(self):
        """An export is busy for a moment after its file was closed."""
        end = time.monotonic() + 30
        while True:
            try:
                self.monitor.command("block-export-del", id="snap")
                break
            except BenchError:
                if time.monotonic() > end:
                    raise
                time.sleep(.05)
        self.monitor.event(lambda e: e["event"] == "BLOCK_EXPORT_DELETED" and
                           e["data"]["id"] == "snap")
        wait_for(lambda: not is_mounted(self.frozen), 30, f"{self.frozen} is still mounted")

    def stored(self):
        sync_fs(self.image)
        return allocated(self.image)

    def memory(self):
        return resident(self.process.pid)


class NewStorageDaemon(StorageDaemon):
    """One from another root directory, run by that system's own dynamic loader."""

    name = "qemu-new"

    def program(self):
        root = self.bench.args.qemu_root
        if not root:
            raise Skip("no --qemu-root")
        program = os.path.join(root, "usr/bin/qemu-storage-daemon")
        loaders = glob.glob(os.path.join(root, "lib*/ld-linux*.so.*"))
        if not os.path.exists(program) or not loaders:
            raise Skip(f"no qemu-storage-daemon in {root}")
        libraries = glob.glob(os.path.join(root, "usr/lib/*-linux-gnu"))
        return [loaders[0], "--library-path", ":".join(libraries), program]
