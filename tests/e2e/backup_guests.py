#!/usr/bin/env python3
"""For backup_guests.sh: what fleece-backup asks of guests and of QEMU, in which order, and where it leaves
them when something fails or it is killed."""

import os
import signal
import subprocess
import sys
import tarfile
import time

from qmp_edges import VIRSH, FakeAgent, Machine, disk, need, pair

SCRIPT = sys.argv[2]
WHERE = ["--mount", "source", "--fleece-dir", "fleece"]


def start(*args):
    return subprocess.Popen([SCRIPT, *WHERE, *args], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT)


def backup(status, *args, says=""):
    with start(*args) as process:
        out = process.communicate(timeout=90)[0].decode()
    need(process.returncode == status and says in out,
         f"fleece-backup {' '.join(args)}: status {process.returncode}, not {status}; {says!r} was expected: {out}")
    return out


def until(condition, what):
    end = time.monotonic() + 20
    while not condition():
        need(time.monotonic() < end, f"in 20 seconds: {what}")
        time.sleep(0.02)


def mountpoints():
    """Of fleecefs, in fleece-backup's own place."""
    with open("/proc/self/mounts", encoding="utf-8") as f:
        return [line.split()[1] for line in f if f"{os.getcwd()}/state/" in line]


def snapshots():
    return [os.path.join(m, "snapshots", n) for m in mountpoints() for n in os.listdir(f"{m}/snapshots")]


def clean(*agents):
    need(not mountpoints(), f"mounts are left: {mountpoints()}")
    for agent in agents:
        need(not agent.frozen, f"{agent.name} is frozen still")


class WatchedAgent(FakeAgent):
    """Tells which commands came, and whether there was a snapshot then."""

    def __init__(self, name, **behaviour):
        self.log, self.killed = [], None
        super().__init__(name, **behaviour)

    def _answer(self, command, arguments):
        if command.startswith("guest-fsfreeze-") and command != "guest-fsfreeze-status":
            self.log.append((command[15:], len(snapshots())))
        answer = super()._answer(command, arguments)
        if self.killed and self.frozen:
            self.killed.kill()
            self.killed = None
        return answer


def agents():
    one, two = WatchedAgent("ga 1"), WatchedAgent("ga2")
    out = backup(0, "--qga", "ga 1", "--qga", "ga2", "--", "true")
    for agent in (one, two):
        need(agent.log == [("freeze", 0), ("thaw", 1)], f"{agent.name} was asked for {agent.log}")
    need("held still for" in out, f"no time that guests held still: {out}")
    clean(one, two)
    # what freezes, and cannot be said to have been frozen until the end
    bad = WatchedAgent("ga3", **{"guest-fsfreeze-thaw": {"return": 0}})
    backup(69, "--qga", "ga2", "--qga", "ga3", "--tar", "out/no.tar", says="did not hold still")
    need(not os.path.exists("out/no.tar"), "an archive of a guest that did not hold still")
    clean(two)
    need(bad.frozen, "the agent does not play its part")
    bad.log.clear()
    backup(69, "--qga", "ga2", "--qga", "ga3", "--", "true", says="frozen already")
    need(not bad.log, "what somebody else has frozen was thawed")
    clean(two)
    bad.frozen = False
    bad.behaviour["guest-fsfreeze-freeze"] = {"error": {"class": "GenericError", "desc": "it is busy"}}
    backup(69, "--qga", "ga2", "--qga", "ga3", "--", "true", says="it is busy")
    clean(two)
    backup(69, "--qga", "nowhere", "--qga", "ga2", "--", "true", says="nowhere")
    clean(two)


def killed_while_frozen():
    """The watchdog thaws, and not the next start."""
    agent = WatchedAgent("ga4")
    with start("--qga", "ga4", "--", "true") as process:
        agent.killed = process
        process.wait(60)
        need(process.returncode == -9, f"status {process.returncode}")
        process.stdout.close()
    until(lambda: not agent.frozen, "the guest is frozen still")
    need(agent.log[0][0] == "freeze" and agent.log[-1][0] == "thaw", f"{agent.log}")
    backup(0, "--", "true", says="left by an earlier run: guest --qga")
    clean(agent)


