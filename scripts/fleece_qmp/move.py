"""
Moving the disks of a running VM from SOURCE onto a mount of it, and back.

For each disk, in this order (a new node is one of driver `file`, with the old one's options):

    in    blockdev-add NEW on the mount; turn the disk's user to NEW; blockdev-del OLD
    back  blockdev-add OLD on SOURCE; turn the disk's user to OLD; blockdev-del NEW

"Turn" is blockdev-reopen of the format or filter node above it, or for a device without such a node
the setting of its property `drive`. Either drains the disk: requests that were begun before end at the
old node, the others go to the new one. What says where a disk is, is QEMU itself; so moving back asks
it, and does what is still to be done, from whatever point a run has died at. FILE, written before the
first step, tells names and options alone.

The length of a file. QEMU looks for the length of a node's file when it opens it, and takes it that
whatever lies beyond is zeros. So if a qcow2 file grew between blockdev-add and blockdev-reopen, its new
clusters would read as zeros, without an error. A QEMU from 9.0 on looks again when a node is reopened:
there, the new node is reopened together with its user. Of an older one the VM is stopped, for a disk
that its user may make grow, before blockdev-add, and goes on after blockdev-reopen (some milliseconds).
After each turn the length is compared with the file's. On the mount the length must be the true one as
well; it is, with --source-lock=off, which makes the kernel trust nothing that it was told of live files.

Iothreads. A QEMU before 9.0 aborts when a disk that is served by one is reopened; not while the VM is
stopped, for then the main thread has all disks. So it is stopped for that, too. Should this program die
while the VM is stopped, a child of it which holds the same connection lets the VM go on.

Snapshots. One that exists while the VM writes to SOURCE itself is spoilt by that. So there must be none
when a disk moves, in either direction.

Never: blockdev-del of a node that somebody uses (QEMU refuses it); setting `drive` to the node that it
has (QEMU 7.2 aborts).
"""
import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys

from .disks import TURNS_RUNNING, Finder, Graph, below, check_backing, check_locks, \
    check_reopens, written_past
from .talk import CommandError, Refused, Unreachable

MOUNT_SECONDS = 20


class Plan:
    """FILE: what is moved. It exists as long as something may have to be moved back."""

    def __init__(self, path, data):
        self.path, self.data = path, data

    @classmethod
    def load(cls, path):
        try:
            with open(path, encoding="utf-8") as f:
                return cls(path, json.load(f))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise Refused(f"{path}: {error}") from None

    def save(self):
        new = f"{self.path}.new"
        try:
            with open(new, "w", encoding="utf-8") as f:
                json.dump(self.data, f, indent=1)
                f.flush()
                os.fsync(f.fileno())
            os.rename(new, self.path)
        except OSError as error:
            raise Refused(f"{new}: {error.strerror}") from None

    def remove(self):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)


def _mounts():
    """(mount point, type, source) of each mount; the last one of a mount point is on top."""
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as f:
        for line in f:
            before, after = line.rstrip("\n").split(" - ", 1)
            kind, source = after.split(" ")[:2]
            path = before.split(" ")[4]
            for code, char in (("040", " "), ("011", "\t"), ("012", "\n"), ("134", "\\")):
                path = path.replace(f"\\{code}", char)
                source = source.replace(f"\\{code}", char)
            yield path, kind, source


def _ask_mount(*command):
    """Has a command look at the mount, for who looks at one that hangs, hangs."""
    try:
        return subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, timeout=MOUNT_SECONDS, check=True,
                              env={**os.environ, "LC_ALL": "C"}).stdout
    except subprocess.CalledProcessError as error:
        raise Unreachable(error.stderr.decode(errors="replace").strip()) from None
    except subprocess.TimeoutExpired:
        raise Unreachable(f"{command[-1]}: does not answer") from None


def _snapshots(mount, name):
    """The snapshots there are."""
    listing = _ask_mount("find", os.path.join(mount, name), "-mindepth", "1", "-maxdepth", "1",
                         "-printf", "%f\\0")
    return sorted(os.fsdecode(entry) for entry in listing.split(b"\0")[:-1])


