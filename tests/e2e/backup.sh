#!/bin/bash
# fleece-backup: each of its targets beside a busy disk, compared with the frozen files; the second night,
# on which tools do not read what has not changed; which files are chosen, and which copies are kept.
# shellcheck source=tests/e2e/lib.sh
. "$(dirname "$0")/lib.sh"
# shellcheck source=tests/e2e/backup_lib.sh
. "$here/backup_lib.sh"
long=
[ "${2-}" != --long ] || long=1

# shellcheck disable=SC2016
odd='o &{}$(x) dd'
mkdir "$src/sub" "$src/sub/$odd" "$src/empty" "$tmp/ref"
head -c 3M /dev/urandom >"$src/busy.img"
head -c 2M /dev/urandom >"$src/sub/$odd/idle.img"
truncate -s 6M "$src/busy.img"
ln -s busy.img "$src/link"
echo small >"$src/note [x].txt"
mount_fs
start_scribbler "$mnt/busy.img"

# What is frozen, kept by the hook while the snapshot is there.
cat >"$tmp/hook" <<'END'
#!/bin/sh
[ "$1" != backup-end ] || { rm -rf "$REF" && cp -a "$FLEECE_SNAPSHOT" "$REF"; }
END
chmod +x "$tmp/hook"
export REF=$tmp/ref

step "tar, compressed or not"
backup 0 --tar "$tmp/out/a.tar" --hook "$tmp/hook" --verify
mkdir "$tmp/x"
tar -C "$tmp/x" -xSf "$tmp/out/a.tar"
same_tree "$REF" "$tmp/x"
! cmp -s "$tmp/x/busy.img" "$mnt/busy.img" || fail "the disk was not busy"
(cd "$tmp/x" && xxhsum -q -c "$tmp/out/a.tar.xxh128") || fail "xxhsum -c does not take the sums"
[ "$(stat -c %b "$tmp/x/busy.img")" -lt 10000 ] || fail "holes were filled"
grep -q '^20.* tar ended well in ' "$tmp/said" || fail "no line for the step: $(cat "$tmp/said")"
grep -qE 'frozen [0-9]+ bytes in 3 files, read [1-9][0-9]+, preserved [0-9]+; longest guest wait [0-9.]+ ms' "$tmp/said" ||
	fail "no summary: $(cat "$tmp/said")"
packs=(zst)
[ -z "$long" ] || packs+=(gz xz)
for pack in "${packs[@]}"; do
	backup 0 --tar "$tmp/out/a.tar.$pack" --hook "$tmp/hook" --quiet
	[ ! -s "$tmp/said" ] || fail "--quiet says $(cat "$tmp/said")"
	rm -r "$tmp/x" && mkdir "$tmp/x"
	tar -C "$tmp/x" -xSf "$tmp/out/a.tar.$pack"
	same_tree "$REF" "$tmp/x"
done

step "copy, which takes an older copy's place and nothing else's"
for _ in 1 2; do
	backup 0 --copy "$tmp/out/copy" --hook "$tmp/hook" --verify
	rm "$tmp/out/copy/.fleece-backup"
	same_tree "$REF" "$tmp/out/copy"
	touch "$tmp/out/copy/.fleece-backup"
done
mkdir "$tmp/out/precious"
echo data >"$tmp/out/precious/data"
backup 73 --copy "$tmp/out/precious"
[ "$(cat "$tmp/out/precious/data")" = data ] || fail "--copy has replaced a directory that is not its own"
backup 73 --rsync "$tmp"
backup 73 --rsync /
backup 73 --tar "$mnt/a.tar"
backup 73 --copy "$src/copy"
[ "$(names "$tmp/out" | sed 's/a.tar.[gx]z //g')" = "a.tar a.tar.xxh128 a.tar.zst copy copy.xxh128 precious " ] ||
	fail "left in the target: $(names "$tmp/out")"

step "rsync, a mirror"
mkdir "$tmp/out/mirror"
echo old >"$tmp/out/mirror/gone"
backup 0 --rsync "$tmp/out/mirror" --hook "$tmp/hook" --verify
same_tree "$REF" "$tmp/out/mirror"
stop "$scribbler"
rsh=$tmp/rsh # another host, that is this one
printf '#!/bin/sh\nshift\nexec "$@"\n' >"$rsh"
chmod +x "$rsh"
RSYNC_RSH=$rsh backup 0 --rsync "host:$tmp/out/mirror" --verify
grep -q "verified.*rsync's own" "$tmp/said" || fail "a mirror on another host is not verified"

