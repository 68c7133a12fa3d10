"""
How long guests wait while a snapshot is made: writers in processes of their own, each at a moderate
pace on a disk of its own, write down how long each write took.
"""
import json
import mmap
import os
import random
import signal
import time

from area import BLOCK, BenchError

PACE = 0.005   # seconds from write to write
SETTLE = 0.3   # before, and after


class Writers:
    """Direct 4K writes to each of the files, until the end."""

    def __init__(self, paths, size):
        self.paths, self.size = paths, size
        self.children = []

    def __enter__(self):
        for i, path in enumerate(self.paths):
            ours, theirs = os.pipe()
            pid = os.fork()
            if pid == 0:
                os.close(ours)
                self._child(path, theirs, i)
            os.close(theirs)
            self.children.append((pid, ours))
        return self

    def _child(self, path, out, seed):
        status = 1
        try:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            stopped = []
            signal.signal(signal.SIGUSR1, lambda *_: stopped.append(True))
            took = self._write(path, random.Random(seed), stopped)
            with os.fdopen(out, "w", encoding="ascii") as f:
                json.dump(took, f)
            status = 0
        finally:
            os._exit(status)

    def _write(self, path, rng, stopped):
        """Every write as [begin, seconds], by the monotonic clock that all processes share."""
        fd = os.open(path, os.O_WRONLY | os.O_DIRECT)
        buffer = mmap.mmap(-1, BLOCK)
        took = []
        while not stopped:
            buffer[:] = rng.randbytes(BLOCK)
            begin = time.monotonic()
            os.pwrite(fd, buffer, rng.randrange(self.size // BLOCK) * BLOCK)
            took.append([begin, time.monotonic() - begin])
            time.sleep(PACE * rng.uniform(.5, 1.5))
        return took

    def around(self, act):
        """
        Runs act() in the middle of the load: (what it returned, the longest write that was under
        way while it ran, the longest in as much time before it).
        """
        time.sleep(SETTLE)
        before = time.monotonic()
        time.sleep(SETTLE)
        begin = time.monotonic()
        result = act()
        end = time.monotonic()
        lack = (end - begin) - (begin - before)
        if lack > 0:
            time.sleep(SETTLE)
            quiet = time.monotonic()
            time.sleep(lack)
        took = self._collect()
        usual = self.longest(took, begin - min(end - begin, begin - before), begin)
        if lack > 0:
            usual = max(usual, self.longest(took, quiet, quiet + lack))
        return result, self.longest(took, begin, end), usual

    @staticmethod
    def longest(took, begin, end):
        """Of the writes that were under way at any time from begin to end; 0 if there was none."""
        return max((s for t, s in took if t < end and t + s > begin), default=0)

    def _collect(self):
        took = []
        for pid, _ in self.children:
            os.kill(pid, signal.SIGUSR1)
        for pid, fd in self.children:
            with os.fdopen(fd, encoding="ascii") as f:
                text = f.read()
            if os.waitpid(pid, 0)[1] != 0:
                raise BenchError("a writer failed")
            took += json.loads(text)
        self.children = []
        return took

    def __exit__(self, *_):
        for pid, fd in self.children:
            os.close(fd)
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
