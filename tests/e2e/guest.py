#!/usr/bin/env python3
"""Drives a guest for guest.sh: builds an initramfs, boots it on a live file of a fleecefs mount, and
gives it operations over the serial line, one at a time, each logged before it is sent and after the
guest has acknowledged it (the log is busy.py's). In the middle the snapshot is made and copied
while the guest works on.

The guest has a second process which overwrites one file all the time, so that the disk is busy
whenever the snapshot is made. Every operation ends with sync in the guest."""

import argparse
import lzma
import os
import random
import shutil
import subprocess
import sys
import threading
import time

import busy

INIT = r"""#!/bin/sh
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t devtmpfs dev /dev
exec </dev/ttyS0 >/dev/ttyS0 2>&1
stty raw -echo
for module in $(cat /modules/order); do
	insmod /modules/$module || echo "FAIL insmod $module"
done
tries=0
until [ -b /dev/vda ] || [ $tries = 100 ]; do tries=$((tries + 1)); usleep 100000; done
mkdir /mnt
mount -t ext4 /dev/vda /mnt || echo "FAIL mount"
mkdir -p /mnt/ops
while :; do
	dd if=/dev/urandom of=/mnt/noise bs=32k count=8 seek=$((tries % 40)) conv=notrunc,fsync 2>/dev/null
	tries=$((tries + 1))
done &
echo READY
while read number verb name size; do
	case $verb in
	write)
		yes "$name op $number" | head -c $size >/body
		{ cat /body; echo "sha256 $(sha256sum </body | cut -d' ' -f1)"; } >/mnt/ops/$name
		;;
	delete)
		rm /mnt/ops/$name
		;;
	off)
		sync
		poweroff -f
		;;
	esac && sync && echo "ACK $number" || echo "FAIL $number"
done
"""

MODULES = ["virtio_pci", "virtio_blk", "ext4", "crc32c_generic"]


def find_modules(root):
    """All modules by name: those of the package lie wherever their subsystem puts them."""
    found = {}
    for where, _, names in os.walk(os.path.join(root, "lib/modules")):
        for name in names:
            stem = name.split(".ko")[0]
            if stem != name:
                found[stem.replace("-", "_")] = os.path.join(where, name)
    return found


def module_bytes(path):
    if path.endswith(".xz"):
        with lzma.open(path) as f:
            return f.read()
    with open(path, "rb") as f:
        return f.read()


def module_order(found, wanted):
    """The wanted modules and what they depend on, in the order of loading; the others are built in."""
    order = []

    def add(name):
        name = name.replace("-", "_")
        if name in order or name not in found:
            return
        for field in module_bytes(found[name]).split(b"\0"):
            if field.startswith(b"depends="):
                for other in field[len(b"depends="):].decode().split(","):
                    add(other)
        order.append(name)

    for name in wanted:
        add(name)
    return order


def build_initramfs(root, work):
    tree = os.path.join(work, "initramfs")
    for name in ("bin", "dev", "proc", "modules"):
        os.makedirs(os.path.join(tree, name))
    static = [os.path.join(root, p) for p in ("bin/busybox", "usr/bin/busybox")]
    shutil.copy(next(p for p in static if os.path.exists(p)), os.path.join(tree, "bin/busybox"))
    os.symlink("busybox", os.path.join(tree, "bin/sh"))
    found = find_modules(root)
    order = module_order(found, MODULES)
    for name in order:
        with open(os.path.join(tree, "modules", name), "wb") as f:
            f.write(module_bytes(found[name]))
    with open(os.path.join(tree, "modules/order"), "w", encoding="ascii") as f:
        f.write(" ".join(order) + "\n")
    with open(os.path.join(tree, "init"), "w", encoding="ascii") as f:
        f.write(INIT)
    os.chmod(os.path.join(tree, "init"), 0o755)
    image = os.path.join(work, "initramfs.img")
    names = subprocess.run(["find", "."], cwd=tree, stdout=subprocess.PIPE, check=True).stdout
    with open(image, "wb") as f:
        subprocess.run(["cpio", "--quiet", "-o", "-H", "newc"], cwd=tree, input=names, stdout=f,
                       check=True)
    return image


