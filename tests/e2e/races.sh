#!/bin/bash
# No path is followed out of SOURCE or FLEECE_DIR, however names are exchanged under our hands: one
# process does that in SOURCE itself, one through the mount, one in FLEECE_DIR, while others work there
# and snapshots are made. What the symlinks lead to stays as it was, and is never seen.
#
#   races.sh FLEECEFS [SECONDS [SEED]]
# shellcheck source=tests/e2e/lib.sh
. "$(dirname "$0")/lib.sh"

seconds=${2:-5}
seed=${3:-$RANDOM}
snaps=$mnt/snapshots
canary=$tmp/canary
echo "seed $seed"

mkdir -p "$canary/sub"
for name in secret one two only-in-canary sub/inside; do
	echo "CANARY $name" >"$canary/$name"
	chmod 604 "$canary/$name"
done
touch -d 2001-01-01 "$canary"/* "$canary/sub/inside" "$canary"

canary_state() {
	find "$canary" -printf '%P %y %m %U:%G %s %n %T@ %C@\n' | sort
	(cd "$canary" && find . -type f -exec cat {} + && getfattr -R -d -m - . 2>/dev/null)
}

area() {
	mkdir -p "$1/flip"
	ln -s "$canary" "$1/link"
	head -c 300000 /dev/urandom >"$1/file"
	ln -s "$canary/secret" "$1/file-link"
	mkfifo "$1/file-fifo"
}

area "$src/behind"
area "$src/through"
canary_state >"$tmp/before"
pids=()
begin() {
	/usr/bin/env python3 "$here/races.py" "$@" &
	pids+=($!)
	children+=($!)
}

step "names exchanged in SOURCE and through the mount, $seconds seconds"
mount_fs
begin flip "$src/behind" "$seconds"
begin flip "$mnt/through" "$seconds"
begin work "$mnt" "$seconds" "$seed"
begin work "$mnt" "$seconds" $((seed + 1))
begin snaps "$snaps" "$seconds"
for pid in "${pids[@]}"; do
	wait "$pid" || fail "a process failed"
done

step "the canary is as it was; what was kept survives a mount"
canary_state | cmp - "$tmp/before" || fail "something was changed behind a symlink"
umount_fs
mount_fs
for s in "$snaps"/*; do
	timeout 30 python3 "$here/races.py" frozen "$s"
	timeout 30 rmdir "$s"
done
[ -z "$(images)" ] || fail "images are left: $(images)"
umount_fs

step "names exchanged in FLEECE_DIR"
rm -r "$src/behind" "$src/through"
mkdir "$src/dir"
head -c 1M /dev/urandom >"$src/dir/disk"
mkdir "$canary/links"
for n in $(seq 1000); do # the names that images have, for who follows a symlink to find them
	ln "$canary/secret" "$canary/disk-fleece-$n.qcow2"
	ln "$canary/secret" "$canary/disk-fleece-$n.xxh3"
done
canary_state >"$tmp/before"
mount_fs
python3 - "$fleece" "$canary" "$seconds" <<'PYTHON' &
import ctypes, os, sys, time

libc = ctypes.CDLL(None)
fleece, canary = sys.argv[1:3]
end = time.monotonic() + float(sys.argv[3])
os.symlink(canary, fleece + "/.link")
while time.monotonic() < end:
    for name in os.listdir(fleece):
        if not name.startswith("."):
            for _ in range(2):
                libc.renameat2(-100, f"{fleece}/{name}/dir".encode(), -100, f"{fleece}/.link".encode(), 2)
PYTHON
flipper=$!
children+=("$flipper")
made=0
end=$((SECONDS + seconds))
while [ $SECONDS -lt $end ]; do # any of this may fail, but must not hang, nor touch the canary
	if timeout 30 mkdir "$snaps/s" 2>/dev/null; then made=$((made + 1)); fi
	timeout 30 dd if=/dev/urandom of="$mnt/dir/disk" bs=16k count=2 seek=$((made % 32)) conv=notrunc status=none
	timeout 30 cat "$snaps/s/dir/disk" >/dev/null 2>&1 || true
	timeout 30 rmdir "$snaps/s" 2>/dev/null || true
done
wait "$flipper"
echo "$made snapshots"
canary_state | cmp - "$tmp/before" || fail "something was changed behind a symlink in FLEECE_DIR"
umount_fs
mount_fs
umount_fs
canary_state | cmp - "$tmp/before" || fail "recovery has changed something behind a symlink"
