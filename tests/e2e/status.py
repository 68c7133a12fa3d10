#!/usr/bin/env python3
"""What status.json, metrics and the extended attributes say, against what was done.

  status.py numbers MOUNTPOINT SOURCE FLEECE_DIR [OPTION=VALUE…]   a fresh mount without snapshots
  status.py expect MOUNTPOINT EXPRESSION                           with s: status.json; snap(NAME), disk(NAME, PATH)
  status.py fill MOUNTPOINT FILE PERCENT                           overwrites until that much of the limit is used
  status.py race MOUNTPOINT SECONDS                                readers, writers, snapshots come and go
"""
import json
import mmap
import os
import subprocess
import sys
import threading
import time

import openmetrics

STATE = "user.fleecefs.state"


def read_file(path, piece=None):
    """All of it, in pieces of odd sizes if wished, from one open."""
    fd = os.open(path, os.O_RDONLY)
    parts = []
    while True:
        part = os.read(fd, piece or 1 << 20)
        if not part:
            break
        parts.append(part)
    os.close(fd)
    return b"".join(parts)


def no_doubles(pairs):
    keys = [k for k, _ in pairs]
    assert len(keys) == len(set(keys)), f"a key twice: {keys}"
    return dict(pairs)


def parse_json(data):
    return json.loads(data.decode("utf-8"), object_pairs_hook=no_doubles)


def status(mnt):
    return parse_json(read_file(f"{mnt}/.fleecefs/status.json"))


def metrics(mnt):
    return openmetrics.parse(read_file(f"{mnt}/.fleecefs/metrics"))


def named(items, key, name):
    found = [i for i in items if i[key] == name]
    assert len(found) == 1, f"{key} {name}: {len(found)} of {[i[key] for i in items]}"
    return found[0]


def same(what, found, expected):
    assert found == expected, f"{what}: {found!r}, expected {expected!r}"


def near(what, found, expected, by):
    assert abs(found - expected) <= by, f"{what}: {found}, expected {expected} ± {by}"


SUMS = {"frozen_bytes", "read_bytes", "preserved_bytes", "allocated_bytes", "saves", "longest_wait_us",
        "p99_wait_us"}
TOP = {"version", "pid", "source", "mountpoint", "fleece_dir", "snapdir", "started", "uptime_seconds",
       "options", "fleece", "guest", "snapshots"}
OPTIONS = {"cluster_size", "on_cbw_error", "cbw_timeout_seconds", "fleece_limit_bytes", "fleece_reserve_bytes",
           "exclude", "device", "durable", "snapshot"}
FLEECE = {"used_bytes", "limit_bytes", "reserve_bytes", "free_bytes", "rate_bytes_per_second", "seconds_to_full"}
GUEST = {"saves", "saved_bytes", "longest_wait_us", "p99_wait_us", "failed_saves"}
SNAPSHOT = SUMS | {"name", "created", "age_seconds", "state", "reason", "durable", "open_files", "files", "disks"}
DISK = SUMS | {"path", "state", "reason"}


def check_form(s):
    """Exactly the fields that there are to be, and sums that add up."""
    same("top", set(s), TOP)
    same("options", set(s["options"]), OPTIONS)
    same("fleece", set(s["fleece"]), FLEECE)
    same("guest", set(s["guest"]), GUEST)
    for snap in s["snapshots"]:
        same("snapshot", set(snap) - {"name_hex"}, SNAPSHOT)
        assert snap["state"] in ("ok", "broken", "torn") and (snap["state"] == "ok") == (snap["reason"] is None)
        for disk in snap["disks"]:
            same("disk", set(disk) - {"path_hex"}, DISK)
            assert disk["p99_wait_us"] <= disk["longest_wait_us"]
        for key in ("read_bytes", "preserved_bytes", "saves"):
            same(f"sum of {key}", snap[key], sum(d[key] for d in snap["disks"]))
        same("longest wait", snap["longest_wait_us"], max([d["longest_wait_us"] for d in snap["disks"]] or [0]))
        states = ["ok", "broken", "torn"]
        same("worst state", snap["state"], max([d["state"] for d in snap["disks"]] or ["ok"], key=states.index))


