#!/bin/bash
# fleecectl on a fleece directory: list, check, gc, map; mounted, unmounted, damaged, left by a kill.
#
#   fleecectl.sh FLEECEFS FLEECECTL
# shellcheck source=tests/e2e/lib.sh
. "$(dirname "$0")/lib.sh"

ctl=$(realpath "${2:?"the path of fleecectl"}")
command -v xxhsum >/dev/null || skip "needs xxhsum"
snaps=$mnt/snapshots

# fleecectl with the arguments after $1 ends with status $1; what it says is in $tmp/out.
says() {
	local want=$1 status=0
	shift
	timeout 60 "$ctl" "$@" >"$tmp/out" 2>&1 || status=$?
	[ "$status" = "$want" ] ||
		fail "fleecectl $*: status $status instead of $want: $(cat "$tmp/out")"
}

# The last output has a line that matches $1.
has() {
	grep -qE -- "$1" "$tmp/out" || fail "no '$1' in: $(cat "$tmp/out")"
}

hasnt() {
	! grep -qE -- "$1" "$tmp/out" || fail "there is '$1' in: $(cat "$tmp/out")"
}

# Bytes at random, $2 KiB at offset $3 KiB of the live disk $1.
overwrite() {
	dd if=/dev/urandom of="$mnt/$1" bs=1k count="$2" seek="$3" conv=notrunc status=none
}

# What the directory holds, byte for byte.
state() {
	(cd "$fleece" && find . -type f ! -name .lock -exec xxhsum -q -H3 {} + | sort -k2 | xxhsum -q -)
}

head -c 2M /dev/urandom >"$src/a.img"
mkdir "$src/sub"
head -c 300001 /dev/urandom >"$src/sub/b.img"
truncate -s 8M "$src/holes.img"
dd if=/dev/urandom of="$src/holes.img" bs=64k seek=32 count=32 conv=notrunc status=none

step "usage"
says 64
says 64 nonsense
has 'usage: fleecectl'
for command in status list create drop check gc map; do
	says 64 "$command" --nonsense
	has "usage: fleecectl $command"
	says 0 "$command" --help
	has "^usage: fleecectl $command"
done
says 0 --version
has '^fleecectl [0-9]'
says 0 -h
! "$ctl" --help | awk 'length > 80' | grep . || fail "the help is wider than 80 columns"
says 64 gc
says 64 map nightly
says 64 map --width 3 nightly/a.img
says 66 gc "$tmp/none"
says 66 check "$src"
says 69 status "$src"

step "a healthy directory, mounted"
mount_fs
mkdir "$snaps/one"
overwrite a.img 64 0
overwrite a.img 4 1024
overwrite sub/b.img 8 100
mkdir "$snaps/two"
overwrite a.img 128 512
truncate -s 100000 "$mnt/sub/b.img"
says 0 check "$fleece"
has 'one/a.img-fleece-1.qcow2: ok, 17 clusters'
has 'two/sub/b.img-fleece-2.qcow2: ok'
has ': snapshots 2, images 6 \(2 empty\), .*all right'
says 0 list "$fleece"
has '^one  .* ok +3 +[0-9.]+K'
says 75 gc "$fleece"
says 75 gc --dry-run "$fleece"

step "map: the picture is that of the writes"
# 2 MiB in 512 characters: one for each cluster
says 0 map --fleece-dir "$fleece" --width 32 one/a.img
python3 - "$tmp/out" <<'PYTHON'
import re
import sys

lines = open(sys.argv[1], encoding="ascii").read().splitlines()
picture = "".join(line for line in lines if re.fullmatch(r"[-.+*#]{32}", line))
want = ["-"] * 512
for first, count in ((0, 16), (256, 1), (128, 32)):
    want[first:first + count] = "#" * count
