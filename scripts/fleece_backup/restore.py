"""
What --restore and --list do with the folders that --incremental has made: see folders.py for what is believed.

A disk is written to a hidden part beside OUT, compared by its sum with what was frozen, and then gets its name:
there is no moment at which OUT is there and not whole. A part that a killed run has left is taken over; one
that is being written is locked.
"""
import contextlib
import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
import time

from .folders import (DIRECTORY, NAME, Damaged, Failure, Shelf, chain_name, close_all, open_beneath, shown,
                      valid_path)
from .report import Meter, human
from .sums import hash_of, hashes_of

SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM)


class Ended(BaseException):
    """By a signal."""


# --- which ---

def one_of(shelf, date):
    """The folder that DATE means."""
    folders = [f for job in shelf.jobs() for f in shelf.of_job(job)]
    known = ", ".join(f.name for f in folders[-20:]) or "nothing that can be used"
    if date == "latest":
        if len(shelf.jobs()) > 1:
            raise Failure(66, f"latest of which? --name is one of: {', '.join(shelf.jobs())}")
        found = folders[-1:]
        newer = [n for n in shelf.damaged if found and NAME.fullmatch(n)[2] > found[0].date]
        if newer:
            raise Failure(74, f"the latest is damaged: {newer[-1]}: {shelf.damaged[newer[-1]]}; the one before is {found[0].name}")
    else:
        found = [f for f in folders if date in (f.name, f.date)] or \
            [f for f in folders if date and (f.name.startswith(date) or f.date.startswith(date))]
    if not found:
        damaged = "".join(f"; {name}: {why}" for name, why in shelf.damaged.items() if date in name)
        raise Failure(66, f"{shelf.path} has no {date}; there is {known}{damaged}")
    if len(found) > 1:
        raise Failure(66, f"{date} is not one, but {', '.join(f.name for f in found)}")
    return found[0]


def chosen(folder, disk):
    """(what of FOLDER is below DISK, the path of that)"""
    path = os.fsencode(disk)
    while path.startswith(b"./") or path.endswith(b"/") and path != b"/":
        path = path[2:] if path.startswith(b"./") else path[:-1]
    if path in (b"", b"."):
        return folder.entries, b"."
    if not valid_path(path):
        raise Failure(64, f"{disk}: a disk is named by its path below SOURCE")
    found = [e for e in folder.entries if e.path == path or e.path.startswith(path + b"/")]
    if not found:
        known = [shown(e.path) for e in folder.files()]
        more = f" and {len(known) - 20} more" if len(known) > 20 else ""
        raise Failure(66, f"{folder.name} has no {disk}; it has {', '.join(known[:20])}{more}")
    return found, path


# --- a disk ---

