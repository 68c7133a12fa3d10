"""
The options with which a VM's block nodes were defined.

blockdev-reopen sets every option that is not repeated to its default, and QEMU tells some of them
(discard, aio, locking) to nobody. So they are taken from where QEMU has them from: the -blockdev
arguments of its command line, or a file which lists, as a JSON array, what was given to blockdev-add.
"""
import json
import os

from .talk import Refused

SUFFIXES = {"b": 0, "k": 10, "m": 20, "g": 30, "t": 40, "p": 50, "e": 60}


class Schema:
    """What query-qmp-schema says, to give the words of a command line their JSON types."""

    def __init__(self, monitor):
        self.entries = {e["name"]: e for e in monitor.execute("query-qmp-schema")}
        self.root = self.entries["blockdev-add"]["arg-type"]

    def typed(self, value, name, what):
        """VALUE, made of strings and dicts, as the type NAME."""
        entry = self.entries[name]
        meta = entry["meta-type"]
        if meta == "alternate":
            name = self._alternative(value, entry["members"], what)
            return self.typed(value, name, what)
        if meta == "object":
            return self._object(value, entry, what)
        if meta == "array" and isinstance(value, dict):
            return [self.typed(value[k], entry["element-type"], what)
                    for k in sorted(value, key=int)]
        if isinstance(value, str) and meta == "builtin":
            return self._builtin(value, entry["json-type"], what)
        if isinstance(value, dict):
            raise Refused(f"{what}: not understood")
        return value

    def _alternative(self, value, members, what):
        for member in members:
            meta = self.entries[member["type"]]["meta-type"]
            if (meta in ("object", "array")) == isinstance(value, dict) and \
                    self.entries[member["type"]].get("json-type") != "null":
                return member["type"]
        raise Refused(f"{what}: not understood")

    def _object(self, value, entry, what):
        if not isinstance(value, dict):
            raise Refused(f"{what}: not understood")
        members = {m["name"]: m["type"] for m in entry["members"]}
        for variant in entry.get("variants", ()):
            if variant["case"] == value.get(entry["tag"]):
                members.update((m["name"], m["type"])
                               for m in self.entries[variant["type"]]["members"])
        for key in value:
            if key not in members:
                raise Refused(f"{what}: the option {key} is not understood")
        return {k: self.typed(v, members[k], f"{what}: {k}") for k, v in value.items()}

    @staticmethod
    def _builtin(value, kind, what):
        if kind == "boolean":
            if value in ("on", "yes", "true", "y", "off", "no", "false", "n"):
                return value in ("on", "yes", "true", "y")
        elif kind == "int":
            digits, shift = value, 0
            if value[-1:].lower() in SUFFIXES and not value.lower().startswith("0x"):
                digits, shift = value[:-1], SUFFIXES[value[-1].lower()]
            try:
                return int(digits, 0) << shift
            except ValueError:
                pass
        else:
            return value
        raise Refused(f"{what}={value}: not understood")


def keyval(text, implied="driver"):
    """A command line's a=b,c.d=e as nested dicts; a comma in a value is written twice."""
    words, out = text.replace(",,", "\0").split(","), {}
    for number, word in enumerate(words):
        key, equals, value = word.replace("\0", ",").partition("=")
        if not equals and number == 0:
            key, value = implied, key
        elif not equals:
            raise Refused(f"-blockdev {text}: not understood")
        at = out
        *path, last = key.split(".")
        for part in path:
            at = at.setdefault(part, {})
            if not isinstance(at, dict):
                raise Refused(f"-blockdev {text}: not understood")
        at[last] = value
    return out


def inherited(child, parent):
    """A node that is defined inside its parent has some of the parent's options."""
    child = dict(child)
    cache = {k: v for k, v in parent.get("cache", {}).items() if k in ("direct", "no-flush")}
    if cache or "cache" in child:
        child["cache"] = {**cache, **child.get("cache", {})}
    for key in ("force-share", "read-only", "auto-read-only"):
        if key in parent:
            child.setdefault(key, parent[key])
    child.setdefault("discard", "unmap")
    return child


class Definitions:
    """All nodes that were defined with a name."""

    def __init__(self, monitor, path):
        self.nodes = {}
        self.pid = monitor.pid()
        self.cwd = "/"
        if self.pid <= 0:
            raise Refused("the process at the QMP socket is not of this machine, or not to be seen: "
                          "run this where QEMU runs")
        with open(f"/proc/{self.pid}/comm", encoding="utf-8", errors="replace") as f:
            name = f.read().strip()
        if name in ("libvirtd", "virtqemud"):
            raise Refused(f"the QMP socket is {name}'s own: give the VM one more, by -qmp in "
                          "<qemu:commandline>")
        self._command_line(monitor)
        if path:
            self._file(path)

    def _command_line(self, monitor):
        try:
            with open(f"/proc/{self.pid}/cmdline", "rb") as f:
                arguments = [os.fsdecode(word) for word in f.read().split(b"\0")[:-1]]
            self.cwd = os.readlink(f"/proc/{self.pid}/cwd")
        except OSError as error:
            raise Refused(f"{error.filename}: {error.strerror}: to read QEMU's command line, be its "
                          "user or root") from None
        schema = None
        for option, value in zip(arguments, arguments[1:]):
            if option not in ("-blockdev", "--blockdev"):
                continue
            if value.startswith("{"):
                try:
                    self._enter(json.loads(value))
                except ValueError:
                    raise Refused(f"-blockdev {value}: not understood") from None
            else:
                schema = schema or Schema(monitor)
                self._enter(schema.typed(keyval(value), schema.root, f"-blockdev {value}"))

    def _file(self, path):
        try:
            with open(path, encoding="utf-8") as f:
                nodes = json.load(f)
            for node in nodes:
                self._enter(dict(node))
        except OSError as error:
            raise Refused(f"{path}: {error.strerror}") from None
        except (ValueError, TypeError):
            raise Refused(f"{path}: not a JSON array of arguments of blockdev-add") from None

    def _enter(self, node):
        if "node-name" in node:
            self.nodes[node["node-name"]] = node
        for value in node.values():
            if isinstance(value, dict) and "driver" in value:
                self._enter(inherited(value, node))

    def child(self, node):
        """Options of the `file` child of a node, or None."""
        child = node.get("file")
        return inherited(child, node) if isinstance(child, dict) else self.nodes.get(child)
