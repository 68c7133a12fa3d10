#!/bin/bash
# Names: of snapshots, of disks, of anything, as long and as odd as the kernel lets them be; paths that
# are longer than it lets them be. All is frozen, listed and the same in tar and rsync, or fails loudly.
# shellcheck source=tests/e2e/lib.sh
. "$(dirname "$0")/lib.sh"

for tool in rsync tar qemu-img; do
	command -v $tool >/dev/null || skip "needs $tool"
done
snaps=$mnt/snapshots
mkdir "$tmp/fast"
mount -t tmpfs -o mode=755 tmpfs "$tmp/fast"
mkdir "$tmp/fast/source" "$tmp/fast/fleece" "$tmp/fast/tar" "$tmp/fast/rsync"
src=$tmp/fast/source
fleece=$tmp/fast/fleece
names() {
	python3 "$here/names.py" "$@"
}

# No byte of a name may end a line of the log, or speak to the terminal.
log_is_plain() {
	! LC_ALL=C grep -avE '^fleecefs: ' "$tmp/log" || fail "a line of the log is not ours"
	! LC_ALL=C grep -aP '[\x00-\x08\x0b-\x1f\x7f]' "$tmp/log" || fail "control characters in the log"
}

step "names of snapshots"
mount_fg
names snapshots "$snaps"
[ -z "$(find "$fleece" -mindepth 1 ! -name '.*')" ] || fail "left: $(ls -A "$fleece")"

step "names of disks: frozen, overwritten, read"
names fill "$src"
cp -a "$src" "$tmp/fast/reference"
mkdir "$snaps/one"
mkdir "$snaps/two"
names overwrite "$mnt"
for _ in 1 2; do
	for s in one two; do
		same_tree "$tmp/fast/reference" "$snaps/$s"
	done
	[ "$(find "$fleece" -name '*-fleece-*.qcow2' -print0 | tr -dc '\0' | wc -c)" -ge 250 ] || fail "images are missing"
	find "$fleece" -path "*-fleece-[12].qcow2" -print0 |
		while IFS= read -rd '' image; do
			[ -f "$image" ] || continue
			qemu-img check -q -f qcow2 "$image" >"$tmp/check" 2>&1 || fail "$image: $(cat "$tmp/check")"
		done
	umount "$mnt"
	wait "$daemon"
	mount_fg
done
tar -C "$snaps/one" -cSf - . | tar -C "$tmp/fast/tar" -xSf -
same_tree "$tmp/fast/reference" "$tmp/fast/tar"
rsync -aS "$snaps/two/" "$tmp/fast/rsync/"
same_tree "$tmp/fast/reference" "$tmp/fast/rsync"
log_is_plain

step "what is lost is named in the log, on one line"
find "$fleece/one" -name '*line-fleece-*' -delete
umount "$mnt"
wait "$daemon"
mount_fg
! cat "$snaps/one/new"$'\n'line >/dev/null 2>&1 || fail "a lost view is read"
cmp "$snaps/two/new"$'\n'line "$tmp/fast/reference/new"$'\n'line
grep -aq 'new?line' "$tmp/log" || fail "not named: $(cat "$tmp/log")"
log_is_plain
rmdir "$snaps/one" "$snaps/two"
[ -z "$(images)" ] || fail "images are left: $(images)"

