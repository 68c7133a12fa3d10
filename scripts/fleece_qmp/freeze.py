"""
Freezing a guest's filesystems, so that nobody can forget to thaw them.

freeze starts a watchdog before it freezes: a process in a session of its own, which thaws after so
many seconds, or as soon as the caller has died. It holds no connection to the agent, for there can
be but one. It listens at a socket in the abstract namespace, which ends with it, so nothing is left
over on a disk; the name is made of the user and the guest, and is the lock against a second freeze
at the same time, too. thaw thaws first and ends the watchdog then: if the agent does not answer, the
watchdog goes on trying.
"""
import hashlib
import os
import re
import select
import signal
import socket
import subprocess
import sys
import syslog
import time

from .talk import Agent, CommandError, Refused, Unreachable

FREEZE_SECONDS = 120  # a guest writes back all that it has cached
THAW_SECONDS = 60
RETRY_SECONDS = 2
GIVE_UP_SECONDS = 3600


class AgentGuest:
    """By the agent's socket."""

    def __init__(self, path):
        self.path = os.path.realpath(path)
        self.key = f"qga:{self.path}"

    def status(self):
        agent = Agent(self.path)
        try:
            return agent.execute("guest-fsfreeze-status", Agent.SYNC_SECONDS)
        finally:
            agent.close()

    def check(self):
        if self.status() == "frozen":
            raise Refused(f"{self.path}: the guest's filesystems are frozen already; "
                          "if nobody is about to thaw them: fleece-qmp thaw")

    def freeze(self):
        return self._count("guest-fsfreeze-freeze", FREEZE_SECONDS)

    def thaw(self):
        return self._count("guest-fsfreeze-thaw", THAW_SECONDS)

    def _count(self, command, seconds):
        agent = Agent(self.path)
        try:
            return int(agent.execute(command, seconds))
        finally:
            agent.close()


class LibvirtGuest:
    """By virsh, which knows the way to the agent. LIBVIRT_DEFAULT_URI says to which libvirt."""

    AWAY = re.compile("failed to connect|failed to get domain|domain not found|not running|"
                      "not connected|not responding|not configured", re.IGNORECASE)

    def __init__(self, domain):
        self.domain = domain
        self.key = f"virsh:{os.environ.get('LIBVIRT_DEFAULT_URI', '')}:{domain}"

    def check(self):
        self._virsh("domstate", Agent.SYNC_SECONDS)

    def freeze(self):
        return self._count("domfsfreeze", FREEZE_SECONDS)

    def thaw(self):
        return self._count("domfsthaw", THAW_SECONDS)

    def _count(self, command, seconds):
        found = re.search("[0-9]+", self._virsh(command, seconds))
        return int(found.group()) if found else 0

    def _virsh(self, command, seconds):
        try:
            done = subprocess.run(["virsh", command, "--domain", self.domain],
                                  env={**os.environ, "LC_ALL": "C"}, stdin=subprocess.DEVNULL,
                                  stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=seconds,
                                  check=False)
        except FileNotFoundError:
            raise Unreachable("virsh is not installed (Debian: libvirt-clients)") from None
        except subprocess.TimeoutExpired:
            raise Unreachable(f"virsh {command} {self.domain}: no answer within {seconds} s") \
                from None
        if done.returncode:
            text = " ".join(done.stderr.decode(errors="replace").split())
            if self.AWAY.search(text):
                raise Unreachable(f"virsh {command} {self.domain}: {text}")
            raise CommandError(f"virsh {command} {self.domain}: {text}")
        return done.stdout.decode(errors="replace")


def _address(guest):
    digest = hashlib.sha256(os.fsencode(guest.key)).hexdigest()[:32]
    return f"\0fleece-qmp-{os.geteuid()}-{digest}"


def _peer_uid(connection):
    option = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    return int.from_bytes(option[4:8], "little")


def _words(pid):
    with open(f"/proc/{pid}/cmdline", "rb") as f:
        return f.read().split(b"\0")[:-1]