def _check_mount(mount, source, snapdir, disks):
    found = [(kind, origin) for path, kind, origin in _mounts() if path == mount]
    if not found or found[-1][0] != "fuse.fleecefs":
        raise Unreachable(f"{mount}: no fleecefs is mounted here")
    if os.path.realpath(found[-1][1]) != source:
        raise Refused(f"{mount}: this is fleecefs over {found[-1][1]}, not over {source}")
    if mount == source:
        raise Refused(f"{mount}: fleecefs is mounted over SOURCE itself: mount it elsewhere")
    there = _snapshots(mount, snapdir)
    if there:
        raise Refused(f"{mount}/{snapdir}: there is a snapshot already ({there[0]}), into which the "
                      "VM has written past the mount: drop it first")
    for disk in disks:
        status = os.stat(disk["path"])
        inode, size = map(int, _ask_mount("stat", "-Lc", "%i %s",
                                          os.path.join(mount, disk["rel"])).split())
        # the VM may be writing
        if inode != status.st_ino or not status.st_size <= size <= os.stat(disk["path"]).st_size:
            raise Refused(f"{mount}/{disk['rel']}: this is not {disk['path']}")


class Mover:
    """The steps, in one VM. STEP is called with a name before each."""

    def __init__(self, monitor, plan, step):
        self.monitor, self.plan, self.step = monitor, plan, step

    def graph(self):
        return Graph(self.monitor)

    def switch(self, disk, node):
        """Adds NODE, and turns the disk's user to it. Afterwards it is there, or all is as before."""
        name = node["node-name"]
        with self._stopped() if disk["held"] else contextlib.nullcontext():
            self.step(f"add {name}")
            self.monitor.execute("blockdev-add", node)
            try:
                self.step(f"turn {name}")
                self._turn(disk, node)
            except CommandError:
                self._delete(name)
                raise
            self._check_length(disk, name)

    def _turn(self, disk, node):
        name = node["node-name"]
        if disk["kind"] == "reopen":
            # an overlay may have been put above it meanwhile, then it is read only
            read_only = self.graph().nodes[disk["parent"]]["ro"]
            user = {**disk["parent_options"], "file": name, "read-only": read_only}
            both = [node] if self.monitor.major >= TURNS_RUNNING else []
            self.monitor.execute("blockdev-reopen", {"options": [*both, user]})
        elif self.graph().child(disk) != name:
            self.monitor.execute("qom-set", {"path": disk["device"], "property": "drive",
                                             "value": name})

    def _check_length(self, disk, name):
        length = os.stat(disk["path"]).st_size
        known = self.graph().length(name)
        if known < length:
            raise CommandError(f"{disk['path']}: QEMU takes it to be {known} bytes long, not {length}")

    def _delete(self, name):
        self.monitor.execute("blockdev-del", {"node-name": name})

    @contextlib.contextmanager
    def _stopped(self):
        """Nothing of the guest runs, and it goes on afterwards whatever happens to us."""
        if self.monitor.execute("query-status")["status"] != "running":
            yield
            return
        end, pid = _start_guard(self.monitor.channel.socket)
        try:
            self.plan.data["stopped"] = True
            self.plan.save()
            self.step("stop")
            self.monitor.execute("stop")
            yield
        finally:
            self.resume()
            os.write(end, b".")
            os.close(end)
            os.waitpid(pid, 0)

    def resume(self):
        if self.plan.data.get("stopped"):
            if self.monitor.execute("query-status")["status"] == "paused":
                self.step("cont")
                self.monitor.execute("cont")
            self.plan.data["stopped"] = False
            self.plan.save()

    def move_in(self, disk):
        self.switch(disk, {**disk["options"], "node-name": disk["new"],
                           "filename": os.path.join(self.plan.data["mount"], disk["rel"])})
        # one that was defined inside its user has gone with it
        if disk["node"] in self.graph().nodes:
            self.step(f"del {disk['node']}")
            self._delete(disk["node"])

    def move_back(self, disk):
        graph = self.graph()
        back, at = disk["back"], graph.child(disk)
        if at == disk["new"]:
            if back in graph.nodes:  # of an earlier moment: it does not know the file's length
                self.step(f"del {back}")
                self._delete(back)
            self.switch(disk, {**disk["options"], "node-name": back})
            print(f"{disk['rel']}: moved back", file=sys.stderr)
        if disk["new"] in self.graph().nodes:
            self.step(f"del {disk['new']}")
            self._delete(disk["new"])


def _start_guard(connection):
    """A child which sends `cont` by our connection if we die. Returns what to write to, to end it."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid:
        os.close(read_end)
        return write_end, pid
    try:
        os.setsid()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        os.close(write_end)
        if not os.read(read_end, 1):
            connection.settimeout(60)
            connection.sendall(b'\n{"execute": "cont", "id": "guard"}\n')
            answers = b""
            while b'"guard"' not in answers:
                more = connection.recv(65536)
                if not more:
                    break
                answers += more
    finally:
        os._exit(0)


def _identity(pid):
    """Tells a process from a later one of the same number: when it was started. None: it is gone."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as f:
            words = f.read().rsplit(b")", 1)[1].split()
    except OSError:
        return None
    return None if words[0] in b"ZX" else int(words[19])


