#!/usr/bin/env python3
"""For qmp.sh: a guest whose disks lie on SOURCE itself works all the time, while they are moved onto a
mount, frozen there, copied, and moved back; and while that is cut short at its steps. The guest tells
of each record that is on its disk, and complains of any that it reads back otherwise; see qmp_guest.c."""

import array
import glob
import os
import random
import shutil
import subprocess
import sys
import threading
import time

import guest as booting

MASK = (1 << 64) - 1
BLOCK = 4096
MODULES = ["virtio_pci", "virtio_blk", "virtio_console", "ext4", "crc32c_generic"]
START = time.monotonic()
HERE = os.path.dirname(os.path.abspath(__file__))
PROGRAM = os.path.join(HERE, "../../scripts/fleece-qmp")
BACKUP = os.path.join(HERE, "../../scripts/fleece-backup")
QEMU = os.environ.get("QEMU", "qemu-system-x86_64").split()


def mix(x):
    x = ((x ^ x >> 31) * 0x9e3779b97f4a7c15) & MASK
    x = ((x ^ x >> 29) * 0xbf58476d1ce4e5b9) & MASK
    return x ^ x >> 32


def record(disk, n):
    base = mix(n << 8 | disk)
    return array.array("Q", [(base + i) & MASK for i in range(BLOCK // 8)]).tobytes()


def check_prefix(path, disk, low, high):
    """The disk in the file is what it was after record N, for an N from LOW to HIGH."""
    with open(path, "rb") as f:
        data = f.read()
    places = len(data) // BLOCK
    known = {mix(n << 8 | disk): n for n in range(1, high + 1)}
    found = 0
    for place in range(places):
        word = int.from_bytes(data[place * BLOCK:place * BLOCK + 8], "little")
        if word:
            need(word in known, f"{path}: block {place} is of no record up to {high}")
            found = max(found, known[word])
    need(found >= low, f"{path}: it has {found} records; {low} had been acknowledged")
    last = {}
    for n in range(1, found + 1):
        last[mix(n << 8 | disk) % places] = n
    for place in range(places):
        want = record(disk, last[place]) if place in last else bytes(BLOCK)
        need(data[place * BLOCK:(place + 1) * BLOCK] == want,
             f"{path}: block {place} is not as after record {found}")
    return found


def need(condition, text):
    if not condition:
        raise RuntimeError(text)


def run(*args, status=0, env=None, timeout=120):
    """Runs a program; returns its output and what it complains of."""
    done = subprocess.run(args, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, timeout=timeout,
                          stderr=subprocess.PIPE, check=False, env={**os.environ, **(env or {})})
    out, err = done.stdout.decode(), done.stderr.decode()
    need(done.returncode == status, f"{' '.join(args[:3])}: status {done.returncode}, not {status}: "
         f"{out}{err}")
    return out, err


def step(text):
    print(f"--- {text} ({time.monotonic() - START:.1f} s)", flush=True)


def agent_files(package):
    """The guest agent with its libraries, as paths in the guest: paths here."""
    binary = os.path.join(package, "usr/sbin/qemu-ga")
    files = {"agent/qemu-ga": binary}
    for line in run("ldd", binary)[0].splitlines():
        words = [w for w in line.split() if w.startswith("/")]
        need("not found" not in line, f"the guest agent lacks a library: {line.strip()}")
        if words:
            files[words[-1].lstrip("/")] = os.path.realpath(words[-1])
    return files


def build_initramfs(kernel, package, init, work):
    tree = os.path.join(work, "initramfs")
    found = booting.find_modules(kernel)
    order = booting.module_order(found, MODULES)
    for name in ("dev", "proc", "sys", "mnt", "modules", "agent"):
        os.makedirs(os.path.join(tree, name))
    for name in order:
        with open(os.path.join(tree, "modules", name), "wb") as f:
            f.write(booting.module_bytes(found[name]))
    with open(os.path.join(tree, "modules/order"), "w", encoding="ascii") as f:
        f.write("\n".join(order) + "\n")
    for name, path in {"init": init, **agent_files(package)}.items():
        target = os.path.join(tree, name)
        os.makedirs(os.path.dirname(target), exist_ok=True)
        shutil.copy(path, target)
        os.chmod(target, 0o755)
    image = os.path.join(work, "initramfs.img")
    names = subprocess.run(["find", "."], cwd=tree, stdout=subprocess.PIPE, check=True).stdout
    with open(image, "wb") as f:
        subprocess.run(["cpio", "--quiet", "-o", "-H", "newc"], cwd=tree, input=names, stdout=f,
                       check=True)
    return image


class Guest:
    """It runs; `acked` has the number of the last record of each disk."""

    def __init__(self, test, initramfs):
        src, work = test.src, test.work
        self.acked, self.failures, self.ready, self.over = [0, 0, 0], [], False, False
        self.longest, self.latest = [0, 0, 0], [0, 0, 0]
        self.changed = threading.Condition()
        vmlinuz = glob.glob(os.path.join(test.kernel, "boot/vmlinuz*"))[0]
        # one disk as Proxmox VE has it, one as libvirt, and one with no format node at all
        pve = ('{"driver": "throttle", "throttle-group": "tg", "node-name": "drive0", "file": {'
               '"driver": "raw", "node-name": "format0", "file": {"driver": "file", '
               f'"node-name": "file0", "filename": "{src}/raw.img", "aio": "native", '
               '"discard": "unmap", "cache": {"direct": true}}}}')
        self.process = subprocess.Popen(
            ["timeout", "-k", "5", "300", *QEMU, "-accel", "tcg", "-m", "256",
             "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-serial", "stdio",
             "-kernel", vmlinuz, "-initrd", initramfs,
             "-append", "console=ttyS0 quiet panic=-1", "-pidfile", f"{work}/pid",
             "-qmp", f"unix:{work}/qmp,server=on,wait=off",
             "-object", "throttle-group,id=tg", "-object", "iothread,id=io0",
             "-blockdev", pve, "-device", "virtio-blk-pci,drive=drive0,iothread=io0,id=disk0",
             "-blockdev", f"driver=file,node-name=file1,filename={src}/sub/disk,,1.qcow2",
             "-blockdev", "driver=qcow2,node-name=format1,file=file1,lazy-refcounts=off",
             "-device", "virtio-blk-pci,drive=format1,id=disk1",
             "-blockdev", f"driver=file,node-name=file2,filename={src}/ext4.img,cache.direct=on",
             "-device", "virtio-blk-pci,drive=file2,id=disk2",
             "-device", "virtio-serial-pci",
             "-chardev", f"socket,id=ga,path={work}/qga,server=on,wait=off",
             "-device", "virtserialport,chardev=ga,name=org.qemu.guest_agent.0"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self):
        with open("console", "wb") as log:
            for line in self.process.stdout:
                log.write(line)
                log.flush()
                words = line.decode(errors="replace").split()
                now = time.monotonic()
                with self.changed:
                    if words[:1] == ["A"]:
                        disk = int(words[1])
                        if self.latest[disk]:
                            self.longest[disk] = max(self.longest[disk], now - self.latest[disk])
                        self.acked[disk], self.latest[disk] = int(words[2]), now
                    elif words[:1] == ["READY"]:
                        self.ready = True
                    elif words[:1] == ["FAIL"] or b"error" in line or b"panic" in line:
                        self.failures.append(line.decode(errors="replace").strip())
                    self.changed.notify_all()
        with self.changed:
            self.over = True
            self.changed.notify_all()

    def wait(self, condition, what, limit=60):
        with self.changed:
            done = self.changed.wait_for(lambda: self.failures or self.over or condition(), limit)
            need(not self.failures, f"the guest says: {self.failures[:3]}")
            need(done, f"{what}: not within {limit} s; records: {self.acked}")
            need(condition(), f"{what}: the guest has ended")

    def go_on(self, count=10, disks=(0, 1, 2)):
        """Each disk gets so many records more."""
        goal = [self.acked[d] + count for d in disks]
        self.wait(lambda: all(self.acked[d] >= g for d, g in zip(disks, goal)), "more records")

    def end(self):
        self.process.stdin.write(b"stop\n")
        self.process.stdin.flush()
        self.wait(lambda: True, "")
        self.process.wait(60)


class Test:
    def __init__(self, args):
        self.fleecefs, self.work, self.kernel, package, init = args[:5]
        self.long = "--long" in args
        self.seed = int(os.environ.get("SEED") or random.SystemRandom().randrange(1 << 32))
        self.random = random.Random(self.seed)
        self.src, self.mnt, self.fleece = (os.path.join(self.work, n)
                                           for n in ("source", "mnt", "fleece"))
        self.state = os.path.join(self.work, "state")
        self.snap = os.path.join(self.mnt, "snapshots/night")
        os.chdir(self.work)
        self.make_disks()
        self.guest = Guest(self, build_initramfs(self.kernel, package, init, self.work))
        self.guest.wait(lambda: self.guest.ready, "the guest's start", 120)
        with open("pid", encoding="ascii") as f:
            self.pid = int(f.read())

    def make_disks(self):
        os.mkdir(os.path.join(self.src, "sub"))
        for name, size in (("raw.img", 8 << 20), ("ext4.img", 16 << 20)):
            with open(os.path.join(self.src, name), "wb") as f:
                f.truncate(size)
        run("mkfs.ext4", "-q", "-F", os.path.join(self.src, "ext4.img"))
        # small clusters: the file grows for thousands of records
        run("qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=4k",
            os.path.join(self.src, "sub/disk,1.qcow2"), "32M")

    def qmp(self, action, *args, status=0, **how):
        words = {"find": ["--source", self.src], "move-out": ["--state", self.state],
                 "move-in": ["--source", self.src, "--mount", self.mnt, "--state", self.state]}
        return run(PROGRAM, action, "--qmp", f"{self.work}/qmp", *words[action], *args,
                   status=status, **how)

    def qga(self, action, *args, status=0):
        out, err = run(PROGRAM, action, "--qga", f"{self.work}/qga", *args, status=status)
        return int(out) if status == 0 else err

    def mount(self):
        run(self.fleecefs, self.src, self.mnt, f"--fleece-dir={self.fleece}", "--source-lock=off")

    def umount(self):
        run("umount", self.mnt)

    def where(self):
        """How many files QEMU has open for writing below SOURCE, and below the mount."""
        count = [0, 0]
        for fd in os.listdir(f"/proc/{self.pid}/fd"):
            try:
                path = os.readlink(f"/proc/{self.pid}/fd/{fd}")
                with open(f"/proc/{self.pid}/fdinfo/{fd}", encoding="ascii") as f:
                    flags = int([line for line in f if line.startswith("flags")][0].split()[1], 8)
            except FileNotFoundError:
                continue
            for number, top in enumerate((self.src, self.mnt)):
                count[number] += path.startswith(top + "/") and flags & os.O_ACCMODE > 0
        return count

    def moved_in(self):
        self.qmp("move-in")
        need(self.where() == [0, 3], f"QEMU has files open in SOURCE and mount: {self.where()}")

    def moved_out(self, *args):
        self.qmp("move-out", *args)
        need(self.where() == [3, 0], f"QEMU has files open in SOURCE and mount: {self.where()}")
        need(not os.path.exists(self.state), "the state file is left")

    def still_frozen(self):
        self.guest.go_on(3, (0, 1))  # what was said before that has come, too
        before, end = self.guest.acked[2], time.monotonic() + 0.7
        while time.monotonic() < end:
            self.guest.go_on(10, (0, 1))
        need(self.guest.acked[2] == before, "the frozen filesystem takes writes")

    def freeze_thaw(self):
        guest = self.guest
        count = self.qga("freeze", "--watchdog", "60")
        need(count >= 1, f"{count} filesystems are frozen")
        self.still_frozen()
        need("frozen" in self.qga("freeze", status=1), "a second freeze: no clear message")
        need(self.qga("thaw") == count, "another number of filesystems was thawed")
        need(self.qga("thaw") == 0, "thawed twice")
        guest.go_on(3)

    def watchdog(self):
        """It thaws when the caller dies, though that is a subshell's parent, and when time is over."""
        script = 'n=$(:; timeout 60 "$0" freeze --watchdog 1000 --qga "$1"; :); echo "$n"; read -r end'
        with subprocess.Popen(["bash", "-c", script, PROGRAM, f"{self.work}/qga"],
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE) as shell:
            need(int(shell.stdout.readline()) >= 1, "nothing was frozen")
            self.still_frozen()
            shell.kill()
        self.guest.go_on(3, (0, 1))
        self.guest.go_on(3, (2,))
        need(self.qga("thaw") == 0, "the watchdog has not thawed")
        need(self.qga("freeze", "--watchdog", "1") >= 1, "nothing was frozen")
        self.guest.go_on(3, (0, 1))
        self.guest.go_on(3, (2,))
        need(self.qga("thaw") == 0, "the watchdog has not thawed in time")

    def snapshot(self, quiesced):
        """Freezes the disks, and copies them while the guest goes on."""
        if quiesced:
            self.qga("freeze")
        low = list(self.guest.acked)
        os.mkdir(self.snap)
        if quiesced:
            need(self.qga("thaw") >= 1, "the filesystems did not stay frozen until the snapshot was made")
        self.guest.go_on(3)
        high = list(self.guest.acked)
        self.guest.go_on(20)
        copy = os.path.join(self.work, "copy")
        shutil.rmtree(copy, ignore_errors=True)
        os.mkdir(copy)
        run("tar", "-C", self.snap, "-cSf", "copy.tar", ".")
        run("tar", "-C", copy, "-xSf", "copy.tar")
        found = self.verify(copy, low, high)
        if quiesced:  # as if it had been unmounted: nothing is left in the journal
            need("needs_recovery" not in run("dumpe2fs", "-h", f"{copy}/ext4.img")[0],
                 "the frozen filesystem was not frozen in the guest")
            run("e2fsck", "-fn", f"{copy}/ext4.img")
        print(f"frozen: records {found[0]} and {found[1]}; acknowledged {low[:2]} to {high[:2]}",
              flush=True)

    def verify(self, folder, low, high, leaks=True):
        image = f"{folder}/sub/disk,1.qcow2"
        check = subprocess.run(["qemu-img", "check", "-q", image], stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, check=False)
        # of a disk that is in use, clusters that were being allocated may be leaked
        need(check.returncode == 0 or (leaks and check.returncode == 3),
             f"qemu-img check: {check.stdout.decode()}")
        run("qemu-img", "convert", "-O", "raw", image, "plain.img")
        return (check_prefix(f"{folder}/raw.img", 0, low[0], high[0]),
                check_prefix("plain.img", 1, low[1], high[1]))

    def backup(self, quiesced):
        self.moved_in()
        self.guest.go_on(5)
        self.snapshot(quiesced)
        if not quiesced:
            _, err = self.qmp("move-out", status=1)
            need("snapshot" in err and self.where() == [0, 3], f"moved out with a snapshot: {err}")
        os.rmdir(self.snap)
        self.moved_out()
        self.guest.go_on(10)

    def whole(self):
        """All of it in one command. The guest's history is bounded by what it had told before and after."""
        state, copy = f"{self.work}/backup-state", f"{self.work}/whole"
        os.mkdir(f"{self.work}/bin")
        os.symlink(self.fleecefs, f"{self.work}/bin/fleecefs")
        low = list(self.guest.acked)
        out, _ = run(BACKUP, "--mount", self.src, "--fleece-dir", self.fleece, "--qmp", f"{self.work}/qmp",
                     "--qga", f"{self.work}/qga", "--copy", copy, "--verify",
                     env={"FLEECE_BACKUP_DIR": state, "PATH": f"{self.work}/bin:{os.environ['PATH']}"})
        need(self.where() == [3, 0], f"QEMU has files open in SOURCE and mount: {self.where()}")
        self.guest.go_on(3)
        found = self.verify(copy, low, self.guest.acked)
        run("e2fsck", "-fn", f"{copy}/ext4.img")
        with open("/proc/self/mounts", encoding="utf-8") as f:
            need(state not in f.read(), "a mount is left")
        print(f"frozen: records {found[0]} and {found[1]}; {out.splitlines()[-1]}", flush=True)

    def crash(self, action, number):
        """Kills fleece-qmp before that step; false if it has no such step. Then all is moved back."""
        if action == "move-out":
            self.qmp("move-in")
        died = True
        try:
            self.qmp(action, status=-9, env={"FLEECE_QMP_DIE_AT": str(number)})
        except RuntimeError:
            died = False
        self.guest.go_on(2)  # also if it had been stopped
        if died or action == "move-in":
            self.moved_out()
        self.guest.go_on(3)
        return died

    def crashes(self):
        for action in ("move-in", "move-out"):
            if self.long:
                number = 1
                while self.crash(action, number):
                    number += 1
                print(f"{action}: killed at {number - 1} steps", flush=True)
                need(number > 9, "too few")
                continue
            # with any QEMU there are three for each disk
            for number in self.random.sample(range(1, 10), 2):
                need(self.crash(action, number), f"{action} has no step {number}")

    def failures(self):
        """What fails leaves everything where it was."""
        path = os.path.join(self.mnt, "sub/disk,1.qcow2")
        run("mount", "--bind", path, path)
        run("mount", "-o", "remount,bind,ro", path)
        _, err = self.qmp("move-in", status=1)
        need("nothing was moved" in err and self.where() == [3, 0], f"half moved: {err}")
        run("umount", path)
        os.mkdir(self.snap)
        _, err = self.qmp("move-in", status=1)
        need("snapshot" in err and self.where() == [3, 0], f"moved in beside a snapshot: {err}")
        os.rmdir(self.snap)
        for daemon in self.daemons():
            os.kill(daemon, 9)
        self.qmp("move-in", status=69)
        need(self.where() == [3, 0], "moved onto a dead mount")
        self.umount()
        self.qmp("move-in", status=69)
        run(self.fleecefs, self.src, self.mnt, f"--fleece-dir={self.fleece}")
        for action in ("find", "move-in"):
            _, err = self.qmp(action, status=1)
            need("--source-lock=off" in err, f"{action} with locks: {err}")
        self.umount()
        self.guest.go_on(3)

    def daemons(self):
        for name in os.listdir("/proc"):
            try:
                with open(f"/proc/{name}/cmdline", "rb") as f:
                    words = f.read().split(b"\0")
            except (FileNotFoundError, NotADirectoryError, ProcessLookupError):
                continue
            if os.fsencode(self.mnt) in words and words[0] == os.fsencode(self.fleecefs):
                yield int(name)

    def finish(self):
        guest = self.guest
        guest.end()
        need(not guest.failures, f"the guest says: {guest.failures[:3]}")
        found = self.verify(self.src, guest.acked, guest.acked, leaks=False)
        run("e2fsck", "-fn", f"{self.src}/ext4.img")
        run("debugfs", "-R", f"dump file {self.work}/file", f"{self.src}/ext4.img")
        with open("file", encoding="ascii") as f:
            numbers = [int(line) for line in f]
        need(numbers == list(range(1, guest.acked[2] + 1)), "lines of the guest's file are lost")
        print(f"the guest's history: {found[0]} and {found[1]} records, {len(numbers)} lines; longest "
              f"time between two of them {max(guest.longest):.2f} s")

    def main(self):
        self.guest.go_on(20)
        step("the guest agent freezes and thaws, and so does the watchdog")
        self.freeze_thaw()
        self.watchdog()
        step("find")
        out, _ = self.qmp("find")
        need(out.splitlines() == ["ext4.img", "raw.img", "sub/disk,1.qcow2"], f"find prints {out}")
        self.qmp("move-out")
        step("backups of the moved disks, two of them on one mount")
        self.mount()
        self.backup(True)
        self.backup(False)
        self.umount()
        step("fleece-backup")
        self.whole()
        self.mount()
        step(f"killed at its steps, seed {self.seed}")
        self.crashes()
        step("failures")
        self.failures()
        step("what the guest has written is all there")
        self.finish()


if __name__ == "__main__":
    test = None
    try:
        test = Test(sys.argv[1:])
        test.main()
        print("passed")
    except (RuntimeError, OSError, subprocess.SubprocessError) as error:
        sys.exit(f"qmp.py: {error}")
    finally:
        if test:
            test.guest.process.terminate()
            test.guest.process.wait(20)
