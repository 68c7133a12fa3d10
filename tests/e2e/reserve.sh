#!/bin/bash
# fleece-reserve and fleece-limit: how much the fleecing images may take, under both policies; and what
# backup programs make of a view that broke: an error, and the earlier backup stays.
# shellcheck source=tests/e2e/lib.sh
. "$(dirname "$0")/lib.sh"

for tool in rsync tar; do
	command -v $tool >/dev/null || skip "needs $tool"
done
snaps=$mnt/snapshots
mkdir "$tmp/out" "$tmp/rsync" "$tmp/cache"
export HOME=$tmp/cache XDG_CACHE_HOME=$tmp/cache BORG_BASE_DIR=$tmp/cache RESTIC_PASSWORD=x
mount -t tmpfs tmpfs "$src"
mount -t tmpfs tmpfs "$tmp/out"
mount -t tmpfs -o size=64m,mode=700 tmpfs "$fleece"
head -c 24M /dev/urandom >"$src/a.img"
head -c 1M /dev/urandom >"$src/b.img"

free_kib() {
	df --output=avail -k "$fleece" | tail -1
}

used_kib() {
	du -sk "$fleece" | cut -f 1
}

overwrite() {
	dd if=/dev/urandom of="$mnt/$1" bs=64k seek="$2" count="$3" conv=notrunc status=none 2>"$tmp/err"
}

freeze() {
	mkdir "$snaps/$1"
	cp "$src/a.img" "$tmp/out/a.ref"
	cp "$src/b.img" "$tmp/out/b.ref"
}

lost() {
	! cat "$1" >/dev/null 2>"$tmp/err" || fail "$1 is read as if nothing had happened"
	grep -q 'Input/output error' "$tmp/err" || fail "$1: not EIO: $(cat "$tmp/err")"
}

# $1: the option; the rest is a command that tells whether the budget is kept.
budget() {
	local option=$1 used
	shift
	step "$option, break-snapshot"
	mount_fg --fleece-reserve=0 "$option"
	freeze one
	overwrite b.img 0 4 || fail "$(cat "$tmp/err")"
	overwrite a.img 0 384 || fail "the guest's write fails: $(cat "$tmp/err")"
	"$@" || fail "$(used_kib) KiB are used, $(free_kib) are free"
	lost "$snaps/one/a.img"
	cmp "$snaps/one/b.img" "$tmp/out/b.ref"
	[ "$(stat -c %s "$snaps/one/a.img")" = $((24 << 20)) ] || fail "its size is another"
	grep -q 'a.img.*the frozen view is lost: No space left' "$tmp/log" || fail "not said: $(cat "$tmp/log")"
	rmdir "$snaps/one"
	[ "$(used_kib)" -lt 200 ] || fail "$(used_kib) KiB are used after rmdir"
	freeze two
	overwrite a.img 0 16
	cmp "$snaps/two/a.img" "$tmp/out/a.ref"
	umount_fs
	mount_fg --fleece-reserve=0 "$option"
	cmp "$snaps/two/a.img" "$tmp/out/a.ref"
	used=$(used_kib)
	overwrite a.img 100 280 || fail "the guest's write fails: $(cat "$tmp/err")"
	"$@" || fail "after another mount, $(used_kib) KiB are used, $(free_kib) are free, it were $used"
	lost "$snaps/two/a.img"
	rmdir "$snaps/two"
	umount_fs

	step "$option, break-guest-write"
	mount_fg -o "fleece-reserve=0,${option#--}" --on-cbw-error=break-guest-write
	freeze one
	overwrite a.img 0 16 || fail "$(cat "$tmp/err")"
	! overwrite a.img 0 384 || fail "the write goes through"
	grep -q 'No space left' "$tmp/err" || fail "the guest gets $(cat "$tmp/err")"
	"$@" || fail "$(used_kib) KiB are used, $(free_kib) are free"
	cmp "$snaps/one/a.img" "$tmp/out/a.ref"
	cmp "$snaps/one/b.img" "$tmp/out/b.ref"
	rmdir "$snaps/one"
	overwrite a.img 0 384 || fail "without a snapshot: $(cat "$tmp/err")"
	umount_fs
}

