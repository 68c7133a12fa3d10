"""Sums of the frozen files and of what was written."""
import os
import stat
import subprocess
import sys

from .choice import ABOUT, read_list

CHUNK = 1 << 20
SHOWN = 5


def hash_of(stream):
    with subprocess.Popen(["xxhsum", "-q", "-H2", "-"], stdin=subprocess.PIPE if stream.fileno is None
                          else stream, stdout=subprocess.PIPE) as program:
        try:
            if stream.fileno is None:
                with program.stdin:
                    while data := stream.read(CHUNK):
                        program.stdin.write(data)
            out = program.stdout.read()
        except BaseException:
            program.kill()
            raise
    if program.returncode:
        raise ValueError("xxhsum failed")
    return out.split()[0].decode("ascii")


def hashes_of(fds):
    """The same of many files, by fewer processes."""
    found = []
    for at in range(0, len(fds), 100):
        some = fds[at:at + 100]
        done = subprocess.run(["xxhsum", "-q", "-H2", *(f"/proc/self/fd/{fd}" for fd in some)], pass_fds=some,
                              stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, check=False)
        lines = done.stdout.split(b"\n")[:-1]
        if done.returncode or len(lines) != len(some):
            raise ValueError("xxhsum failed")
        found += [entry.split()[0].decode("ascii") for entry in lines]
    return found


class Plain:
    """A stream without a descriptor of its own."""
    fileno = None

    def __init__(self, stream):
        self.read = stream.read


def line(digest, name):
    """As md5sum writes it: a backslash in front tells of a name with escapes."""
    escaped = name.replace(b"\\", b"\\\\").replace(b"\n", b"\\n")
    return (b"\\" if escaped != name else b"") + digest.encode() + b"  ./" + escaped + b"\n"


def tree_sums(root, list_file, written=False):
    known = {}
    for name in read_list(list_file):
        name = name[2:]
        path = os.path.join(os.fsencode(root), name)
        try:
            status = os.lstat(path)
        except FileNotFoundError:
            if not written:
                raise
            continue  # compare() tells of it
        if not stat.S_ISREG(status.st_mode):
            continue
        key = (status.st_dev, status.st_ino)
        if status.st_nlink == 1 or key not in known:
            with open(path, "rb", buffering=0) as f:
                known[key] = hash_of(f)
        yield line(known[key], name)


def tar_sums():
    import tarfile  # pylint: disable=import-outside-toplevel  # it takes its time, and few need it
    known = {}
    with tarfile.open(fileobj=sys.stdin.buffer, mode="r|", bufsize=CHUNK, errors="surrogateescape") as tar:
        for member in tar:
            name = os.fsencode(member.name.removeprefix("./"))
            if member.islnk():
                known[name] = known[os.fsencode(member.linkname.removeprefix("./"))]
            elif member.isreg():
                known[name] = hash_of(Plain(tar.extractfile(member)))
            else:
                continue
            if not name.endswith(b"/" + os.fsencode(ABOUT)):
                yield line(known[name], name)
    while sys.stdin.buffer.read(CHUNK):  # what follows the end
        pass


def sums(kind, *words):
    """KIND: tree, or written for one where files may be missing, or tar."""
    found = tar_sums() if kind == "tar" else tree_sums(*words, kind == "written")
    for entry in sorted(found, key=lambda e: e.split(b"  ", 1)[1]):
        sys.stdout.buffer.write(entry)


def compare(frozen, written):
    found = []
    for path in (frozen, written):
        with open(path, "rb") as f:
            found.append(dict(reversed(entry.rstrip(b"\n").split(b"  ", 1)) for entry in f))
    differ = [(name, found[1].get(name)) for name in sorted(set(found[0]) | set(found[1]))
              if found[0].get(name) != found[1].get(name)]
    for name, there in differ[:SHOWN]:
        what = "is not there" if there is None else "should not be there" if name not in found[0] else "differs"
        print(f"fleece-backup: {os.fsdecode(name)!r} {what}")
    if len(differ) > SHOWN:
        print(f"fleece-backup: and {len(differ) - SHOWN} more")
    return 1 if differ else 0
