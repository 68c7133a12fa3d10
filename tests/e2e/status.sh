#!/bin/bash
# What fleecefs tells of itself: .fleecefs/status.json and metrics, extended attributes, the log. Every
# number against what was done; whole and valid while everything goes on; and only for those it is for.
#
#   status.sh FLEECEFS [SECONDS]     seconds of readers beside snapshots and writers (2); from 10 on, also
#                                    what the log says of lines left out
# shellcheck source=tests/e2e/lib.sh
. "$(dirname "$0")/lib.sh"

for tool in getfattr setpriv python3; do
	command -v $tool >/dev/null || skip "needs $tool"
done
seconds=${2:-2}
snaps=$mnt/snapshots
other=54322

tell() {
	timeout 120 python3 "$here/status.py" "$@"
}

expect() {
	tell expect "$mnt" "$1"
}

# The log has exactly $1 lines that match $2, soon.
logged() {
	wait_for 20 eval "[ \"\$(grep -c '$2' '$tmp/log')\" -ge $1 ]" || true
	[ "$(grep -c "$2" "$tmp/log")" = "$1" ] || fail "not $1 times '$2': $(cat "$tmp/log")"
}

# Has the daemon looked at what it does once a second?
another_second() {
	local before
	before=$(cat "$fleece/.alive" 2>/dev/null || true)
	wait_for 30 eval "[ \"\$(cat '$fleece/.alive')\" != '$before' ]" || fail "no pulse"
}

head -c 3000001 /dev/urandom >"$src/a.img"
head -c 1M /dev/urandom >"$src/b.img"
mkdir "$src/sub" "$src/.fleecefs"
echo theirs >"$src/.fleecefs/theirs"
head -c 200000 /dev/urandom >"$src/sub/c.img"
truncate -s 64M "$src/hole.img"
printf odd >"$src/$(printf 'odd \\ " \n \377 name')"
printf long >"$src/$(printf 'l%.0s' {1..250})"
setfattr -n user.comment -v mine "$src/a.img"
setfattr -n user.fleecefs.state -v theirs "$src/a.img"

step "numbers"
mount_fg --fleece-reserve=1M --exclude='*.tmp' --log-level=warning
tell numbers "$mnt" "$src" "$fleece" fleece_reserve_bytes=1048576 'exclude=["*.tmp"]'

step "while snapshots come and go"
tell race "$mnt" "$seconds"

step "after a new mount"
umount_fs
mount_fg
expect 'snap("n")["preserved_bytes"] > 600000 and snap("n")["saves"] == 0 and snap("n")["read_bytes"] == 0'
expect 's["guest"]["saves"] == 0 and snap("n")["state"] == "ok" and len(snap("n")["disks"]) == 3'
expect 's["fleece"]["used_bytes"] >= snap("n")["allocated_bytes"] > snap("n")["preserved_bytes"] - 8192'
rmdir "$snaps/n"
expect 's["snapshots"] == [] and s["fleece"]["used_bytes"] == 0'
umount_fs

step "for whom it is"
head -c 1M /dev/urandom >"$src/b.img"
mount_fg -o allow_other
mkdir "$snaps/n"
as_other() {
	setpriv --reuid=$other --regid=$other --clear-groups "$@"
}
as_other cat "$mnt/b.img" >/dev/null
for file in status.json metrics; do
	! as_other cat "$mnt/.fleecefs/$file" >"$tmp/out" 2>"$tmp/err" || fail "everybody reads $file"
	grep -q 'Permission denied' "$tmp/err" || fail "$(cat "$tmp/err")"
done
! as_other ls "$mnt/.fleecefs" 2>"$tmp/err" || fail "everybody lists it"
! as_other touch "$mnt/.fleecefs/x" 2>"$tmp/err" || fail "a file is made there"
chown :$other "$snaps"
wait_for 5 as_other cat "$mnt/.fleecefs/metrics" || fail "the group of snapshots/ is kept out"
[ "$(as_other stat -c '%u:%g %a' "$mnt/.fleecefs/status.json")" = "0:$other 440" ] || fail "owner and mode"
rmdir "$snaps/n"
umount_fs