def _starts_us(words):
    """Are these the words of a program like timeout, whose last arguments are our command line?"""
    own = [os.path.basename(os.fsencode(sys.argv[0])), *map(os.fsencode, sys.argv[1:])]
    last = words[-len(own):]
    return [os.path.basename(last[0]), *last[1:]] == own


def caller():
    """Who froze: our parent, but not a subshell of it, nor a program like timeout that started us."""
    pid = os.getppid()
    try:
        while pid > 1:
            with open(f"/proc/{pid}/stat", "rb") as f:
                parent = int(f.read().rsplit(b")", 1)[1].split()[1])
            words = _words(pid)
            if not _starts_us(words) and (parent <= 1 or _words(parent) != words):
                break
            pid = parent
    except (OSError, IndexError):
        pass
    return pid


def _thaw_at_last(guest, why):
    """The watchdog's purpose."""
    end = time.monotonic() + GIVE_UP_SECONDS
    while True:
        try:
            count = guest.thaw()
            if count:
                syslog.syslog(syslog.LOG_WARNING, f"{guest.key}: thawed {count} filesystems: {why}")
            return
        except (Unreachable, CommandError, ValueError, TypeError) as error:
            if time.monotonic() > end:
                syslog.syslog(syslog.LOG_ERR, f"{guest.key}: not thawed: {error}")
                return
        time.sleep(RETRY_SECONDS)


def _watch(guest, listener, watched, seconds):
    end = time.monotonic() + seconds
    while True:
        left = end - time.monotonic()
        ready = select.select([listener, watched], [], [], left)[0] if left > 0 else []
        if listener in ready:
            connection = listener.accept()[0]
            if _peer_uid(connection) in (0, os.geteuid()):
                listener.close()  # before the answer: the name is free then
                connection.sendall(b"ended\n")
                return
            connection.close()
        elif watched in ready:
            return _thaw_at_last(guest, "the program that had frozen them has died")
        elif left <= 0:
            return _thaw_at_last(guest, f"frozen for {seconds:g} s")


def _start_watchdog(guest, pid, seconds):
    listener = socket.socket(socket.AF_UNIX)
    try:
        listener.bind(_address(guest))
    except OSError:
        raise Refused(f"{guest.key}: another run has frozen this guest; wait for it, or "
                      "fleece-qmp thaw") from None
    listener.listen(8)
    try:
        watched = os.pidfd_open(pid)
    except OSError as error:
        raise Refused(f"process {pid}, which is to be watched: {error.strerror}") from None
    if os.fork() > 0:
        listener.close()
        os.close(watched)
        return
    status = 70
    try:
        os.setsid()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        null = os.open(os.devnull, os.O_RDWR)
        for fd in range(3):
            os.dup2(null, fd)
        keep = {listener.fileno(), watched}
        for name in os.listdir("/proc/self/fd"):  # locks and pipes of the caller's
            if int(name) > 2 and int(name) not in keep:
                try:
                    os.close(int(name))
                except OSError:
                    pass
        os.chdir("/")
        syslog.openlog("fleece-qmp", syslog.LOG_PID, syslog.LOG_DAEMON)
        _watch(guest, listener, watched, seconds)
        status = 0
    finally:
        os._exit(status)


def _end_watchdog(guest):
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(10)
    try:
        connection.connect(_address(guest))
        if _peer_uid(connection) in (0, os.geteuid()):
            connection.recv(16)
    except OSError:
        pass  # there is none
    finally:
        connection.close()


def freeze(guest, pid, seconds):
    guest.check()
    _start_watchdog(guest, pid, seconds)
    try:
        count = guest.freeze()
    except BaseException as error:
        # What became of it is not known: the watchdog thaws, if this cannot.
        try:
            guest.thaw()
            _end_watchdog(guest)
        except (Unreachable, CommandError):
            print("fleece-qmp: the guest cannot be thawed now; it is tried again in "
                  f"{seconds:g} s, or when process {pid} ends", file=sys.stderr)
        if isinstance(error, CommandError):
            raise Refused(str(error)) from None
        raise
    print(count)


def thaw(guest):
    try:
        count = guest.thaw()
    except CommandError as error:
        raise Refused(str(error)) from None
    _end_watchdog(guest)
    print(count)