def check_metrics(mnt):
    """metrics says what status.json says."""
    before, m, s = status(mnt), metrics(mnt), status(mnt)

    def get(name, **labels):
        kind = m["fleecefs_" + name]
        found = [v for _, have, v in kind.samples if have == labels]
        assert len(found) == 1, f"{name} {labels}: {len(found)}"
        return found[0]

    for key in ("used", "reserve"):
        same(key, get(f"fleece_{key}_bytes"), s["fleece"][f"{key}_bytes"])
    same("limit", "fleecefs_fleece_limit_bytes" in m, s["fleece"]["limit_bytes"] is not None)
    for key in ("saves", "saved_bytes", "failed_saves"):
        same(key, get(f"guest_{key}"), s["guest"][key])
    near("longest", get("guest_longest_wait_seconds") * 1e6, s["guest"]["longest_wait_us"], 1)
    near("p99", get("guest_p99_wait_seconds") * 1e6, s["guest"]["p99_wait_us"], 1)
    near("started", get("start_timestamp_seconds"), s["started"], 1e-5)
    same("version", get("build", version=s["version"]), 1)

    def compare(kind, item, labels):
        for key in ("frozen_bytes", "preserved_bytes", "allocated_bytes", "read_bytes", "saves"):
            same(f"{kind} {key}", get(f"{kind}_{key}", **labels), item[key])
        near("longest", get(f"{kind}_longest_wait_seconds", **labels) * 1e6, item["longest_wait_us"], 1)
        for state in ("ok", "broken", "torn"):
            same("state", get(f"{kind}_state", **labels, **{f"fleecefs_{kind}_state": state}),
                 item["state"] == state)

    def hexed(labels, item, key, label):
        return labels | ({label + "_hex": item[key + "_hex"]} if key + "_hex" in item else {})

    for snap in s["snapshots"]:
        labels = hexed({"snapshot": snap["name"]}, snap, "name", "snapshot")
        compare("snapshot", snap, labels)
        same("open", get("snapshot_open_files", **labels), snap["open_files"])
        same("files", get("snapshot_files", **labels), snap["files"])
        near("created", get("snapshot_created_timestamp_seconds", **labels), snap["created"], 1e-5)
        for disk in snap["disks"]:
            compare("disk", disk, labels | hexed({"disk": disk["path"]}, disk, "path", "disk"))
    same("disks", len(m["fleecefs_disk_saves"].samples), sum(len(x["disks"]) for x in s["snapshots"]))
    assert before["uptime_seconds"] <= s["uptime_seconds"]


def regular_files(top):
    out = []
    for base, dirs, names in os.walk(os.fsencode(top)):
        if base == os.fsencode(top) and b".fleecefs" in dirs:
            dirs.remove(b".fleecefs")
        out += [os.path.join(base, n) for n in names]
    return out


