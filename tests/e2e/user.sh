#!/bin/bash
# fleecefs run by an ordinary user: all of it works, others stay out, or in with the rights that they
# have; and whoever may not mount is told why. In a mount namespace, for /dev/fuse and /etc/fuse.conf.
# shellcheck source=tests/e2e/lib.sh
. "$(dirname "$0")/lib.sh"

[ -n "${IN_NAMESPACE-}" ] || skip "needs mount namespaces"
for tool in setpriv fusermount3 tar; do
	command -v $tool >/dev/null || skip "needs $tool"
done
[ -u "$(command -v fusermount3)" ] || skip "fusermount3 is not set-user-id root"
snaps=$mnt/snapshots
user=54321
other=54322
as() {
	local id=$1
	shift
	setpriv --reuid="$id" --regid="$id" --clear-groups "$@"
}
as $user test -x "$fleecefs" || skip "$fleecefs is not for other users"
rmdir "$fleece"
mkdir "$tmp/dev" "$tmp/home"
mount -t tmpfs -o mode=755 tmpfs "$tmp/dev"
mknod -m 666 "$tmp/dev/fuse" c 10 229
mount --bind "$tmp/dev/fuse" /dev/fuse
as $other dd if=/dev/fuse count=0 status=none 2>/dev/null || skip "device nodes cannot be made here"
[ -e /etc/fuse.conf ] || skip "needs /etc/fuse.conf"
echo "user$user:x:$user:$user::$tmp/home:/bin/sh" | cat /etc/passwd - >"$tmp/passwd"
chmod 644 "$tmp/passwd"
mount --bind "$tmp/passwd" /etc/passwd # fusermount3 wants to know their name
chown -R $user:$user "$src" "$mnt" "$tmp/home"

# Mounts as the user, or says in $tmp/err why not.
user_mount() {
	as $user timeout 60 "$fleecefs" "$src" "$mnt" --fleece-dir="$tmp/home/fleece" "$@" </dev/null >/dev/null 2>"$tmp/err"
}

user_umount() {
	local pid
	pid=$(daemons " $mnt ")
	as $user fusermount3 -u "$mnt"
	wait_for 60 gone "$pid" || fail "the daemon stays"
}

# The mount fails, leaves nothing, and says $1.
refused() {
	local what=$1
	shift
	! user_mount "$@" || fail "it mounts: $what"
	grep -qi "$what" "$tmp/err" || fail "it says: $(cat "$tmp/err")"
	! mountpoint -q "$mnt" || fail "a mount is left"
	[ -z "$(daemons " $mnt ")" ] || fail "a process is left"
}

step "the user alone"
as $user sh -c "head -c 1000001 /dev/urandom >'$src/a.img'; mkdir '$src/d'; echo x >'$src/d/b'"
user_mount || fail "$(cat "$tmp/err")"
[ "$(stat -c '%a %u' "$tmp/home/fleece")" = "700 $user" ] || fail "$(stat "$tmp/home/fleece")"
cp -a "$src" "$tmp/reference"
as $user mkdir "$snaps/s"
as $user dd if=/dev/urandom of="$mnt/a.img" bs=4k count=100 conv=notrunc status=none
as $user rm "$mnt/d/b"
as $user tar -C "$snaps/s" -cSf "$tmp/home/s.tar" .
mkdir "$tmp/out"
tar -C "$tmp/out" -xSf "$tmp/home/s.tar"
same_tree "$tmp/reference" "$tmp/out"
[ "$(stat -c %u "$tmp/out/a.img")" = $user ] || fail "$(stat "$tmp/out/a.img")"
for who in $other 0; do
	! as "$who" ls "$mnt" >/dev/null 2>"$tmp/err" || fail "$who may come in"