class Guest:
    def __init__(self, args):
        boot = os.path.join(args.root, "boot")
        kernel = next(n for n in os.listdir(boot) if n.startswith("vmlinuz"))
        initramfs = build_initramfs(args.root, args.work)
        disk = os.path.join(args.live, args.disk)
        self.console = open(os.path.join(args.work, "console"), "wb")
        self.process = subprocess.Popen(
            ["timeout", "-k", "5", str(args.limit), "qemu-system-x86_64", "-accel", "tcg",
             "-m", "256", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
             "-kernel", os.path.join(boot, kernel), "-initrd", initramfs,
             "-append", "console=ttyS0 quiet panic=-1",
             "-drive", f"file={disk},format=raw,if=virtio,cache=none",
             "-serial", "stdio"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def expect(self, word):
        """Reads lines until one is WORD; the console's own messages may come in between."""
        for line in self.process.stdout:
            self.console.write(line)
            self.console.flush()
            text = line.decode(errors="replace").strip()
            if text == word:
                return
            if text.startswith("FAIL") or "Kernel panic" in text or "I/O error" in text:
                raise RuntimeError(f"the guest says: {text}")
        with open(self.console.name, "rb") as f:
            tail = f.read()[-2000:].decode(errors="replace")
        raise RuntimeError(f"the guest ended while {word} was awaited; its console:\n{tail}")

    def send(self, line):
        self.process.stdin.write(line.encode() + b"\n")
        self.process.stdin.flush()


def work(guest, log_path, stopping, failures):
    """The guest's day: operations until STOPPING is set."""
    try:
        rng = random.Random(7)
        names = set()
        number = 0
        with open(log_path, "w", encoding="ascii", buffering=1) as log:
            while not stopping.is_set():
                number += 1
                words = busy.choose(rng, names, number, 60_000)
                log.write(f"BEGIN {number} {' '.join(words)}\n")
                guest.send(f"{number} {' '.join(words)}")
                guest.expect(f"ACK {number}")
                log.write(f"ACK {number}\n")
                (names.add if words[0] == "write" else names.remove)(words[1])
    except Exception as e:  # the main thread reports it
        failures.append(e)


def numbers(log_path):
    operations, acked = busy.read_log(log_path)
    return acked, len(operations)


def wait_until(log_path, count, failures, limit=240):
    end = time.monotonic() + limit
    while numbers(log_path)[0] < count:
        if failures:
            raise failures[0]
        if time.monotonic() > end:
            raise RuntimeError(f"operation {count} was not acknowledged within {limit} s")
        time.sleep(0.05)


def backup(args, log_path, failures):
    """Freezes, copies, drops; the guest goes on all the time."""
    snap = os.path.join(args.live, "snapshots/night")
    acked, _ = numbers(log_path)
    os.mkdir(snap)
    _, begun = numbers(log_path)
    with open(os.path.join(args.work, "marks"), "w", encoding="ascii") as f:
        f.write(f"{acked} {begun}\n")
    print(f"frozen between operations {acked} and {begun}", flush=True)
    wait_until(log_path, begun + 15, failures)
    os.mkdir(os.path.join(args.work, "copy"))
    archive = os.path.join(args.work, "copy.tar")
    tar = subprocess.run(["tar", "-C", snap, "-cSf", archive, args.disk], stderr=subprocess.PIPE,
                         check=True)
    if tar.stderr:
        raise RuntimeError(f"tar says: {tar.stderr.decode()}")
    subprocess.run(["tar", "-C", os.path.join(args.work, "copy"), "-xSf", archive], check=True)
    wait_until(log_path, begun + 40, failures)
    subprocess.run(["cp", "--sparse=always", os.path.join(snap, args.disk),
                    os.path.join(args.work, "frozen.img")], check=True)
    os.rmdir(snap)
    after = numbers(log_path)[0]
    wait_until(log_path, after + 5, failures)
    print(f"copied while the guest went on to operation {after}", flush=True)


def day(args, act):
    """Boots the guest, calls ACT(log_path, failures) while it works, and shuts it down."""
    log_path = os.path.join(args.work, "guest.log")
    open(log_path, "w", encoding="ascii").close()
    guest = Guest(args)
    stopping, failures = threading.Event(), []
    thread = threading.Thread(target=work, args=(guest, log_path, stopping, failures), daemon=True)
    try:
        guest.expect("READY")
        thread.start()
        wait_until(log_path, 30, failures)
        act(log_path, failures)
        stopping.set()
        thread.join(60)
        if failures:
            raise failures[0]
        guest.send("0 off")
        guest.process.wait(60)
    finally:
        if guest.process.poll() is None:
            guest.process.terminate()
            guest.process.wait(20)


def parser(text):
    """With the arguments that day() needs."""
    out = argparse.ArgumentParser(description=text)
    out.add_argument("--root", required=True, help="where kernel and busybox were unpacked")
    out.add_argument("--live", required=True, help="the fleecefs mount")
    out.add_argument("--disk", required=True, help="the disk's name in it")
    out.add_argument("--work", required=True, help="directory for everything made here")
    out.add_argument("--limit", type=int, default=400, help="longest life of the guest, seconds")
    return out


def main():
    args = parser(__doc__).parse_args()
    day(args, lambda log_path, failures: backup(args, log_path, failures))


if __name__ == "__main__":
    try:
        main()
    except (RuntimeError, OSError, subprocess.SubprocessError) as error:
        sys.exit(f"guest.py: {error}")
