"""
Which disks of a VM lie below SOURCE, and whether each can be moved.

A disk here is a node of driver `file` that is open for writing, with the one edge by which it is
used: that of a format or filter node above it (which blockdev-reopen turns to another node), or that
of a device (which a change of its property `drive` turns). Nodes that nobody may write to are left alone.
"""
import os
import stat
from collections import namedtuple

from .options import Definitions
from .talk import CommandError, Refused

FORMATS = ("raw", "qcow2", "throttle")  # right above the file; copy-on-read cannot be reopened
QEMU_WRITES, QEMU_UNSHARES_WRITING = 101, 201  # the bytes of a file whose locks say so
MIGRATING = ("setup", "active", "device", "pre-switchover", "wait-unplug", "postcopy-active")
# From this QEMU on a disk that may grow, or that an iothread serves, can be turned while the VM runs; why
# not before is said in move.py.
TURNS_RUNNING = 9

Edge = namedtuple("Edge", "parent kind name writes grows")


class Graph:
    """The nodes, and who uses whom."""

    def __init__(self, monitor):
        self.nodes = {n["node-name"]: n for n in monitor.execute("query-named-block-nodes")}
        graph = monitor.execute("x-debug-query-block-graph")
        names = {n["id"]: (n["type"], n["name"]) for n in graph["nodes"]}
        self.users, self.children = {}, {}
        for e in graph["edges"]:
            kind, parent = names[e["parent"]]
            child = names[e["child"]][1]
            edge = Edge(parent, kind, e["name"], "write" in e["perm"], "resize" in e["perm"])
            self.users.setdefault(child, []).append(edge)
            if kind == "block-driver":
                self.children.setdefault(parent, {})[e["name"]] = child

    def above(self, name):
        """Every edge on the way from a node up to whoever uses it."""
        for edge in self.users.get(name, ()):
            yield edge
            if edge.kind == "block-driver":
                yield from self.above(edge.parent)

    def child(self, disk):
        """What the disk's user uses now; None if there is no such user any more."""
        if disk["kind"] == "reopen":
            return self.children.get(disk["parent"], {}).get("file")
        for child, edges in self.users.items():
            for edge in edges:
                if edge.kind == "block-backend" and edge.parent == disk["parent"]:
                    return child
        return None

    def filename(self, name):
        """Of the file that a node is stored in."""
        while "file" in self.children.get(name, {}):
            name = self.children[name]["file"]
        return self.nodes[name]["image"]["filename"]

    def length(self, name):
        return self.nodes[name]["image"]["virtual-size"]


def below(path, folder):
    return path.startswith(folder.rstrip("/") + "/")


def check_machine(monitor):
    state = monitor.execute("query-status")["status"]
    if state in ("inmigrate", "postmigrate", "finish-migrate", "save-vm", "restore-vm", "colo"):
        raise Refused(f"the VM is in state {state}: wait until that is over")
    if monitor.execute("query-migrate").get("status") in MIGRATING:
        raise Refused("the VM is being migrated: wait until that is over")


def open_files(pid):
    """The regular files that a process has open: ((device, inode), path, flags, locks)."""
    out, base = [], f"/proc/{pid}"
    try:
        names = os.listdir(f"{base}/fd")
    except OSError as error:
        raise Refused(f"QEMU's open files cannot be seen ({error.strerror}): be root, on the same "
                      "machine") from None
    for name in names:
        try:
            status = os.stat(f"{base}/fd/{name}")
            if not stat.S_ISREG(status.st_mode):
                continue
            path = os.readlink(f"{base}/fd/{name}")
            with open(f"{base}/fdinfo/{name}", encoding="ascii") as f:
                info = [line.split(":", 1) for line in f]
        except OSError:  # closed meanwhile, or of a dead mount
            continue
        flags = next(int(value, 8) for key, value in info if key == "flags")
        locks = [value for key, value in info if key == "lock"]
        out.append(((status.st_dev, status.st_ino), path, flags, locks))
    return out


