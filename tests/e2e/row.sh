#!/bin/bash
# Snapshots made one after the other, many of them alive at a time, each checked before it is dropped: what
# they hold, and that the daemon neither grows nor keeps descriptors. Two arguments more: how many are made, how many
# are alive.
# shellcheck source=tests/e2e/lib.sh
. "$(dirname "$0")/lib.sh"

made=${2:-80}
alive=${3:-20}
disks=4
blocks=512
seed=${SEED:-$RANDOM}
echo "SEED=$seed"
RANDOM=$seed

for ((d = 0; d < disks; d++)); do
	head -c $((blocks * 4096)) /dev/urandom >"$src/disk$d"
done
mount_fs --on-cbw-error=break-guest-write
pid=$(daemons "$tmp/")

sums() {
	(cd "$1" && sha256sum disk*)
}

check() {
	[ "$(sums "$mnt/snapshots/s$1")" = "${want[$1]}" ] || fail "s$1 is not what was frozen"
}

rss() {
	awk '/^VmRSS/ { print $2 }' "/proc/$pid/status"
}

threads() {
	find "/proc/$pid/task" -mindepth 1 -maxdepth 1 | wc -l
}

fds() {
	find "/proc/$pid/fd" -mindepth 1 | wc -l
}

step "$made snapshots, $alive alive"
declare -A want=()
steady=0
had=0
for ((i = 0; i < made; i++)); do
	mkdir "$mnt/snapshots/s$i"
	want[$i]=$(sums "$src")
	for ((d = 0; d < disks; d++)); do
		dd if=/dev/urandom of="$mnt/disk$d" bs=4096 count=$((RANDOM % 8 + 1)) seek=$((RANDOM % blocks)) \
			conv=notrunc status=none
		truncate -s $(((blocks - RANDOM % 3) * 4096)) "$mnt/disk$d"
	done
	if [ ${#want[@]} -gt "$alive" ]; then
		# Mostly the oldest; now and then one in the middle.
		mapfile -t names < <(printf '%s\n' "${!want[@]}" | sort -n)
		victim=${names[$((RANDOM % 4 ? 0 : RANDOM % alive))]}
		check "$victim"
		rmdir "$mnt/snapshots/s$victim"
		unset "want[$victim]"
	fi
	[ "$i" != $(((alive + made) / 2)) ] || {
		steady=$(rss)
		had=$(threads)
	}
done

step "the daemon has not grown"
end=$(rss)
open=$(fds)
# Some more than are alive: an older one may need what was saved in one that was dropped.
images=$(find "$fleece" -name '*.qcow2' | wc -l)
[ "$images" -le $((disks * alive * 2)) ] || fail "$images images of $alive snapshots of $disks disks"
echo "$steady KiB with $alive alive, $end KiB at the end, $open descriptors"
more=$(($(threads) - had)) # each with buffers of its own
[ "$end" -le $((steady * 9 / 8 + 2048 + (more > 0 ? more * 2048 : 0))) ] || fail "memory grows with the number of snapshots that were made"
# An image has two, with its checksums, and the directory of each snapshot, dropped or not, one.
dirs=$(find "$fleece" -mindepth 1 -maxdepth 1 -type d | wc -l)
[ "$open" -le $((images * 2 + dirs + 50)) ] || fail "$open descriptors for $images images in $dirs directories"

step "killed, mounted again: all alive are right"
[ "$(find "$mnt/snapshots" -mindepth 1 -maxdepth 1 | wc -l)" = "$alive" ] || fail "another number is listed"
kill -KILL "$pid"
wait_for 20 gone "$pid"
mount_fs
for i in "${!want[@]}"; do
	check "$i"
done
for i in "${!want[@]}"; do
	rmdir "$mnt/snapshots/s$i"
done
[ -z "$(find "$fleece" -name '*.qcow2')" ] || fail "images are left"
umount_fs