assert picture == "".join(want), picture
PYTHON
says 0 map --fleece-dir "$fleece" two/a.img
has '^preserved 128K, unchanged 1.9M, holes 0$'
"$ctl" map --fleece-dir "$fleece" --svg --width 32 one/a.img >"$tmp/map.svg"
python3 - "$tmp/map.svg" <<'PYTHON'
import sys
import xml.etree.ElementTree as tree

root = tree.parse(sys.argv[1]).getroot()
fills = [r.get("fill") for r in root.iter("{http://www.w3.org/2000/svg}rect")]
cells, legend = fills[:512], fills[512:]
assert len(legend) == 5, len(fills)
assert cells.count(legend[4]) == 16 + 1 + 32, cells
PYTHON
says 66 map --fleece-dir "$fleece" three/a.img
says 66 map --fleece-dir "$fleece" one/none.img

step "a healthy directory, not mounted; nothing is changed in it"
umount_fs
before=$(state)
says 0 check "$fleece"
has ': snapshots 2, images 6 \(2 empty\), .*all right'
says 0 check --quiet "$fleece"
[ ! -s "$tmp/out" ] || fail "not quiet: $(cat "$tmp/out")"
says 0 check "$fleece" one
says 66 check "$fleece" three
says 0 list "$fleece"
"$ctl" list --json "$fleece" | python3 -c '
import json, sys
one, two = json.load(sys.stdin)
assert (one["name"], one["state"], one["disks"]) == ("one", "ok", 3), one
assert one["preserved_bytes"] == (16 + 1 + 2) * 4096, one
assert two["created"] >= one["created"] > 1e9, two'
says 0 map --fleece-dir "$fleece" --width 128 one/holes.img
has '^preserved 0, unchanged 2.0M, holes 6.0M$'
[ "$(grep -cE '^\.{128}$' "$tmp/out")" = 12 ] || fail "not 12 rows of holes: $(cat "$tmp/out")"
says 0 gc "$fleece"
has ': 0 removed'
chmod 777 "$fleece"
says 77 gc "$fleece"
chmod 755 "$fleece"
[ "$before" = "$(state)" ] || fail "something was changed"

step "check finds damage"
cp -a --sparse=always "$fleece" "$tmp/good"
restore() {
	rm -rf "$fleece"
	cp -a --sparse=always "$tmp/good" "$fleece"
}
one=$fleece/one/a.img-fleece-1.qcow2
two=$fleece/two/a.img-fleece-2.qcow2
# $1: what check says of it; the rest is a command that damages.
found() {
	local what=$1
	shift
	restore
	"$@"
	says 1 check "$fleece"
	has "$what"
	has ': DAMAGE$'
}
damage() {
	/usr/bin/env python3 "$here/imgdamage.py" "$@"
}
found "one/a.img-fleece-1.qcow2: the saved cluster of the disk's offset 0 does not match" damage data "$one"
says 0 check --quick "$fleece"
says 0 check "$fleece" two
says 1 check "$fleece" one
found "one/a.img-fleece-1.qcow2: the cluster of the disk's offset 1048576 is another's too" damage entry-other "$one"
found "one/a.img-fleece-1.qcow2: the L2 entry of the disk's offset 0 is damaged" damage entry-wild "$one"
found "one/a.img-fleece-1.qcow2: the L2 entry of the disk's offset 0 is damaged" damage entry-beyond "$one"
found "one/a.img-fleece-1.qcow2: its L2 tables are not what they were" damage entry-gone "$one"
found "two/a.img-fleece-2.qcow2: L1 table entry 0 is damaged" damage table "$two"
found "two/a.img-fleece-2.qcow2: refcount table entry 0 is damaged" damage block "$two"
found "two/a.img-fleece-2.qcow2: the image's offset [0-9]+ is in use, but its refcount is 0" damage refcount "$two"
found "two/a.img-fleece-2.qcow2: the L2 entry of the disk's offset [0-9]+ is damaged" damage cut "$two"
found "two/a.img-fleece-2.qcow2: it was cut short" damage short "$two"
found "one/a.img-fleece-1.qcow2: its header is damaged" damage byte "$one" 200
found "one/a.img-fleece-1.qcow2: its backing file, \.\./one/a.img-fleece-1.qcow2, is not a newer image" \
	damage backing "$one" ../one/a.img-fleece-1.qcow2
