"""
The dated folders that --incremental makes, and what of them may be believed.

  DIR/NAME-DATE/manifest.json   what was frozen, and which image has it: see Folder.text()
  DIR/NAME-DATE/images.xxh128   sums of the manifest and of the images, for xxhsum -c
  DIR/NAME-DATE/disks.xxh128    sums of the frozen files, if all are known, for xxhsum -c where they are restored
  DIR/NAME-DATE/REL.qcow2       a full image, or one against an image in the parent folder
  DIR/.NAME-DATE.part, .gone    a folder that is being written, or removed

A folder's parent is the one that was published before it; number counts them, so that order does not hang on
clocks. An image is against one in the parent or against none, so a disk's chain is that of its folders or
ends sooner.

Nothing that is read from DIR is believed before it was looked at: names are relative and have no "..", no symlink
is followed, an image is a regular file of the size that was recorded, its header leads to the one image
that the manifest names, or to none. And QEMU is not given names to follow: a chain is handed to it as
descriptors, each with its format and what lies below it (chain_name()), and what headers say is not used.
"""
import errno
import json
import os
import re
import stat
import struct

VERSION = 1
FORMAT = "fleece-backup increments"
MANIFEST, IMAGE_SUMS, DISK_SUMS = "manifest.json", "images.xxh128", "disks.xxh128"
OWN = (MANIFEST, IMAGE_SUMS, DISK_SUMS)
DATE = r"\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d(?:\.\d{1,6})?"
NAME = re.compile(rf"([A-Za-z0-9_][A-Za-z0-9._-]*)-({DATE})")
MOST_LINKS = 200  # of a chain: more is more than fleecefs's own reader of images follows
MOST_BYTES = 256 << 20  # of a manifest
DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
QCOW2 = struct.Struct(">4sIQIIQI36xQ")  # up to the incompatible features


class Failure(ValueError):
    """With fleece-backup's exit status."""

    def __init__(self, status, text):
        super().__init__(text)
        self.status = status


class Damaged(Failure):
    def __init__(self, text):
        super().__init__(74, text)


def shown(name):
    """A name for a message, in one line."""
    text = os.fsdecode(name)
    return text if text.isprintable() else repr(text)


def valid_path(path):
    return 0 < len(path) < 4096 and b"\0" not in path and all(
        part not in (b"", b".", b"..") and len(part) < 256 for part in path.split(b"/"))


def open_beneath(top, path, flags=os.O_RDONLY):
    """Opens PATH below the directory TOP; through no symlink, and without waiting for a FIFO's other end."""
    fd = os.dup(top)
    try:
        *way, last = path.split(b"/")
        for name in way:
            inner = os.open(name, DIRECTORY, dir_fd=fd)
            os.close(fd)
            fd = inner
        return os.open(last, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=fd)
    finally:
        os.close(fd)


def read_regular(top, path, most):
    fd = open_beneath(top, path)
    with open(fd, "rb") as f:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_size > most:
            raise Damaged(f"{shown(path)} is not a file of a size that can be")
        return f.read(status.st_size)


def name_fields(field, name):
    """As status.json has names: as text, and in hexadecimal where they are none."""
    try:
        return {field: name.decode()}
    except UnicodeDecodeError:
        return {field: name.decode(errors="replace"), f"{field}_hex": name.hex()}


def field_of(found, field, kind, check=lambda value: True):
    value = found.get(field)
    if isinstance(value, bool) != (kind is bool) or not isinstance(value, kind) or not check(value):
        raise ValueError(f"no right {field}")
    return value


def name_of(found, field):
    if f"{field}_hex" in found:
        return bytes.fromhex(field_of(found, f"{field}_hex", str))
    return field_of(found, field, str).encode()


def path_of(found, field):
    path = name_of(found, field)
    if not valid_path(path):
        raise ValueError(f"{shown(path)} is no path that may be")
    return path


def number_of(found, field, least=0, most=(1 << 63) - 1):
    return field_of(found, field, int, lambda value: least <= value <= most)


def sum_of(found, field):
    return field_of(found, field, str, re.compile("[0-9a-f]{32}").fullmatch)