step "borg and restic"
for tool in borg restic; do
	command -v $tool >/dev/null || skip "needs $tool"
done
export BORG_BASE_DIR=$tmp/borgbase BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK=yes RESTIC_PASSWORD=x RESTIC_CACHE_DIR=$tmp/cache
borg init -e none "$tmp/out/borg"
restic init -q -r "$tmp/out/restic"
backup 0 --borg "$tmp/out/borg" --hook "$tmp/hook" --verify
(rm -rf "$tmp/x" && mkdir "$tmp/x" && cd "$tmp/x" && borg extract --sparse "$tmp/out/borg::$(borg list --short "$tmp/out/borg")" \
	--exclude "re:/\.fleece-backup$" && rm -rf var "${tmp#/}" "./${FLEECE_BACKUP_DIR#/}" && find . -type d -empty -delete)
rmdir "$REF/empty"
same_tree "$REF" "$tmp/x"
backup 0 --restic "$tmp/out/restic" --hook "$tmp/hook" --verify
rm -rf "$tmp/x"
restic -q -r "$tmp/out/restic" restore latest --target "$tmp/x"
same_tree "$REF" "$tmp/x"

step "the second night nothing is read of a disk that has not changed"
read_bytes() {
	sed -n 's/.* frozen .* read \([0-9]*\), preserved.*/\1/p' "$tmp/said"
}
remount() { # what the kernel has cached is not read either, and would hide it
	umount_fs
	mount_fs
}
targets=("--rsync $tmp/out/mirror" "--borg $tmp/out/borg" "--restic $tmp/out/restic")
for target in "${targets[@]}"; do
	remount
	# shellcheck disable=SC2086
	backup 0 $target
	[ "$(read_bytes)" = 0 ] || fail "$target: $(read_bytes) bytes read of disks that have not changed"
done
printf night | dd of="$mnt/busy.img" bs=1 seek=77777 conv=notrunc status=none
for target in "${targets[@]}"; do
	remount
	# shellcheck disable=SC2086
	backup 0 $target
	[ "$(read_bytes)" = "$(stat -c %s "$mnt/busy.img")" ] || fail "$target: $(read_bytes) bytes read, where one disk" \
		"of $(stat -c %s "$mnt/busy.img") has changed"
done
cmp "$mnt/busy.img" "$tmp/out/mirror/busy.img"
[ "$(borg extract --stdout "$tmp/out/borg::$(borg list --short --last 1 "$tmp/out/borg")" busy.img | xxhsum -)" = \
	"$(xxhsum - <"$mnt/busy.img")" ] || fail "borg has not got the new disk"
[ "$(restic -q -r "$tmp/out/restic" dump latest /busy.img | xxhsum -)" = "$(xxhsum - <"$mnt/busy.img")" ] ||
	fail "restic has not got the new disk"

step "--include, --exclude"
chosen() { # what is wanted, and the options
	local want=$1
	shift
	for target in "${targets[@]}"; do
		rm -rf "$tmp/out/fr"
		# shellcheck disable=SC2086
		backup 0 $target "$@" --verify
		case $target in
		--tar*) tar -tf "$tmp/out/f.tar" | sed 's|^\./||; s|/$||' ;;
		--copy*) (cd "$tmp/out/f" && find . -mindepth 1 ! -name .fleece-backup -printf '%P\n') ;;
		--rsync*) (cd "$tmp/out/fr" && find . -mindepth 1 -printf '%P\n') ;;
		--borg*) borg list --format '{path}{NL}' "$tmp/out/borg::$(borg list --short --last 1 "$tmp/out/borg")" | grep -v .fleece-backup ;;
		--restic*) restic -q -r "$tmp/out/restic" ls latest | sed 's|^/||' | grep -v '^snapshot ' ;;
		esac | grep -vx '\.\?' | sort | tr '\n' ' ' >"$tmp/got"
		[ "$(cat "$tmp/got")" = "$want" ] || fail "$target $*: $(cat "$tmp/got")"
	done
}
targets=("--tar $tmp/out/f.tar" "--copy $tmp/out/f" "--rsync $tmp/out/fr" "--borg $tmp/out/borg" "--restic $tmp/out/restic")
chosen "link note [x].txt sub sub/$odd sub/$odd/idle.img " --exclude 'busy*' --exclude=empty
[ -n "$long" ] || targets=("${targets[0]}")
chosen "sub sub/$odd sub/$odd/idle.img " --include 'idle*'
chosen "busy.img " --include '*.img' --exclude sub
backup 66 --tar "$tmp/out/f.tar" --include nothing
# shellcheck disable=SC2016
backup 0 --include 'idle*' -- sh -c 'tr "\0" "\n" <"$FLEECE_FILES"'
grep -qxF "./sub/$odd/idle.img" "$tmp/said" || fail "the list for COMMAND"