class Restorer:
    def __init__(self, shelf, folder, quiet):
        self.shelf, self.folder, self.quiet = shelf, folder, quiet
        self.process = None

    def say(self, text):
        if not self.quiet:
            print(time.strftime("%F %T"), text, flush=True)

    def fill(self, entry, target):
        """Makes the new file TARGET the frozen one."""
        began = time.monotonic()
        fds = self.shelf.open_chain(self.folder, entry)
        try:
            if entry.sum is None:
                self.check_images(entry, fds)
            if entry.size:
                os.ftruncate(target, -(-entry.size // 512) * 512)
                self.convert(entry, fds, target)
        finally:
            close_all(fds)
        os.ftruncate(target, entry.size)
        if entry.sum is not None:
            with open(os.dup(target), "rb", buffering=0) as f:
                f.seek(0)
                if hash_of(f) != entry.sum:
                    raise Damaged(f"{shown(entry.path)}: what the images of {self.folder.name} hold is not what was frozen")
        finish(target, entry, entry.mode & 0o777)
        os.fsync(target)
        self.say(f"{shown(entry.path)}: {entry.size} bytes from {len(fds)} images in {time.monotonic() - began:.0f} s, "
                 f"{'compared with what was frozen' if entry.sum else 'the images have their sums'}")

    def check_images(self, entry, fds):
        """The sum of the frozen disk is not known (that takes --verify), those of the images are."""
        for found, (folder, link) in zip(hashes_of(fds), self.shelf.links(self.folder, entry)):
            if found != link.image_sum:
                raise Damaged(f"{folder.name}/{shown(link.image)} is damaged: it has not the sum of its manifest")

    def convert(self, entry, fds, target):
        command = ["qemu-img", "convert", "-p", "-n", "--target-is-zero", "-O", "raw", chain_name(fds),
                   f"/proc/self/fd/{target}"]
        meter = None if self.quiet else Meter(entry.size)
        with subprocess.Popen(command, pass_fds=[*fds, target], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE) as process:
            try:
                while said := process.stdout.read1(4096):
                    part = re.findall(rb"\(([0-9.]+)/100%\)", said)
                    if meter and part:
                        meter.show(int(float(part[-1]) * entry.size / 100))
            except BaseException:
                process.kill()
                raise
            error = process.stderr.read().decode(errors="replace").strip()
        if meter:
            meter.clear()
        if process.returncode:
            raise Damaged(f"{shown(entry.path)}: qemu-img convert ended with {process.returncode}: {error}")


def finish(fd, entry, mode):
    """Owner, mode and time, as far as who restores may set them."""
    with contextlib.suppress(PermissionError):
        os.fchown(fd, entry.uid, entry.gid)
    os.fchmod(fd, mode)
    os.utime(fd, ns=(entry.mtime_ns, entry.mtime_ns))


# --- what is written ---

@contextlib.contextmanager
def part_of(out, directory):
    """A hidden part beside OUT: (its path, its descriptor). It is gone when that has failed."""
    parent, base = os.path.split(out)
    part = os.path.join(parent, f".{base}.part")
    for _ in range(2):
        try:
            if directory:
                os.mkdir(part, 0o700)
                fd = os.open(part, DIRECTORY)
            else:
                fd = os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            break
        except FileExistsError:
            take_over(part)
    else:
        raise Failure(73, f"{part} is there again and again")
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield part, fd
    except BaseException:
        remove(part)
        raise
    finally:
        os.close(fd)


def take_over(part):
    """Removes what a killed run has left; another that is at work has locked it."""
    fd = os.open(part, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(fd), os.lstat(part)):
            remove(part)
    except BlockingIOError as error:
        raise Failure(75, f"another run is writing {part}") from error
    finally:
        os.close(fd)


def remove(part):
    if os.path.isdir(part) and not os.path.islink(part):
        shutil.rmtree(part, ignore_errors=True)
    else:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(part)


def publish(part, out):
    """PART becomes OUT, where nothing has come meanwhile."""
    if os.path.lexists(out):
        raise Failure(73, f"{out} exists")
    os.rename(part, out)
    fd = os.open(os.path.dirname(out), os.O_RDONLY | os.O_DIRECTORY)
    os.fsync(fd)
    os.close(fd)


def restore_tree(restorer, entries, top, fd):
    """ENTRIES, which are those below the directory TOP, into the new directory FD."""
    def below(entry):
        return b"." if entry.path == top else entry.path if top == b"." else entry.path[len(top) + 1:]
    directories = sorted((e for e in entries if e.kind == "dir"), key=lambda e: e.path)
    for entry in directories:
        if below(entry) != b".":
            in_directory(fd, below(entry), lambda at, name: os.mkdir(name, 0o700, dir_fd=at))
    for entry in entries:
        if entry.kind == "symlink":
            in_directory(fd, below(entry), lambda at, name, entry=entry: symlink(at, name, entry))
        elif entry.kind == "file":
            target = open_beneath_new(fd, below(entry))
            try:
                restorer.fill(entry, target)
            finally:
                os.close(target)
    for entry in reversed(directories):
        inner = os.dup(fd) if below(entry) == b"." else open_beneath(fd, below(entry), os.O_DIRECTORY)
        finish(inner, entry, entry.mode)
        os.fsync(inner)
        os.close(inner)


def in_directory(top, path, act):
    folder, _, name = path.rpartition(b"/")
    at = open_beneath(top, folder, os.O_DIRECTORY) if folder else os.dup(top)
    try:
        return act(at, name)
    finally:
        os.close(at)


def open_beneath_new(top, path):
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    return in_directory(top, path, lambda at, name: os.open(name, flags, 0o600, dir_fd=at))


def symlink(at, name, entry):
    os.symlink(entry.target, name, dir_fd=at)
    with contextlib.suppress(PermissionError):
        os.chown(name, entry.uid, entry.gid, dir_fd=at, follow_symlinks=False)
    os.utime(name, ns=(entry.mtime_ns, entry.mtime_ns), dir_fd=at, follow_symlinks=False)


def on_signal(number, _):
    for each in SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    raise Ended(number)


def restore(path, date, disk, out, job, quiet, dry):
    shelf = Shelf(path, job or None)
    folder = one_of(shelf, date)
    entries, top = chosen(folder, disk)
    single = next((e for e in entries if e.path == top and e.kind != "dir"), None)
    if os.path.lexists(out):
        raise Failure(73, f"{out} exists: it is left alone")
    if not os.path.isdir(os.path.dirname(out)):
        raise Failure(73, f"{os.path.dirname(out)}: no such directory")
    if single is not None and single.kind == "symlink":
        raise Failure(66, f"{disk} is a symlink to {shown(single.target)}")
    for entry in entries:
        if entry.kind == "file":
            close_all(shelf.open_chain(folder, entry))  # before anything is written
    count = sum(e.kind == "file" for e in entries)
    size = human(sum(e.size for e in entries))
    if dry:
        print(f"would restore {count} disks, {size}, of {folder.name} to {out}")
        return 0
    restorer = Restorer(shelf, folder, quiet)
    restorer.say(f"to be restored: {count} disks, {size}, of {folder.name}")
    for number in SIGNALS:
        signal.signal(number, on_signal)
    try:
        with part_of(out, single is None) as (part, fd):
            if single is None:
                check_names(entries)
                restore_tree(restorer, entries, top, fd)
            else:
                restorer.fill(single, fd)
            publish(part, out)
    except OSError as error:
        raise Failure(73, f"{out} cannot be written: {error}") from error
    except Ended as ended:
        print(f"fleece-backup: ended by signal {signal.Signals(ended.args[0]).name}", file=sys.stderr)
        return 128 + ended.args[0]
    restorer.say(f"restored: {out}")
    return 0


def check_names(entries):
    """Each name once, and each in a directory that is one of them."""
    seen = {}
    for entry in entries:
        if seen.setdefault(entry.path, entry) is not entry:
            raise Damaged(f"{shown(entry.path)} is there twice")


# --- list ---

def state_of(shelf, folder, verify):
    why = shelf.wrong_with(folder)
    if not why and verify:
        for entry in folder.files():
            with open(shelf.open_image(folder, entry), "rb", buffering=0) as f:
                if hash_of(f) != entry.image_sum:
                    return f"damaged: {shown(entry.image)} has not the sum of its manifest"
    return f"damaged: {why}" if why else "ok"


def listing(path, job, verify):
    shelf = Shelf(path, job or None)
    rows = [("NAME", "KIND", "PARENT", "DISKS", "BYTES", "STATE")]
    for name in sorted({*shelf.folders, *shelf.damaged}, key=lambda n: order(shelf, n)):
        folder = shelf.folders.get(name)
        if folder is None:
            rows.append((name, "?", "?", "?", "?", f"damaged: {shelf.damaged[name]}"))
            continue
        rows.append((name, "increment" if folder.parent else "full", folder.parent or "-", str(len(folder.files())),
                     str(sum(e.image_bytes for e in folder.files())), state_of(shelf, folder, verify)))
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    for row in rows:
        print("  ".join([*(text.ljust(width) for text, width in zip(row, widths)), row[5]]))
    return 74 if any(row[5].startswith("damaged") for row in rows) else 0


def order(shelf, name):
    match = NAME.fullmatch(name)
    return match[1], shelf.folders[name].number if name in shelf.folders else 0, name
