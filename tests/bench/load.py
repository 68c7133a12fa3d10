"""The load: fio, dd and tar, and what they measured."""
import json
import os
import random
import re
import signal
import subprocess
import time

from area import BLOCK, MIB, BenchError, call, drop_caches

# How a guest asks: name, fio's options.
DEPTHS = (
    ("depth 1", {"engine": "psync"}),
    ("libaio 16", {"engine": "libaio", "depth": 16}),
    ("16 threads", {"engine": "psync", "jobs": 16}),
)


class Fio:
    """Calls of fio with the seed of the run: no two write the same bytes, each can be repeated."""

    def __init__(self, seed):
        self.random = random.Random(seed)

    def run(self, path, rw, *, size, seconds=None, engine="psync", depth=1, jobs=1, bs=BLOCK,
            offset=0, once=False, total=None, direct=True):
        """
        One run over [offset, offset + size). once: no block twice, and it ends when all are done.
        total: bytes after which it ends. Several jobs share the range, each has its own part.
        """
        part = size // jobs // bs * bs
        args = ["fio", "--name=load", f"--filename={path}", f"--rw={rw}", f"--bs={bs}",
                f"--ioengine={engine}", f"--iodepth={depth}", f"--numjobs={jobs}", "--thread",
                "--group_reporting", f"--direct={int(direct)}", f"--offset={offset}",
                f"--size={part}", f"--offset_increment={part if jobs > 1 else 0}",
                "--allow_file_create=0", "--fallocate=none", "--randrepeat=0",
                f"--randseed={self.random.randrange(1, 1 << 31)}", "--output-format=json"]
        if seconds:
            args.append(f"--runtime={int(seconds * 1000)}ms")
        if not once and total is None:
            args.append("--time_based")
        if total is not None:
            args.append(f"--io_size={total // jobs // bs * bs}")
        out = call(*args, timeout=3600)
        result = json.loads(out[out.index("{"):])["jobs"][0]
        if result["error"]:
            raise BenchError(f"fio on {path}: error {result['error']}")
        side = result["write" if "write" in rw else "read"]
        return {"iops": side["iops"], "rate": side["bw_bytes"] / MIB, "ios": side["total_ios"],
                "p99": side["clat_ns"].get("percentile", {}).get("99.000000", 0) / 1000,
                "max": side["clat_ns"]["max"] / 1000}


def cold_dd(path, bs, seconds):
    """MiB/s of dd with a cold cache; ends after that many seconds at the latest."""
    drop_caches()
    done = subprocess.run(["timeout", "-s", "INT", str(seconds), "dd", f"if={path}", "of=/dev/null",
                           f"bs={bs}"], capture_output=True, text=True, check=False,
                          env=dict(os.environ, LC_ALL="C"), timeout=seconds + 120)
    found = re.search(r"^(\d+) bytes.* copied, ([\d.e-]+) s", done.stderr, re.M)
    if done.returncode not in (0, 124) or not found:
        raise BenchError(f"dd of {path}: {done.stderr.strip()}")
    return int(found[1]) / MIB / float(found[2])


def cold_tar(path, seconds):
    """
    tar -S of one file with a cold cache: (seconds, bytes of the archive, did it end?, did it say that
    the file changed as it was read?). Through a pipe: to /dev/null tar would not read at all.
    """
    drop_caches()
    buffer = memoryview(bytearray(MIB))
    start = time.monotonic()
    total, ended = 0, False
    with subprocess.Popen(["tar", "-C", os.path.dirname(path), "-cSf", "-", os.path.basename(path)],
                          stdout=subprocess.PIPE, bufsize=0, pipesize=MIB) as tar:
        # An alarm, because a tar that looks for holes by reading writes nothing for a long time.
        signal.signal(signal.SIGALRM, lambda *_: tar.kill())
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            while got := tar.stdout.readinto(buffer):
                total += got
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        ended = tar.wait() in (0, 1)
    took = time.monotonic() - start
    if not ended and took < seconds:
        raise BenchError(f"tar of {path} failed with status {tar.returncode}")
    return took, total, ended, tar.returncode == 1


def tar_frozen(bench, system, row):
    """The same for a system's frozen file, with a note of what went wrong."""
    took, total, ended, changed = cold_tar(system.frozen, bench.patience)
    if not ended:
        row.note(system.name, f"stopped after {bench.patience} s")
    if changed:
        if system.name == "fleecefs":
            raise BenchError("tar says that a frozen file changed as it was read")
        row.note(system.name, "tar fails: file changed as we read it")
    return took, total, ended


class Reader:
    """Reads a file at a given rate beside a load, again and again; or stops in its middle (rate 0)."""

    def __init__(self, path, rate):
        self.pid = os.fork()
        if self.pid == 0:
            status = 1
            try:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                self._read(path, rate)
                status = 0
            finally:
                os._exit(status)

    @staticmethod
    def _read(path, rate):
        fd = os.open(path, os.O_RDONLY)
        chunk = 64 * 1024
        if not rate:
            os.lseek(fd, os.fstat(fd).st_size // 2, os.SEEK_SET)
            os.read(fd, chunk)
            signal.pause()
        due = time.monotonic()
        while True:
            if not os.read(fd, chunk):
                os.lseek(fd, 0, os.SEEK_SET)
            due += chunk / rate
            time.sleep(max(0, due - time.monotonic()))

    def __enter__(self):
        time.sleep(0.1)
        if os.waitpid(self.pid, os.WNOHANG)[0]:
            raise BenchError("the reader ended early")
        return self

    def __exit__(self, *_):
        os.kill(self.pid, signal.SIGTERM)
        os.waitpid(self.pid, 0)


def fill(path, size):
    """Incompressible content, written out."""
    with open(path, "wb") as f:
        left = size
        while left:
            part = min(left, 4 * MIB)
            f.write(os.urandom(part))
            left -= part
        os.fsync(f.fileno())


def copy(source, path):
    """A copy with its own storage."""
    call("cp", "--reflink=never", "--sparse=never", source, path, timeout=3600)
    call("sync", path)
