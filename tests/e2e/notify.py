#!/usr/bin/env python3
"""
A service manager's side of sd_notify(3): starts fleecefs as systemd would and looks at what it is told, when.

  notify.py FLEECEFS SOURCE MOUNTPOINT FLEECE_DIR DIRECTORY [COMMAND...]

COMMAND is put before fleecefs. Sockets and the log (DIRECTORY/service.log) are made in DIRECTORY.
"""
import errno
import os
import signal
import socket
import subprocess
import sys
import time

program, source, mountpoint, fleece, directory, *wrapper = sys.argv[1:]
log_path = os.path.join(directory, "service.log")


def fail(text):
    sys.exit(f"FAIL: {text}; log: {open(log_path, encoding='utf-8').read()}")


class Manager:
    """One run of the service."""

    def __init__(self, name, *options, foreground=True, journal=False):
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(name.replace("@", "\0", 1))
        self.socket.settimeout(30)
        self.name = name
        args = [*wrapper, program, source, mountpoint, f"--fleece-dir={fleece}", *options]
        if foreground:
            args.append("-f")
        with open(log_path, "ab") as log:
            stat = os.fstat(log.fileno())
            stream = f"{stat.st_dev}:{stat.st_ino}" if journal else "1:1"
            self.process = subprocess.Popen(
                args, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env={
                **os.environ, "NOTIFY_SOCKET": name, "JOURNAL_STREAM": stream})

    def next(self):
        """The next message as a dictionary; None when nobody can send any more."""
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            ended = self.process.poll() is not None
            self.socket.settimeout(0.02)
            try:
                text = self.socket.recv(4096).decode()
            except (TimeoutError, BlockingIOError):
                if ended:
                    return None
                continue
            print(f"    {text.splitlines()}")
            return dict(line.split("=", 1) for line in text.splitlines())
        return fail("no message")

    def wait_ready(self):
        message = self.next()
        # At once: what is announced must be there.
        mounted = os.path.ismount(mountpoint)
        names = os.listdir(mountpoint) if mounted else []
        if not message or message.get("READY") != "1":
            fail(f"the first word is not READY=1: {message}")
        if not mounted or "snapshots" not in names:
            fail("READY=1 before the mount is ready to use")
        if not message.get("STATUS"):
            fail("no STATUS")

    def wait_end(self):
        first = self.next()
        if not first or first.get("STOPPING") != "1":
            fail(f"the end is not announced by STOPPING=1: {first}")
        while message := self.next():
            if "READY" in message:
                fail("READY=1 at the end")
        if self.process.wait(30) != 0:
            fail(f"status {self.process.returncode}")
        if os.path.ismount(mountpoint):
            fail("the mount is still there")
        self.close()

    def close(self):
        self.socket.close()
        if self.name[0] == "/":
            os.unlink(self.name)


path = os.path.join(directory, "notify")
print("--- SIGTERM, as systemctl stop sends it, while a file is open")
open(log_path, "w", encoding="utf-8").close()
one = Manager(path, "--snapshot=boot")
one.wait_ready()
if os.listdir(os.path.join(mountpoint, "snapshots")) != ["boot"]:
    fail("READY=1 before the snapshot")
busy = os.open(os.path.join(mountpoint, "a.img"), os.O_RDONLY)
one.process.send_signal(signal.SIGTERM)
one.wait_end()
try:
    os.pread(busy, 1, 0)
    fail("who still used the mount reads on")
except OSError as error:
    if error.errno != errno.ENOTCONN:
        fail(f"who still used the mount gets {error}")
try:
    os.close(busy)
except OSError:  # as read(2): flush cannot be asked for any more
    pass

print("--- umount, and a socket with an abstract name; levels for the journal")
before = os.path.getsize(log_path)
two = Manager(f"@fleecefs-test-{os.getpid()}", journal=True)
two.wait_ready()
subprocess.run(["umount", mountpoint], check=True)
two.wait_end()
with open(log_path, encoding="utf-8") as log:
    log.seek(before)
    lines = log.read()
expected = f"<6>{source} is mounted on {mountpoint}\n<6>{mountpoint} is unmounted\n"
if lines != expected:
    fail(f"lines for the journal: {lines}")

print("--- a mount that fails")
three = Manager(path, "--snapshot=in/valid")
if (message := three.next()) is not None:
    fail(f"a mount that failed says {message}")
if three.process.wait(30) == 0:
    fail("a mount that failed ends with status 0")
three.close()

print("--- in the background there is nobody to tell")
four = Manager(path, foreground=False)
if four.process.wait(30) != 0 or not os.path.ismount(mountpoint):
    fail("no mount in the background")
subprocess.run(["umount", mountpoint], check=True)
four.socket.settimeout(0.2)
try:
    fail(f"it says {four.socket.recv(4096)}")
except TimeoutError:
    pass
four.close()