step "directories deeper than paths reach keep nobody from a snapshot"
names deep "$mnt" 0 40
timeout 60 mkdir "$snaps/deep" || fail "mkdir is kept from it: $(tail -3 "$tmp/log")"
grep -q 'the path is too long' "$tmp/log" || fail "not said: $(cat "$tmp/log")"
cp -a "$src/plain" "$tmp/fast/plain"
names deep-move "$mnt"
names overwrite "$mnt"
cmp "$snaps/deep/plain" "$tmp/fast/plain"
names deep-check "$snaps/deep" "$src" $((4094 - ${#src}))
mkdir "$tmp/fast/copy"
! tar -C "$snaps/deep" -cf "$tmp/fast/out.tar" . 2>"$tmp/err" || fail "tar says nothing"
grep -q 'Input/output error' "$tmp/err" || fail "tar says: $(cat "$tmp/err")"
! rsync -a --delete "$snaps/deep/" "$tmp/fast/copy/" 2>"$tmp/err" || fail "rsync says nothing"
cmp "$tmp/fast/copy/plain" "$tmp/fast/plain"
umount "$mnt"
wait "$daemon"
mount_fg
names deep-check "$snaps/deep" "$src" $((4094 - ${#src}))
rmdir "$snaps/deep"
rm -rf "$mnt/deep"
mkdir "$snaps/again"
tar -C "$snaps/again" -cf - . >/dev/null
rmdir "$snaps/again"
umount "$mnt"
wait "$daemon"
[ -z "$(images)" ] || fail "images are left: $(images)"

step "what is mounted below SOURCE is not left out unnoticed"
mkdir "$src/below" "$tmp/apart"
: >"$src/file"
head -c 8192 /dev/urandom >"$tmp/apart/vm.img"
mount --bind "$tmp/apart/vm.img" "$src/file"
mount -t tmpfs none "$src/below"
cp "$tmp/apart/vm.img" "$src/below/vm.img"
cp "$tmp/apart/vm.img" "$src/here.img"
mount_fg
cmp "$mnt/below/vm.img" "$tmp/apart/vm.img"
mkdir "$snaps/below"
grep -q 'below is on a filesystem of its own' "$tmp/log" || fail "not said: $(cat "$tmp/log")"
for _ in 1 2; do
	! ls "$snaps/below/below" 2>"$tmp/err" || fail "it looks empty"
	grep -q 'Input/output error' "$tmp/err" || fail "$(cat "$tmp/err")"
	! tar -C "$snaps/below" -cf "$tmp/fast/out.tar" . 2>"$tmp/err" || fail "tar says nothing"
	[ "$(getfattr --only-values -n user.fleecefs.state "$snaps/below")" = broken ] || fail "it is said to be whole"
	cmp "$snaps/below/here.img" "$tmp/apart/vm.img"
	find "$snaps/below" >/dev/null 2>"$tmp/err" || true
	! grep -q loop "$tmp/err" || fail "find: $(cat "$tmp/err")"
	umount "$mnt"
	wait "$daemon"
	mount_fg
done
rmdir "$snaps/below"
umount "$mnt"
wait "$daemon"
mount_fg --exclude=below --exclude=file
mkdir "$snaps/below"
[ ! -e "$snaps/below/below" ] || fail "it is not excluded"
[ "$(getfattr --only-values -n user.fleecefs.state "$snaps/below")" = ok ] || fail "it is not whole"
tar -C "$snaps/below" -cf /dev/null .
rmdir "$snaps/below"
umount "$mnt"
wait "$daemon"
umount "$src/below" "$src/file"
rm -r "$src/below" "$src/file" "$src/here.img"

step "names of SOURCE, MOUNTPOINT and FLEECE_DIR themselves"
# shellcheck disable=SC1003,SC2016
for odd in 'a,b=c' 'sp ace' $'new\nline' 'back\\040slash\\' 'quote"$(x)' $'\xff\xfe' '-o' 'x:y' "$(printf 'l%.0s' {1..255})"; do
	src=$tmp/fast/$odd/source
	mnt=$tmp/fast/$odd/$odd
	fleece=$tmp/fast/$odd/fleece
	snaps=$mnt/snapshots
	mkdir -p "$src" "$mnt"
	head -c 100001 /dev/urandom >"$src/a.img"
	cp "$src/a.img" "$tmp/fast/a.ref"
	(cd "$tmp/fast/$odd" && timeout 60 "$fleecefs" --fleece-dir="$fleece" -- source "$odd" </dev/null >/dev/null 2>"$tmp/err") ||
		fail "$odd: $(cat "$tmp/err")"
	mkdir "$snaps/one" "$snaps/two"
	dd if=/dev/urandom of="$mnt/a.img" bs=4k count=9 conv=notrunc status=none
	cmp "$snaps/one/a.img" "$tmp/fast/a.ref"
	check_convert one a.img "$tmp/fast/a.ref"
	pid=$(daemons "$fleece")
	kill -KILL "$pid"
	wait_for 20 gone "$pid"
	(cd "$tmp/fast/$odd" && timeout 60 "$fleecefs" -o fleece-dir=fleece -- source "$odd" </dev/null >/dev/null 2>"$tmp/err") ||
		fail "$odd, over a dead mount: $(cat "$tmp/err")"
	cmp "$snaps/one/a.img" "$tmp/fast/a.ref"
	rmdir "$snaps/one" "$snaps/two"
	umount "$mnt"
done
