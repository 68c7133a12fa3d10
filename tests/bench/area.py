"""
The place where everything happens: one work directory, filesystems made in it for the purpose, and a
stack of what must be undone. Whatever is set up pushes its end at once; the stack is run backwards
whatever happens, signals included, so that nothing stays mounted.
"""
import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time

MIB = 1 << 20
GIB = 1 << 30
TIB = 1 << 40
BLOCK = 4096


class BenchError(Exception):
    """Something that the user is told in one line."""


class Skip(Exception):
    """A system or a row that cannot be had here; says why."""


def say(text):
    print(text, file=sys.stderr, flush=True)


def call(*args, timeout=600, ok=(0,), **options):
    """Runs a command and returns what it printed; an error names the command."""
    done = subprocess.run([str(a) for a in args], stdin=subprocess.DEVNULL, timeout=timeout,
                          capture_output=True, text=True, check=False, **options)
    if done.returncode not in ok:
        raise BenchError(f"{' '.join(map(str, args))}: status {done.returncode}: "
                         f"{(done.stderr or done.stdout).strip()}")
    return done.stdout


def size_of(text):
    """'4G' -> bytes."""
    scale = {"K": 10, "M": 20, "G": 30, "T": 40}
    unit = text[-1:].upper()
    number, shift = (text[:-1], scale[unit]) if unit in scale else (text, 0)
    if not number.isdigit() or not int(number):
        raise ValueError(text)
    return int(number) << shift


def show_size(size):
    for name, unit in (("TiB", TIB), ("GiB", GIB), ("MiB", MIB), ("KiB", 1024)):
        if size >= unit:
            return f"{size / unit:.4g} {name}"
    return f"{size} B"


def sync_fs(path):
    call("sync", "-f", path)


def allocated(path):
    """Bytes of storage below a directory, or of one file."""
    total = os.lstat(path).st_blocks * 512 if not os.path.isdir(path) else 0
    for base, _, files in os.walk(path):
        for name in files:
            with contextlib.suppress(FileNotFoundError):
                total += os.lstat(os.path.join(base, name)).st_blocks * 512
    return total


def drop_caches():
    """Clean pages of all files: what is read next comes from storage."""
    with open("/proc/sys/vm/drop_caches", "w", encoding="ascii") as f:
        f.write("1\n")


def wait_for(condition, seconds, what):
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise BenchError(f"waited {seconds} s in vain: {what}")
        time.sleep(0.005)


class Area:
    """The work directory and its cleanup."""

    def __init__(self, parent, loops):
        self.parent = parent
        self.loops = loops
        self.path = None
        self.stack = contextlib.ExitStack()

    def __enter__(self):
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._stop)
        os.makedirs(self.parent, exist_ok=True)
        self._alone()
        self.path = os.path.realpath(tempfile.mkdtemp(prefix="fleecefs-bench.", dir=self.parent))
        self.stack.callback(shutil.rmtree, self.path, ignore_errors=True)
        return self

    def _alone(self):
        """Two runs at a time would measure each other."""
        lock = os.open(self.parent, os.O_RDONLY | os.O_DIRECTORY)
        self.stack.callback(os.close, lock)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"waiting for another run that works below {self.parent}")
            fcntl.flock(lock, fcntl.LOCK_EX)

    def __exit__(self, *_):
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        self.stack.close()

    @staticmethod
    def _stop(number, _):
        raise SystemExit(128 + number)

    def undo(self, function, *args, **options):
        self.stack.callback(function, *args, **options)

    def directory(self, *names):
        path = os.path.join(self.path, *names)
        os.makedirs(path, exist_ok=True)
        return path

    def filesystem(self, kind, size):
        """A filesystem of the given kind in a file of the work directory, mounted; its path."""
        if not self.loops and kind == "ext4":
            return self.directory("in-place")
        if not shutil.which(f"mkfs.{kind}"):
            raise Skip(f"no mkfs.{kind}")
        image = os.path.join(self.path, f"{kind}.image")
        free = os.statvfs(self.path)
        if free.f_bavail * free.f_frsize < size + GIB:
            raise BenchError(f"{self.path}: {show_size(size)} are needed for {kind}; choose another "
                             "--work-dir or a smaller --size")
        # Written once, so that no write that is measured has to allocate beneath.
        call("dd", "if=/dev/zero", f"of={image}", "bs=4M", f"count={size // (4 * MIB)}",
             "oflag=direct", "conv=fsync", timeout=3600)
        quiet = {"ext4": ["-q", "-E", "nodiscard,lazy_itable_init=0,lazy_journal_init=0"],
                 "xfs": ["-q", "-K"], "btrfs": ["-q", "-K"]}[kind]
        call(f"mkfs.{kind}", *quiet, image)
        device = call("losetup", "--direct-io=on", "--find", "--show", image).strip()
        path = self.directory(kind)
        try:
            options = "noatime,nodiscard" if kind != "xfs" else "noatime"
            call("mount", "-t", kind, "-o", options, device, path)
            self.undo(unmount, path)
        finally:
            call("losetup", "-d", device)  # lazily: it goes with the mount
        return path

    def tmpfs(self, size):
        path = self.directory("tmpfs")
        call("mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", path)
        self.undo(unmount, path)
        return path


def unmount(path):
    """Of what is beneath a busy one, the lazy form takes care."""
    if not os.path.ismount(path) and not is_mounted(path):
        return
    for _ in range(50):
        done = subprocess.run(["umount", path], capture_output=True, check=False, timeout=120)
        if done.returncode == 0:
            return
        time.sleep(0.1)
    subprocess.run(["umount", "-l", path], capture_output=True, check=False, timeout=120)


def is_mounted(path):
    """Also true for a dead FUSE mount and for a file that is a mount point."""
    with open("/proc/self/mounts", encoding="utf-8") as f:
        return any(line.split()[1] == path for line in f)


def end_process(process, seconds=60):
    """Waits for a child's end, and ends it by force after that."""
    try:
        process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
