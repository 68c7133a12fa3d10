#!/bin/bash
# Every way to read frozen files gives the frozen bytes, while a writer changes the live disks; what
# the frozen tree says of itself (holes, sizes, times, inode numbers) is true and stays the same.
# shellcheck source=tests/e2e/lib.sh
. "$(dirname "$0")/lib.sh"

command -v rsync >/dev/null || skip "needs rsync"
command -v qemu-img >/dev/null || skip "needs qemu-img"

disks=(big.img sub/odd.img sparse.img)
all=("${disks[@]}" hole.img empty.img tiny.img)
snap=$mnt/snapshots/one
ref=$tmp/ref

step "make disks"
mkdir -p "$src/sub/deep/empty" "$ref"
head -c 24M /dev/urandom >"$src/big.img"
head -c 5123457 /dev/urandom >"$src/sub/odd.img"
truncate -s 64M "$src/sparse.img" "$src/hole.img"
for at in 3 17 30 55; do
	head -c 777777 /dev/urandom | dd of="$src/sparse.img" bs=1M seek=$at conv=notrunc status=none
done
: >"$src/empty.img"
printf x >"$src/tiny.img"
ln -s sub/odd.img "$src/link"
sync -f "$src"
cp -a --sparse=always "$src/." "$ref/"

step "freeze, then write all the time"
mount_fs
mkdir "$snap"
python3 "$here/frozen.py" same-stat "$src" "$snap"
start_scribbler "${disks[@]/#/$mnt/}"

step "tar -S"
mkdir "$tmp/tar" "$tmp/cp" "$tmp/qemu"
tar -C "$snap" -cSf - . 2>"$tmp/tar.err" | tar -C "$tmp/tar" -xSf -
[ ! -s "$tmp/tar.err" ] || fail "tar says: $(cat "$tmp/tar.err")"
same_tree "$ref" "$tmp/tar"

step "rsync -S"
rsync -aS "$snap/" "$tmp/rsync/"
same_tree "$ref" "$tmp/rsync"
changed=$(rsync -aSni --out-format=%n "$snap/" "$tmp/rsync/")
[ -z "$changed" ] || fail "a second rsync finds changes: $changed"

step "cp --sparse=always"
cp -a --sparse=always "$snap/." "$tmp/cp/"
same_tree "$ref" "$tmp/cp"

step "qemu-img convert of frozen files"
for disk in "${all[@]}"; do
	[ "$disk" != empty.img ] || continue
	qemu-img convert -f raw -O raw "$snap/$disk" "$tmp/qemu/out" 2>/dev/null
	size=$(stat -c %s "$ref/$disk")
	cmp -n "$size" "$ref/$disk" "$tmp/qemu/out" || fail "qemu-img convert of $disk"
done

step "dd, buffered and O_DIRECT"
for disk in "${all[@]}"; do
	for bs in 512 4k 12345 64k 1M 3000001; do
		for flag in fullblock direct; do
			[ "$bs" != 512 ] || [ "$disk" = sub/odd.img ] || continue
			dd if="$snap/$disk" iflag=$flag bs=$bs status=none | cmp - "$ref/$disk" ||
				fail "dd iflag=$flag bs=$bs of $disk"
		done
	done
done

step "mmap, pread at random, holes"
for disk in "${all[@]}"; do
	python3 "$here/frozen.py" read "$snap/$disk" "$ref/$disk"
	python3 "$here/frozen.py" holes "$snap/$disk" "$ref/$disk"
done

step "changes are refused"
python3 "$here/frozen.py" refuse "$snap"

step "the live side has really changed meanwhile"
changes=$(cat "$tmp/scribbled")
stop "$scribbler"
[ "$changes" -gt 200 ] || fail "the writer made only $changes changes"
for disk in "${disks[@]}"; do
	! cmp -s "$mnt/$disk" "$ref/$disk" || fail "$disk did not change"
	cmp "$mnt/$disk" "$src/$disk" || fail "mount and source differ"
done
same_tree "$ref" "$snap"

step "a second snapshot; every image in both chains reads as its frozen disk"
mkdir "$tmp/ref2"
cp -a --sparse=always "$src/." "$tmp/ref2/"
mkdir "$mnt/snapshots/two"
start_scribbler --seed 2 "${disks[@]/#/$mnt/}"
wait_for 60 sh -c "[ \$(cat '$tmp/scribbled') -gt 300 ]"
stop "$scribbler"
check_images
for disk in "${disks[@]}"; do
	check_convert one "$disk" "$ref/$disk"
	check_convert two "$disk" "$tmp/ref2/$disk"
done
same_tree "$ref" "$snap"
same_tree "$tmp/ref2" "$mnt/snapshots/two"

step "unmount and mount: the same bytes"
umount_fs
check_images
for disk in "${disks[@]}"; do
	check_convert one "$disk" "$ref/$disk"
done
mount_fs
same_tree "$ref" "$snap"
same_tree "$tmp/ref2" "$mnt/snapshots/two"

step "drop"
rmdir "$snap" "$mnt/snapshots/two"
[ -z "$(images)" ] || fail "images are left: $(images)"
umount_fs
