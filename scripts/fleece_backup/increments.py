"""
Writing one dated folder of --incremental: see folders.py for what it is.

plan() decides, while the snapshot is there, what each disk's image is against; increment() writes the part;
verify_increment() compares what it reads as with the frozen files. Each goes by the draft of the manifest that
the one before has left beside the state.

An image is an increment only if all of this holds; otherwise it is a full one, and it is said why:
  - the newest folder of this job is there, its chain too, and it is neither its time for a full one
  - the snapshot of that folder is on the mount still, as it was made: by name and time of creation
  - no VM has had a chance to write past the mount since (the token in `past`, see state.sh)
  - fleecefs knows what has changed since, in this disk
  - that folder has this disk, wherever it was then, and its images are there
"""
import errno
import json
import os
import stat
import subprocess
import sys
import time

from .choice import read_list
from .folders import (DISK_SUMS, IMAGE_SUMS, MANIFEST, MOST_LINKS, OWN, Damaged, Entry, Failure, Folder, Shelf,
                      chain_name, close_all, header, shown, words)
from .keep import known_past, say_prune
from .processes import created_of
from .sums import hash_of, hashes_of, line

CHUNK = 1 << 20
GRAIN = 1 << 16  # holes are left where so much is zeros
ZEROS = bytes(GRAIN)


def complain(text):
    print(f"fleece-backup: {text}", file=sys.stderr, flush=True)


# --- what is to be written ---

def links_below(shelf, folder):
    count = 1
    while folder.parent and count <= MOST_LINKS:
        folder = shelf.above(folder)
        count += 1
    return count


def turn(shelf, job, every):
    """Why it is time for a full one; and whether that is as it should be."""
    folders = shelf.of_job(job)
    if not folders:
        return "the first one", True
    newest = folders[-1]
    try:
        count = links_below(shelf, newest)
    except Damaged as error:
        return str(error), False
    if every and count >= every:
        return f"--full-every {every}", True
    if count >= MOST_LINKS:
        return f"the chain has {count} already; --full-every would keep it short", True
    return None, True


def checkpoint_gone(top, folder, o):
    """Why the snapshot of FOLDER is of no use, or None."""
    if not top:
        return None
    snapshot = os.path.join(top, folder.name)
    now = created_of(snapshot)
    if now is None:
        return f"the checkpoint {folder.name} is not on the mount any more"
    if now != folder.created:
        return f"the snapshot {folder.name} is not the one that it was"
    if known_past(o["record"], folder.name) != o["past"]:
        return "a VM may have written to SOURCE past the mount since"
    state = os.getxattr(snapshot, "user.fleecefs.state").decode()
    if state == "torn":
        return f"the checkpoint {folder.name} is torn, by a loss of power"
    return None


def choose_parent(shelf, o, top):
    """The folder to be against, or None and why."""
    if o.get("why"):
        return None, o["why"], True
    why, expected = turn(shelf, o["job"], int(o["every"]))
    if why:
        return None, why, expected
    folder = shelf.of_job(o["job"])[-1]
    why = checkpoint_gone(top, folder, o)
    return (None, why, False) if why else (folder, "", True)


def image_of(root, since, path):
    """The name of the image of the file PATH: as fusefs's since_names.c has it."""
    folder, _, base = path.rpartition(b"/")
    name = base + b".qcow2"
    while len(name) <= 255 and is_directory(os.path.join(root, folder, name)):
        name += b".qcow2"
    if len(name) > 255:
        found = [n for n in os.listdir(os.path.join(since, folder)) if len(n) == 255 and n.startswith(base[:232] + b"~")]
        if len(found) != 1:
            raise Failure(73, f"{shown(path)}: two names that are so long and so alike: leave one out with --exclude")
        name = found[0]
    return folder + b"/" + name if folder else name


def is_directory(path):
    try:
        return stat.S_ISDIR(os.lstat(path).st_mode)
    except OSError:
        return False


