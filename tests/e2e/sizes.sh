#!/bin/bash
# Disks of up to 16 TiB, sparse: frozen right at their beginning, middle and end, in images that pass
# qemu-img check; mkdir, mount, truncate and rmdir take no longer for them, nor memory in proportion.
# shellcheck source=tests/e2e/lib.sh
. "$(dirname "$0")/lib.sh"

for tool in qemu-img tar; do
	command -v $tool >/dev/null || skip "needs $tool"
done
snaps=$mnt/snapshots
T=$((1 << 40))
mkdir "$tmp/fast" "$tmp/out"
mount -t tmpfs -o size=900m tmpfs "$tmp/fast"
if command -v mkfs.xfs >/dev/null && grep -qw xfs /proc/filesystems; then
	for part in source fleece; do
		truncate -s 320M "$tmp/fast/$part.xfs"
		mkfs.xfs -q -f "$tmp/fast/$part.xfs"
		mount -o loop "$tmp/fast/$part.xfs" "$tmp/$part" 2>"$tmp/err" || skip "no loop device: $(cat "$tmp/err")"
	done
else
	mount -t tmpfs tmpfs "$src"
	mount -t tmpfs -o mode=700 tmpfs "$fleece"
	echo "without XFS, in memory"
fi
chmod 700 "$fleece"
sizes=(512 $((8 * T)) $((8 * T + 1)) $((12 * T + 4097)) $((16 * T - 512)) $((16 * T - 1)) $((16 * T)))

# Runs the rest of the line, which may take $1 seconds, and says how long it took.
quick() {
	local most=$1 begin end
	shift
	begin=$(date +%s%N)
	timeout -s KILL 60 "$@" || fail "$* fails"
	end=$(date +%s%N)
	echo "$(((end - begin) / 1000000)) ms: ${*:1:2}"
	[ $(((end - begin) / 1000000000)) -le "$most" ] || fail "$* takes too long"
}

# The blocks of 64 KiB of a disk of size $1 that matter.
blocks() {
	printf '%s\n' 0 $(($1 / 2 / 65536)) $((8 * T / 65536 - 1)) $((8 * T / 65536)) $((($1 - 1) / 65536)) |
		sort -nu | awk -v last=$((($1 - 1) / 65536)) '$1 <= last'
}

# Those of the file $1, of size $2.
places() {
	local block
	for block in $(blocks "$2"); do
		dd if="$1" bs=65536 count=1 skip="$block" status=none
	done
}

# The same of the image $1, by QEMU, of a disk of size $2.
places_of_image() {
	local block n
	for block in $(blocks "$2"); do
		n=$(($2 - block * 65536 < 65536 ? $2 - block * 65536 : 65536))
		qemu-img convert -U -O raw --image-opts "driver=raw,offset=$((block * 65536)),size=$(((n + 511) / 512 * 512)),file.driver=qcow2,file.file.driver=file,file.file.filename=$1" "$tmp/piece"
		head -c "$n" "$tmp/piece"
		rm "$tmp/piece"
	done
}

scribble() {
	local size=$2 at
	for at in 0 $((size / 2 / 65536 * 65536 + 77)) $((size - 5000)); do
		if [ "$at" -lt 0 ] || [ "$at" -ge "$size" ]; then continue; fi
		head -c $((size - at < 5000 ? size - at : 5000)) /dev/urandom |
			dd of="$1" bs=5000 oflag=seek_bytes seek="$at" conv=notrunc iflag=fullblock status=none
	done
}

rss() {
	awk '/^VmHWM:/ { print $2 }' "/proc/$daemon/status"
}

for size in "${sizes[@]}"; do
	truncate -s "$size" "$src/$size.img"
	scribble "$src/$size.img" "$size"
done
mount_fg
step "freeze, overwrite"
quick 5 mkdir "$snaps/one"
for size in "${sizes[@]}"; do
	places "$src/$size.img" "$size" >"$tmp/out/one.$size"
	scribble "$mnt/$size.img" "$size"
	dd if=/dev/urandom of="$mnt/$size.img" bs=512 oflag=seek_bytes seek=$((size - 512)) count=1 conv=notrunc status=none
done
quick 5 mkdir "$snaps/two"
for size in "${sizes[@]}"; do
	places "$src/$size.img" "$size" >"$tmp/out/two.$size"
	scribble "$mnt/$size.img" "$size"
done
right() {
	local s size
	for s in one two; do
		for size in "${sizes[@]}"; do
			[ "$(stat -c %s "$snaps/$s/$size.img")" = "$size" ] || fail "$s/$size.img: size $(stat -c %s "$snaps/$s/$size.img")"
			places "$snaps/$s/$size.img" "$size" | cmp - "$tmp/out/$s.$size" || fail "$s/$size.img"
		done
	done
}
right

step "the images, by another reader"
begin=$(date +%s)
check_images
for size in "${sizes[@]}"; do
	for s in one two; do
		image=$(images $s "$size.img")
		places_of_image "$image" "$size" >"$tmp/read"
		cmp "$tmp/read" "$tmp/out/$s.$size" || fail "$image is not the frozen disk"
		[ "$(qemu-img info -U --output=json "$image" | sed -n 's/.*"virtual-size": \([0-9]*\),.*/\1/p' | head -1)" = $(((size + 511) / 512 * 512)) ] ||
			fail "$image: $(qemu-img info -U "$image")"
	done
done
[ $(($(date +%s) - begin)) -le 60 ] || fail "qemu-img takes too long"

step "tar goes by the holes"
quick 10 tar -C "$snaps/one" -cSf "$tmp/fast/out.tar" .
[ "$(stat -c %s "$tmp/fast/out.tar")" -lt 2000000 ] || fail "$(stat -c %s "$tmp/fast/out.tar") bytes of tar"
rm "$tmp/fast/out.tar"

step "cut, stretched, and mounted again"
for size in "${sizes[@]}"; do
	quick 3 truncate -s 0 "$mnt/$size.img"
	quick 3 truncate -s "$size" "$mnt/$size.img"
done
right
echo "the daemon had $(rss) KiB at the most"
[ "$(rss)" -lt 200000 ] || fail "too much memory"
check_images
kill -KILL "$daemon"
wait "$daemon" 2>/dev/null || true
umount "$mnt"
mount_fg # with a limit of its own
right
echo "the daemon had $(rss) KiB at the most"
[ "$(rss)" -lt 200000 ] || fail "too much memory"
quick 5 rmdir "$snaps/one"
quick 5 rmdir "$snaps/two"
umount "$mnt"
wait "$daemon"
