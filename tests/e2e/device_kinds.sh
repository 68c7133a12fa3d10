#!/bin/bash
# Block devices of other kinds than a plain loop device, as far as this kernel has them: sectors of
# 4 KiB, an odd number of sectors, partitions, memory (zram), device mapper; one that fails in places;
# and a guest's qcow2 image on a device, decoded.
# shellcheck source=tests/e2e/lib.sh
. "$(dirname "$0")/lib.sh"

snaps=$mnt/snapshots
name=/dev/fleecefs-kinds-$$
zrams=()
maps=()
kinds=()
finish() {
	local status=$? n
	trap - EXIT ERR
	set +e
	for n in "${children[@]}"; do
		kill -KILL "$n" 2>/dev/null
		wait "$n" 2>/dev/null
	done
	for n in "${maps[@]}"; do
		dmsetup remove -f "$n" >/dev/null 2>&1
	done
	for n in "${zrams[@]}"; do
		echo "$n" >/sys/class/zram-control/hot_remove
	done
	(exit $status)
	cleanup
}
trap finish EXIT

# A loop device over $1 bytes in $tmp/$2.img is in $loop; the rest are options of losetup.
attach() {
	truncate -s "$1" "$tmp/$2.img"
	loop=$(losetup --find --show "${@:3}" "$tmp/$2.img" 2>"$tmp/err") || return 1
	loops+=("$loop")
}

# Serves device $2 as $1.
serve() {
	wait_for 5 test -b "$2" || fail "there is no $2"
	head -c "$(blockdev --getsize64 "$2")" /dev/urandom | dd of="$2" bs=1M iflag=fullblock conv=notrunc status=none
	links+=("$name-$1")
	ln -s "$2" "$name-$1"
	ln -s "$name-$1" "$src/$1"
	kinds+=("$1")
}

step "devices"
attach 8M plain || skip "no loop device: $(cat "$tmp/err")"
[ -e "/sys/block/${loop#/dev/}/diskseq" ] || skip "this kernel does not number its disks"
if attach 8M sectors -b 4096; then
	[ "$(blockdev --getss "$loop")" = 4096 ] || fail "$loop has not sectors of 4 KiB"
	serve sectors "$loop"
else
	echo "no sectors of 4 KiB: $(cat "$tmp/err")"
fi
attach $((8388608 - 3 * 512)) odd || fail "no loop device: $(cat "$tmp/err")"
serve odd "$loop"
if attach 16M table --partscan && addpart "$loop" 1 2048 20480 && addpart "$loop" 2 22528 6001; then
	whole=$loop
	serve first "${whole}p1"
	serve second "${whole}p2"
else
	echo "no partitions of loop devices"
	whole=
fi
if [ -e /sys/class/zram-control/hot_add ]; then
	n=$(cat /sys/class/zram-control/hot_add)
	zrams+=("$n")
	echo 8M >"/sys/block/zram$n/disksize"
	echo 1 >"/sys/block/zram$n/queue/iostats" # it counts, but says that it does not
	serve memory "/dev/zram$n"
else
	echo "no zram"
fi
map() { # NAME TABLE
	dmsetup load "$1" <<<"$2" && dmsetup resume "$1" && dmsetup mknodes
}
if dmsetup version >/dev/null 2>&1; then
	attach 40M base
	base=$loop
	for n in mapped failing; do
		maps+=("fleecefs-$n-$$")
		dmsetup create "fleecefs-$n-$$" --notable
	done
	map "fleecefs-mapped-$$" "0 16384 linear $base 16387"
	map "fleecefs-failing-$$" "0 16384 linear $base 40960"
	serve mapped "/dev/mapper/fleecefs-mapped-$$"
	serve failing "/dev/mapper/fleecefs-failing-$$"
else
	echo "no device mapper"
	base=
fi
echo "kinds: ${kinds[*]}"

step "each: random changes, by the mount and behind it, past the page cache and not"
mount_fg --device="$name-*"
for kind in "${kinds[@]}"; do
	python3 "$here/devices.py" "$mnt/$kind" "$name-$kind" "$snaps" --steps "${STEPS:-120}" ${SEED:+--seed "$SEED"} ||
		fail "$kind: $(tail -3 "$tmp/log")"
done