def virsh():
    with open("bin/virsh", "w", encoding="ascii") as f:
        f.write(VIRSH.replace("virsh.log", os.path.abspath("virsh.log")))
    os.chmod("bin/virsh", 0o755)
    backup(0, "--virsh", "my vm", "--", "true")
    with open("virsh.log", encoding="ascii") as f:
        log = f.read().splitlines()
    need([line for line in log if "fs" in line] == ["domfsfreeze --domain my vm", "domfsthaw --domain my vm"], f"{log}")
    backup(69, "--virsh", "away", "--", "true", says="failed to get domain")
    backup(69, "--virsh", "broken", "--", "true", says="unable to execute")
    clean()


def places(vm):
    """Where the VM's files are: source, or mount."""
    files = [n["file"] for n in vm.nodes().values() if n["drv"] == "file"]
    return {"source" if f.startswith(os.path.abspath("source") + "/") else "mount" for f in files}


HOOK = """#!/bin/sh
cd "${FLEECE_BACKUP_DIR%/*}" || exit
[ "$1" != post-restart ] || { touch frozen; while [ ! -e go ]; do sleep 0.02; done; rm go; }
"""


def moved():
    raw = disk("raw.img")
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "source/q.qcow2", "4M"], check=True)
    with open("hook", "w", encoding="ascii") as f:
        f.write(HOOK)
    os.chmod("hook", 0o755)
    path = os.path.abspath("source/q.qcow2")
    with Machine(*pair(1, "raw.img", share=True), "-blockdev", f"driver=file,node-name=f2,filename={path}",
                 "-blockdev", "driver=qcow2,node-name=q2,file=f2",
                 "-device", "virtio-blk-pci,drive=q2,id=d2,share-rw=on", running=True) as vm:
        vm.io("format1", "write -P 1 0 1M")
        vm.io("q2", "write -P 1 0 1M")
        with start("--qmp", vm.name, "--hook", "hook", "--tar", "out/moved.tar", "--verify") as process:
            until(lambda: os.path.exists("frozen") or process.poll() is not None, "no snapshot")
            need(process.poll() is None, f"{process.stdout.read() if process.poll() is not None else ''}")
            need(places(vm) == {"mount"}, f"the disks are at {places(vm)}")
            vm.io("format1", "write -P 2 0 1M")
            vm.io("q2", "write -P 2 0 1M")
            open("go", "w", encoding="ascii").close()
            out = process.communicate(timeout=60)[0].decode()
        need(process.returncode == 0 and "moved back" in out, f"status {process.returncode}: {out}")
        need(places(vm) == {"source"}, "the disks are not back")
        clean()
        os.makedirs("extracted")
        with tarfile.open("out/moved.tar") as tar:
            tar.extractall("extracted")
        subprocess.run(["qemu-img", "convert", "-O", "raw", "extracted/q.qcow2", "q.raw"], check=True)
        for name in ("extracted/raw.img", "q.raw"):
            with open(name, "rb") as f:
                need(f.read(1 << 20) == b"\1" * (1 << 20), f"{name} is not what was frozen")
        vm.io("format1", "read -P 2 0 1M")
        vm.io("q2", "read -P 2 0 1M")
        increments(vm)
        ends(vm)
        others(vm)
    need(os.stat(raw).st_size == 4 << 20, "the disk's size")


