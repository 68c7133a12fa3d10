#!/bin/bash
# What `meson install` brings, at work: mount(8)'s helper, fstab, the service and its word to the
# service manager, completions. It runs in a mount namespace, with the helper in a copy of /usr/sbin.
# shellcheck source=tests/e2e/lib.sh
. "$(dirname "$0")/lib.sh"
[ -n "${IN_NAMESPACE-}" ] || skip "needs a mount namespace"
command -v meson >/dev/null || skip "needs meson"

build=$(dirname "$fleecefs")
repository=$(realpath "$here/../..")
dest=$tmp/dest
snaps=$mnt/snapshots
mkdir "$src/sub"
head -c 1M /dev/urandom >"$src/a.img"
cp "$src/a.img" "$tmp/ref"

step "meson install"
DESTDIR=$dest meson install -C "$build" --no-rebuild --quiet >"$tmp/log"
usr=$(find "$dest" -name fleecefs -path '*/sbin/*' -printf '%h\n')
usr=${usr%/sbin}
prefix=${usr#"$dest"}
helper=$(find "$dest" -name mount.fleecefs -perm 755)
[ -n "$helper" ] || fail "no mount.fleecefs"
for file in man/man8/fleecefs.8 man/man8/mount.fleecefs.8 man/man8/fleece-backup.8 doc/fleecefs/examples/fleecefs.conf \
	bash-completion/completions/fleecefs; do
	[ -f "$usr/share/$file" ] || fail "$file is not installed"
done
installed=$(realpath "$usr/sbin/fleecefs")
"$installed" -V >/dev/null

step "man pages have no errors"
if command -v groff >/dev/null; then
	for page in "$usr"/share/man/man*/*; do
		groff -man -Tutf8 -ww -wbreak "$page" 2>&1 >/dev/null | tee "$tmp/err"
		[ ! -s "$tmp/err" ] || fail "$page"
	done
fi

step "mount -t fleecefs, umount"
mkdir "$tmp/sbin"
cp -a /usr/sbin/. "$tmp/sbin/"
cp "$installed" "$helper" "$tmp/sbin/"
mount --bind "$tmp/sbin" /usr/sbin
fleecefs=/usr/sbin/fleecefs
mount -t fleecefs "$src" "$mnt" -o "fleece-dir=$fleece,allow_other"
mkdir "$snaps/x"
cmp "$snaps/x/a.img" "$tmp/ref"
rmdir "$snaps/x"
[ "$(findmnt -no FSTYPE "$mnt")" = fuse.fleecefs ] || fail "type: $(findmnt -no FSTYPE "$mnt")"
mnt_busy() {
	local status=0
	mount -t fleecefs "$src" "$tmp/mnt2" -o "fleece-dir=$fleece" 2>"$tmp/err" || status=$?
	[ $status = 32 ] || fail "status $status of a mount that fails"
	grep -q . "$tmp/err" || fail "no message"
}
mkdir "$tmp/mnt2"
mnt_busy
status=0
mount -o remount,ro "$mnt" 2>"$tmp/err" || status=$?
[ $status != 0 ] || fail "a remount does nothing and says nothing"
grep -q 'unmount it first' "$tmp/err" || fail "remount: $status, $(cat "$tmp/err")"
echo live >"$mnt/still-writable"
umount_fs

step "fstab: words that are not ours, spaces, commas in values"
mkdir "$tmp/with space" "$tmp/with space/source" "$tmp/with space/mnt" "$tmp/flee,ce" "$tmp/fl\\eece"
cp "$src/a.img" "$tmp/with space/source/"
echo no >"$tmp/with space/source/no,this.tmp"
words=defaults,noauto,nofail,_netdev,user,suid,dev,exec,rw,relatime,lazytime,comment=x,x-systemd.automount
words+=,x-systemd.requires-mounts-for=/,x-systemd.before=libvirtd.service,X-other=1,allow_other
cat >"$tmp/fstab" <<EOT
$tmp/with\\040space/source  $tmp/with\\040space/mnt  fleecefs  $words,fleece-dir="$tmp/flee,ce",exclude=no\\,*.tmp  0  2
$src  $mnt  fleecefs  ro,noauto,fleece-dir=$tmp/fl\\134\\134eece  0  0
EOT
cat "$tmp/fstab"
mount -v -T "$tmp/fstab" "$tmp/with space/mnt"
mkdir "$tmp/with space/mnt/snapshots/x"
cmp "$tmp/with space/mnt/snapshots/x/a.img" "$tmp/ref"
[ -e "$tmp/with space/mnt/no,this.tmp" ] || fail "an excluded file is not live"
[ ! -e "$tmp/with space/mnt/snapshots/x/no,this.tmp" ] || fail "exclude= with a comma is not understood"
[ -d "$tmp/flee,ce/x" ] || fail "fleece-dir= with a comma is not understood: $(ls "$tmp")"
findmnt -no OPTIONS "$tmp/with space/mnt" | grep nosuid | grep -q nodev || fail "suid or dev came through"
rmdir "$tmp/with space/mnt/snapshots/x"
sed -i s/,noauto// "$tmp/fstab"
mount -a -T "$tmp/fstab"
[ "$(grep -c "$tmp/with.040space/mnt" /proc/self/mounts)" = 1 ] || fail "mount -a mounts it twice"
[ -e "$tmp/fl\\eece/.lock" ] || fail "a backslash in a value: $(ls "$tmp")"
! touch "$mnt/new" 2>"$tmp/err" || fail "ro is ignored"
grep -q 'Read-only' "$tmp/err" || fail "ro: $(cat "$tmp/err")"
! mkdir "$snaps/x" 2>/dev/null || fail "a snapshot on a mount that is read only"
cmp "$mnt/a.img" "$tmp/ref"
umount "$mnt" "$tmp/with space/mnt"

step "the helper's own arguments"
called() {
	local expected=$1 status=0
	shift
	timeout 30 mount.fleecefs "$@" >"$tmp/out" 2>"$tmp/err" || status=$?
	[ $status = "$expected" ] || fail "status $status, not $expected: mount.fleecefs $*: $(cat "$tmp/err")"
	! mountpoint -q "$mnt" || fail "mounted: mount.fleecefs $*"
}
called 1
called 1 "$src"
called 1 "$src" "$mnt" extra
called 1 "$src" "$mnt" -q
called 1 "$src" "$mnt" -o
called 1 "$src" "$mnt" -o 'fleece-dir="/a,b'
called 1 "$src" "$mnt" -o no_such_option
called 1 "$src" "$mnt" -o remount,ro
called 32 "$src" "$tmp/nowhere" -o "fleece-dir=$fleece"
called 0 -fnv "$src" "$mnt" -o 'ro,exclude="a,b",noatime' -t fleecefs
grep -qF 'ro,exclude=a\,b,noatime' "$tmp/out" || fail "-f -v says $(cat "$tmp/out")"
mount.fleecefs -ns "$src" "$mnt" -o "fleece-dir=$fleece" -o noatime
umount_fs

step "the service: capabilities of its unit, notification, one line at each end"
unit=$(find "$dest" -name 'fleecefs@.service')
bounding=-all
for capability in $(sed -n 's/^CapabilityBoundingSet=//p' "$unit" | tr '[:upper:]' '[:lower:]'); do
	bounding+=,+${capability#cap_}
done
python3 "$here/notify.py" "$fleecefs" "$src" "$mnt" "$fleece" "$tmp" \
	setpriv --no-new-privs --bounding-set "$bounding"
grep -v in/valid "$tmp/service.log" >"$tmp/lines"
cat "$tmp/lines"
[ "$(wc -l <"$tmp/lines")" = 4 ] || fail "more than one line when mounted and one when unmounted"
sed 's/^<6>//; s/^/Nov 24 01:31:47 host fleecefs[34]: /' "$tmp/lines" |
	{ ! grep -vE -f "$repository/scripts/system/logcheck"; } || fail "lines that logcheck would send"
! echo 'Nov 24 01:31:47 host fleecefs[34]: fleecefs: error: something' |
	grep -E -f "$repository/scripts/system/logcheck" || fail "logcheck would miss an error"

step "systemd-analyze verify"
if command -v systemd-analyze >/dev/null; then
	mkdir -p "$tmp/root/etc/systemd/system" "$tmp/root/$prefix/sbin"
	cp "$unit" "$tmp/root/etc/systemd/system/fleecefs@vm.service"
	cp "$installed" "$tmp/root/$prefix/sbin/"
	mkdir -p "$tmp/root/usr/sbin"
	cp "$usr/sbin/fleece-backup" "$tmp/root/usr/sbin/"
	for kind in service timer; do
		cp "$usr/share/doc/fleecefs/examples/fleece-backup@.$kind" "$tmp/root/etc/systemd/system/fleece-backup@vm.$kind"
	done
	sed -n '/^\[Unit\]/,/^\.fi/p' "$usr/share/man/man8/mount.fleecefs.8" | sed '/^\.fi/,$d; s/\\//g' \
		>"$tmp/root/etc/systemd/system/srv-live.mount"
	grep -q Type=fleecefs "$tmp/root/etc/systemd/system/srv-live.mount" || fail "no mount unit in the manual"
	for target in timers time-set time-sync sysinit basic shutdown umount local-fs local-fs-pre multi-user; do
		echo '[Unit]' >"$tmp/root/etc/systemd/system/$target.target"
	done
	for unit in fleecefs@vm.service srv-live.mount fleece-backup@vm.timer fleece-backup@vm.service; do
		systemd-analyze --man=no --root="$tmp/root" verify "$unit" >"$tmp/out" 2>&1 || fail "$(cat "$tmp/out")"
		[ ! -s "$tmp/out" ] || fail "$unit: $(cat "$tmp/out")"
	done
else
	echo "left out: no systemd here"
fi

step "completions know every long option, and no other"
# Sets of words, one in a line: what bash offers where the words given end; what files or help name.
complete_words() {
	# shellcheck disable=SC2016 # it is for the other shell
	bash -c 'compopt() { :; }; source "$1"; shift; COMP_WORDS=("$@") COMP_CWORD=$(($# - 1))
		read -r _ _ name _ < <(complete -p "${1##*/}"); "$name"; printf "%s\n" "${COMPREPLY[@]}"' \
		- "$usr/share/bash-completion/completions/${1##*/}" "$@" | sort -u
}
offered() {
	complete_words "$@" -- | sed 's/=$//'
}
named() {
	sed 's/\\-/-/g' "$@" | grep -oE -- '--[a-z][a-z-]*[a-z]' | sort -u
}
same() {
	[ -s "$tmp/b" ] || fail "$1: no options at all"
	diff "$tmp/a" "$tmp/b" || fail "$1"
}
zsh_dir=$(dirname "$(find "$dest" -name _fleecefs)")
"$fleecefs" --help | sed '/^libfuse/,$d' | grep -v usage: | named >"$tmp/a"
offered fleecefs >"$tmp/b"
same "fleecefs: help, bash"
named <(grep "^	'" "$zsh_dir/_fleecefs") <(echo "--help --version") >"$tmp/b"
same "fleecefs: help, zsh"
sed -n '/^\.SH OPTIONS/,/^\.SH [^O]/{
	/^\.TP/{n; s/\\-/-/g; s/^\.[BIR]* *"*//; /^-/!s/^\([a-z-]*\).*/--\1/p; }
}' "$usr/share/man/man8/fleecefs.8" | named >"$tmp/b"
printf '%s\n' --help --version | sort -u - "$tmp/b" >"$tmp/c"
mv "$tmp/c" "$tmp/b"
same "fleecefs: help, manual"
ctl=$(find "$usr" -name fleecectl -perm -u=x -type f)
for command in $("$ctl" --help | sed -n 's/^  \([a-z]*\)  *\[.*/\1/p'); do
	{ "$ctl" "$command" --help | named; echo "--help"; echo "--version"; } | sort -u >"$tmp/a"
	offered fleecectl "$command" >"$tmp/b"
	same "fleecectl $command: help, bash"
	sed -n "/^$command)/,/;;/p" "$zsh_dir/_fleecectl" | sed "s/\\\$on/--on/" >"$tmp/zsh"
	{ named "$tmp/zsh"; echo "--help"; echo "--version"; } | sort -u >"$tmp/b"
	same "fleecectl $command: help, zsh"
	echo "$command: $(wc -l <"$tmp/a") options"