found "one/a.img-fleece-1.qcow2: its backing file, \.\./two/a.img-fleece-7.qcow2, is missing" \
	damage backing "$one" ../two/a.img-fleece-7.qcow2
found "two/a.img-fleece-2.qcow2: the fleecing image is missing" rm "$two"
has "one/a.img-fleece-1.qcow2: its backing file, .*, is missing"
found "one/manifest: its checksum does not match" damage byte "$fleece/one/manifest" 100
found "two/manifest: it is cut short|two/manifest: it is not a manifest|two/manifest: its checksum" \
	truncate -s 100 "$fleece/two/manifest"
found "one/a.img-fleece-1.qcow2: its checksum file is missing" rm "${one%.qcow2}.xxh3"
found "one/a.img-fleece-1.qcow2: its checksum file is damaged, or another" cp "${two%.qcow2}.xxh3" "${one%.qcow2}.xxh3"
found "does not match its checksum" damage byte "${two%.qcow2}.xxh3" 70
restore
damage leak "$two"
says 0 check "$fleece"
has 'note: clusters of images that nothing uses: 1;'
found "/source/a.img was changed while fleecefs was not mounted" touch -d @1 "$src/a.img"
found "not durable, and power was lost" sh -c "rm '$fleece/.clean'
	sed -i 's/^........-/00000000-/' '$fleece/.session'"
says 0 list "$fleece"
has '^one .* torn '

step "a lost manifest, and what is somebody else's"
lose() {
	mkdir -p "$fleece/lost+found" "$fleece/theirs/deep"
	touch "$fleece/theirs/deep/a.img-fleece-1.qcow2"
	rm "$fleece/one/manifest"
}
found "one/manifest: it is lost" lose
has 'note: theirs: no snapshot: it is left alone'
hasnt 'lost+found/|theirs/'
says 0 list "$fleece"
has '^one .* damaged '
hasnt 'theirs|lost.found'
before=$(state)
says 0 gc "$fleece"
has ': 0 removed'
[ "$before" = "$(state)" ] || fail "gc removes what is none of its business"

step "an interrupted mkdir, a killed daemon, a drop cut short: gc"
rm -rf "$fleece" "$src/.fleecefs"
mkdir -m 700 "$fleece"
mount_fg
mkdir "$snaps/one"
overwrite a.img 64 0
cp "$src/a.img" "$tmp/two.ref"
mkdir "$snaps/two"
overwrite a.img 64 100
rm "$mnt/sub/b.img"
mkdir "$snaps/three"
overwrite a.img 64 200
kill -KILL "$daemon"
wait "$daemon" || true
umount "$mnt"
says 0 check "$fleece"
[ "$(find "$src/.fleecefs" -type f | wc -l)" = 1 ] || fail "no disk was kept aside"
# three is one that was being made: no older one needs more than what its images lead to
mv "$fleece/three/manifest" "$fleece/three/~making"
mv "$fleece/one" "$fleece/.dropped-0"
touch "$fleece/two/~unfinished" "$fleece/two/manifest.tmp" "$fleece/.session.tmp" \
	"$fleece/two/old.img-fleece-9.xxh3"