step "warnings, once each, and a budget that is used up"
head -c 6M /dev/urandom >"$src/big.img"
mount_fg --fleece-limit=4M --fleece-reserve=0
mkdir "$snaps/n"
expect 's["fleece"]["free_bytes"] + s["fleece"]["used_bytes"] == s["fleece"]["limit_bytes"] == 4 << 20'
tell fill "$mnt" big.img 60
another_second
another_second
logged 0 'fleecing images take more'
tell fill "$mnt" big.img 82
logged 1 'fleecing images take more than 80 %'
tell fill "$mnt" big.img 96
logged 1 'fleecing images take more than 95 %'
another_second
another_second
logged 1 'fleecing images take more than 80 %'
logged 1 'fleecing images take more than 95 %'
rmdir "$snaps/n"
mkdir "$snaps/n"
another_second
another_second
tell fill "$mnt" big.img 85
logged 2 'fleecing images take more than 80 %'
logged 1 'fleecing images take more than 95 %'
expect 'snap("n")["state"] == "ok" and s["guest"]["failed_saves"] == 0'
cp "$mnt/snapshots/n/b.img" "$tmp/b.ref"
head -c 6M /dev/urandom | dd of="$mnt/big.img" bs=64k conv=notrunc status=none
expect 'disk("n", "big.img")["state"] == "broken" and disk("n", "big.img")["reason"] == "No space left on device"'
expect 'snap("n")["state"] == "broken" and snap("n")["reason"] == "No space left on device"'
expect 's["guest"]["failed_saves"] == 1'
[ "$(getfattr --absolute-names --only-values -n user.fleecefs.state "$snaps/n")" = broken ] || fail "the snapshot's state"
[ "$(getfattr --absolute-names --only-values -n user.fleecefs.state "$snaps/n/big.img")" = broken ] || fail "the file's state"
[ "$(getfattr --absolute-names --only-values -n user.fleecefs.state "$snaps/n/b.img")" = ok ] || fail "another file's state"
logged 1 'the frozen view is lost'
umount_fs
mount_fg
expect 'disk("n", "big.img")["state"] == "broken" and snap("n")["reason"] is not None'
expect '[d["path"] for d in snap("n")["disks"] if d["state"] != "ok"] == ["big.img"]'
rmdir "$snaps/n"
umount_fs

step "writes that fail do not flood the log"
: >"$tmp/log"
mount_fg --fleece-limit=100K --on-cbw-error=break-guest-write --fleece-reserve=0
rm -f "$mnt"/[!abs]*
mkdir "$snaps/n"
python3 - "$mnt/b.img" <<'END'
import os, sys
fd = os.open(sys.argv[1], os.O_WRONLY)
failed = 0
for i in range(256):
    try:
        os.pwrite(fd, os.urandom(4096), i * 4096)
    except OSError:
        failed += 1
assert failed > 200, failed
END
expect 's["guest"]["failed_saves"] > 200 and s["guest"]["saves"] == 256'
expect 'snap("n")["state"] == "ok" and s["options"]["on_cbw_error"] == "break-guest-write"'
lines=$(grep -c 'the guest.s write fails' "$tmp/log") # 50, in each ten seconds that this took
[[ $lines -ge 50 && $lines -le 150 ]] || fail "$lines lines"
if [ "$seconds" -ge 10 ]; then
	wait_for 30 grep -q ' more lines like this one were left out: .*the guest.s write fails' "$tmp/log" ||
		fail "it is not said what was left out: $(tail -1 "$tmp/log")"
fi
kill -KILL "$daemon"
wait "$daemon" 2>/dev/null || true
umount "$mnt"

step "torn by a loss of power"
printf 0 | dd of="$fleece/.session" conv=notrunc status=none # as on another boot
mount_fg --log-level=error
expect 'snap("n")["state"] == "torn" and disk("n", "b.img")["state"] == "torn" and "power" in snap("n")["reason"]'
[ "$(getfattr --absolute-names --only-values -n user.fleecefs.state "$snaps/n")" = torn ] || fail "the snapshot's state"
umount_fs
mount_fg --log-level=error
expect 'snap("n")["state"] == "torn" and disk("n", "b.img")["state"] == "torn"'
rmdir "$snaps/n"
umount_fs

step "what is lost beside the image"
mount_fg
mkdir "$snaps/n"
dd if=/dev/urandom of="$mnt/b.img" bs=4k count=3 conv=notrunc status=none
umount_fs
rm "$fleece"/n/a.img-*
mount_fg
expect 'disk("n", "a.img")["state"] == "broken" and "image" in disk("n", "a.img")["reason"]'
expect 'disk("n", "b.img")["state"] == "ok" and disk("n", "b.img")["preserved_bytes"] == 12288'
umount_fs
echo damaged >"$fleece/n/manifest"
mount_fg
tell expect "$mnt" 'True' 2>/dev/null && fail "a damaged snapshot has a state of its own"
[ "$(getfattr --absolute-names --only-values -n user.fleecefs.state "$snaps/n")" = broken ] || fail "the damaged snapshot's state"
python3 -c 'import json, sys; s = json.load(open(sys.argv[1]))["snapshots"][0]; assert s["state"] == "broken" and "manifest" in s["reason"] and not s["disks"], s' \
	"$mnt/.fleecefs/status.json"
rmdir "$snaps/n"
umount_fs

step "log-level"
! timeout 60 "$fleecefs" "$src" "$mnt" --log-level=loud 2>"$tmp/err" || fail "loud is a level"
grep -q 'error, warning, info or debug' "$tmp/err" || fail "$(cat "$tmp/err")"
