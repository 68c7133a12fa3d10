#!/bin/bash
# snapshots/NAME/.xxh128: the digests are right and stay those of the freeze, its size is known
# beforehand, a real file of that name wins, an open one keeps the snapshot, an unreadable disk
# leaves no manifest at all, and a reader who is killed is not waited for.
# shellcheck source=tests/e2e/lib.sh
. "$(dirname "$0")/lib.sh"

command -v xxhsum >/dev/null || skip "needs xxhsum"
snaps=$mnt/snapshots
mkdir -p "$src/d/e"
head -c 3000001 /dev/urandom >"$src/a.img"
head -c 700 /dev/urandom >"$src/d/e/back\\slash"
head -c 800 /dev/urandom >"$src/d/"$'new\nline\\'
: >"$src/d/empty"
truncate -s 70000001 "$src/d/sparse"
printf x | dd of="$src/d/sparse" bs=1 seek=50000000 conv=notrunc status=none
ln "$src/a.img" "$src/d/hardlink"
ln -s a.img "$src/link"

step "right, of the freeze, in a size that is known before it is read"
mount_fs
mkdir "$snaps/one"
printf changed | dd of="$mnt/a.img" bs=1 seek=100000 conv=notrunc status=none
printf changed | dd of="$mnt/d/sparse" bs=1 seek=10 conv=notrunc status=none
size=$(stat -c %s "$snaps/one/.xxh128")
cat "$snaps/one/.xxh128" >"$tmp/sums"
[ "$(stat -c %s "$tmp/sums")" = "$size" ] || fail "its size was said to be $size"
cp "$snaps/one/.xxh128" "$tmp/copied"
cmp "$tmp/sums" "$tmp/copied"
cp -r "$snaps/one" "$tmp/restored"
[ ! -e "$tmp/restored/.xxh128" ] || fail "it is listed"
[ "$(wc -l <"$tmp/sums")" = 6 ] || fail "not a line for each file: $(cat "$tmp/sums")"
(cd "$tmp/restored" && grep -v '^[\\]' "$tmp/sums" | xxhsum -c --quiet --strict)
escaped=$(grep '^[\\]' "$tmp/sums")
plain=$(xxhsum -H2 - <"$tmp/restored/d/"$'new\nline\\')
[ "$escaped" = "\\${plain%% *}  d/new\\nline\\\\" ] || fail "escaped: $escaped"
printf y | dd of="$tmp/restored/d/sparse" bs=1 seek=60000000 conv=notrunc status=none
(cd "$tmp/restored" && grep -v '^[\\]' "$tmp/sums" | xxhsum -c --quiet 2>&1) >"$tmp/out" && fail "a wrong byte passes"
grep -q 'd/sparse: FAILED' "$tmp/out" || fail "$(cat "$tmp/out")"

step "read only, for the owner alone, with a number of its own"
[ "$(stat -c %A "$snaps/one/.xxh128")" = -r-------- ] || fail "its mode"
for command in "touch $snaps/one/.xxh128" "rm -f $snaps/one/.xxh128" "chmod 644 $snaps/one/.xxh128"; do
	$command 2>"$tmp/err" && fail "$command"
	grep -q 'Read-only' "$tmp/err" || fail "$command: $(cat "$tmp/err")"
done
find "$mnt" -printf '%i\n' | sort | uniq -d >"$tmp/twice"
! find "$mnt" -printf '%i\n' | grep -qx "$(stat -c %i "$snaps/one/.xxh128")" || fail "its number is another's"

step "an open one keeps the snapshot; a read one does not"
exec 5<"$snaps/one/.xxh128"
! rmdir "$snaps/one" 2>/dev/null || fail "dropped under a reader"
cmp "$tmp/sums" /dev/fd/5
exec 5<&-
for n in 1 2 3 4 5; do
	mkdir "$snaps/again$n"
	cat "$snaps/again$n/.xxh128" >/dev/null
	rmdir "$snaps/again$n"
done
mv "$snaps/one" "$snaps/uno"
cmp "$tmp/sums" "$snaps/uno/.xxh128"

step "a file of that name in the tree wins"
echo mine >"$mnt/.xxh128"
mkdir "$snaps/two"
[ "$(cat "$snaps/two/.xxh128")" = mine ] || fail "the frozen file is hidden"
cmp "$tmp/sums" "$snaps/uno/.xxh128"
rm "$mnt/.xxh128"
umount_fs

step "a view that was lost: no line at all, and the log says whose"
rm -f "$fleece"/uno/a.img-fleece-*.qcow2
mount_fg
status=0
cat "$snaps/uno/.xxh128" >"$tmp/partial" 2>"$tmp/err" || status=$?
[ $status != 0 ] || fail "read without one of its files"
grep -q 'Input/output error' "$tmp/err" || fail "$(cat "$tmp/err")"
[ ! -s "$tmp/partial" ] || fail "a manifest that lacks a file: $(cat "$tmp/partial")"
grep -q '\.xxh128: a.img cannot be read' "$tmp/log" || fail "not in the log: $(cat "$tmp/log")"

step "a reader who is killed, and an unmount, end the computing"
truncate -s 4T "$mnt/huge"
mkdir "$snaps/huge"
cat "$snaps/huge/.xxh128" >/dev/null &
reader=$!
children+=("$reader")
sleep 0.3
kill -0 "$reader" || fail "4 TiB were hashed in no time"
timeout 5 cmp "$mnt/d/e/back\\slash" "$snaps/huge/d/e/back\\slash" || fail "others wait"
kill -TERM "$reader"
wait_for 5 gone "$reader" || fail "a killed reader is kept"
wait_for 5 rmdir "$snaps/huge" || fail "the snapshot is kept"
umount_fs
