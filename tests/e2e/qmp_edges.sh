#!/bin/bash
# fleece-qmp: what it refuses, what it keeps of a node's options; agents and a virsh that misbehave.
# shellcheck source=tests/e2e/lib.sh
. "$(dirname "$0")/lib.sh"

command -v qemu-system-x86_64 >/dev/null || skip "needs qemu-system-x86_64"
mkdir "$tmp/mnt2" "$tmp/source2" "$tmp/fleece2"
mount_fs --source-lock=off
timeout 60 "$fleecefs" "$tmp/source2" "$tmp/mnt2" --fleece-dir="$tmp/fleece2" --source-lock=off </dev/null
DAEMON2=$(daemons " $tmp/mnt2 ")
export DAEMON2
timeout 250 python3 "$here/qmp_edges.py" "$tmp"
