#!/bin/bash
# The README's recipes, taken from it as they stand, with their places put here: nbdkit, loop mounts, fstab,
# libvirt; and the example of a vzdump hook.
# shellcheck source=tests/e2e/lib.sh
. "$(dirname "$0")/lib.sh"
command -v mkfs.ext4 >/dev/null || skip "needs mkfs.ext4"
repository=$(realpath "$here/../..")
snap=$mnt/snapshots/nightly

run_recipe() {
	recipe "$1"
	timeout 60 bash -euo pipefail "$tmp/block" || fail "the recipe with $1"
}

step "disks: one with ext4 in use, one with a partition"
mkdir "$tmp/files" "$tmp/backup" "$tmp/restore" "$tmp/fill" "$tmp/fill/etc" "$tmp/guest"
echo "file of the guest" >"$tmp/fill/etc/fstab"
truncate -s 24M "$src/vm1.img"
mkfs.ext4 -q -F -d "$tmp/fill" "$src/vm1.img"
truncate -s 26M "$src/vm2.img"
python3 - "$src/vm2.img" <<'EOF'
import struct, sys
# An MBR with one Linux partition from sector 2048.
with open(sys.argv[1], "r+b") as disk:
    disk.seek(446)
    disk.write(struct.pack("<BBBBBBBBII", 0, 254, 255, 255, 0x83, 254, 255, 255, 2048, 49152))
    disk.seek(510)
    disk.write(b"\x55\xaa")
EOF
cp "$src/vm1.img" "$tmp/part"
dd if="$tmp/part" of="$src/vm2.img" bs=1M seek=1 conv=notrunc,sparse status=none
! command -v qemu-img >/dev/null || qemu-img convert -c -f raw -O qcow2 "$tmp/part" "$src/vm3.qcow2"
mount_fs
loop=$(losetup --find --show "$mnt/vm1.img")
loops+=("$loop")
mount "$loop" "$tmp/guest"
echo new >"$tmp/guest/etc/new"
sync -f "$tmp/guest"
mkdir "$snap"
for disk in vm1.img vm2.img; do
	cp --sparse=always "$snap/$disk" "$tmp/$disk"
done
# The guest goes on, and changes what is frozen.
rm "$tmp/guest/etc/fstab"
head -c 3M /dev/urandom >"$tmp/guest/filler"
sync -f "$tmp/guest"

step "nbdkit and nbdcopy"
if command -v nbdkit >/dev/null && command -v nbdcopy >/dev/null; then
	recipe nbdkit
	port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
	sed -i "s#nbdkit #nbdkit --port $port #; s#nbd://127.0.0.1/#nbd://127.0.0.1:$port/#" "$tmp/block"
	status=0
	timeout 60 bash -euo pipefail "$tmp/block" || status=$?
	[ $status = 0 ] || {
		[ ! -f "$tmp/nightly.pid" ] || kill "$(cat "$tmp/nightly.pid")"
		fail "the recipe"
	}
	cmp "$tmp/vm1.img" "$tmp/backup/vm1.img" || fail "the copy is not the frozen disk"
	! cmp -s "$mnt/vm1.img" "$tmp/backup/vm1.img" || fail "the live disk has not changed at all"
	[ "$(du -k "$tmp/backup/vm1.img" | cut -f1)" -lt 12000 ] || fail "holes were filled: $(du -k "$tmp/backup/vm1.img")"
else
	echo "left out: no nbdkit, nbdcopy"
fi

step "files of a frozen disk that was in use"
# what the text says: without noload it cannot be mounted
if mount -o loop,ro "$snap/vm1.img" "$tmp/files" 2>"$tmp/err"; then
	fail "a dirty journal needs no noload: the text is wrong, or the disk was not in use"
fi
run_recipe "nightly/vm1.img /mnt"
[ "$(cat "$tmp/restore/fstab")" = "file of the guest" ] || fail "the file that the guest has deleted is not restored"
rm "$tmp/restore/fstab"
! mountpoint -q "$tmp/files" || fail "still mounted"
cp --sparse=always "$snap/vm1.img" "$tmp/copy.img"
mount -o loop "$tmp/copy.img" "$tmp/files"
[ "$(cat "$tmp/files/etc/new")" = new ] || fail "not in the copy with its journal replayed"
umount "$tmp/files"

step "files of a partition"
run_recipe partx
[ "$(cat "$tmp/restore/fstab")" = "file of the guest" ] || fail "no file from the partition"
if command -v qemu-img >/dev/null; then
	rm "$tmp/restore/fstab"
	run_recipe /.raw/
	[ "$(cat "$tmp/restore/fstab")" = "file of the guest" ] || fail "no file from the qcow2 disk"
fi
cmp "$tmp/vm1.img" "$snap/vm1.img" || fail "the frozen disk has changed"
wait_for 10 rmdir "$snap" || fail "the snapshot is in use still"
umount "$tmp/guest"
losetup -d "$loop"

