"""Talking to a QEMU (QMP) and to a guest agent (QGA): JSON over a Unix socket, one command at a time."""
import json
import os
import socket
import time


class Refused(Exception):
    """It cannot be done, and the text says why and what to change: exit status 1."""


class Unreachable(Exception):
    """Somebody does not answer: exit status 69."""


class CommandError(Exception):
    """QEMU, or the agent, answered with an error."""


class Channel:
    """A connection. Lines are read with a deadline for the whole answer."""

    def __init__(self, path, what, timeout):
        self.what = f"{what} {path}"
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(timeout)
        self.pending = b""
        try:
            self._connect(os.path.abspath(path))
        except OSError as error:
            raise Unreachable(f"{self.what}: {error.strerror or error}") from None

    def _connect(self, path):
        if len(os.fsencode(path)) < 108:
            self.socket.connect(path)
            return
        folder = os.open(os.path.dirname(path), os.O_PATH | os.O_CLOEXEC)
        try:  # a name that is too long for a socket's address
            self.socket.connect(f"/proc/self/fd/{folder}/{os.path.basename(path)}")
        finally:
            os.close(folder)

    def send(self, data):
        try:
            self.socket.sendall(data)
        except OSError as error:
            raise Unreachable(f"{self.what}: {error.strerror or error}") from None

    def line(self, timeout, terminator=b"\n"):
        end = time.monotonic() + timeout
        while terminator not in self.pending:
            left = end - time.monotonic()
            try:
                self.socket.settimeout(max(left, 0.001))
                data = self.socket.recv(65536) if left > 0 else None
            except socket.timeout:
                data = None
            except OSError as error:
                raise Unreachable(f"{self.what}: {error.strerror or error}") from None
            if data is None:
                raise Unreachable(f"{self.what}: no answer within {timeout:g} s")
            if not data:
                raise Unreachable(f"{self.what}: the connection was closed")
            self.pending += data
        line, self.pending = self.pending.split(terminator, 1)
        return line

    def message(self, timeout):
        line = self.line(timeout)
        try:
            answer = json.loads(line)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise Unreachable(f"{self.what}: this is no answer: {line[:80]!r}")
        return answer

    def close(self):
        self.socket.close()


class Monitor:
    """A QMP monitor. It serves one client at a time: a second one waits for its greeting."""

    GREETING_SECONDS = 10
    COMMAND_SECONDS = 300  # moving a disk flushes it first

    def __init__(self, path):
        self.channel = Channel(path, "the QMP monitor", self.GREETING_SECONDS)
        try:
            greeting = self.channel.message(self.GREETING_SECONDS)
        except Unreachable as error:
            raise Unreachable(f"{error} (does another program use this monitor? "
                              "QEMU can have several: -qmp unix:PATH,server=on,wait=off)") from None
        if "QMP" not in greeting:
            raise Unreachable(f"{self.channel.what}: this is no QMP monitor")
        self.execute("qmp_capabilities")
        self.major = self.execute("query-version")["qemu"]["major"]

    def execute(self, command, arguments=None):
        self.channel.send(json.dumps({"execute": command, "arguments": arguments or {}}).encode())
        while True:
            answer = self.channel.message(self.COMMAND_SECONDS)
            if "error" in answer:
                raise CommandError(f"{command}: {answer['error'].get('desc')}")
            if "return" in answer:
                return answer["return"]

    def pid(self):
        """Of the QEMU which listens at the socket; 0 where it cannot be known."""
        option = self.channel.socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        return int.from_bytes(option[:4], "little", signed=True)


class Agent:
    """The guest agent behind a virtio-serial port. What an earlier client left unread is skipped by
    guest-sync-delimited: the answer that counts comes after a byte 0xFF."""

    SYNC_SECONDS = 10

    def __init__(self, path):
        self.channel = Channel(path, "the guest agent", self.SYNC_SECONDS)
        number = int.from_bytes(os.urandom(4), "big")
        self.channel.send(b"\xff" + self._encode("guest-sync-delimited", {"id": number}))
        try:
            while True:
                self.channel.line(self.SYNC_SECONDS, b"\xff")
                if self.channel.message(self.SYNC_SECONDS).get("return") == number:
                    return
        except Unreachable as error:
            self.channel.close()
            raise Unreachable(f"{error} (is the agent running in the guest, and does nobody else "
                              "use its socket?)") from None

    @staticmethod
    def _encode(command, arguments=None):
        return json.dumps({"execute": command, "arguments": arguments or {}}).encode() + b"\n"

    def execute(self, command, timeout):
        self.channel.send(self._encode(command))
        answer = self.channel.message(timeout)
        if "error" in answer:
            raise CommandError(f"{command}: {answer['error'].get('desc')}")
        return answer.get("return")

    def close(self):
        self.channel.close()