step "--keep-last"
mkdir "$tmp/out/kept"
for date in 2001-02-03 2001-02-10 2001-03-01; do
	touch "$tmp/out/kept/n-$date.tar" "$tmp/out/kept/n-$date.tar.xxh128"
	mkdir "$tmp/out/kept/c$date"
	touch "$tmp/out/kept/c$date/.fleece-backup"
done
touch "$tmp/out/kept/n-2001-02-03.tar.old" "$tmp/out/kept/n-2001-99-99.tar" "$tmp/out/kept/other.tar" -d 1999-01-01
mkdir "$tmp/out/kept/c1999-01-01"
backup 0 --dry-run --tar "$tmp/out/kept/n-%F.tar" --keep-last 2
grep -q "would remove $tmp/out/kept/n-2001-02-10.tar" "$tmp/said" || fail "--dry-run: $(cat "$tmp/said")"
[ "$(find "$tmp/out/kept" -name 'n-2001*' | wc -l)" = 8 ] || fail "--dry-run has removed something"
backup 0 --tar "$tmp/out/kept/n-%F.tar" --keep-last 2
backup 0 --copy "$tmp/out/kept/c%F" --keep-last 1
today=$(date +%F)
[ "$(names "$tmp/out/kept")" = \
	"c1999-01-01 c$today n-2001-02-03.tar.old n-2001-03-01.tar n-2001-03-01.tar.xxh128 n-2001-99-99.tar n-$today.tar other.tar " ] ||
	fail "kept: $(names "$tmp/out/kept")"
backup 64 --tar "$tmp/out/kept/n.tar" --keep-last 2
backup 64 --tar "$tmp/out/%F/n.tar" --keep-last 2
backup 64 --tar "$tmp/out/n-%d.tar" --keep-last 2

step "--bwlimit"
targets=("--tar $tmp/out/slow.tar")
[ -z "$long" ] || targets+=("--copy $tmp/out/slow" "--restic $tmp/out/restic2" "--rsync $tmp/out/slowr")
for target in "${targets[@]}"; do
	[ "${target#--restic}" = "$target" ] || restic init -q -r "$tmp/out/restic2"
	began=$EPOCHREALTIME
	# shellcheck disable=SC2086
	backup 0 $target --include 'idle*' --bwlimit 1M
	[ $(((${EPOCHREALTIME/./} - ${began/./}) / 1000)) -ge 1500 ] || fail "$target: 2 MB at 1 MB/s were too fast"
done
backup 64 --borg "$tmp/out/borg" --bwlimit 1M

step "what was written is not what was frozen"
cat >"$tmp/bin/rsync" <<END
#!/bin/sh
$(command -v rsync) "\$@" && printf x | dd of="$tmp/out/mirror/busy.img" bs=1 seek=5000 conv=notrunc status=none
END
chmod +x "$tmp/bin/rsync"
backup 74 --rsync "$tmp/out/mirror" --verify
grep -q "'./busy.img' differs" "$tmp/said" || fail "$(cat "$tmp/said")"
rm "$tmp/bin/rsync"
cat >"$tmp/bin/tar" <<END
#!/bin/sh
exec $(command -v tar) --exclude=idle.img "\$@"
END
chmod +x "$tmp/bin/tar"
backup 74 --tar "$tmp/out/bad.tar" --verify
grep -q "is not there" "$tmp/said" || fail "$(cat "$tmp/said")"
[ ! -e "$tmp/out/bad.tar" ] || fail "a bad archive got its name"
backup 74 --copy "$tmp/out/copy" --verify
[ -f "$tmp/out/copy/sub/$odd/idle.img" ] || fail "a bad copy took the place of a good one"
rm "$tmp/bin/tar"
nothing_left
umount_fs