step "vzdump's hook"
hook=$repository/scripts/examples/vzdump-hook
mkdir -p "$mnt/images/100"
head -c 3M /dev/urandom >"$mnt/images/100/vm-100-disk-0.raw"
cp "$mnt/images/100/vm-100-disk-0.raw" "$tmp/ref"
if command -v rsync >/dev/null; then
	export FLEECE_MOUNT=$mnt FLEECE_COPIES=$tmp/backup/images
	run() {
		timeout 60 "$hook" "$@" || fail "vzdump-hook $* ends with $?"
	}
	left() {
		find "$mnt/snapshots" -mindepth 1 -maxdepth 1
	}
	run job-init
	run job-start
	run backup-start snapshot 100
	[ -d "$mnt/snapshots/vzdump-100" ] || fail "no snapshot"
	head -c 2M /dev/urandom | dd of="$mnt/images/100/vm-100-disk-0.raw" conv=notrunc status=none
	run pre-stop snapshot 100
	run pre-restart snapshot 100
	run post-restart snapshot 100
	run backup-end snapshot 100
	run log-end snapshot 100
	cmp "$tmp/ref" "$tmp/backup/images/100/vm-100-disk-0.raw" || fail "the copy is not of the beginning"
	[ -z "$(left)" ] || fail "left: $(left)"
	run backup-start snapshot 101 # a VM with its disks elsewhere
	run backup-end snapshot 101
	run backup-start stop 100
	run backup-abort stop 100
	[ -z "$(left)" ] || fail "left after an abort: $(left)"
	run backup-start stop 100
	run backup-start stop 100
	run job-abort
	[ -z "$(left)" ] || fail "left after the job: $(left)"
	run backup-start stop 100
	status=0
	FLEECE_COPIES=/dev/null "$hook" backup-end stop 100 2>"$tmp/err" || status=$?
	[ $status != 0 ] || fail "a copy that fails is no failure"
	run job-end
	[ -z "$(left)" ] || fail "left after a failure: $(left)"
	! FLEECE_MOUNT=$tmp/files "$hook" job-start >"$tmp/out" || fail "a job without the mount"
else
	echo "left out: no rsync"
fi

step "backup tools"
for tool in borg restic qemu-img zstd xxhsum; do
	command -v $tool >/dev/null || missing=$tool
done
if [ -z "${missing-}" ]; then
	mkdir "$tmp/bin"
	printf '#!/bin/sh\nshift\nexec "$@"\n' >"$tmp/bin/rsh" # to another host, which is this one
	chmod +x "$tmp/bin/rsh"
	ln -s "$fleecefs" "$repository/scripts/fleece-backup" "$tmp/bin/"
	export PATH=$tmp/bin:$PATH RSYNC_RSH=$tmp/bin/rsh FLEECE_BACKUP_DIR=$tmp/state RESTIC_PASSWORD=x \
		BORG_BASE_DIR=$tmp BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK=yes RESTIC_CACHE_DIR=$tmp/cache
	rm -rf "$tmp/backup"
	mkdir "$tmp/backup"
	borg init -e none "$tmp/backup/borg"
	restic init -q -r "$tmp/backup/restic"
	cp "$mnt/vm1.img" "$tmp/now.img"
	look() {
		cmp "$tmp/now.img" "$tmp/backup/images/vm1.img"
		qemu-img compare -q -f raw -F qcow2 "$tmp/now.img" "$tmp/backup/vm1.qcow2"
		borg extract --stdout "$tmp/backup/borg::$(borg list --short --last 1 "$tmp/backup/borg")" vm1.img | cmp - "$tmp/now.img"
		restic -q -r "$tmp/backup/restic" dump latest "$1/vm1.img" | cmp - "$tmp/now.img"
		tar --zstd -xOf "$(echo "$tmp"/backup/*.tar.zst)" ./vm1.img | cmp - "$tmp/now.img"
		rm -rf "$tmp"/backup/{*.tar.zst,images,vm1.qcow2}
	}
	mkdir "$snap"
	run_recipe "borg create"
	look "$snap"
	rmdir "$snap"
	run_recipe "--keep-last 7"
	cmp "$tmp/now.img" "$tmp/backup/copy-$(date +%F)/vm1.img"
	look ""
	[ -z "$(left)" ] || fail "left: $(left)"
	recipe "root  fleece-backup"
	sed 's/^30 2 \* \* \*  root //' "$tmp/block" | timeout 60 sh -eu
	[ "$(borg list --short "$tmp/backup/borg" | wc -l)" = 3 ] || fail "the line for cron"
else
	echo "left out: no $missing"
fi
umount_fs

step "fstab, configuration of the service, libvirt's disk"
recipe x-systemd.before
read -r what where type options _ <"$tmp/block"
[ "$type" = fleecefs ] || fail "type $type"
PATH=$(dirname "$fleecefs"):$PATH timeout 60 "$repository/scripts/system/mount.fleecefs" "$what" "$where" -o "$options"
mkdir "$snap"
rmdir "$snap"
umount_fs
recipe MOUNTPOINT=
diff "$tmp/block" <(sed "s#/srv/images#$src#; s#/srv/live#$mnt#; s#/nvme/fleece#$fleece#; /^[A-Z]/!d" \
	"$repository/scripts/examples/fleecefs.conf") || fail "README and example differ"
# shellcheck disable=SC2153 # it is in the block
(eval "$(sed 's/=\(.*\)/="\1"/' "$tmp/block")" && eval "set -- $OPTIONS" &&
	timeout 60 "$fleecefs" "$SOURCE" "$MOUNTPOINT" "$@")
umount_fs
recipe "<disk"
python3 -c 'import sys, xml.etree.ElementTree as e; d = e.parse(sys.argv[1]).getroot()
assert d.find("driver").get("type") == "raw" and d.find("source").get("file")' "$tmp/block"