done
user_umount
user_mount --snapshot=t || fail "$(cat "$tmp/err")"
as $user cat "$snaps/s/a.img" | cmp - "$tmp/reference/a.img"
as $user cmp "$snaps/t/a.img" "$mnt/a.img"
pid=$(daemons " $mnt ")
kill -KILL "$pid"
wait_for 20 gone "$pid"
user_mount || fail "after a kill: $(cat "$tmp/err")"
as $user cat "$snaps/s/a.img" | cmp - "$tmp/reference/a.img"
[ "$(as $user ls "$snaps")" = s ] || fail "there are $(as $user ls "$snaps")"
as $user rmdir "$snaps/s"

step "what the user may not read cannot be frozen"
echo secret >"$src/secret"
chmod 600 "$src/secret"
! as $user mkdir "$snaps/s" 2>"$tmp/err" || fail "frozen unread"
grep -q 'Permission denied' "$tmp/err" || fail "$(cat "$tmp/err")"
user_umount
user_mount --exclude=secret || fail "$(cat "$tmp/err")"
as $user mkdir "$snaps/s"
[ ! -e "$tmp/home/fleece/s/secret-fleece-1.qcow2" ] || fail "excluded and frozen"
as $user rmdir "$snaps/s"
user_umount
rm "$src/secret"

step "others, with the rights that they have"
refused 'user_allow_other' -o allow_other
{
	cat /etc/fuse.conf
	echo user_allow_other
} >"$tmp/fuse.conf"
mount --bind "$tmp/fuse.conf" /etc/fuse.conf
as $user sh -c "echo mine >'$src/private'; chmod 600 '$src/private'; chmod 644 '$src/a.img'
	mkdir -m 700 '$src/closed'; echo x >'$src/closed/x'; mkdir -m 1777 '$src/open'"
user_mount -o allow_other || fail "$(cat "$tmp/err")"
as $user mkdir "$snaps/s"
for top in "$mnt" "$snaps/s"; do
	as $other cmp "$top/a.img" "$src/a.img"
	for file in private closed/x; do
		! as $other cat "$top/$file" >"$tmp/out.txt" 2>"$tmp/err" || fail "$other reads $top/$file"
		grep -q 'Permission denied' "$tmp/err" || fail "$(cat "$tmp/err")"
	done
	! as $other ls "$top/closed" >/dev/null 2>&1 || fail "$other lists $top/closed"
	! as $other sh -c "echo y >>'$top/a.img'" 2>/dev/null || fail "$other writes to $top/a.img"
	! as $other rm -f "$top/a.img" 2>/dev/null || fail "$other removes $top/a.img"
	! as $other touch "$top/new" 2>/dev/null || fail "$other makes $top/new"
	! as $other chmod 777 "$top/a.img" 2>/dev/null || fail "$other changes $top/a.img"
done
! as $other mkdir "$snaps/theirs" 2>/dev/null || fail "$other makes a snapshot"
! as $other rmdir "$snaps/s" 2>/dev/null || fail "$other drops a snapshot"
! as $other mv "$snaps/s" "$snaps/t" 2>/dev/null || fail "$other renames a snapshot"
as $other sh -c "echo hello >'$mnt/open/theirs'" || echo "a daemon without rights makes no files for others"
[ ! -u "$mnt/open/theirs" ] || fail "set-user-id"
as $user rmdir "$snaps/s"
user_umount

step "whoever may not mount is told why"
umount /dev/fuse
chmod 600 "$tmp/dev/fuse"
mount --bind "$tmp/dev/fuse" /dev/fuse
refused 'let this user open it'
umount /dev/fuse
mkdir "$tmp/nodev"
mount -t tmpfs -o mode=755 tmpfs "$tmp/nodev"
for node in null urandom zero; do
	cp -a "/dev/$node" "$tmp/nodev/$node"
done
mount --bind "$tmp/nodev" /dev
refused 'modprobe fuse'
! timeout 60 "$fleecefs" "$src" "$mnt" </dev/null >/dev/null 2>"$tmp/err" || fail "root mounts without /dev/fuse"
grep -q 'modprobe fuse' "$tmp/err" || fail "it says: $(cat "$tmp/err")"