step "all at one moment; what was written by the mount is on the devices after it"
for kind in "${kinds[@]}"; do
	cp "$mnt/$kind" "$tmp/$kind.ref"
done
mkdir "$snaps/s"
for kind in "${kinds[@]}"; do
	head -c "$(stat -c %s "$mnt/$kind")" /dev/urandom >"$tmp/$kind.new"
	dd if="$tmp/$kind.new" of="$mnt/$kind" bs=64k conv=notrunc status=none
	cmp "$snaps/s/$kind" "$tmp/$kind.ref"
	qemu-img check -q "$(images s "$kind")"
done
umount_fs
wait "$daemon" || fail "the daemon ends with $?"
for kind in "${kinds[@]}"; do
	cmp "$name-$kind" "$tmp/$kind.new"
	size=$(($(stat -c %s "$tmp/$kind.new") / 4096 * 4096))
	dd if="$name-$kind" iflag=direct bs=4k count=$((size / 4096)) status=none | cmp -n "$size" - "$tmp/$kind.new"
done
mount_fg --device="$name-*"
for kind in "${kinds[@]}"; do
	cmp "$snaps/s/$kind" "$tmp/$kind.ref"
done

if [ -n "${whole-}" ]; then
	step "a disk and its partitions exclude each other: nobody writes beneath what is frozen"
	links+=("$name-whole")
	ln -s "$whole" "$name-whole"
	ln -s "$name-whole" "$mnt/whole"
	refused 'busy' mkdir "$snaps/t"
	refused 'busy' dd if=/dev/zero of="$mnt/whole" bs=4k count=1 conv=notrunc status=none
	grep -q 'whole is in use' "$tmp/log" || fail "it is not said: $(tail -3 "$tmp/log")"
	rm "$mnt/whole"
	mkdir "$snaps/t"
	rmdir "$snaps/t"
fi

if [ -n "$base" ]; then
	step "a device that cannot be read, or written, in places: EIO there, and the frozen views are right or lost"
	table="0 16384 linear $base 40960"
	cp "$mnt/failing" "$tmp/failing.ref"
	mkdir "$snaps/f"
	dmsetup suspend "fleecefs-failing-$$"
	map "fleecefs-failing-$$" "0 4096 linear $base 40960
4096 128 error
4224 12160 linear $base 45184"
	blockdev --flushbufs "$name-failing"
	refused 'Input/output' dd if="$mnt/failing" of="$tmp/out" iflag=direct bs=4k skip=520 count=1
	refused 'Input/output' dd if=/dev/zero of="$mnt/failing" oflag=direct conv=notrunc bs=4k seek=520 count=1
	dd if=/dev/zero of="$mnt/failing" oflag=direct conv=notrunc bs=4k seek=10 count=4 status=none
	dmsetup suspend "fleecefs-failing-$$"
	map "fleecefs-failing-$$" "$table"
	if ! cmp "$snaps/f/failing" "$tmp/failing.ref" 2>"$tmp/err"; then
		grep -q 'Input/output' "$tmp/err" || fail "wrong: $(cat "$tmp/err")"
		[ "$(getfattr --only-values -n user.fleecefs.state "$snaps/f/failing")" = broken ] || fail "not broken"
	fi
	cmp "$snaps/f/mapped" "$tmp/mapped.new"
	rmdir "$snaps/f"
fi

step "a guest's image on a device, as it is on many a logical volume"
qemu-img create -q -f qcow2 "$tmp/guest.qcow2" 4M
dd if="$tmp/guest.qcow2" of="$mnt/odd" bs=64k conv=notrunc status=none
qemu-io -f qcow2 -c 'write -P 7 1M 64k' "$mnt/odd" >/dev/null 2>&1 || fail "qemu-io"
mkdir "$snaps/q"
qemu-io -f qcow2 -c 'write -P 8 1M 64k' "$mnt/odd" >/dev/null 2>&1 || fail "qemu-io"
[ "$(stat -c %s "$snaps/q/.raw/odd")" = 4194304 ] || fail "$(stat "$snaps/q/.raw/odd")"
cmp "$snaps/q/.raw/odd" <(head -c 1M /dev/zero && head -c 64k /dev/zero | tr '\0' '\7' && head -c $((4194304 - 1048576 - 65536)) /dev/zero)
umount_fs
wait "$daemon" || fail "the daemon ends with $?: $(tail -3 "$tmp/log")"