mkdir "$fleece/mine"
touch "$fleece/mine/photo.jpg" "$fleece/mine/a.img-fleece-1.xxh3"
mkdir -p "$fleece/.dropped-5/sub"
touch "$fleece/.dropped-5/sub/photo.jpg"
before=$(state)
says 0 gc --dry-run "$fleece"
has 'would remove .dropped-0/a.img-fleece-1.qcow2'
has 'would remove two/~unfinished'
has 'would remove .session.tmp'
hasnt 'mine|three/|kept aside|remove two/a'
[ "$before" = "$(state)" ] || fail "a dry run changes something"
says 0 gc "$fleece"
[ ! -e "$fleece/.dropped-0" ] || fail ".dropped-0 is left"
has '^.dropped-5 holds what fleecefs has not made'
rm "$fleece/.dropped-5/sub/photo.jpg"
says 0 gc "$fleece"
[ ! -e "$fleece/.dropped-5" ] || fail ".dropped-5 is left"
[ "$(find "$fleece/mine" -type f | wc -l)" = 2 ] || fail "foreign files are gone"
[ -z "$(find "$fleece" -name '*.tmp' -o -name '*~unfinished' -o -name '*-9.xxh3')" ] || fail "leftovers are left"
[ -n "$(images three a.img)" ] || fail "an image that two needs is gone"
mount_fs
cmp "$snaps/two/a.img" "$tmp/two.ref"
umount_fs
before=$(state)
says 0 gc "$fleece"
has ': 0 removed'
[ "$before" = "$(state)" ] || fail "nothing to do, but something was changed"

step "gc: what cannot be told stays; without snapshots all goes, in SOURCE too"
damage byte "$(find "$fleece" -name 'a.img-fleece-3.qcow2')" 200
n=$(images | wc -l)
says 0 gc "$fleece"
has 'a.img-fleece-3.qcow2: cannot be read: its header is damaged'
[ "$(images | wc -l)" = "$n" ] || fail "an image is gone that may be needed"
[ "$(find "$src/.fleecefs" -type f | wc -l)" = 1 ] || fail "the disk aside is gone, though an image cannot be read"
# nobody can say whose image this was
damage byte "$(images two sub/b.img)" 200
damage byte "$fleece/two/manifest" 100
says 0 gc "$fleece"
[ "$(images | wc -l)" = "$n" ] || fail "an image is gone that may be needed"
[ "$(find "$src/.fleecefs" -type f | wc -l)" = 1 ] || fail "the disk aside is gone, though its image cannot be read"
mv "$fleece/two/manifest" "$fleece/two/~making"
says 0 gc "$fleece"
[ -z "$(images)" ] || fail "images are left: $(images)"
[ -z "$(find "$src/.fleecefs" -type f)" ] || fail "a disk is kept aside for nobody"
[ -e "$fleece/mine/photo.jpg" ] || fail "foreign files are gone"