reserved() {
	[ "$(free_kib)" -ge 53248 ]
}

limited() {
	[ "$(used_kib)" -le 8400 ]
}
budget --fleece-reserve=52M reserved
budget --fleece-limit=8M limited

step "the reserve is 64 MiB unless it is given: a filesystem of that size takes nothing"
mount_fg
! mkdir "$snaps/one" 2>"$tmp/err" || fail "the reserve is not kept"
grep -q 'No space left' "$tmp/err" || fail "$(cat "$tmp/err")"
grep -q 'fleece-reserve' "$tmp/log" || fail "not said: $(cat "$tmp/log")"
[ -z "$(ls "$snaps")" ] || fail "half a snapshot: $(ls "$snaps")"
[ -z "$(images)" ] || fail "images are left: $(images)"
umount_fs

step "backup programs and a view that broke"
mount_fg --fleece-limit=1M --fleece-reserve=0
have() {
	command -v "$1" >/dev/null || {
		echo "left out: $1"
		return 1
	}
}
back_up() {
	case $1 in
	tar) tar -C "$snaps/nightly" -cSf "$tmp/out/tar" . ;;
	rsync) rsync -aS --delete "$snaps/nightly/" "$tmp/rsync/" ;;
	cp) cp -a "$snaps/nightly/a.img" "$tmp/out/copy" ;;
	borg) (cd "$snaps/nightly" && borg create --list --filter=AME "$tmp/out/borg::$2" .) ;;
	restic) restic -q -r "$tmp/out/restic" backup "$snaps/nightly" ;;
	esac
}
tools=()
for tool in tar rsync cp borg restic; do
	have $tool && tools+=("$tool")
done
case " ${tools[*]} " in *" borg "*) borg init -e none "$tmp/out/borg" >/dev/null 2>&1 ;; esac
case " ${tools[*]} " in *" restic "*) restic -q -r "$tmp/out/restic" init >/dev/null ;; esac
freeze nightly
cp "$tmp/out/a.ref" "$tmp/out/first"
for tool in "${tools[@]}"; do
	back_up "$tool" first >"$tmp/err" 2>&1 || fail "$tool: $(cat "$tmp/err")"
done
rmdir "$snaps/nightly"
overwrite a.img 0 2
freeze nightly
overwrite a.img 0 384 # more than may be saved
for tool in "${tools[@]}"; do
	! back_up "$tool" second >"$tmp/err" 2>&1 || fail "$tool says nothing: $(cat "$tmp/err")"
	if ! grep -qi 'input/output error' "$tmp/err" || ! grep -q 'a\.img' "$tmp/err"; then
		fail "$tool says: $(cat "$tmp/err")"
	fi
	echo "$tool fails: $(grep -i 'input/output error' "$tmp/err" | head -1)"
done
cmp "$tmp/rsync/a.img" "$tmp/out/first"
[ "$(find "$tmp/rsync" -type f | wc -l)" = 2 ] || fail "rsync has deleted: $(ls -l "$tmp/rsync")"
for tool in "${tools[@]}"; do
	case $tool in
	borg)
		borg extract --stdout "$tmp/out/borg::first" a.img | cmp - "$tmp/out/first"
		if borg list "$tmp/out/borg" | grep -q '^second '; then
			! borg list --short "$tmp/out/borg::second" | grep -q 'a\.img' || fail "borg has something for a.img"
		fi
		;;
	restic)
		restic -q -r "$tmp/out/restic" ls latest >"$tmp/list"
		! grep -q 'a\.img' "$tmp/list" || fail "restic has something for a.img: $(cat "$tmp/list")"
		;;
	esac
done
rmdir "$snaps/nightly"
umount_fs
