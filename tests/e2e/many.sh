#!/bin/bash
# A tree of many small files: what a snapshot of it holds, the memory that it takes, and that reading all of
# it does not use up the descriptors. Two arguments more: files, snapshots.
# shellcheck source=tests/e2e/lib.sh
. "$(dirname "$0")/lib.sh"

command -v tar >/dev/null || skip "needs tar"
files=${2:-6000}
snapshots=${3:-3}
ulimit -Sn 4096
ulimit -Hn 4096

step "$files files"
for ((i = 0; i < files; i++)); do
	[ $((i % 1000)) -ne 0 ] || mkdir "$src/d$((i / 1000))"
	printf 'file %d of many\n' "$i" >"$src/d$((i / 1000))/f$i"
done
"$fleecefs" "$src" "$mnt" --fleece-dir="$fleece"
pid=$(daemons "$tmp/")

rss() {
	awk '/^VmRSS/ { print $2 }' "/proc/$pid/status"
}

sums() {
	(cd "$1" && find . -type f ! -path './snapshots/*' -print0 | sort -z | xargs -0 sha256sum) | sha256sum
}

want=$(sums "$src")
before=$(rss)
step "$snapshots snapshots; one file changes after each"
for ((i = 0; i < snapshots; i++)); do
	mkdir "$mnt/snapshots/s$i"
	echo "changed after s$i" >"$mnt/d0/f$i"
done
each=$((($(rss) - before) * 1024 / (files * snapshots)))
echo "$each bytes of memory for a file and snapshot"
[ "$each" -lt 6000 ] || fail "that is too much"

step "each is read; then there are descriptors left for the live files"
for ((i = 0; i < snapshots; i++)); do
	tar -C "$mnt/snapshots/s$i" -cf - . | tar -tf - >"$tmp/list"
	[ "$(grep -c '/f[0-9]*$' "$tmp/list")" = "$files" ] || fail "s$i is not complete"
done
[ "$(sums "$mnt/snapshots/s0")" = "$want" ] || fail "s0 is not what was frozen"
[ "$(cat "$mnt/d0/f0")" = "changed after s0" ] || fail "the live file is not right"

step "all are dropped"
for ((i = 0; i < snapshots; i++)); do
	rmdir "$mnt/snapshots/s$i"
done
[ -z "$(find "$fleece" -name '*.qcow2')" ] || fail "images are left"
umount "$mnt"

step "more files than descriptors: that is said, and what is open goes on"
ulimit -n 1024
mount_few() {
	setpriv --bounding-set=-sys_resource "$fleecefs" "$src" "$mnt" --fleece-dir="$fleece" -f </dev/null >"$tmp/log" 2>&1 &
	daemon=$!
	children+=("$daemon")
	wait_for 30 mountpoint -q "$mnt" || fail "no mount: $(cat "$tmp/log")"
}
mount_few
exec 5<>"$mnt/d0/f7"
! find "$mnt"/d* -type f -size +1000 >"$tmp/list" 2>"$tmp/errors" || fail "$files files were found with 1,024 descriptors"
grep -q 'Too many open files' "$tmp/errors" || fail "find says $(head -1 "$tmp/errors")"
[ "$(grep -c 'more files are in use.*raise the limit' "$tmp/log")" = 1 ] || fail "the log does not say it once: $(cat "$tmp/log")"
mkdir "$mnt/snapshots/few"
printf changed >&5
exec 5>&-
[ "$(cat "$mnt/snapshots/few/d0/f7")" = "file 7 of many" ] || fail "what is open does not go on"
rmdir "$mnt/snapshots/few"
umount_fs
