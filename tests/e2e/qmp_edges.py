#!/usr/bin/env python3
"""For qmp_edges.sh: what fleece-qmp refuses and how it says so, what it keeps of a node's options, and a
guest agent and a virsh that misbehave. QEMU runs without a guest here."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

HERE = os.path.dirname(os.path.abspath(__file__))
PROGRAM = os.path.join(HERE, "../../scripts/fleece-qmp")
QEMU = os.environ.get("QEMU", "qemu-system-x86_64").split()


def need(condition, text):
    if not condition:
        raise RuntimeError(text)


def run(*args, status=0, says="", env=None, silent=False):
    """Runs fleece-qmp; SAYS is what must be among its complaints. Returns its output."""
    done = subprocess.run([PROGRAM, *args], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, timeout=60, check=False,
                          env={**os.environ, **(env or {})})
    out, err = done.stdout.decode(), done.stderr.decode()
    need(done.returncode == status and says in err and "fleece-qmp: internal" not in err,
         f"fleece-qmp {' '.join(args)}: status {done.returncode}, not {status}; {says!r} was expected: "
         f"{out}{err}")
    need(not silent or not err, f"fleece-qmp {' '.join(args)} complains: {err}")
    return out


class Machine:
    """A QEMU with these arguments, and a monitor of our own."""

    count = 0

    def __init__(self, *args, running=False):
        Machine.count += 1
        self.name = f"vm{Machine.count}"
        self.process = subprocess.Popen(
            ["timeout", "-k", "5", "100", *QEMU, "-accel", "tcg", "-m", "32",
             "-nodefaults", "-no-user-config", "-display", "none", *([] if running else ["-S"]),
             "-qmp", f"unix:{self.name},server=on,wait=off",
             "-qmp", f"unix:{self.name}.own,server=on,wait=off", *args], stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, pass_fds=[int(a.split(",")[0][3:]) for a in args if a.startswith("fd=")])
        end = time.monotonic() + 30
        self.socket = socket.socket(socket.AF_UNIX)
        while True:
            try:
                self.socket.connect(f"{self.name}.own")
                break
            except OSError:
                need(time.monotonic() < end and self.process.poll() is None, "QEMU does not start")
                time.sleep(0.02)
        self.stream = self.socket.makefile("rw", encoding="utf-8")
        self.stream.readline()
        self.ask("qmp_capabilities")

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.process.terminate()
        self.process.wait(30)

    def ask(self, command, **arguments):
        arguments = {k.replace("_", "-"): v for k, v in arguments.items()}
        self.stream.write(json.dumps({"execute": command, "arguments": arguments}))
        self.stream.flush()
        while True:
            answer = json.loads(self.stream.readline())
            need("error" not in answer, f"QEMU, {command}: {answer.get('error')}")
            if "return" in answer:
                return answer["return"]

    def io(self, node, command):
        out = self.ask("human-monitor-command", command_line=f'qemu-io {node} "{command}"')
        need("rror" not in out and "ermission" not in out and "fail" not in out, f"qemu-io: {out}")

    def nodes(self):
        return {n["node-name"]: n for n in self.ask("query-named-block-nodes")}

    def find(self, status=0, says="", *more):
        return run("find", "--qmp", self.name, "--source", "source", *more, status=status, says=says)

    def move_in(self, status=0, says="", mount="mnt", silent=False):
        return run("move-in", "--qmp", self.name, "--source", "source", "--mount", mount, "--state",
                   f"{self.name}.state", status=status, says=says, silent=silent)

    def move_out(self, *more, status=0, says=""):
        return run("move-out", "--qmp", self.name, "--state", f"{self.name}.state", *more,
                   status=status, says=says)


def disk(name, size=4 << 20):
    with open(f"source/{name}", "wb") as f:
        f.truncate(size)
    return os.path.abspath(f"source/{name}")


def pair(number, name, above="", below="", share=False, folder="source"):
    """A raw disk in the two nodes that libvirt makes, and its device."""
    path = os.path.join(os.getcwd(), folder, name)
    return ["-blockdev", f"driver=file,node-name=file{number},filename={path}{below}",
            "-blockdev", f"driver=raw,node-name=format{number},file=file{number}{above}",
            "-device", f"virtio-blk-pci,drive=format{number},id=disk{number}"
            + (",share-rw=on" if share else "")]


def usage():
    for args in ((), ("find",), ("freeze",), ("freeze", "--qga", "a", "--virsh", "b"), ("sleep",),
                 ("freeze", "--qga", "a", "--watchdog", "soon"), ("find", "--qmp", "a", "--sour", "b"),
                 ("move-in", "--qmp", "a", "--source", "b", "--mount", "c")):
        run(*args, status=64)
    need("move-out" in run("--help"), "no help")
    run("find", "--qmp", "nothing", "--source", "source", status=69, says="nothing")
    run("move-out", "--qmp", "nothing", "--state", "nothing")


def not_movable():
    a, b = disk("a.img"), disk("b.img")
    with Machine("-drive", f"file={a},format=raw,if=virtio") as vm:
        vm.find(1, "define it by -blockdev")
    with Machine("-blockdev", f"driver=file,node-name=f,filename={a},read-only=on",
                 "-blockdev", "driver=raw,node-name=r,file=f,read-only=on",
                 "-device", "virtio-blk-pci,drive=r") as vm:
        vm.find(1, "no disk of this VM")
    with Machine("-blockdev", f"driver=file,node-name=f,filename={a}",
                 "-device", "virtio-blk-pci,drive=f") as vm:
        vm.find(1, "give it an id")
    with Machine("-blockdev", f'{{"driver": "throttle", "throttle-group": "g", "node-name": "t", "file": '
                 f'{{"driver": "raw", "file": {{"driver": "file", "filename": "{a}"}}}}}}',
                 "-object", "throttle-group,id=g", "-device", "virtio-blk-pci,drive=t") as vm:
        vm.find(1, "with a node-name")
    fd = os.open(a, os.O_RDWR)
    with Machine("-add-fd", f"fd={fd},set=1", "-blockdev",
                 "driver=file,node-name=f,filename=/dev/fdset/1",
                 "-blockdev", "driver=raw,node-name=r,file=f",
                 "-device", "virtio-blk-pci,drive=r") as vm:
        vm.find(1, "/dev/fdset")
    os.close(fd)
    with Machine(*pair(1, "a.img"), *pair(2, "b.img")) as vm:
        # plugged in later
        c = disk("c.img")
        plugged = [{"driver": "file", "node-name": "file3", "filename": c, "discard": "unmap"},
                   {"driver": "raw", "node-name": "format3", "file": "file3"}]
        for node in plugged:
            vm.ask("blockdev-add", **node)
        need(vm.find() == "a.img\nb.img\n", "a node that nobody uses is found")
        vm.ask("device_add", driver="virtio-blk-pci", drive="format3", id="disk3")
        vm.find(1, "--options")
        with open("options", "w", encoding="utf-8") as f:
            json.dump(plugged, f)
        need(vm.find(0, "", "--options", "options") == "a.img\nb.img\nc.img\n", "--options")
        vm.find(1, "nowhere", "--options", "nowhere")
    with Machine(*pair(1, "a.img")) as vm:
        vm.ask("blockdev-reopen", options=[{"driver": "raw", "node-name": "format1", "file": "file1",
                                            "detect-zeroes": "on"}])
        vm.find(1, "was changed after its start (detect-zeroes)")
    with Machine(*pair(1, "a.img")) as vm:
        vm.ask("blockdev-add", driver="file", node_name="target", filename=b)
        vm.io("target", "write 0 4k")
        vm.ask("blockdev-mirror", job_id="copy", device="format1", target="target", sync="full", speed=1)
        vm.find(1, "block job copy")
    with Machine(*pair(1, "a.img")) as vm:
        os.rename(a, f"{a}.old")
        vm.find(1, "No such file")
        disk("a.img")
        vm.find(1, "was replaced")
        vm.move_in(1, "was replaced")


def options_are_kept():
    """What is not repeated when a node is reopened is lost, and no query shows some of it."""
    path = disk("kept.img")

    def trims(vm, node):
        vm.io(node, "write -P 7 0 1M")
        vm.io(node, "flush")
        before = os.stat(path).st_blocks
        vm.io(node, "discard 0 1M")
        need(os.stat(path).st_blocks <= before - 2048, f"{node}: discard is not kept")
        vm.io(node, "write -P 0 2M 64k")
        vm.io(node, "flush")
    with Machine(*pair(1, "kept.img", ",discard=unmap,detect-zeroes=unmap,offset=65536,size=3145728",
                       ",discard=unmap,cache.direct=on,aio=native,locking=on", share=True)) as vm:
        before = vm.nodes()
        trims(vm, "format1")
        for _ in range(2):
            need(vm.move_in() == "kept.img\n", "move-in's output")
            need("mnt" in vm.nodes()["format1"]["file"], "not on the mount")
            trims(vm, "format1")
            vm.io("format1", "write -P 9 0 4k")
            with open(path, "rb") as f:
                f.seek(65536)
                need(f.read(4096) == b"\x09" * 4096, "the offset is not kept")
            vm.move_out()
            trims(vm, "format1")
        after = vm.nodes()
        for node in (*before.values(), *after.values()):
            del node["image"]["actual-size"]
        need(after == before, f"the nodes are others: {before} {after}")


def inline_is_kept():
    """The same for a node inside another, which takes options of the outer one."""
    path = disk("inline.img")
    with Machine("-blockdev", f'{{"driver": "raw", "node-name": "r", "discard": "unmap", "cache": {{"direct": '
                 f'true}}, "file": {{"driver": "file", "filename": "{path}"}}}}',
                 "-device", "virtio-blk-pci,drive=r,id=d,share-rw=on") as vm:
        for there in (True, False, True, False):
            vm.move_in() if there else vm.move_out()
            nodes = {n["file"]: n for n in vm.nodes().values() if n["drv"] == "file"}
            need(len(nodes) == 1 and all(n["cache"]["direct"] for n in nodes.values()) and
                 all(f.startswith(os.path.abspath("mnt" if there else "source")) for f in nodes),
                 f"nodes: {nodes}")
            vm.io("r", "write -P 7 0 1M")
            vm.io("r", "flush")
            before = os.stat(path).st_blocks
            vm.io("r", "discard 0 1M")
            need(os.stat(path).st_blocks <= before - 2048, "discard is not kept")


def formats():
    """An encrypted disk; an overlay, whose backing file stays; one more overlay, made meanwhile."""
    for command in ("create -q -f qcow2 --object secret,id=s,data=abc -o encrypt.format=luks,"
                    "encrypt.key-secret=s,encrypt.iter-time=10 source/luks.qcow2 4M",
                    "create -q -f qcow2 source/base.qcow2 4M",
                    "create -q -f qcow2 -F qcow2 -b base.qcow2 source/over.qcow2",
                    "create -q -f qcow2 -o data_file=source/ext.raw source/ext.qcow2 4M"):
        tries = 0  # LUKS measures the processor first, which fails when others are busy
        while subprocess.run(["qemu-img", *command.split()], check=False).returncode:
            tries += 1
            need(tries < 50, f"qemu-img {command}")
    path = os.path.join(os.getcwd(), "source")
    with Machine("-object", "secret,id=s,data=abc",
                 "-blockdev", f"driver=file,node-name=f1,filename={path}/luks.qcow2", "-blockdev",
                 "driver=qcow2,node-name=d1,file=f1,encrypt.format=luks,encrypt.key-secret=s",
                 "-device", "virtio-blk-pci,drive=d1,id=v1,share-rw=on",
                 "-blockdev", f"driver=file,node-name=f3,filename={path}/over.qcow2",
                 "-blockdev", "driver=qcow2,node-name=d3,file=f3",
                 "-device", "virtio-blk-pci,drive=d3,id=v3,share-rw=on", running=True) as vm:
        vm.io("d1", "write -P 5 0 1M")
        for value in (1, 2):
            need(vm.move_in() == "luks.qcow2\nover.qcow2\n", "what was moved")
            vm.io("d1", "read -P 5 0 1M")
            vm.io("d1", f"write -P {value} 1M 2M")
            vm.io("d3", f"write -P {value} 0 2M")
            vm.move_out()
            vm.io("d1", f"read -P {value} 1M 2M")
            vm.io("d3", f"read -P {value} 0 2M")
        vm.move_in()
        vm.ask("blockdev-snapshot-sync", node_name="d3", snapshot_file=f"{path}/new.qcow2",
               snapshot_node_name="d4")
        vm.move_out(says="source/new.qcow2 was made meanwhile")
        nodes = vm.nodes()
        need(nodes["d3"]["ro"] and not any("mnt" in n["file"] for n in nodes.values()), f"{nodes}")
        vm.io("d4", "read -P 2 0 2M")
    with Machine("-blockdev", f"driver=file,node-name=f1,filename={path}/ext.qcow2",
                 "-blockdev", f"driver=file,node-name=f2,filename={path}/ext.raw",
                 "-blockdev", "driver=qcow2,node-name=d1,file=f1,data-file=f2",
                 "-device", "virtio-blk-pci,drive=d1,id=v1") as vm:
        vm.find(1, "'data-file'")


def filters():
    """Filters right above the file, and above a format."""
    filtered, other = disk("filtered.img"), disk("other.img")
    path = os.path.join(os.getcwd(), "source/cor.qcow2")
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", path, "4M"], check=True)
    with Machine("-object", "throttle-group,id=g,x-iops-total=100000",
                 "-blockdev", f"driver=file,node-name=f1,filename={filtered}",
                 "-blockdev", "driver=throttle,node-name=d1,file=f1,throttle-group=g",
                 "-device", "virtio-blk-pci,drive=d1,id=v1,share-rw=on", "-blockdev",
                 "driver=copy-on-read,node-name=d2,file.driver=qcow2,file.node-name=q2,"
                 f"file.file.driver=file,file.file.filename={path}",
                 "-device", "virtio-blk-pci,drive=d2,id=v2,share-rw=on", running=True) as vm:
        for value in (1, 2):
            need(vm.move_in() == "cor.qcow2\nfiltered.img\n", "what was moved")
            for node in ("d1", "d2"):
                vm.io(node, f"write -P {value} 0 1M")
            vm.move_out()
            for node in ("d1", "d2"):
                vm.io(node, f"read -P {value} 0 1M")
    with Machine("-blockdev", f"driver=copy-on-read,node-name=d,file.driver=file,file.filename={other}",
                 "-device", "virtio-blk-pci,drive=d,id=v") as vm:
        vm.find(1, "copy-on-read")


def mounts():
    disk("a.img")
    with Machine(*pair(1, "a.img"), running=True) as vm:
        os.makedirs("other/sub", exist_ok=True)
        vm.move_in(69, "no fleecefs", "other")
        vm.move_in(69, "no fleecefs", "nowhere")
        vm.move_in(1, "not over", "mnt2")
        os.mkdir("mnt/snapshots/early")
        vm.move_in(1, "a snapshot already (early)")
        os.rmdir("mnt/snapshots/early")
        disk("other.img")
        with Machine(*pair(1, "other.img")):
            vm.move_in(says="other.img is still written")
            vm.move_out()
        vm.move_in(silent=True)
        vm.move_in(1, "move-out first")
        os.mkdir("mnt/snapshots/late")
        vm.move_out(status=1, says="late would be spoilt")
        need("mnt" in vm.nodes()["format1"]["file"], "moved back with a snapshot")
        vm.move_out("--force")
        need("mnt" not in vm.nodes()["format1"]["file"], "not moved back")
        os.rmdir("mnt/snapshots/late")
        # a VM that has ended, or another one at the same socket
        vm.move_in()
        vm.process.kill()
        pid = json.load(open(f"{vm.name}.state", encoding="utf-8"))["pid"]
        os.kill(pid, signal.SIGKILL)
        end = time.monotonic() + 20
        while os.path.exists(f"/proc/{pid}/fd/0") and time.monotonic() < end:
            time.sleep(0.02)
        vm.move_out(says="has ended")
        need(not os.path.exists(f"{vm.name}.state"), "the state file is left")
    with open("bad.state", "w", encoding="utf-8") as f:
        f.write("{")
    run("move-out", "--qmp", "nothing", "--state", "bad.state", status=1, says="bad.state")


def dead_mount():
    """fleecefs dies under the VM: what has nothing to flush goes back, the rest stays, and is said."""
    for name in ("clean.img", "dirty.img"):
        with open(f"source2/{name}", "wb") as f:
            f.truncate(1 << 20)
    with Machine(*pair(1, "clean.img", share=True, folder="source2"),
                 *pair(2, "dirty.img", share=True, folder="source2")) as vm:
        state = f"{vm.name}.state"
        run("move-in", "--qmp", vm.name, "--source", "source2", "--mount", "mnt2", "--state", state)
        vm.io("format1", "write 0 4k")
        vm.io("format1", "flush")
        vm.io("format2", "write 0 4k")
        os.kill(int(os.environ["DAEMON2"]), signal.SIGKILL)
        vm.move_out(status=1, says="start it anew")
        need("source2" in vm.nodes()["format1"]["file"], "the disk without a loss is not back")
        need("mnt2" in vm.nodes()["format2"]["file"], "the other is back without a flush")
        vm.move_out(status=1, says="dirty.img")
        vm.io("format1", "write 0 4k")
        vm.io("format1", "flush")


def silent():
    """A monitor that another program uses."""
    with Machine() as vm:
        with socket.socket(socket.AF_UNIX) as other:
            other.connect(vm.name)
            vm.find(69, "does another program use this monitor")


class FakeAgent:
    """Answers as the one in a guest does, but for what BEHAVIOUR says. One client at a time."""

    def __init__(self, name, **behaviour):
        self.name, self.behaviour = name, behaviour
        self.frozen, self.commands = behaviour.get("frozen", False), []
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(name)
        self.listener.listen(8)
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self):
        while True:
            connection = self.listener.accept()[0]
            with connection, connection.makefile("rwb") as stream:
                try:
                    self._talk(stream)
                except (OSError, ValueError):
                    pass

    def _talk(self, stream):
        if self.behaviour.get("stale"):  # for a client that did not wait for it
            stream.write(b'{"return": {"of an": "earlier command"}}\n{"ret')
            stream.flush()
        for line in stream:
            request = json.loads(line.lstrip(b"\xff"))
            command = request["execute"]
            self.commands.append(command)
            answer = self.behaviour.get(command)
            if answer == "silent":
                continue
            if answer == "hang up":
                return
            if answer is None:
                answer = self._answer(command, request["arguments"])
            stream.write(b"\xff" if command == "guest-sync-delimited" else b"")
            stream.write(json.dumps(answer).encode() + b"\n")
            stream.flush()

    def _answer(self, command, arguments):
        if command == "guest-sync-delimited":
            return {"return": arguments["id"]}
        if command == "guest-fsfreeze-status":
            return {"return": "frozen" if self.frozen else "thawed"}
        count = 2 if self.frozen != (command == "guest-fsfreeze-freeze") else 0
        self.frozen = command == "guest-fsfreeze-freeze"
        return {"return": count}


def agents():
    agent = FakeAgent("ga-stale", stale=True)
    need(run("freeze", "--qga", "ga-stale", "--caller", str(os.getpid())) == "2\n" and agent.frozen,
         "not frozen")
    run("freeze", "--qga", "ga-stale", status=1, says="frozen already")
    need(run("thaw", "--qga", "ga-stale") == "2\n" and not agent.frozen, "not thawed")
    need(run("thaw", "--qga", "ga-stale") == "0\n", "thawed twice")
    # An error, or no answer, when it is about to freeze: it is thawed, for it may have done a part.
    error = {"error": {"class": "GenericError", "desc": "failed to freeze /mnt"}}
    for name, answer, status, says in (("ga-error", error, 1, "failed to freeze /mnt"),
                                       ("ga-gone", "hang up", 69, "closed")):
        agent = FakeAgent(name, **{"guest-fsfreeze-freeze": answer})
        for _ in range(2):  # nothing is left that would hinder the second
            run("freeze", "--qga", name, status=status, says=says)
            need(agent.commands[-1] == "guest-fsfreeze-thaw", f"not thawed after {says}")
    # It dies, and cannot be thawed at once: the watchdog goes on trying.
    agent = FakeAgent("ga-late")
    run("freeze", "--qga", "ga-late", "--watchdog", "1", "--caller", str(os.getpid()))
    agent.behaviour["guest-fsfreeze-thaw"] = error
    run("thaw", "--qga", "ga-late", status=1, says="failed")
    end = time.monotonic() + 20
    while agent.commands.count("guest-fsfreeze-thaw") < 2 and time.monotonic() < end:
        time.sleep(0.05)
    del agent.behaviour["guest-fsfreeze-thaw"]
    while agent.frozen and time.monotonic() < end:
        time.sleep(0.05)
    need(not agent.frozen, "the watchdog has given up")
    run("freeze", "--qga", "nowhere", status=69, says="nowhere")


def silent_agent():
    FakeAgent("ga-silent", **{"guest-sync-delimited": "silent"})
    run("freeze", "--qga", "ga-silent", status=69, says="is the agent running")


VIRSH = """#!/bin/sh
echo "$*" >>virsh.log
case "$LC_ALL $1" in
"C domfsfreeze") echo "Froze 3 filesystem(s)" ;;
"C domfsthaw") echo "Thawed 3 filesystem(s)" ;;
"C domstate") [ "$3" != away ] || { echo "error: failed to get domain 'away'" >&2; exit 1; } ;;
*) exit 1 ;;
esac
[ "$1 $3" != "domfsfreeze broken" ] || { echo "error: internal error: unable to execute" >&2; exit 1; }
"""


def virsh():
    os.mkdir("bin")
    with open("bin/virsh", "w", encoding="ascii") as f:
        f.write(VIRSH)
    os.chmod("bin/virsh", 0o755)
    env = {"PATH": f"{os.getcwd()}/bin:{os.environ['PATH']}"}
    need(run("freeze", "--virsh", "my vm", env=env) == "3\n", "freeze --virsh")
    run("freeze", "--virsh", "my vm", env=env, status=1, says="another run")
    need(run("thaw", "--virsh", "my vm", env=env) == "3\n", "thaw --virsh")
    run("freeze", "--virsh", "away", env=env, status=69, says="failed to get domain")
    run("freeze", "--virsh", "broken", env=env, status=1, says="unable to execute")
    with open("virsh.log", encoding="ascii") as f:
        log = f.read().splitlines()
    need("domfsfreeze --domain my vm" in log and log[-1] == "domfsthaw --domain broken",
         f"virsh was called so: {log}")
    run("thaw", "--virsh", "x", env={"PATH": os.path.dirname(sys.executable)}, status=69,
        says="not installed")


def main():
    os.chdir(sys.argv[1])
    with ThreadPoolExecutor() as pool:
        waiting = [pool.submit(f) for f in (silent, silent_agent)]
        for part in (usage, agents, virsh, not_movable, options_are_kept, inline_is_kept, formats, filters, mounts,
                     dead_mount):
            print(f"--- {part.__name__}", flush=True)
            part()
        for one in waiting:
            one.result()
    print("passed")


if __name__ == "__main__":
    try:
        main()
    except (RuntimeError, OSError, subprocess.SubprocessError) as error:
        sys.exit(f"qmp_edges.py: {type(error).__name__}: {error}")