class Entry:
    """A frozen file, directory (kind "dir") or symlink. path is b"." for the whole tree."""

    def __init__(self, kind, path, mode, uid, gid, mtime_ns):
        self.kind, self.path, self.mode, self.uid, self.gid, self.mtime_ns = kind, path, mode, uid, gid, mtime_ns
        self.target = None  # a symlink's
        self.size = 0
        self.image = self.image_bytes = self.image_sum = None  # a file's
        self.parent = None  # the path of the image in the parent folder that it is against
        self.sum = None  # of the frozen content

    @classmethod
    def of(cls, found):
        kind = field_of(found, "type", str, ("file", "dir", "symlink").__contains__)
        path = name_of(found, "path")
        if path != b"." or kind != "dir":
            path_of(found, "path")
        self = cls(kind, path, number_of(found, "mode", most=0o7777), number_of(found, "uid", most=(1 << 32) - 2),
                   number_of(found, "gid", most=(1 << 32) - 2), number_of(found, "mtime_ns", least=-(1 << 63)))
        if kind == "symlink":
            self.target = name_of(found, "target")
            if not self.target or b"\0" in self.target:
                raise ValueError("a symlink to nothing")
        if kind == "file":
            self.size = number_of(found, "size")
            self.image = path_of(found, "image")
            self.image_bytes = number_of(found, "image_bytes")
            self.image_sum = sum_of(found, "image_xxh128")
            self.parent = path_of(found, "parent_image") if "parent_image" in found else None
            self.sum = sum_of(found, "xxh128") if "xxh128" in found else None
        return self

    def fields(self):
        out = {"type": self.kind, **name_fields("path", self.path), "mode": self.mode, "uid": self.uid,
               "gid": self.gid, "mtime_ns": self.mtime_ns}
        if self.kind == "symlink":
            out.update(name_fields("target", self.target))
        if self.kind == "file":
            out.update({"size": self.size, **name_fields("image", self.image), "image_bytes": self.image_bytes,
                        "image_xxh128": self.image_sum})
            if self.parent is not None:
                out.update(name_fields("parent_image", self.parent))
            if self.sum is not None:
                out["xxh128"] = self.sum
        return out


class Folder:
    """One of them. place: its name in DIR, which differs from name while it is a part."""

    def __init__(self, name, number, source):
        match = NAME.fullmatch(name)
        self.name = self.place = name
        self.job, self.date = match[1], match[2]
        self.number, self.source = number, source
        self.parent = None  # the name of the folder that images are against; None: it is a full one
        self.why = ""  # it is a full one
        self.created = ""  # of the snapshot, which has the folder's name
        self.entries = []
        self.images = {}

    @classmethod
    def of(cls, name, found):
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            raise ValueError("not a manifest of fleece-backup")
        if found.get("version") != VERSION:
            raise ValueError(f"version {found.get('version')!r} is not known to this fleece-backup")
        if field_of(found, "name", str) != name:
            raise ValueError(f"it is the manifest of {found['name']!r}")
        self = cls(name, number_of(found, "number", least=1), name_of(found, "source"))
        if found.get("parent") is not None:
            self.parent = field_of(found, "parent", str, NAME.fullmatch)
        self.created = field_of(found, "created", str, re.compile(r"-?[0-9]+\.[0-9]{9}").fullmatch)
        self.why = field_of(found, "why", str)
        for item in field_of(found, "entries", list):
            self.add(Entry.of(item))
        return self

    def add(self, entry):
        if entry.kind == "file":
            if entry.image in self.images or entry.parent is not None and self.parent is None:
                raise ValueError(f"{shown(entry.path)} has an image that cannot be")
            self.images[entry.image] = entry
        self.entries.append(entry)

    def files(self):
        return [e for e in self.entries if e.kind == "file"]

    def text(self):
        head = {"format": FORMAT, "version": VERSION, "name": self.name, "number": self.number,
                "kind": "increment" if self.parent else "full", "parent": self.parent, "why": self.why,
                **name_fields("source", self.source), "created": self.created}
        head["entries"] = [e.fields() for e in self.entries]
        return json.dumps(head, indent=1, ensure_ascii=True).encode() + b"\n"

    def backing(self, entry):
        """What the header of its image has to lead to."""
        if entry.parent is None:
            return b""
        return b"../" * (1 + entry.image.count(b"/")) + self.parent.encode() + b"/" + entry.parent


def header(fd):
    """Of a qcow2 image: the disk's size, and the backing file's name."""
    head = os.pread(fd, QCOW2.size, 0)
    if len(head) < QCOW2.size:
        raise ValueError("it is cut off")
    magic, version, at, length, _, size, crypt, incompatible = QCOW2.unpack(head)
    if magic != b"QFI\xfb" or version != 3:
        raise ValueError("it is not a qcow2 image of version 3")
    if crypt or incompatible:
        raise ValueError("it has features that fleece-backup does not write")
    if not at:
        return size, b""
    name = os.pread(fd, length, at) if 0 < length < 1024 and at < 1 << 22 else b""
    if not name or len(name) < length:
        raise ValueError("its backing file has no name")
    return size, name


