#!/bin/bash
# What the daemon may do while it serves, and what callers may do through it.
# shellcheck source=tests/e2e/lib.sh
. "$(dirname "$0")/lib.sh"

for tool in setpriv setfattr setcap; do
	command -v $tool >/dev/null || skip "needs $tool"
done
snaps=$mnt/snapshots
user=54321
other=54322
as() {
	local id=$1
	shift
	setpriv --reuid="$id" --regid="$id" --clear-groups "$@"
}
denied() {
	! "$@" 2>"$tmp/err" || fail "allowed: $*"
	grep -qE 'not permitted|ermission denied|Read-only' "$tmp/err" || fail "$*: $(cat "$tmp/err")"
}
# chown dac_override fowner fsetid setgid setuid sys_admin mknod setfcap
kept=$((1 | 1 << 1 | 1 << 3 | 1 << 4 | 1 << 6 | 1 << 7 | 1 << 21 | 1 << 27 | 1 << 31))
mkdir "$src/u" "$src/t"
chown $user:$user "$src/u"
chmod 1777 "$src/t"
echo secret >"$src/u/secret"
chown $user:$user "$src/u/secret"
chmod 600 "$src/u/secret"

step "no thread of root's daemon has more than serving needs"
mount_fg -o allow_other
mkdir "$snaps/early"
for task in "/proc/$daemon/task"/*/status; do
	for set in CapPrm CapEff CapBnd; do
		has=$((16#$(awk "/^$set:/ { print \$2 }" "$task")))
		[ $((has & ~kept)) = 0 ] || fail "$set of $task is $(printf %x $has), allowed are $(printf %x $kept)"
	done
	[ $((16#$(awk '/^CapInh:/ { print $2 }' "$task"))) = 0 ] || fail "inheritable capabilities"
	grep -q '^CapAmb:[[:space:]]*0*$' "$task" || fail "ambient capabilities"
	grep -q '^NoNewPrivs:[[:space:]]*1$' "$task" || fail "new privileges are possible"
done

step "what root does through the mount still works"
echo x >"$mnt/f"
chown $user:$other "$mnt/f"
chmod 6755 "$mnt/f"
setfattr -n trusted.x -v 1 "$mnt/f"
setfattr -n user.x -v 1 "$mnt/f"
setcap cap_net_raw+ep "$mnt/f"
mknod "$mnt/null" c 1 3
touch -d 2001-01-01 "$mnt/f"
ln "$mnt/u/secret" "$mnt/u/link"
rm "$mnt/u/link"
[ "$(getfattr --only-values -n trusted.x "$src/f")" = 1 ] || fail "no trusted.x"
getcap "$src/f" | grep -q cap_net_raw || fail "no file capability"
[ "$(stat -c '%u %g %a %Y' "$src/f")" = "$user $other 6755 $(date -d 2001-01-01 +%s)" ] || fail "$(stat "$src/f")"
[ -c "$src/null" ] || fail "no device node"

step "callers' rights hold, live and frozen"
mkdir "$snaps/s"
for top in "$mnt" "$snaps/s"; do
	as $user cat "$top/u/secret" >/dev/null
	denied as $other cat "$top/u/secret"
	denied as $other chmod 644 "$top/u/secret"
	denied as $other touch "$top/u/new"
	denied as $user dd if="$top/null" count=1 status=none
	as $user getfattr -d -m - "$top/f" 2>/dev/null | grep -q user.x || fail "$top: no user.x"
	! as $user getfattr -d -m - "$top/f" 2>/dev/null | grep -q trusted || fail "$top: trusted.* is listed"
	denied as $user setfattr -n user.y -v 1 "$top/null"
done
denied as $user mkdir "$snaps/mine"
denied as $user rmdir "$snaps/s"
denied as $user mv "$snaps/s" "$snaps/t"
denied as $user chmod 777 "$snaps"
denied mkdir "$snaps/s/u/x"
denied rm -f "$snaps/s/u/secret"
as $user cp "$mnt/u/secret" "$mnt/t/users"
denied as $other rm -f "$mnt/t/users"
denied as $other mv "$mnt/t/users" "$mnt/t/taken"
if [ "$(cat /proc/sys/fs/protected_hardlinks)" = 1 ]; then
	denied as $other ln "$mnt/u/secret" "$mnt/t/hard"
fi
as $other /usr/bin/python3 - "$mnt/t" <<'PYTHON'
import os, sys

try:
    fd = os.open(sys.argv[1], os.O_TMPFILE | os.O_RDWR, 0o600)
except OSError:
    sys.exit(0)  # this libfuse has none
assert os.fstat(fd).st_uid == os.getuid(), "an unnamed file belongs to somebody else"
PYTHON
setfacl -d -m "u:$user:rwx" "$mnt/t" && : >"$mnt/t/acl"
getfacl -nc "$src/t/acl" | grep -q "^user:$user:" || fail "the default ACL is not inherited"
chmod 666 "$mnt/u/secret" # what was frozen as 0600 stays so
chmod 755 "$mnt/u"
as $other cat "$mnt/u/secret" >/dev/null
denied as $other cat "$snaps/s/u/secret"

step "who may make snapshots is decided by the mode of snapshots/"
chgrp $other "$snaps"
chmod 775 "$snaps"
as $other mkdir "$snaps/theirs"
as $other mv "$snaps/theirs" "$snaps/still"
denied as $user rmdir "$snaps/still"
as $other rmdir "$snaps/still"
chmod 1777 "$snaps" # sticky: anybody makes, but only the owner of snapshots/ drops
as $user mkdir "$snaps/users"
denied as $other rmdir "$snaps/users"
rmdir "$snaps"/*

step "SIGTERM still unmounts"
kill -TERM "$daemon"
wait "$daemon" || fail "status $? after SIGTERM"
! mountpoint -q "$mnt" || fail "the mount is left"
ls "$mnt" >/dev/null || fail "a dead mount is left"
mount_fs -o allow_other
pid=$(daemons " $mnt ")
kill -TERM "$pid"
wait_for 20 gone "$pid" || fail "the daemon in the background does not end"
! mountpoint -q "$mnt" || fail "the mount is left"

step "a limit of file sizes is an error of a write's, and not the end of all disks"
rm -rf "${src:?}"/*
head -c 300000 /dev/urandom >"$src/disk"
cp "$src/disk" "$tmp/was"
# Where it cannot be raised. 512 KiB; no image is larger.
(
	ulimit -f 512
	timeout 60 setpriv --bounding-set=-sys_resource "$fleecefs" "$src" "$mnt" --fleece-dir="$fleece" </dev/null >/dev/null
)
mkdir "$snaps/s"
! dd if=/dev/zero of="$mnt/disk" bs=64K count=1 seek=15 conv=notrunc,fsync 2>"$tmp/err" || fail "it writes beyond the limit"
grep -q "File too large" "$tmp/err" || fail "$(cat "$tmp/err")"
! truncate -s 2M "$mnt/disk" 2>"$tmp/err" || fail "it grows beyond the limit"
dd if=/dev/zero of="$mnt/disk" bs=64K count=1 conv=notrunc,fsync status=none
cmp "$snaps/s/disk" "$tmp/was"
umount_fs
# And where it can.
(
	ulimit -Sf 512
	mount_fs
)
dd if=/dev/zero of="$mnt/disk" bs=64K count=1 seek=15 conv=notrunc,fsync status=none
cmp "$snaps/s/disk" "$tmp/was"
rmdir "$snaps/s"
umount_fs