done
named <(grep -v '^\.IR' "$usr/share/man/man8/fleecectl.8" | sed '/^\.SH EXIT/,$d') >"$tmp/a"
named "$usr/share/bash-completion/completions/fleecectl" >"$tmp/b"
same "fleecectl: manual, bash"
backup=$usr/sbin/fleece-backup
"$backup" --help | named >"$tmp/a"
offered "$backup" >"$tmp/b"
same "fleece-backup: help, bash"
sed -n '/^\.SH OPTIONS/,/^\.SH [^O]/{ /^\.TP/{n; p; }; }' "$usr/share/man/man8/fleece-backup.8" | named >"$tmp/b"
same "fleece-backup: help, manual"
offers() {
	local expected=$1
	shift
	[ "$(complete_words "$@" | tr '\n' ' ')" = "$expected " ] || fail "offered for '$*': $(complete_words "$@")"
}
mount_fs
rmdir "$tmp/mnt2"
mkdir "$snaps/one" "$snaps/two"
offers "break-guest-write break-snapshot" fleecefs --on-cbw-error = break
offers "$tmp/fleece" fleecefs --fleece-dir = "$tmp/fleec"
offers "ro,fleece-dir= ro,fleece-limit= ro,fleece-reserve=" fleecefs /a /b -o ro,fleece
offers "drop" fleecectl dr
offers "two" fleecectl drop --on "$mnt" tw
offers "$mnt" fleecectl status "$mnt"
offers "$mnt" fleece-backup --on "$mnt"
mkdir -p "$tmp/kept/vm-2026-11-26T23-51-26"
offers "vm-2026-11-26T23-51-26" fleece-backup --restore "$tmp/kept" vm
offers "latest" fleece-backup --restore "$tmp/kept" la
offers "$tmp/log" fleece-backup --restore "$tmp/kept" latest . "$tmp/lo"
offers "$tmp/log" fleece-backup --on "$mnt" -- cat "$tmp/lo"
rmdir "$snaps/one" "$snaps/two"
umount_fs
if command -v zsh >/dev/null; then
	for file in "$zsh_dir"/_flee*; do
		zsh -n "$file"
	done
fi
