"""Processes of a run: those that carry its token in their environment."""
import errno
import os
import signal
import sys
import time

GRACE_SECONDS = 5


def numbers():
    return [int(name) for name in os.listdir("/proc") if name.isdigit() and int(name) != os.getpid()]


def read(pid, name):
    try:
        with open(f"/proc/{pid}/{name}", "rb") as f:
            return f.read()
    except OSError:
        return b""


def held(pid):
    """Where it is, and what it has open."""
    links = ["cwd", "root"]
    try:
        links += [f"fd/{fd}" for fd in os.listdir(f"/proc/{pid}/fd")]
    except OSError:
        pass
    for link in links:
        try:
            yield os.readlink(os.fsencode(f"/proc/{pid}/{link}"))
        except OSError:
            pass
    for line in read(pid, "maps").split(b"\n"):
        words = line.split(None, 5)
        if len(words) == 6:
            yield words[5]


def holds(pid, path):
    path = os.fsencode(path)
    return any(link == path or link.startswith(path + b"/") for link in held(pid))


def session(pid):
    words = read(pid, "stat").rsplit(b")", 1)[-1].split()
    return int(words[3]) if len(words) > 3 and words[0] not in b"ZX" else -1


def end(token, path, leader):
    mark = os.fsencode(f"FLEECE_RUN={token}")

    def ours():
        for pid in numbers():
            if mark in read(pid, "environ").split(b"\0") and session(pid) != -1 and \
                    (session(pid) == int(leader) or holds(pid, path)):
                yield pid
    until = time.monotonic() + GRACE_SECONDS
    for number in (signal.SIGTERM, signal.SIGKILL):
        while left := list(ours()):
            for pid in left:
                try:
                    os.kill(pid, number)
                except ProcessLookupError:
                    pass
            if number == signal.SIGTERM and time.monotonic() > until:
                break
            if number == signal.SIGKILL and time.monotonic() > until + GRACE_SECONDS:
                return
            time.sleep(0.1)


def created_of(snapshot):
    """When it was made; None: there is none."""
    try:
        return os.getxattr(snapshot, "user.fleecefs.created").decode()
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENODATA, errno.ENOTSUP):
            return None
        raise  # it may be there


def created(path):
    print(created_of(path) or "-")


def holders(path):
    for pid in numbers():
        if holds(pid, path):
            print(f"fleece-backup: it is in use by process {pid}, {os.fsdecode(read(pid, 'comm')).strip()}")


def past(parts, source, list_file):
    sys.path.insert(0, parts)
    from fleece_qmp.disks import written_past  # pylint: disable=import-outside-toplevel
    from .choice import read_list  # pylint: disable=import-outside-toplevel
    chosen = {os.fsdecode(name[2:]) for name in read_list(list_file)}
    found = 0
    for path in written_past(source):
        if path in chosen:
            print(f"fleece-backup: {path} is written by a VM in {source} itself")
            found = 1
    return found