class Finder:
    """Looks for the disks of one VM below one SOURCE."""

    def __init__(self, monitor, source, options=None):
        self.monitor = monitor
        self.source = os.path.realpath(source)
        if not os.path.isdir(self.source):
            raise Refused(f"{source}: no such directory")
        check_machine(monitor)
        self.graph = Graph(monitor)
        self.defined = Definitions(monitor, options)
        self.iothreads = bool(monitor.execute("query-iothreads"))
        self.devices = {}
        for block in monitor.execute("query-block"):
            if block.get("qdev"):
                self.devices[block["qdev"]] = block

        self.written = {inode: path for inode, path, flags, _ in open_files(self.defined.pid)
                        if flags & os.O_ACCMODE}

    def path_of(self, node):
        return os.path.realpath(os.path.join(self.defined.cwd, node["image"]["filename"]))

    def disks(self):
        """Each as a dict that says all about the move, in the order of the paths."""
        found = []
        for name, node in self.graph.nodes.items():
            used = any(edge.writes for edge in self.graph.users.get(name, ()))
            if node["drv"] != "file" or node["ro"] or not used:
                continue
            if node["image"]["filename"].startswith("/dev/fdset/"):
                self._check_fdset(name)
                continue
            path = self.path_of(node)
            if below(path, self.source):
                found.append(self._disk(name, node, path))
        if not found:
            raise Refused(f"no disk of this VM that it writes to lies below {self.source}")
        return sorted(found, key=lambda disk: disk["path"])

    def _check_fdset(self, name):
        """It was given as a descriptor: only /proc tells of what."""
        paths = [self.path_of(n) for n in self.graph.nodes.values()]
        for path in self.written.values():
            if below(path, self.source) and path not in paths:
                raise Refused(f"{path}: node {name} has it by /dev/fdset alone, and may not be able "
                              "to open it: give its path as filename")

    def _disk(self, name, node, path):
        def refuse(why):
            raise Refused(f"{path} (node {name}): {why}")
        try:
            status = os.stat(path)
        except OSError as error:
            refuse(error.strerror)
        if (status.st_dev, status.st_ino) not in self.written:
            refuse("the file by this name is not the one that QEMU has open: it was replaced, or QEMU "
                   "sees other mounts than this program")
        edges = self.graph.users[name]
        for above in self.graph.above(name):
            if above.kind == "block-job":
                refuse(f"the block job {above.parent} is at work on it: wait for its end")
        if len(edges) > 1:
            refuse("it is used by more than one: " + ", ".join(e.parent or e.kind for e in edges))
        edge = edges[0]
        if node.get("dirty-bitmaps"):
            refuse("it has dirty bitmaps: make those of the node above it")
        if node.get("write_threshold"):
            refuse("it has a write threshold, which would be lost")
        held = (edge.grows or self.iothreads) and self.monitor.major < TURNS_RUNNING
        disk = {"path": path, "rel": os.path.relpath(path, self.source), "node": name,
                "parent": edge.parent, "grows": edge.grows, "held": held}
        if edge.kind == "block-driver":
            self._below_format(disk, edge, refuse)
        elif edge.kind == "block-backend" and edge.parent in self.devices:
            self._below_device(disk, refuse)
        else:
            refuse(f"it is used by {edge.parent or edge.kind}, which is neither a format nor a device")
        self._check_options(disk["options"], node, path, refuse)
        if disk["held"]:
            for above in self.graph.above(name):
                if above.kind == "block-backend" and above.writes and \
                        above.parent not in self.devices:
                    refuse("it is exported for writing: with this QEMU, end that export first, or "
                           "use a newer QEMU (9.0)")
        return disk

    UNKNOWN = ("was not defined by -blockdev on QEMU's command line, so its options cannot be known: "
               "define it so, instead of by -drive; or, if it was plugged in later, name by --options "
               "a JSON file with what was given to blockdev-add")

    def _below_format(self, disk, edge, refuse):
        parent = self.graph.nodes.get(edge.parent)
        if edge.name != "file":
            refuse(f"it is the '{edge.name}' of node {edge.parent}, and only a 'file' can be moved")
        if edge.parent.startswith("#"):
            refuse("the node above it has no name: define it by -blockdev (not -drive), with a node-name")
        options = self.defined.nodes.get(edge.parent)
        if not options:
            refuse(f"the node above it, {edge.parent}, {self.UNKNOWN}")
        if parent["drv"] not in FORMATS:
            refuse(f"its format is {parent['drv']}; those that can be moved: {', '.join(FORMATS)}")
        disk["kind"] = "reopen"
        disk["options"] = self.defined.child(options) or refuse(f"it {self.UNKNOWN}")
        self._check_options(options, parent, None, refuse)
        # the children that stay are referred to by name
        disk["parent_options"] = {
            **{k: v for k, v in options.items() if not isinstance(v, dict) or "driver" not in v},
            **self.graph.children[edge.parent]}

    def _below_device(self, disk, refuse):
        disk["kind"] = "drive"
        path = disk["parent"]
        if not path.startswith("/"):
            path = f"/machine/peripheral/{path}"
        if path.endswith("/virtio-backend"):
            path = path[:-len("/virtio-backend")]
        if not path.startswith("/machine/peripheral/"):
            refuse(f"its device {path} has no name: give it an id")
        disk["device"] = path
        disk["options"] = self.defined.nodes.get(disk["node"]) or refuse(f"it {self.UNKNOWN}")
        if disk["grows"]:
            refuse(f"its device {path} may change its length: put a format node between")

    def _check_options(self, options, node, path, refuse):
        """Are these, by what QEMU does tell, the options that the node has now?"""
        cache = options.get("cache", {})
        wrong = [key for key, want, have in (
            ("driver", options["driver"], node["drv"]),
            ("cache.direct", bool(cache.get("direct")), node["cache"]["direct"]),
            ("cache.no-flush", bool(cache.get("no-flush")), node["cache"]["no-flush"]),
            ("detect-zeroes", options.get("detect-zeroes", "off"), node["detect_zeroes"]),
            ("filename", path and os.path.realpath(
                os.path.join(self.defined.cwd, options.get("filename", ""))), path),
        ) if want != have]
        if wrong:
            refuse(f"node {node['node-name']} was changed after its start ({', '.join(wrong)}): "
                   "what its options are is not known")


