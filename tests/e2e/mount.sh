#!/bin/bash
# Mounting and ending: every way to give options, readiness, failures, signals, ordinary users.
#
# Where it can, it runs in a mount namespace of its own, with the program in /usr/local/bin: mount(8)
# looks for it in the standard directories alone. A chroot cannot; then a link is made and removed.
# shellcheck source=tests/e2e/lib.sh
. "$(dirname "$0")/lib.sh"

snaps=$mnt/snapshots
no_daemon() {
	[ -z "$(daemons " $mnt ")" ]
}
mkdir "$src/sub"
head -c 1M /dev/urandom >"$src/a.img"
cp "$src/a.img" "$tmp/ref"

step "-h names every option, -V every version"
"$fleecefs" -h >"$tmp/help" 2>&1
for word in fleece-dir snapdir snapshot cluster-size on-cbw-error cbw-timeout fleece-limit \
	fleece-reserve exclude device durable allow_other break-snapshot break-guest-write; do
	grep -q -e "$word" "$tmp/help" || fail "-h does not name $word"
done
"$fleecefs" -V >"$tmp/version" 2>&1
for word in fleecefs fuse qcow xxhash; do
	grep -qi "$word" "$tmp/version" || fail "-V does not name $word: $(cat "$tmp/version")"
done
"$fleecefs" --help | cmp - <("$fleecefs" -h) || fail "--help and -h differ"
"$fleecefs" --version | cmp - <("$fleecefs" -V) || fail "--version and -V differ"

step "options as --name=V"
mount_fs --snapdir=backups --cluster-size=64K --on-cbw-error=break-guest-write --cbw-timeout=5 \
	--fleece-limit=1G --fleece-reserve=1M --exclude='*.tmp' --exclude=cache --durable
mkdir "$mnt/backups/x"
cmp "$mnt/backups/x/a.img" "$tmp/ref"
[ ! -e "$snaps" ] || fail "snapdir is ignored"
rmdir "$mnt/backups/x"
umount_fs

step "options as -o name=V; exclude"
"$fleecefs" -o "fleece-dir=$fleece,snapdir=backups,exclude=*.tmp,cluster-size=8K" "$src" "$mnt"
mountpoint -q "$mnt" || fail "no mount after return"
echo left out >"$mnt/sub/x.tmp"
mkdir "$mnt/backups/x"
[ -e "$mnt/sub/x.tmp" ] || fail "an excluded file must be live"
[ ! -e "$mnt/backups/x/sub/x.tmp" ] || fail "an excluded file must not be frozen"
rmdir "$mnt/backups/x"
rm "$mnt/sub/x.tmp"
umount_fs

step "the fleece directory is never shown"
unset -v image_dir
timeout 60 "$fleecefs" "$src" "$mnt" </dev/null
image_dir=$src/.fleecefs
mkdir "$snaps/x"
head -c 9000 /dev/urandom | dd of="$mnt/a.img" conv=notrunc status=none
[ -n "$(images)" ] || fail "no image in the default place"
[ "$(find "$mnt" "$snaps/x" -maxdepth 1 -name .fleecefs | wc -l)" = 0 ] || fail ".fleecefs is listed"
[ "$(find "$mnt" -name '*.qcow2' | wc -l)" = 0 ] || fail "images are listed"
! mkdir "$mnt/.fleecefs" 2>/dev/null || fail "mkdir of the hidden name"
cmp "$snaps/x/a.img" "$tmp/ref"
rmdir "$snaps/x"
[ -z "$(images)" ] || fail "images are left"
umount_fs
unset -v image_dir
timeout 60 "$fleecefs" "$src" "$mnt" --fleece-dir="$src/sub/images" </dev/null
mkdir "$snaps/x"
[ "$(find "$mnt" -name images | wc -l)" = 0 ] || fail "FLEECE_DIR inside SOURCE is listed"
[ ! -e "$mnt/sub/images" ] || fail "FLEECE_DIR inside SOURCE is found by name"
rmdir "$snaps/x"
umount_fs
rm -rf "$src/sub/images" "$src/.fleecefs"
cp "$tmp/ref" "$src/a.img"

step "SOURCE covered by its own mount"
timeout 60 "$fleecefs" "$src" "$src" --fleece-dir="$fleece" </dev/null
mountpoint -q "$src" || fail "no mount after return"
mkdir "$src/snapshots/x"
printf 'changed' | dd of="$src/a.img" bs=1 seek=9999 conv=notrunc status=none
cmp "$src/snapshots/x/a.img" "$tmp/ref"
rmdir "$src/snapshots/x"
umount_fs "$src"
[ "$(tail -c +10000 "$src/a.img" | head -c 7)" = changed ] || fail "the write is lost"
[ ! -e "$src/snapshots" ] || fail "snapshots/ is in SOURCE itself"
cp "$tmp/ref" "$src/a.img"

