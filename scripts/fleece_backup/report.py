"""What status.json says of the snapshot, and what tools say of their run."""
import json
import os
import re
import signal
import sys
import time

LINE_SECONDS = 60


def read_status(path):
    with open(path, encoding="utf-8") as f:
        return json.load(f)


def raw(entry, field):
    """A name, with the bytes that are not UTF-8."""
    if f"{field}_hex" in entry:
        return bytes.fromhex(entry[f"{field}_hex"])
    return os.fsencode(entry[field])


def places(path):
    sys.stdout.buffer.write(raw(read_status(path), "snapdir") + b"\0")


def snapshot_of(path, name):
    for entry in read_status(path)["snapshots"]:
        if entry["name"] == name:
            return entry
    raise ValueError(f"the snapshot {name} is gone")


def human(count):
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            break
        value /= 1024
    else:
        unit = "TiB"
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


def summary(path, name):
    entry = snapshot_of(path, name)
    print(f"frozen {entry['frozen_bytes']} bytes in {entry['files']} files, read {entry['read_bytes']}, preserved "
          f"{entry['preserved_bytes']}; longest guest wait {(entry['longest_wait_us'] or 0) / 1000:.1f} ms")
    if entry["state"] == "ok":
        return 0
    reason = f": {entry['reason']}" if entry.get("reason") else ""
    print(f"fleece-backup: the snapshot {name} is {entry['state']}{reason}", file=sys.stderr)
    for disk in entry["disks"]:
        if disk["state"] != "ok":
            print(f"fleece-backup: {os.fsdecode(raw(disk, 'path'))} is {disk['state']}", file=sys.stderr)
    return 1


class Meter:
    def __init__(self, total):
        self.total = total
        self.begin = self.said = time.monotonic()
        self.terminal = sys.stderr.isatty()
        self.rate = None
        self.last = None

    def text(self, done):
        done = min(done, self.total)
        part = done / self.total if self.total else 1
        now = time.monotonic()
        if self.last:
            fresh = max(done - self.last[1], 0) / max(now - self.last[0], 0.001)
            self.rate = fresh if self.rate is None else 0.8 * self.rate + 0.2 * fresh
        self.last = (now, done)
        left = ""
        if self.rate:
            seconds = int((self.total - done) / self.rate)
            left = f"  {human(self.rate)}/s  {seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02} left"
        return part, f"{human(done)} of {human(self.total)}{left}"

    def show(self, done):
        part, text = self.text(done)
        if self.terminal:
            filled = int(part * 20)
            sys.stderr.write(f"\r[{'#' * filled}{'.' * (20 - filled)}] {part:4.0%}  {text}\x1b[K")
            sys.stderr.flush()
        elif time.monotonic() - self.said >= float(os.environ.get("FLEECE_BACKUP_LINES", LINE_SECONDS)):
            self.said = time.monotonic()
            print(time.strftime("%F %T"), f"{part:.0%} read: {text}", flush=True)

    def clear(self):
        if self.terminal:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()


class Ended(Exception):
    """SIGTERM came."""


def progress(path, name, total):
    meter = Meter(int(total))

    def stop(*_):
        raise Ended
    signal.signal(signal.SIGTERM, stop)
    try:
        while True:
            meter.show(snapshot_of(path, name)["read_bytes"])
            time.sleep(0.5 if meter.terminal else 1)
    except (Ended, OSError, ValueError):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        meter.clear()
    except OSError:
        pass  # the terminal has gone


def said(tool):
    """Of its output at standard input."""
    text = sys.stdin.read()
    if tool == "rsync":
        found = {key: value.replace(",", "") for key, value in
                 re.findall(r"^(Total [a-z ]+|Literal data|Number of regular files transferred): ([0-9,]+)", text,
                            re.MULTILINE)}
        print(f"{found.get('Number of regular files transferred', '?')} files transferred, "
              f"{found.get('Literal data', '?')} bytes of them new, {found.get('Total bytes sent', '?')} bytes sent")
    elif tool == "borg":
        stats = json.loads(text)["archive"]["stats"]
        print(f"{stats['original_size']} bytes, {stats['deduplicated_size']} of them new in the repository")
    else:
        last = json.loads(text.splitlines()[-1])
        if tool == "restic-id":
            print(last["snapshot_id"])
        else:
            print(f"{last['files_unmodified']} files unchanged, {last['files_new'] + last['files_changed']} read, "
                  f"{last['data_added']} bytes new in the repository")
