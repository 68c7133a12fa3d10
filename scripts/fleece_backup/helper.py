#!/usr/bin/env python3
"""
fleece-backup's helper: what a shell cannot do well. Names are bytes, in lists that NUL bytes end.

  choose [--live] ROOT LIST [--include=GLOB|--exclude=GLOB]...
                            writes LIST of what is chosen below ROOT, ROOT/. first; beside it `left`, the
                            topmost entries that are not, and prints: files, bytes, bytes on storage
  patterns rsync|restic LEFT [ROOT]     the same entries as that tool's patterns
  sums tree|written ROOT LIST | sums tar      XXH128 of each regular file, as xxhsum -c reads it
  compare FROZEN WRITTEN                says what differs
  places STATUS                         the name of the directory of snapshots
  summary STATUS NAME                   what happened to the snapshot; fails if it is not whole
  progress STATUS NAME BYTES            a bar on a terminal, lines now and then elsewhere, until SIGTERM
  said TOOL                             what a tool says of its run, in short
  prune --check PATTERN | prune [--dry] PATTERN KEEP NEWEST
  end TOKEN PATH SESSION                ends what a run has started and is in SESSION, or holds PATH
  holders PATH                          says who holds PATH
  created PATH                          when that snapshot was made; - if it is not there
  past PARTS SOURCE LIST                says which files of LIST a VM writes in SOURCE itself
For --incremental, see increments.py, keep.py and restore.py:
  plan|increment|verify_increment|forecast KEY=VALUE...
  folder_name DIR JOB TOP SOURCE        a new folder's name, and what killed runs have left there
  prune_chains DIR JOB KEEP EVERY       which folders are too old
  settle FOLDER RECORD SNAPSHOT CREATED PAST | state SNAPSHOT       of the job's checkpoints
  restore DIR DATE DISK OUT JOB QUIET DRY | listing DIR JOB VERIFY
"""
import importlib
import os
import sys

sys.dont_write_bytecode = True
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))

ACTIONS = {"choose": "choice", "patterns": "choice", "sums": "sums", "compare": "sums", "created": "processes",
           "places": "report", "summary": "report", "progress": "report", "said": "report",
           "prune": "prune", "end": "processes", "holders": "processes", "past": "processes",
           "plan": "increments", "increment": "increments", "verify_increment": "increments", "forecast": "increments",
           "folder_name": "keep", "prune_chains": "keep", "settle": "keep", "state": "keep",
           "restore": "restore", "listing": "restore"}


def main():
    try:
        # one alone, for each takes its time to load
        part = importlib.import_module(f"fleece_backup.{ACTIONS[sys.argv[1]]}")
        status = getattr(part, sys.argv[1])(*sys.argv[2:]) or 0
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0
    except (OSError, ValueError) as error:
        print(f"fleece-backup: {error}", file=sys.stderr)
        return getattr(error, "status", 1)


if __name__ == "__main__":
    sys.exit(main())