class Planner:
    def __init__(self, o, shelf, folder, parent):
        self.shelf, self.folder, self.parent = shelf, folder, parent
        self.root = os.fsencode(o["snapshot"])
        self.full = os.path.join(self.root, b".since/-")
        self.since = parent and os.path.join(self.root, b".since", parent.name.encode())
        self.before = {e.path: e for e in parent.files()} if parent else {}
        self.refused = []
        self.said = []

    def entry(self, path):
        status = os.lstat(os.path.join(self.root, path) if path != b"." else self.root)
        kind = {stat.S_IFREG: "file", stat.S_IFDIR: "dir", stat.S_IFLNK: "symlink"}.get(stat.S_IFMT(status.st_mode))
        if kind is None:
            self.said.append(f"left out, for it is no file: {shown(path)}")
            return
        if kind == "dir" and path in map(str.encode, OWN):
            raise Failure(73, f"{shown(path)}: a directory of this name has no place in a folder: leave it out with --exclude")
        entry = Entry(kind, path, stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid, status.st_mtime_ns)
        if kind == "symlink":
            entry.target = os.readlink(os.path.join(self.root, path))
        if kind == "file":
            entry.size = status.st_size
            entry.image = image_of(self.root, self.full, path)
            self.settle(entry)
        self.folder.add(entry)

    def settle(self, entry):
        """What its image is against."""
        if self.parent:
            try:
                self.against(entry)
                return
            except Damaged as error:
                self.refused.append(f"{shown(entry.path)} is written in full: {error}")
            except OSError as error:
                if error.errno != errno.EIO:
                    raise
                self.refused.append(f"{shown(entry.path)} is written in full: fleecefs does not know what changed in it "
                                    f"since {self.parent.name}")
        entry.parent = None
        entry.image_bytes = os.stat(os.path.join(self.full, entry.image)).st_size

    def against(self, entry):
        image = os.path.join(self.since, entry.image)
        entry.image_bytes = os.stat(image).st_size
        try:
            old = os.getxattr(image, "user.fleecefs.old_path")
        except OSError as error:
            if error.errno != errno.ENODATA:
                raise
            return  # a new disk
        before = self.before.get(old)
        if before is None:
            raise Damaged(f"{self.parent.name} has not got it")
        why = self.shelf.why_not(self.parent, before)
        if why:
            raise Damaged(why)
        entry.parent = before.image
        ranges = os.stat(os.path.join(self.since, entry.path))
        if before.sum and before.size == entry.size == ranges.st_size and ranges.st_blocks == 0 and entry.size:
            entry.sum = before.sum  # for nothing has changed in it


def plan(*arguments):
    try:
        make_plan(words(arguments))
    except OSError as error:
        raise Failure(73, f"what is to be written is not known: {error}") from error


def make_plan(o):
    """Prints how many bytes will be written, then what there is to say."""
    shelf = Shelf(o["dir"], o["job"])
    top, name = os.path.split(o["snapshot"])
    parent, why, expected = choose_parent(shelf, o, top)
    for damaged, what in shelf.damaged.items():
        complain(f"{damaged}: {what}")
    folders = shelf.of_job(o["job"])
    folder = Folder(name, folders[-1].number + 1 if folders else 1, os.fsencode(o["source"]))
    folder.created = created_of(o["snapshot"])
    folder.parent = parent and parent.name
    planner = Planner(o, shelf, folder, parent)
    paths = [path[2:] or b"." for path in read_list(o["list"])]
    said = planner.said
    for path in paths:
        planner.entry(path)
    for refused in planner.refused:
        complain(refused)
    if parent and all(e.parent is None for e in folder.files()):
        folder.parent, why = None, f"no disk can be compared with {parent.name}"
        expected = not planner.refused
    folder.why = why
    if folder.parent:
        said.append(f"an increment against {folder.parent}")
    elif expected:
        said.append(f"a full backup: {why}")
    else:
        complain(f"a full backup: {why}")
    with open(o["draft"], "wb") as f:
        for entry in folder.files():
            entry.image_sum = "0" * 32
        f.write(folder.text())
    print("\n".join([str(sum(e.image_bytes for e in folder.files())), *said]))