class Shelf:
    """DIR, with its folders."""

    def __init__(self, path, job=None, only=None):
        self.path = path
        try:
            self.fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise Failure(66, f"{path}: {error.strerror}") from error
        self.folders, self.damaged = {}, {}
        self.reasons = {}
        for name in sorted(os.listdir(self.fd)):
            match = NAME.fullmatch(name)
            if match and job in (None, match[1]) and only in (None, name):
                self.read(name)

    def read(self, name):
        try:
            data = read_regular(self.fd, f"{name}/{MANIFEST}".encode(), MOST_BYTES)
            self.folders[name] = Folder.of(name, json.loads(data))
        except (OSError, ValueError, RecursionError) as error:
            if isinstance(error, FileNotFoundError) and not self.there(name):
                return  # it went meanwhile
            what = error.strerror if isinstance(error, OSError) else error
            self.damaged[name] = f"its manifest cannot be used: {what}"

    def there(self, name):
        try:
            os.lstat(name, dir_fd=self.fd)
            return True
        except FileNotFoundError:
            return False

    def of_job(self, job):
        """Its folders, oldest first."""
        return sorted((f for f in self.folders.values() if f.job == job), key=lambda f: (f.number, f.name))

    def jobs(self):
        return sorted({f.job for f in self.folders.values()})

    def above(self, folder):
        """The folder that FOLDER's images are against."""
        older = self.folders.get(folder.parent)
        if older is None:
            raise Damaged(f"{folder.parent}: {self.damaged.get(folder.parent, 'it is not there')}")
        if older.job != folder.job or older.number >= folder.number:
            raise Damaged(f"{folder.name}: its parent cannot be {folder.parent}")
        return older

    def links(self, folder, entry):
        """The chain of ENTRY's image, newest first: pairs of a folder and an entry."""
        found = [(folder, entry)]
        while entry.parent is not None:
            older = self.above(folder)
            below = older.images.get(entry.parent)
            if below is None:
                raise Damaged(f"{older.name} has no image {shown(entry.parent)}")
            folder, entry = older, below
            found.append((folder, entry))
            if len(found) > MOST_LINKS:
                raise Damaged(f"{found[0][0].name}: a chain of more than {MOST_LINKS} images")
        return found

    def open_image(self, folder, entry):
        """A descriptor of ENTRY's image, which is what the manifest says that it is."""
        where = f"{self.path}/{folder.place}/{shown(entry.image)}"
        try:
            fd = open_beneath(self.fd, os.fsencode(folder.place) + b"/" + entry.image)
        except OSError as error:
            what = "it is, or lies behind, a symlink" if error.errno in (errno.ELOOP, errno.ENOTDIR) else error.strerror
            raise Damaged(f"{where}: {what}") from error
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode) or status.st_size != entry.image_bytes:
                raise ValueError(f"it has {status.st_size} bytes, not the {entry.image_bytes} of its manifest")
            size, backing = header(fd)
            if size != -(-entry.size // 512) * 512:
                raise ValueError(f"the disk in it has {size} bytes")
            if backing != folder.backing(entry):
                raise ValueError(f"it leads to {shown(backing) or 'nothing'}")
        except ValueError as error:
            os.close(fd)
            raise Damaged(f"{where}: {error}") from error
        return fd

    def open_chain(self, folder, entry):
        """The same of the whole chain, newest first."""
        fds = []
        try:
            for link in self.links(folder, entry):
                fds.append(self.open_image(*link))
        except BaseException:
            close_all(fds)
            raise
        return fds

    def why_not(self, folder, entry):
        """What is wrong with its chain, or None. A look at the files, not at their content."""
        try:
            links = self.links(folder, entry)
        except Damaged as error:
            return str(error)
        for link in links:
            key = (link[0].name, link[1].image)
            if key not in self.reasons:
                self.reasons[key] = None
                try:
                    os.close(self.open_image(*link))
                except Damaged as error:
                    self.reasons[key] = str(error)
            if self.reasons[key]:
                return self.reasons[key]
        return None

    def wrong_with(self, folder):
        """The first thing that is wrong with FOLDER, or None."""
        if folder.parent:
            try:
                self.above(folder)
            except Damaged as error:
                return str(error)
        return next((why for why in (self.why_not(folder, e) for e in folder.files()) if why), None)


def close_all(fds):
    for fd in fds:
        os.close(fd)


def chain_name(fds):
    """What QEMU opens a chain by: descriptors, newest first, with nothing left to be looked up."""
    node = None
    for fd in reversed(fds):
        node = {"driver": "qcow2", "file": {"driver": "file", "filename": f"/proc/self/fd/{fd}"}, "backing": node}
    return "json:" + json.dumps(node)


def words(arguments):
    """KEY=VALUE words as a dictionary."""
    return dict(word.split("=", 1) for word in arguments)