class Numbers:
    def __init__(self, mnt, src, fleece, options):
        self.mnt, self.src, self.fleece, self.options = mnt, src, fleece, options
        self.saves = self.saved = 0

    def status(self):
        s = status(self.mnt)
        check_form(s)
        return s

    def snap(self, name):
        return named(self.status()["snapshots"], "name", name)

    def disk(self, name, path):
        return named(self.snap(name)["disks"], "path", path)

    def saved_by(self, what, saves, clusters):
        """The operation just made saved that many clusters, in that many operations."""
        self.saves += saves
        self.saved += clusters * 4096
        g = self.status()["guest"]
        same(f"saves after {what}", g["saves"], self.saves)
        same(f"saved bytes after {what}", g["saved_bytes"], self.saved)
        same("failed", g["failed_saves"], 0)

    def write(self, path, off, data):
        fd = os.open(f"{self.mnt}/{path}", os.O_WRONLY)
        os.pwrite(fd, data, off)
        os.close(fd)

    def top(self):
        before = time.time()
        s = self.status()
        for key, value in {"source": self.src, "mountpoint": self.mnt, "fleece_dir": self.fleece,
                           "snapdir": "snapshots", "snapshots": []}.items():
            same(key, s[key], value)
        same("executable", os.path.basename(os.readlink(f"/proc/{s['pid']}/exe")), "fleecefs")
        assert before - s["started"] - 0.05 <= s["uptime_seconds"] <= time.time() - s["started"] + 0.05
        near("start", s["started"], os.stat(f"/proc/{s['pid']}").st_ctime, 20)
        options = {"cluster_size": 4096, "on_cbw_error": "break-snapshot", "cbw_timeout_seconds": 0,
                   "fleece_limit_bytes": None, "fleece_reserve_bytes": 64 << 20, "exclude": [], "device": [],
                   "durable": False, "snapshot": None}
        options.update(self.options)
        same("options", s["options"], options)
        same("used", s["fleece"]["used_bytes"], 0)
        v = os.statvfs(self.fleece)
        near("free", s["fleece"]["free_bytes"], v.f_bavail * v.f_frsize - options["fleece_reserve_bytes"], 64 << 20)
        same("full", s["fleece"]["seconds_to_full"], None)

    def freeze(self):
        before = time.time()
        os.mkdir(f"{self.mnt}/snapshots/n")
        after = time.time()
        n = self.snap("n")
        assert before - 0.02 <= n["created"] <= after, f"created {n['created']}, not in {before} … {after}"
        assert after - n["created"] - 0.05 <= n["age_seconds"] <= time.time() - n["created"] + 0.05
        files = regular_files(self.src)
        same("files", n["files"], len(files))
        same("size", n["frozen_bytes"], sum(os.stat(f).st_size for f in files))
        same("disks", n["disks"], [])
        same("state", (n["state"], n["reason"], n["durable"], n["open_files"]), ("ok", None, False, 0))
        self.du(n["allocated_bytes"], n["files"])

    def du(self, allocated, files):
        """Tables are counted by pages: as much as the filesystem gave, but for a page or two each."""
        taken = sum(os.stat(f).st_blocks * 512 for f in regular_files(self.fleece) if f.endswith(b".qcow2"))
        assert taken - files * 16384 <= allocated <= taken + files * 8192, f"allocated {allocated}, du {taken}"
        same("used", self.status()["fleece"]["used_bytes"],
             sum(s["allocated_bytes"] for s in self.status()["snapshots"]))

    def writes(self):
        for i in range(5):
            self.write("a.img", i * 3 * 4096 + 100, b"x" * 200)
        self.saved_by("five writes", 5, 5)
        self.write("a.img", 0, b"y" * 4096)
        self.saved_by("a second write to a cluster", 0, 0)
        with open(f"{self.mnt}/a.img", "rb") as f:
            f.seek(1 << 20)
            old = f.read(65536)
        self.write("a.img", 1 << 20, old)
        self.saved_by("a write of what is there", 0, 0)
        self.write("a.img", 1 << 20, os.urandom(65536))
        self.saved_by("64K", 1, 16)
        self.write("hole.img", 8192, b"z" * 4096)
        self.saved_by("a write into a hole", 1, 1)
        os.truncate(f"{self.mnt}/b.img", 512 << 10)
        self.saved_by("a truncation", 1, 128)
        a, b, hole = (self.disk("n", x) for x in ("a.img", "b.img", "hole.img"))
        same("preserved", (a["preserved_bytes"], b["preserved_bytes"], hole["preserved_bytes"]),
             (21 * 4096, 512 << 10, 4096))
        same("saves", (a["saves"], b["saves"], hole["saves"]), (6, 1, 1))
        same("frozen", (a["frozen_bytes"], b["frozen_bytes"], hole["frozen_bytes"]),
             (3000001, 1 << 20, 64 << 20))
        near("allocated for a", a["allocated_bytes"], 21 * 4096, 5 * 4096)
        near("allocated for a hole", hole["allocated_bytes"], 0, 4 * 4096)
        same("disks", len(self.snap("n")["disks"]), 3)
        for d in (a, b, hole):
            assert 0 < d["p99_wait_us"] <= d["longest_wait_us"] < 60e6
        same("longest", self.status()["guest"]["longest_wait_us"], max(d["longest_wait_us"] for d in (a, b, hole)))
        self.du(self.snap("n")["allocated_bytes"], self.snap("n")["files"])
        f = self.status()["fleece"]
        assert f["rate_bytes_per_second"] > 0 and f["seconds_to_full"] > 0, f
        near("time to full", f["seconds_to_full"], f["free_bytes"] / f["rate_bytes_per_second"], 1)

    def reads(self):
        frozen = f"{self.mnt}/snapshots/n"
        same("bytes of c", len(read_file(f"{frozen}/sub/c.img")), 200000)
        same("read", self.disk("n", "sub/c.img")["read_bytes"], 200000)
        fd = os.open(f"{frozen}/b.img", os.O_RDONLY | os.O_DIRECT)
        buf = mmap.mmap(-1, 65536)
        same("direct read", os.preadv(fd, [buf], 262144), 65536)
        same("open files", self.snap("n")["open_files"], 1)
        same("read", self.disk("n", "b.img")["read_bytes"], 65536)
        os.close(fd)
        deadline = time.time() + 10
        while self.snap("n")["open_files"] and time.time() < deadline:
            time.sleep(0.01)
        same("open files", self.snap("n")["open_files"], 0)
        odd = b"odd \\ \" \n \xff name"
        same("odd", read_file(os.path.join(os.fsencode(frozen), odd)), b"odd")
        d = named(self.snap("n")["disks"], "path", odd.decode("utf-8", "replace"))
        same("hex", d["path_hex"], odd.hex())
        long = "l" * 250
        same("long", read_file(f"{frozen}/{long}"), b"long")
        same("read", self.disk("n", long)["read_bytes"], 4)

    def chain(self):
        n = self.snap("n")
        os.mkdir(f"{self.mnt}/snapshots/m")
        self.write("a.img", 2 << 20, os.urandom(40960))
        self.saved_by("a write with two snapshots", 1, 10)
        same("n", self.disk("n", "a.img")["preserved_bytes"], 21 * 4096)
        same("m", self.disk("m", "a.img")["preserved_bytes"], 10 * 4096)
        same("names", [s["name"] for s in self.status()["snapshots"]], ["n", "m"])
        check_metrics(self.mnt)
        os.rename(f"{self.mnt}/snapshots/m", f"{self.mnt}/snapshots/other")
        same("renamed", self.disk("other", "a.img")["preserved_bytes"], 10 * 4096)
        os.rmdir(f"{self.mnt}/snapshots/other")
        s = self.status()
        same("names", [x["name"] for x in s["snapshots"]], ["n"])
        hidden = s["fleece"]["used_bytes"] - n["allocated_bytes"]
        assert 40960 <= hidden <= 40960 + 5 * 8192, f"what n needs of the dropped one: {hidden}"

    def attributes(self):
        n, frozen = self.snap("n"), f"{self.mnt}/snapshots/n"
        disk = self.disk("n", "a.img")

        def get(path, key):
            return os.getxattr(path, "user.fleecefs." + key).decode()

        for path, item in ((frozen, n), (f"{frozen}/a.img", disk)):
            same("state", get(path, "state"), "ok")
            same("preserved", int(get(path, "preserved")), item["preserved_bytes"])
            near("created", float(get(path, "created")), n["created"], 1e-5)
            assert len(get(path, "created").split(".")[1]) == 9
            assert not [x for x in os.listxattr(path) if x.startswith("user.fleecefs.")], os.listxattr(path)
        same("of the frozen file itself", os.getxattr(f"{frozen}/a.img", "user.comment"), b"mine")
        for path, key in ((f"{frozen}/sub", "state"), (f"{frozen}/a.img", "other"), (f"{self.mnt}/b.img", "state")):
            try:
                get(path, key)
            except OSError as e:
                same(path, os.strerror(e.errno), "No data available")
            else:
                raise AssertionError(f"{path} has {key}")
        out = subprocess.run(["getfattr", "--only-values", "-n", STATE, frozen], capture_output=True, text=True)
        same("getfattr", out.stdout, "ok")

    def fixed(self):
        """A file stays as it was when it was opened, however it is read."""
        path = f"{self.mnt}/.fleecefs/status.json"
        fd = os.open(path, os.O_RDONLY)
        head = os.read(fd, 100)
        self.write("a.img", 2500000, b"q" * 9)
        self.saved_by("one more", 1, 1)
        s = parse_json(head + b"".join(iter(lambda: os.read(fd, 7), b"")))
        os.close(fd)
        check_form(s)
        same("saves when it was opened", s["guest"]["saves"], self.saves - 1)
        for command in (["cat", path], ["tail", "-n", "+1", path], ["tail", "-c", "999999", path],
                        ["dd", f"if={path}", "bs=13", "status=none"], ["cp", path, "/dev/stdout"]):
            out = subprocess.run(command, capture_output=True, check=True).stdout
            same(command[0], parse_json(out)["guest"]["saves"], self.saves)
        with open(path, encoding="utf-8") as f:
            check_form(json.load(f))

    def closed(self):
        """Nothing can be changed, and it is listed nowhere."""
        own = f"{self.mnt}/.fleecefs"
        file = f"{own}/metrics"
        same("files", sorted(os.listdir(own)), ["metrics", "status.json"])
        assert ".fleecefs" not in os.listdir(self.mnt)
        assert not os.path.exists(f"{own}/theirs"), "what SOURCE has shows"
        same("modes", [os.stat(p).st_mode & 0o7777 for p in (own, file)], [0o550, 0o440])
        attempts = {
            "open": lambda: os.open(file, os.O_WRONLY), "truncate": lambda: os.truncate(file, 0),
            "create": lambda: os.open(f"{own}/x", os.O_WRONLY | os.O_CREAT), "mkdir": lambda: os.mkdir(f"{own}/x"),
            "unlink": lambda: os.unlink(file), "rename": lambda: os.rename(file, f"{own}/y"),
            "rename in": lambda: os.rename(f"{self.mnt}/b.img", f"{own}/b"), "rmdir": lambda: os.rmdir(own),
            "move away": lambda: os.rename(own, f"{self.mnt}/y"), "chmod": lambda: os.chmod(file, 0o644),
            "link in": lambda: os.link(f"{self.mnt}/b.img", f"{own}/b"), "symlink": lambda: os.symlink("x", f"{own}/x"),
            "over it": lambda: os.rename(f"{self.mnt}/sub", own), "setxattr": lambda: os.setxattr(file, "user.x", b"1"),
        }
        for what, attempt in attempts.items():
            try:
                attempt()
            except OSError as e:
                assert os.strerror(e.errno) in ("Read-only file system", "Device or resource busy",
                                                "Operation not permitted", "Invalid cross-device link"), (what, e)
            else:
                raise AssertionError(what)
        same("content", sorted(os.listdir(own)), ["metrics", "status.json"])

    def run(self):
        for step in (self.top, self.freeze, self.writes, self.reads, self.chain, self.attributes, self.fixed,
                     self.closed):
            step()
            check_metrics(self.mnt)