step "mount -t fuse.fleecefs and fstab"
standard=/usr/local/bin/fleecefs
if [ -n "${IN_NAMESPACE-}" ]; then
	mount -t tmpfs tmpfs /usr/local/bin
elif [ -e $standard ]; then
	fail "$standard is in the way"
fi
ln -s "$fleecefs" $standard
links+=("$standard")
mount -t fuse.fleecefs "$src" "$mnt" -o "fleece-dir=$fleece,allow_other"
mkdir "$snaps/x"
cmp "$snaps/x/a.img" "$tmp/ref"
rmdir "$snaps/x"
umount_fs
echo "$src $mnt fuse.fleecefs fleece-dir=$fleece,allow_other,noauto 0 0" >"$tmp/fstab"
mount -T "$tmp/fstab" "$mnt"
[ "$(findmnt -no FSTYPE "$mnt")" = fuse.fleecefs ] || fail "type: $(findmnt -no FSTYPE "$mnt")"
cmp "$mnt/a.img" "$tmp/ref"
umount_fs

step "failures: a message, a status, no dead mount"
refused() {
	local status=0
	timeout 30 "$fleecefs" "$@" </dev/null >"$tmp/out" 2>"$tmp/err" || status=$?
	[ "$status" != 0 ] || fail "allowed: fleecefs $*"
	[ "$status" -lt 124 ] || fail "status $status: fleecefs $*"
	[ -s "$tmp/err" ] || fail "no message: fleecefs $*"
	! mountpoint -q "$mnt" || fail "a mount is left: fleecefs $*"
	ls "$mnt" >/dev/null || fail "a dead mount is left: fleecefs $*"
	wait_for 5 no_daemon || fail "a process is left: fleecefs $*"
	echo "refused ($status): $(tail -1 "$tmp/err")"
}
fl=--fleece-dir=$fleece
refused
refused "$src"
refused "$src" "$mnt" "$tmp" "$fl"
refused "$tmp/nowhere" "$mnt" "$fl"
refused "$src/a.img" "$mnt" "$fl"
refused "$src" "$tmp/nowhere" "$fl"
refused "$src" "$mnt" --fleece-dir="$mnt"
refused "$src" "$mnt" --fleece-dir="$mnt/in/it"
refused "$src" "$mnt" --fleece-dir="$(dirname "$mnt")"
[ -z "$(ls -A "$mnt")" ] || fail "something was made in the mount point"
refused "$src" "$mnt" "$fl" --no-such-option
refused "$src" "$mnt" "$fl" -o no_such_option=1
for size in 3000 2K 4M 0 abc "" -4096 5000 99999999999999999999; do
	refused "$src" "$mnt" "$fl" --cluster-size="$size"
done
refused "$src" "$mnt" "$fl" --on-cbw-error=panic
refused "$src" "$mnt" "$fl" --cbw-timeout=soon
refused "$src" "$mnt" "$fl" --fleece-limit=lots
refused "$src" "$mnt" "$fl" --snapshot=a/b
refused "$src" "$mnt" "$fl" --snapshot=.hidden
refused "$src" "$mnt" "$fl" --snapdir=a/b
refused "$src" "$mnt" --fleece-dir="$src/a.img"
refused "$src" "$mnt" --fleece-dir="$src/a.img/x"
mkdir "$src/snapshots"
refused "$src" "$mnt" "$fl"
mount_fs --snapdir=other
ls -d "$mnt/snapshots" "$mnt/other" >/dev/null
umount_fs
rmdir "$src/snapshots"
mkdir "$tmp/mnt2"
timeout 60 "$fleecefs" "$src" "$tmp/mnt2" "$fl" </dev/null
refused "$src" "$mnt" "$fl"
umount_fs "$tmp/mnt2"

step "SIGTERM, SIGINT, umount end it cleanly"
for signal in TERM INT; do
	mount_fg
	mkdir "$snaps/kept"
	cat "$mnt/a.img" "$snaps/kept/a.img" >/dev/null
	kill -$signal "$daemon"
	wait_for 20 gone "$daemon" || fail "SIG$signal does not end it"
	status=0
	wait "$daemon" || status=$?
	[ "$status" = 0 ] || fail "status $status after SIG$signal"
	! mountpoint -q "$mnt" || fail "SIG$signal leaves the mount"
	ls "$mnt" >/dev/null
	mount_fg
	cmp "$snaps/kept/a.img" "$tmp/ref" || fail "the snapshot is lost after SIG$signal"
	rmdir "$snaps/kept"
	umount "$mnt"
	wait_for 20 gone "$daemon" || fail "umount does not end it"
	wait "$daemon" || fail "a status other than 0 after umount"
done
mount_fs
pid=$(daemons " $mnt ")
kill -TERM "$pid"
wait_for 20 gone "$pid" || fail "SIGTERM does not end the daemon in the background"
! mountpoint -q "$mnt" || fail "the mount is left"
mount_fs
fusermount3 -u "$mnt"
wait_for 20 no_daemon || fail "fusermount3 -u does not end it"