def forecast(*arguments):
    """For --dry-run. top is empty where nothing is mounted."""
    o = words(arguments)
    if not os.path.isdir(o["dir"]):
        print("nwould make it, with a full backup")
        return
    shelf = Shelf(o["dir"], o["job"])
    parent, why, _ = choose_parent(shelf, o, o["top"])
    print(f"nwould write an increment against {parent.name}" if parent else f"nwould write a full backup: {why}")
    folders = shelf.of_job(o["job"])
    new = Folder(f"{o['job']}-{time.strftime('%Y-%m-%dT%H-%M-%S')}.999999", folders[-1].number + 1 if folders else 1, b"")
    new.parent = parent and parent.name
    shelf.folders[new.name] = new
    if o["keep"] != "0":
        say_prune(shelf, o["job"], o["keep"], o["every"])


# --- writing it ---

class Brake:
    """Not more than RATE bytes a second; 0: as fast as it goes."""

    def __init__(self, rate):
        self.rate, self.done, self.began = rate, 0, time.monotonic()

    def passed(self, count):
        self.done += count
        if self.rate:
            time.sleep(max(0, self.done / self.rate - (time.monotonic() - self.began)))


def copy_sparse(source, target, brake):
    """Returns how many bytes came."""
    size = 0
    while data := os.read(source, CHUNK):
        for at in range(0, len(data), GRAIN):
            piece = data[at:at + GRAIN]
            if piece != ZEROS[:len(piece)]:
                view = memoryview(piece)
                while view:
                    view = view[os.pwrite(target, view, size + at + len(piece) - len(view)):]
        size += len(data)
        brake.passed(len(data))
    os.ftruncate(target, size)
    return size