seed=${SEED:-$(od -An -N2 -tu2 /dev/urandom | tr -d ' ')}
step "gc after failures at random, seed $seed: what remains of the snapshots is right"
RANDOM=$seed
for _ in $(seq "${GC_ROUNDS:-2}"); do
	rm -rf "$fleece" "$src/.fleecefs" "$tmp/ref"
	mkdir -m 700 "$fleece" "$tmp/ref"
	head -c 300000 /dev/urandom >"$src/sub/b.img"
	mount_fg
	for name in 1 2 3 4 5 6; do
		cp "$src/a.img" "$tmp/ref/$name.a"
		mkdir "$snaps/$name"
		overwrite a.img $((RANDOM % 60 + 1)) $((RANDOM % 1900))
		overwrite a.img $((RANDOM % 20 + 1)) $((RANDOM % 300))
		[ $((RANDOM % 2)) = 0 ] || overwrite sub/b.img 20 $((RANDOM % 200))
		[ $((RANDOM % 4)) != 0 ] || rmdir "$snaps/$((RANDOM % name + 1))" 2>/dev/null || true
	done
	[ $((RANDOM % 2)) = 0 ] || rm "$mnt/sub/b.img"
	if [ $((RANDOM % 2)) = 0 ]; then
		kill -KILL "$daemon"
		wait "$daemon" 2>/dev/null || true
	fi
	umount "$mnt"
	wait_for 60 gone "$daemon"
	for name in 1 2 3 4 5 6; do
		[ -d "$fleece/$name" ] || continue
		case $((RANDOM % 4)) in
		0) mv "$fleece/$name/manifest" "$fleece/$name/~making" ;;
		1) mv "$fleece/$name" "$fleece/.dropped-9$name" ;;
		esac
	done
	says 0 gc --dry-run "$fleece"
	sed -n 's/^would remove //p' "$tmp/out" >"$tmp/would"
	says 0 gc "$fleece"
	sed -n 's/^removed //p' "$tmp/out" | cmp - "$tmp/would" || fail "a dry run says something else"
	says 0 gc "$fleece"
	has ': 0 removed'
	says 0 check "$fleece"
	mount_fs
	for name in "$snaps"/*; do
		[ ! -d "$name" ] || cmp "$name/a.img" "$tmp/ref/${name##*/}.a"
	done
	rmdir "$snaps"/* 2>/dev/null || true
	[ -z "$(images)" ] || fail "images are left: $(images)"
	umount_fs
done

step "a writer, and snapshots that come and go: check finds nothing"
rm -rf "$fleece"
mkdir -m 700 "$fleece"
mount_fs
start_scribbler --seed 5 --pause 0.001 "$mnt/a.img" "$mnt/holes.img"
(while [ ! -e "$tmp/stop" ]; do
	mkdir "$snaps/x" && mv "$snaps/x" "$snaps/y" && mkdir "$snaps/x" && rmdir "$snaps/y" "$snaps/x"
done) &
churn=$!
children+=("$churn")
mkdir "$snaps/stays"
for _ in $(seq "${ROUNDS:-8}"); do
	says 0 check "$fleece"
	says 0 list "$fleece"
	says 0 map --fleece-dir "$fleece" stays/a.img
done
touch "$tmp/stop"
wait "$churn" || fail "a mkdir or rmdir failed"
stop "$scribbler"
says 0 check "$fleece"
has 'clusters [1-9][0-9]*: all right'
umount_fs

step "status"
# Runs the rest with no other fleecefs to be seen than those of this test.
alone() {
	# shellcheck disable=SC2016 # they are for the shell inside
	unshare -m --propagation private bash -c '
		awk -v tmp="$1/" "\$3 == \"fuse.fleecefs\" && index(\$2, tmp) != 1 { print \$2 }" /proc/self/mounts |
			while read -r other; do umount -l "$other"; done
		shift
		exec "$@"' - "$tmp" "$@"
}
# Everything that was said fits 80 columns and has no escape sequence.
fits() {
	! LC_ALL=C.UTF-8 awk 'length > 80' "$tmp/out" | grep . || fail "wider than 80 columns"
	! grep "$(printf '\033')" "$tmp/out" || fail "an escape sequence"
}
rm -rf "$fleece"
mkdir -m 700 "$fleece"
mount_fs --fleece-limit=900K
mkdir "$snaps/nightly"
evil=$(printf 'e\033[31mv\r\n\303\251\342\200\256\377')
mkdir "$snaps/$evil" "$snaps/$(printf 'long%.0s' $(seq 50))"
overwrite a.img 100 0
head -c 1228000 "$snaps/nightly/a.img" >/dev/null
says 0 status "$mnt"
fits
has "^fleecefs $("$ctl" -V | cut -d' ' -f2), pid [0-9]+, up [0-9]+s$"
has '^fleece +\[#+-*\] +[0-9]+ %  [0-9]+K used, [0-9]+K free, limit 900K$'
has '^nightly .* ok +[0-9.]+M .*\[#+-+\] +[1-9][0-9]*% '
has '^e\\x1b\[31mv\\x0d\\x0a'
LC_ALL=C.UTF-8 says 0 status "$mnt"
fits
has '^e\\x1b\[31mv\\x0d\\x0aé'
says 0 list "$mnt"
fits
says 0 status --json "$mnt"
python3 - "$tmp/out" <<'PYTHON'
import json
import sys

status = json.load(open(sys.argv[1], encoding="utf-8"))
assert status["snapshots"][0]["name"] == "nightly", status
PYTHON
"$ctl" list --json "$mnt" | python3 -c '
import json, sys
snapshots = json.load(sys.stdin)
assert [s["state"] for s in snapshots] == ["ok"] * 3, snapshots
assert snapshots[0]["disks"] == int(sys.argv[1]), snapshots
assert snapshots[1]["name_hex"].endswith("ff"), snapshots' "$(find "$src" -type f -name '*.img' | wc -l)"
# $1 pictures are in the output, each with a line that matches $2.
drawn() {
	[ "$(grep -c -- "$2" "$tmp/out")" -ge "$1" ]
}
rm "$tmp/out"
env --default-signal=INT "$ctl" status --watch=0.1 "$mnt" >"$tmp/out" &
watcher=$!
children+=("$watcher")
wait_for 30 drawn 3 '^fleecefs ' || fail "--watch: $(cat "$tmp/out")"
kill -INT "$watcher"
wait "$watcher" || fail "--watch does not end well: $?"
fits
rm "$tmp/out"
script -qec "echo \$\$; stty cols 80; exec env --default-signal=INT $ctl status -w.1 $mnt" /dev/null </dev/null >"$tmp/out" &
watcher=$!
children+=("$watcher")
wait_for 30 drawn 2 "$(printf '\033')\[Hfleecefs " || fail "not drawn again: $(cat -v "$tmp/out")"
kill -INT "$(head -1 "$tmp/out" | tr -d '\r')"
wait "$watcher" || fail "--watch on a terminal does not end well: $?"
says 64 status --watch=x "$mnt"
alone "$ctl" status | grep -q '^nightly ' || fail "the only mount is not found"
mkdir "$tmp/mnt2" "$tmp/source2"
"$fleecefs" "$tmp/source2" "$tmp/mnt2" </dev/null >/dev/null
! alone "$ctl" status >"$tmp/out" 2>&1 || fail "one of two was chosen"
has 'several are mounted'
has "/mnt2$"
umount_fs "$tmp/mnt2"

step "create and drop"
says 73 create --on "$mnt" nightly
has 'such a snapshot already'
says 64 create --on "$mnt" .hidden
has '1 to 200 bytes'
says 0 create --on "$mnt" another
says 0 drop --on "$mnt" another
says 66 drop --on "$mnt" another
tail -c 1 -f "$snaps/nightly/a.img" >"$tmp/tail" &
children+=("$!")
holder=$!
wait_for 10 test -s "$tmp/tail"
says 75 drop --on "$mnt" nightly
has "process $holder \\(tail\\) has .*/nightly/a.img open"
kill "$holder"
if command -v setpriv >/dev/null; then
	! setpriv --reuid 12345 --regid 12345 --clear-groups "$ctl" create --on "$mnt" user >"$tmp/out" 2>&1 ||
		fail "another user could make a snapshot"
	has 'Permission denied'
fi

step "a view that is lost"
overwrite a.img 1500 0
says 0 status "$mnt"
fits
has '^nightly .* broken '
has '^  a.img: broken'
says 0 list "$mnt"
has '^nightly .* broken '
says 1 check "$mnt"
has 'nightly/a.img-fleece-[0-9]+.qcow2: this frozen view is lost'
hasnt 'libqcow|damaged|does not match'
umount_fs
says 0 list "$fleece"
has '^nightly .* broken '

step "a mount that covers its SOURCE"
rm -rf "$src/.fleecefs"
mnt=$src
snaps=$src/snapshots
"$fleecefs" "$src" "$src" </dev/null >/dev/null
mkdir "$snaps/one"
overwrite a.img 40 8
says 0 check "$src"
has 'one/a.img-fleece-1.qcow2: ok, 10 clusters'
says 0 map --on "$src" one/holes.img
has ', unchanged .*, holes [1-9]'
daemon=$(daemons "$src $src")
kill -KILL "$daemon"
wait_for 10 gone "$daemon"
says 69 status "$src"
has 'has died'