def _steps():
    """For tests: dies before the step of that number, in a way that nothing can catch."""
    left = [int(os.environ.get("FLEECE_QMP_DIE_AT", "0"))]

    def step(name):
        left[0] -= 1
        if left[0] == 0:
            print(f"fleece-qmp: dies before: {name}", file=sys.stderr)
            sys.stderr.flush()
            os.kill(os.getpid(), signal.SIGKILL)
    return step


def find(monitor, source, options):
    finder = Finder(monitor, source, options)
    disks = finder.disks()
    for disk in disks:
        check_locks(disk, finder.defined.pid)
    for note in check_backing(finder, disks):
        print(f"fleece-qmp: {note}", file=sys.stderr)
    for disk in disks:
        print(disk["rel"])


def move_in(monitor, args):
    mount = os.path.realpath(args.mount)
    if os.path.exists(args.state):
        raise Refused(f"{args.state}: an earlier run has left it: fleece-qmp move-out first")
    finder = Finder(monitor, args.source, args.options)
    disks = finder.disks()
    for disk in disks:
        check_locks(disk, finder.defined.pid)
    _check_mount(mount, finder.source, args.snapdir, disks)
    token = secrets.token_hex(4)
    for number, disk in enumerate(disks):
        check_reopens(monitor, disk, f"fleecefs-{token}-{number}-try")
        disk["new"] = f"fleecefs-{token}-{number}"
        # a name that QEMU made up cannot be given to a node
        disk["back"] = f"{disk['new']}-src" if disk["node"].startswith("#") else disk["node"]
    pid = finder.defined.pid
    plan = Plan(args.state, {"mount": mount, "snapdir": args.snapdir, "source": finder.source,
                             "pid": pid, "started": _identity(pid), "stopped": False,
                             "disks": disks})
    plan.save()
    mover = Mover(monitor, plan, _steps())
    try:
        for disk in disks:
            mover.move_in(disk)
    except (CommandError, Refused) as error:
        failed = _all_back(mover)
        if failed:
            raise Refused(f"{error}; and back: {'; '.join(failed)}") from None
        plan.remove()
        raise Refused(f"nothing was moved: {error}") from None
    for path in written_past(finder.source):
        print(f"fleece-qmp: {path} is still written in SOURCE itself, by another VM: unless that is moved, "
              "too, a snapshot of it is worth nothing", file=sys.stderr)
    for disk in disks:
        print(disk["rel"])


def _all_back(mover):
    """Moves back what is not at its place; returns what failed."""
    failed = []
    for disk in reversed(mover.plan.data["disks"]):
        try:
            mover.move_back(disk)
        except CommandError as error:
            failed.append(f"{disk['rel']}: {error}")
    return failed


def _overlays(graph, mount):
    """Overlays that name a file of the mount as their backing file, in their own header."""
    for node in graph.nodes.values():
        image = node["image"]
        if below(image.get("full-backing-filename", ""), mount):
            yield graph.filename(node["node-name"]), image["full-backing-filename"]


def move_out(connect, state, force):
    plan = Plan.load(state)
    if not plan:
        return
    if _identity(plan.data["pid"]) != plan.data["started"]:
        print("fleece-qmp: that VM has ended: there is nothing to move back", file=sys.stderr)
        plan.remove()
        return
    mover = Mover(connect(), plan, _steps())
    mover.resume()
    graph = mover.graph()
    away = [d for d in plan.data["disks"] if graph.child(d) == d["new"]]
    try:
        there, hint = _snapshots(plan.data["mount"], plan.data["snapdir"]), ""
    except Unreachable as error:  # a mount that is dead or gone has nothing to lose
        there, hint = [], (f" ({error}: what was not moved back is lost to the VM: end it, and start it "
                           "anew; SOURCE has all that the guest has flushed)")
    if away and not force:
        if there:
            raise Refused(f"{plan.data['mount']}/{plan.data['snapdir']}: the snapshot {there[0]} "
                          "would be spoilt by what the VM writes afterwards: drop it first, or --force")
    failed = _all_back(mover)
    for image, name in _overlays(mover.graph(), plan.data["mount"]):
        print(f"fleece-qmp: {image} was made meanwhile, and says that its backing file is {name}: put "
              "that right before the VM's next start, by change-backing-file or qemu-img rebase -u",
              file=sys.stderr)
    if failed:
        raise Refused("; ".join(failed) + hint)
    plan.remove()