class Writer:
    def __init__(self, o):
        self.o = o
        self.root = os.fsencode(o["snapshot"])
        self.brake = Brake(int(o.get("rate", "0")))
        with open(o["draft"], "rb") as f:
            self.folder = Folder.of(os.path.basename(o["snapshot"]), json.load(f))
        self.folder.place = os.path.basename(o["part"])
        self.part = os.fsencode(o["part"])
        self.shelf = Shelf(o["dir"], self.folder.job)
        self.shelf.folders[self.folder.name] = self.folder

    def write(self):
        os.mkdir(self.part, 0o700)
        for entry in self.folder.entries:
            if entry.kind == "dir" and entry.path != b".":
                os.mkdir(os.path.join(self.part, entry.path), 0o700)
        files = self.folder.files()
        for entry in files:
            self.image(entry)
            self.look(entry)
        for at in range(0, len(files), 100):
            self.sums(files[at:at + 100])
        self.seal()

    def sums(self, files):
        fds = [os.open(os.path.join(self.part, e.image), os.O_RDONLY | os.O_CLOEXEC) for e in files]
        try:
            for entry, found in zip(files, hashes_of(fds)):
                entry.image_sum = found
        finally:
            close_all(fds)

    def image(self, entry):
        target = os.open(os.path.join(self.part, entry.image), os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            if entry.parent is not None:
                try:
                    self.copy(entry, target, self.folder.parent)
                except OSError as error:
                    if error.errno != errno.EIO:
                        raise
                    complain(f"{shown(entry.path)} is written in full: what changed in it is not known any more")
                    entry.parent = entry.sum = None
            if entry.parent is None:
                os.ftruncate(target, 0)
                self.copy(entry, target, "-")
            else:
                self.lead_to(entry, target)
            entry.image_bytes = os.fstat(target).st_size
            keep_owner(target, entry, entry.mode & 0o666)
            os.fsync(target)
        finally:
            os.close(target)

    def copy(self, entry, target, against):
        path = os.path.join(self.root, b".since", os.fsencode(against), entry.image)
        source = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            expected = os.fstat(source).st_size
            got = copy_sparse(source, target, self.brake)
            if got != expected:
                raise Failure(74, f"{shown(path)}: {got} bytes were read of {expected}")
        finally:
            os.close(source)

    def lead_to(self, entry, target):
        """The mount may have another pattern for names of older images (backing=) than that of folders."""
        path = os.path.join(self.part, entry.image)
        wanted = self.folder.backing(entry)
        if header(target)[1] != wanted:
            run_tool(["qemu-img", "rebase", "-q", "-u", "-f", "qcow2", "-F", "qcow2", "-b", wanted, path])

    def look(self, entry):
        """It is one that reads, and leads where it should."""
        path = os.path.join(self.part, entry.image)
        for fd in self.shelf.open_chain(self.folder, entry):
            os.close(fd)
        # by its own name, as a user would
        run_tool(["qemu-img", "check", "-q", "-f", "qcow2", path])

    def seal(self):
        """Manifest, sums, modes; and all of it on storage."""
        if all(e.parent is None for e in self.folder.files()):
            self.folder.why = self.folder.why or "no disk could be compared"
            self.folder.parent = None
        for name, text in ((MANIFEST, self.folder.text()), (IMAGE_SUMS, b""), (DISK_SUMS, self.disk_sums())):
            if name == IMAGE_SUMS:
                text = self.image_sums()
            if text is not None:
                self.own_file(name, text)
        for entry in sorted((e for e in self.folder.entries if e.kind == "dir"), key=lambda e: e.path, reverse=True):
            fd = os.open(os.path.join(self.part, entry.path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            keep_owner(fd, entry, entry.mode & 0o777 | 0o700)
            os.fsync(fd)
            os.close(fd)

    def own_file(self, name, text):
        path = os.path.join(self.part, name.encode())
        with open(path + b".new", "wb") as f:
            f.write(text)
            f.flush()
            os.fchmod(f.fileno(), 0o644)
            os.fsync(f.fileno())
        os.replace(path + b".new", path)

    def image_sums(self):
        with open(os.path.join(self.part, MANIFEST.encode()), "rb") as f:
            lines = [line(hash_of(f), MANIFEST.encode())]
        return b"".join(lines + [line(e.image_sum, e.image) for e in self.folder.files()])

    def disk_sums(self):
        files = self.folder.files()
        if not files or any(e.sum is None for e in files):
            return None
        return b"".join(line(e.sum, e.path) for e in files)

    def verify(self):
        for entry in self.folder.files():
            fds = self.shelf.open_chain(self.folder, entry)
            frozen = os.open(os.path.join(self.root, entry.path), os.O_RDONLY | os.O_CLOEXEC)
            try:
                for fd in fds[:1]:  # what is in the cache says little of what is on storage
                    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
                self.compare(entry, fds, frozen)
            finally:
                close_all([*fds, frozen])
        self.seal()

    def compare(self, entry, fds, frozen):
        if os.fstat(frozen).st_size != entry.size:
            raise Failure(74, f"{shown(entry.path)} is {os.fstat(frozen).st_size} bytes long, not {entry.size}")
        raw = json.dumps({"driver": "raw", "file": {"driver": "file", "filename": f"/proc/self/fd/{frozen}"}})
        if entry.size:
            run_tool(["qemu-img", "compare", "-q", chain_name(fds), f"json:{raw}"], [*fds, frozen],
                     f"{shown(entry.path)}: what was written is not what was frozen")
        with open(os.dup(frozen), "rb", buffering=0) as f:
            found = hash_of(f)
        if entry.sum not in (None, found):
            raise Failure(74, f"{shown(entry.path)} has changed, and fleecefs did not know")
        entry.sum = found


def keep_owner(fd, entry, mode):
    try:
        os.fchown(fd, entry.uid, entry.gid)
    except PermissionError:
        pass  # an ordinary user's backup is that user's
    os.fchmod(fd, mode)


def run_tool(command, fds=(), what=None):
    done = subprocess.run(command, pass_fds=fds, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        said = done.stdout.decode(errors="replace").strip()
        name = " ".join(command[:2])
        raise Failure(74, f"{what or shown(command[-1])}: {name} ended with {done.returncode}{': ' if said else ''}{said}")


def increment(*arguments):
    write(Writer.write, words(arguments))


def verify_increment(*arguments):
    write(Writer.verify, words(arguments))


def write(act, o):
    try:
        act(Writer(o))
    except OSError as error:
        raise Failure(73, f"no folder is written in {o['dir']}: {error}") from error
