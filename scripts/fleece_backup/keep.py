"""
What stays of --incremental: which snapshots of a mount are a job's checkpoints, and which folders are kept.

A job is a --name and a DIR. Its record, a file beside the state, says which snapshots it has made checkpoints,
by name and time of creation; it is written before one is made, and none is dropped that it does not name.
"""
import json
import os
import re
import sys
import time

from .folders import DATE, NAME, Damaged, Failure, Shelf, shown
from .processes import created_of


# --- checkpoints ---

def read_record(path):
    try:
        with open(path, encoding="ascii") as f:
            found = json.load(f)
    except FileNotFoundError:
        return []
    return [(str(e["name"]), str(e["created"]), str(e["past"])) for e in found]


def write_record(path, entries):
    with open(f"{path}.new", "w", encoding="ascii") as f:
        json.dump([{"name": name, "created": when, "past": past} for name, when, past in entries], f, indent=1)
        f.flush()
        os.fsync(f.fileno())
    os.replace(f"{path}.new", path)
    fd = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY)
    os.fsync(fd)
    os.close(fd)


def known_past(record, name):
    """The token of the time when that checkpoint was made; - if there was none."""
    return next((past for known, _, past in read_record(record) if known == name), "-")


def ours(record, top):
    """Those of the record that are there still."""
    return [e for e in read_record(record) if created_of(os.path.join(top, e[0])) == e[1]]


def published(folder, when):
    """Is FOLDER there, made from the snapshot of its name that was made at WHEN?"""
    path, name = os.path.split(folder)
    found = Shelf(path, only=name).folders.get(name)
    return bool(found) and found.created == when


def settle(folder, record, snapshot, when, past):
    """Is the FOLDER of SNAPSHOT published? Then the record has it, and the names of older checkpoints are printed.
    3: it is not."""
    try:
        if not published(folder, when):
            return 3
    except Failure as error:
        print(f"fleece-backup: {error}", file=sys.stderr)
        return 3  # DIR is not there: so much is known that nobody can build on it now
    top, name = os.path.split(snapshot)
    others = [e for e in ours(record, top) if e[0] != name]
    write_record(record, [*others, (name, when, past)] if past else others)
    for known, _, _ in others:
        sys.stdout.buffer.write(known.encode() + b"\0")
    return 0


def state(snapshot):
    print(os.getxattr(snapshot, "user.fleecefs.state").decode())


# --- names ---

def check_source(path, job, there, source):
    """Folders of one name are of one SOURCE: else keep-last of the one would count, and remove, the other's."""
    names = sorted(n for n in there if (match := NAME.fullmatch(n)) and match[1] == job)
    last = Shelf(path, only=names[-1]).folders.get(names[-1]) if names else None
    if last and last.source != os.fsencode(source):
        raise Failure(73, f"{path} has folders {job}-* of another SOURCE, {shown(last.source)}: take another --name or DIR")


def folder_name(path, job, top, source):
    """A name with the date that nothing has yet, for clocks go back, and two may fall in one second; then what
    killed runs have left in PATH, which is locked."""
    base = f"{job}-{time.strftime('%Y-%m-%dT%H-%M-%S')}"
    there = os.listdir(path)
    check_source(path, job, there, source)
    taken = {*there, *os.listdir(top)}
    number = 1
    name = base
    while {name, f".{name}.part", f".{name}.gone"} & taken:
        number += 1
        name = f"{base}.{number}"
    wanted = re.compile(rf"\.{re.escape(job)}-{DATE}\.(part|gone)")
    for each in (name, *filter(wanted.fullmatch, there)):
        sys.stdout.buffer.write(os.fsencode(each) + b"\0")


# --- prune ---

def chain_root(shelf, folder):
    seen = 0
    while folder.parent and seen < len(shelf.folders):
        try:
            folder = shelf.above(folder)
        except Damaged:
            break  # what is below is lost to it
        seen += 1
    return folder.name


def too_old(shelf, job, keep):
    """(the folders to be removed, those with dependants last; those kept though they are old)"""
    folders = shelf.of_job(job)
    whole = [f for f in folders if not shelf.wrong_with(f)]
    if len(whole) <= keep:
        return [], []
    border = whole[-keep].number
    chains = {}
    for folder in folders:
        chains.setdefault(chain_root(shelf, folder), []).append(folder)
    gone, kept = [], []
    for chain in chains.values():
        if chain[-1].number < border:
            gone += reversed(chain)
        else:
            kept += [f for f in chain if f.number < border]
    return gone, kept


def say_prune(shelf, job, keep, every):
    """Lines: r and the name of a folder to be removed, in this order; n and what there is to say."""
    gone, kept = too_old(shelf, job, int(keep))
    for folder in gone:
        print(f"r{folder.name}")
    if kept:
        names = ", ".join(f.name for f in kept)
        print(f"nkept beyond --keep-last {keep}, for newer ones are against it: {names}"
              f"{'' if int(every) else '; --full-every would begin new chains, so that old ones can go'}")


def prune_chains(path, job, keep, every):
    say_prune(Shelf(path, job), job, keep, every)