step "umount and mount again at once"
for _ in 1 2 3; do
	mount_fs
	umount "$mnt"
done
mount_fs
umount_fs

step "--snapshot lives as long as the mount"
for how in umount TERM; do
	mount_fs --snapshot=now
	cmp "$snaps/now/a.img" "$tmp/ref"
	printf 'changed' | dd of="$mnt/a.img" bs=1 seek=77 conv=notrunc status=none
	cmp "$snaps/now/a.img" "$tmp/ref"
	[ -n "$(images)" ] || fail "nothing was saved"
	pid=$(daemons " $mnt ")
	if [ $how = umount ]; then
		umount "$mnt"
	else
		kill -TERM "$pid"
	fi
	wait_for 20 gone "$pid" || fail "no end"
	[ -z "$(images)" ] || fail "images are left: $(images)"
	mount_fs
	[ ! -e "$snaps/now" ] || fail "it came back"
	umount_fs
	cp "$tmp/ref" "$src/a.img"
done

step "ordinary users"
command -v setpriv >/dev/null || skip "needs setpriv"
as_nobody() {
	setpriv --reuid=65534 --regid=65534 --clear-groups "$@"
}
cp "$tmp/ref" "$src/secret.img"
chmod 600 "$src/secret.img"
mkdir "$src/open"
chmod 1777 "$src/open"
mount_fs
! as_nobody cat "$mnt/a.img" >/dev/null 2>&1 || fail "nobody gets in without allow_other"
umount_fs
mount_fs -o allow_other
mkdir "$snaps/x"
as_nobody cmp "$snaps/x/a.img" "$tmp/ref"
! as_nobody cat "$snaps/x/secret.img" >/dev/null 2>&1 || fail "nobody reads a frozen 0600 file"
! as_nobody cat "$mnt/secret.img" >/dev/null 2>&1 || fail "nobody reads a live 0600 file"
! as_nobody mkdir "$snaps/y" 2>/dev/null || fail "nobody makes a snapshot"
! as_nobody rmdir "$snaps/x" 2>/dev/null || fail "nobody drops a snapshot"
[ -d "$snaps/x" ] || fail "the snapshot is gone"
as_nobody cp "$tmp/ref" "$mnt/open/mine"
[ "$(stat -c %u:%g "$mnt/open/mine" "$src/open/mine" | sort -u)" = 65534:65534 ] ||
	fail "a new file does not belong to its maker"
: >"$mnt/open/roots"
! as_nobody rm -f "$mnt/open/roots" 2>/dev/null || fail "the sticky bit is ignored"
! as_nobody mv "$mnt/open/roots" "$mnt/open/x" 2>/dev/null || fail "the sticky bit is ignored"
rmdir "$snaps/x"
umount_fs

step "what must not be turned on, or found"
mount_fs -o writeback_cache,relatime,comment=x,max_read=65536
grep -F "$mnt" /proc/self/mounts | grep -q max_read=65536 || fail "the kernel does not hear of max_read"
printf '%s' "$(head -c 10000 /dev/zero | tr '\0' x)" >"$mnt/late.img"
mkdir "$snaps/x"
[ "$(stat -c %s "$snaps/x/late.img")" = 10000 ] || fail "a write waited in a cache and missed the freeze"
mkdir "$mnt/dir"
! mv "$mnt/dir" "$snaps/" 2>/dev/null || fail "a directory was moved into the snapshots"
[ ! -e "$snaps/dir" ] || fail "mv has made a snapshot"
rmdir "$snaps/x"
umount_fs
mkdir "$src/deep"
timeout 60 "$fleecefs" "$src" "$mnt" --fleece-dir="$src/deep/fleece" <&- >&- 2>&-
mountpoint -q "$mnt"
[ -z "$(ls -A "$mnt/deep")" ] || fail "the fleece directory is shown"
! timeout 10 touch "$mnt/deep/fleece" 2>"$tmp/err" || fail "a name that is hidden was made"
grep -q 'not permitted' "$tmp/err" || fail "making a hidden name: $(cat "$tmp/err")"
umount_fs

step "SIGTERM loses no page that was written by mapped memory"
truncate -s 1M "$src/mapped.img"
mount_fg
python3 - "$mnt/mapped.img" "$daemon" <<'EOF'
import mmap, os, signal, sys, time

fd = os.open(sys.argv[1], os.O_RDWR)
memory = mmap.mmap(fd, 1 << 20)
memory[5000:5006] = b"MAPPED"
os.kill(int(sys.argv[2]), signal.SIGTERM)
while os.path.ismount(os.path.dirname(sys.argv[1])):
    time.sleep(0.05)
os._exit(0)
EOF
wait_for 30 gone "$daemon" || fail "SIGTERM does not end it"
[ "$(dd if="$src/mapped.img" bs=1 skip=5000 count=6 status=none)" = MAPPED ] || fail "a mapped page is lost"
