#!/bin/bash
# What deb.sh runs as a service of a container's systemd, with fleecefs installed: the last line that it
# prints is "passed". It changes the system that it runs in, so it runs nowhere else.
set -Eeuo pipefail
shopt -s inherit_errexit
trap 'echo "FAIL: line $LINENO: $BASH_COMMAND"' ERR
export LC_ALL=C DEBIAN_FRONTEND=noninteractive

[ "$(systemd-detect-virt)" = systemd-nspawn ] || exit 77

fail() {
	echo "FAIL: $*"
	systemctl status --no-pager -l fleecefs@vm || true
	exit 1
}

# Waits up to 20 seconds until the line succeeds.
wait_for() {
	local tries=400
	until "$@" >/dev/null 2>&1; do
		tries=$((tries - 1))
		[ "$tries" -gt 0 ] || return 1
		sleep 0.05
	done
}

mounted() {
	[ "$(findmnt -no FSTYPE /srv/live)" = fuse.fleecefs ]
}

restarted() {
	[ "$(systemctl show -P NRestarts fleecefs@vm)" = 1 ] && systemctl is-active -q fleecefs@vm
}

inactive() {
	[ "$(systemctl show -P ActiveState fleecefs@vm)" = inactive ]
}

snaps=/srv/live/snapshots
cat >/etc/fleecefs/vm.conf <<'EOF'
SOURCE=/srv/images
MOUNTPOINT="/srv/live"
OPTIONS=--fleece-dir=/srv/fleece "--exclude=no *.tmp" -o allow_other
EOF

echo "--- start: mounted for all when systemctl returns"
systemctl enable -q --now fleecefs@vm
mounted || fail "not mounted where the rest of the system sees it"
pid=$(systemctl show -P MainPID fleecefs@vm)
grep -q '^Seccomp:.*2' "/proc/$pid/status" || fail "no filter of system calls"
[ "$(systemctl show -P StatusText fleecefs@vm)" = Mounted ] || fail "no status"
mkdir "$snaps/x"
dd if=/dev/urandom of=/srv/live/a.img bs=10k count=20 conv=notrunc status=none
cmp "$snaps/x/a.img" /root/ref

echo "--- what root does in other file systems works in the mount"
touch "/srv/live/no 1.tmp" /srv/live/mine
chown 1234:1234 /srv/live/mine
chmod 6755 /srv/live/mine
[ "$(stat -c %u:%a /srv/live/mine)" = 1234:6755 ]
mknod /srv/live/pipe p
ln -s x /srv/live/link
ln /srv/live/mine /srv/live/second
fallocate -l 1M /srv/live/mine
fallocate -p -o 4096 -l 8192 /srv/live/a.img
mv /srv/live/second /srv/live/third
cp --reflink=auto /srv/live/a.img /srv/live/b.img
setpriv --reuid=65534 --regid=65534 --clear-groups cat "$snaps/x/a.img" | cmp - /root/ref
mkdir "$snaps/y"
[ ! -e "$snaps/y/no 1.tmp" ] || fail "an option with a space"
rmdir "$snaps/y"
sync -f /srv/live
rm -f /srv/live/{pipe,link,third,mine,b.img} "/srv/live/no 1.tmp"

echo "--- killed: up again by itself, with its snapshots"
kill -KILL "$pid"
wait_for restarted || fail "not restarted"
mounted || fail "not mounted again"
cmp "$snaps/x/a.img" /root/ref || fail "the snapshot is lost"

echo "--- stop, although somebody has a file open"
rmdir "$snaps/x"
exec 5</srv/live/a.img
SECONDS=0
systemctl stop fleecefs@vm
[ "$SECONDS" -lt 15 ] || fail "stopping takes $SECONDS seconds"
! mounted || fail "stop leaves the mount"
[ "$(systemctl show -P Result fleecefs@vm)" = success ] || fail "stop fails"
exec 5<&- || true
systemctl start fleecefs@vm
umount /srv/live
wait_for inactive || fail "umount does not end the service"
[ "$(systemctl show -P Result fleecefs@vm)" = success ] || fail "an umount is a failure to the service"

echo "--- what is logged"
journalctl --no-pager -t fleecefs | grep -v '^-- ' >/root/log
cat /root/log
grep -vE -f /root/logcheck /root/log | grep -v 'took away a dead mount' >/root/more || true
[ ! -s /root/more ] || fail "logcheck would send: $(cat /root/more)"
[ "$(journalctl --no-pager -o cat -t fleecefs -p warning)" = "warning: /srv/live: took away a dead mount" ] ||
	fail "levels in the journal: $(journalctl -o cat -t fleecefs -p warning)"
# mounted three times, ended well twice
[ "$(grep -c 'is mounted on' /root/log)" = 3 ] || fail "not one line for each mount"
[ "$(grep -c 'is unmounted' /root/log)" = 2 ] || fail "not one line for each end"

echo "--- a mount that cannot be: the start fails"
printf 'SOURCE=/nowhere\nMOUNTPOINT=/srv/live\n' >/etc/fleecefs/bad.conf
! systemctl start fleecefs@bad 2>/dev/null || fail "started"
systemctl stop fleecefs@bad
! systemctl start fleecefs@none 2>/dev/null || fail "started without a configuration"

echo "--- fstab, by systemd"
echo '/srv/images /srv/live fleecefs fleece-dir=/srv/fleece,allow_other,nofail,x-systemd.before=libvirtd.service 0 0' >>/etc/fstab
systemctl daemon-reload
systemctl start srv-live.mount
mounted || fail "not mounted"
mkdir "$snaps/z"
rmdir "$snaps/z"
systemctl stop srv-live.mount
! mounted || fail "still mounted"
[ "$(systemctl show -P Result srv-live.mount)" = success ] || fail "result"

echo "--- purge"
systemctl start fleecefs@vm
! apt-get purge -y fleecefs >/root/apt 2>&1 || fail "removed under a mount"
systemctl stop fleecefs@vm
apt-get purge -y fleecefs >/root/apt 2>&1 || fail "purge: $(tail -5 /root/apt)"
left=$(find /etc /usr /var/lib/systemd -name '*fleece*' | sort)
[ -z "$left" ] || fail "left: $left"
echo passed