def increments(vm):
    """What a VM writes on SOURCE itself is in no checkpoint: so none stays, and each backup is a full one."""
    for pattern in (b"\1", b"\4"):
        vm.io("format1", f"write -P {pattern[0]} 0 1M")
        backup(0, "--qmp", vm.name, "--incremental", "out/nights", "--verify", says="a full backup: with --qmp")
        need(places(vm) == {"source"}, f"the disks are at {places(vm)}")
        need(not [n for n in os.listdir("fleece") if not n.startswith(".")], f"left in fleece: {os.listdir('fleece')}")
        vm.io("format1", "write -P 3 0 1M")
        subprocess.run([SCRIPT, "--restore", "out/nights", "latest", "raw.img", "back.img", "--quiet"], check=True)
        with open("back.img", "rb") as f:
            need(f.read(1 << 20) == pattern * (1 << 20), "it is not what was frozen")
        os.unlink("back.img")
    vm.io("format1", "write -P 2 0 1M")
    clean()


def ends(vm):
    """However it ends, the VM is where it began."""
    backup(9, "--qmp", vm.name, "--", "sh", "-c", "exit 9")
    need(places(vm) == {"source"}, "not back after a failure")
    backup(69, "--qmp", vm.name, "--qmp", "nowhere", "--", "true", says="nowhere")
    need(places(vm) == {"source"}, "not back when another VM cannot be moved")
    clean()
    with start("--qmp", vm.name, "--", "sleep", "1000") as process:
        until(snapshots, "no snapshot")
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    need(process.returncode == 143 and places(vm) == {"source"}, "not back after SIGTERM")
    clean()
    with start("--qmp", vm.name, "--", "sleep", "1000") as process:
        until(snapshots, "no snapshot")
        process.kill()
        process.wait(60)
        process.stdout.close()
    need(places(vm) == {"mount"}, "killed, and back already")
    vm.io("format1", "write -P 3 0 1M")
    backup(0, "--", "true", says="moved back")
    need(places(vm) == {"source"}, "not back after the next start")
    vm.io("format1", "read -P 3 0 1M")
    clean()
    # somebody else looks into the snapshot, so that it cannot be dropped
    with start("--qmp", vm.name, "--", "sh", "-c", "touch hold; while [ ! -e go ]; do sleep 0.02; done".replace(
            "hold", os.path.abspath("hold")).replace("go", os.path.abspath("go"))) as process:
        until(lambda: os.path.exists("hold"), "COMMAND is not run")
        with open(snapshots()[0] + "/raw.img", "rb") as held:
            held.read(1)
            open("go", "w", encoding="ascii").close()
            out = process.communicate(timeout=90)[0].decode()
        os.unlink("go")
    need(process.returncode == 70 and "in use by process" in out, f"status {process.returncode}: {out}")
    need(places(vm) == {"source"}, "not back though the snapshot is left")
    backup(0, "--", "true", says="dropped the snapshot")
    clean()


def others(vm):
    """A VM that writes past the mount, and is not named."""
    disk("other.img")
    with Machine(*pair(1, "other.img"), running=True) as other:
        backup(74, "--qmp", vm.name, "--tar", "out/torn.tar", says="other.img is written by a VM")
        need(not os.path.exists("out/torn.tar"), "an archive of a disk that was not frozen")
        need(places(vm) == {"source"}, "not back")
        backup(0, "--qmp", vm.name, "--exclude", "other*", "--tar", "out/torn.tar")
        backup(0, "--qmp", vm.name, "--qmp", other.name, "--tar", "out/torn.tar")
        need(places(vm) | places(other) == {"source"}, "not both back")
    os.unlink("source/other.img")
    drive = disk("drive.img")
    with Machine("-drive", f"file={drive},format=raw,if=virtio") as other:
        backup(69, "--qmp", vm.name, "--qmp", other.name, "--", "true", says="define it by -blockdev")
        need(places(vm) == {"source"}, "not back")
    clean()


def main():
    os.chdir(sys.argv[1])
    for part in (agents, killed_while_frozen, virsh, moved):
        print(f"--- {part.__name__}", flush=True)
        part()
    print("passed")


if __name__ == "__main__":
    try:
        main()
    except (RuntimeError, OSError, subprocess.SubprocessError) as error:
        sys.exit(f"backup_guests.py: {type(error).__name__}: {error}")