def parse_option(text):
    key, value = text.split("=", 1)
    return key, json.loads(value)


def expect(mnt, expression):
    s = status(mnt)
    check_form(s)
    check_metrics(mnt)
    names = {"s": s, "snap": lambda n: named(s["snapshots"], "name", n),
             "disk": lambda n, p: named(named(s["snapshots"], "name", n)["disks"], "path", p)}
    assert eval(expression, names), f"{expression}: {json.dumps(s, indent=1)}"  # pylint: disable=eval-used


def fill(mnt, name, percent):
    fd = os.open(f"{mnt}/{name}", os.O_RDWR)
    for off in range(0, os.fstat(fd).st_size, 65536):
        f = status(mnt)["fleece"]
        if f["used_bytes"] * 100 >= f["limit_bytes"] * percent:
            return
        os.pwrite(fd, bytes(b ^ 255 for b in os.pread(fd, 65536, off)), off)
    raise AssertionError(f"{name} is too small")


def race(mnt, seconds):
    end = time.time() + seconds
    wrong, looks, made = [], [0, 0], [0]

    def guarded(fn):
        def body():
            try:
                while time.time() < end and not wrong:
                    fn()
            except BaseException as e:  # pylint: disable=broad-except
                wrong.append(e)
        return threading.Thread(target=body)

    def look():
        s = parse_json(read_file(f"{mnt}/.fleecefs/status.json", 997))
        check_form(s)
        names = [x["name"] for x in s["snapshots"]]
        same("order", names, [x["name"] for x in sorted(s["snapshots"], key=lambda x: x["created"])])
        looks[0] += 1

    def look_metrics():
        metrics(mnt)
        looks[1] += 1

    def write():
        fd = os.open(f"{mnt}/a.img", os.O_WRONLY)
        for _ in range(50):
            os.pwrite(fd, os.urandom(512), int.from_bytes(os.urandom(3), "big") % 2900000)
        os.close(fd)

    def snapshot():
        for i in range(8):
            os.mkdir(f"{mnt}/snapshots/r{i}")
            made[0] += 1
        read_file(f"{mnt}/snapshots/r3/sub/c.img")
        for i in (5, 0, 7, 1, 2, 3, 6, 4):
            try:
                os.getxattr(f"{mnt}/snapshots/r{i}", STATE)
            finally:
                os.rmdir(f"{mnt}/snapshots/r{i}")

    threads = [guarded(f) for f in (look, look_metrics, write, snapshot)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    if wrong:
        raise wrong[0]
    assert min(looks) >= 10 and made[0] >= 8, (looks, made)
    print(f"{looks[0]} times status.json and {looks[1]} times metrics, over {made[0]} snapshots")


def main():
    what, mnt, rest = sys.argv[1], sys.argv[2], sys.argv[3:]
    if what == "numbers":
        Numbers(mnt, rest[0], rest[1], dict(parse_option(o) for o in rest[2:])).run()
    elif what == "expect":
        expect(mnt, rest[0])
    elif what == "fill":
        fill(mnt, rest[0], float(rest[1]))
    elif what == "race":
        race(mnt, float(rest[0]))
    else:
        sys.exit(__doc__)


main()