def check_backing(finder, disks):
    """Disks whose backing files are not in the same tree."""
    for disk in disks:
        at = disk["parent"] if disk["kind"] == "reopen" else None
        while at:
            at = finder.graph.children.get(at, {}).get("backing")
            if at and not below(finder.path_of(finder.graph.nodes[at]), finder.source):
                yield (f"{disk['rel']}: its backing file {finder.graph.nodes[at]['image']['filename']} "
                       f"does not lie below {finder.source}, and will not be in the snapshot")


def _locks(lines, byte):
    """The files, as (device, inode), of those locks that cover this byte. One that is waited for has
    an arrow before it."""
    for line in lines:
        words = line.split()
        if "OFDLCK" not in words or "->" in words:
            continue
        *_, where, first, last = words
        major, minor, number = where.split(":")
        if int(first) <= byte and (last == "EOF" or int(last) >= byte):
            yield (int(major, 16), int(minor, 16)), int(number)


def _device_of(path):
    """The device number by which the kernel knows the filesystem; btrfs shows another in stat."""
    fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        with open(f"/proc/self/fdinfo/{fd}", encoding="ascii") as f:
            mount = dict(line.split(":", 1) for line in f)["mnt_id"].strip()
    finally:
        os.close(fd)
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as f:
        for line in f:
            words = line.split()
            if words[0] == mount:
                major, minor = words[2].split(":")
                return int(major), int(minor)
    status = os.stat(path)
    return os.major(status.st_dev), os.minor(status.st_dev)


def check_locks(disk, pid):
    """Would QEMU be let in again, when it moves back? A mount that keeps it off would not let it."""
    file = _device_of(disk["path"]), os.stat(disk["path"]).st_ino
    with open("/proc/locks", encoding="ascii") as f:
        everybody = list(_locks(f, QEMU_UNSHARES_WRITING)).count(file)
    own = sum(list(_locks(locks, QEMU_UNSHARES_WRITING)).count(file)
              for _, _, _, locks in open_files(pid))
    if everybody > own:
        raise Refused(f"{disk['path']}: another program than this QEMU has locked it. If that is "
                      "fleecefs: mount it with --source-lock=off, or QEMU could not come back")


def written_past(source):
    """Files below SOURCE that some QEMU has open for writing."""
    with open("/proc/locks", encoding="ascii") as f:
        locked = set(_locks(f, QEMU_WRITES))
    inodes = {inode for _, inode in locked}
    for folder, _, names in os.walk(source) if locked else ():
        for name in names:
            path = os.path.join(folder, name)
            try:
                status = os.lstat(path)
                if status.st_ino in inodes and stat.S_ISREG(status.st_mode) and \
                        (_device_of(path), status.st_ino) in locked:
                    yield os.path.relpath(path, source)
            except OSError:
                continue


def check_reopens(monitor, disk, name):
    """QEMU must be able to open the source again: it may have given up the right to, or the file
    may have been replaced since."""
    try:
        monitor.execute("blockdev-add", {**disk["options"], "node-name": name})
    except CommandError as error:
        raise Refused(f"{disk['path']}: QEMU cannot open it again, so it could not come back: "
                      f"{error}") from None
    monitor.execute("blockdev-del", {"node-name": name})
