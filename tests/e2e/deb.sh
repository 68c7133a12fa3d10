#!/bin/bash
# The Debian package: built, checked by lintian, unpacked, used, purged.
#
#   deb.sh FLEECEFS [system]     system: also installed by apt in a small Debian made by debootstrap from
#                                the machine's own package source, and run as a service there
# shellcheck source=tests/e2e/lib.sh
. "$(dirname "$0")/lib.sh"
for tool in dpkg-shlibdeps dpkg-gencontrol meson; do
	command -v "$tool" >/dev/null || skip "needs $tool"
done
repository=$(realpath "$here/../..")
mkdir "$tmp/out"

step "scripts/make-deb"
TMPDIR=$tmp "$repository/scripts/make-deb" "$tmp/out"
deb=$(echo "$tmp"/out/*.deb)
[ -f "$deb" ] || fail "not exactly one package: $deb"
version=$(meson introspect --projectinfo "$repository/meson.build" | python3 -c 'import json, sys; print(json.load(sys.stdin)["version"])')
[ "$(dpkg-deb -f "$deb" Version)" = "$version-1" ] || fail "version $(dpkg-deb -f "$deb" Version)"
for library in libc6 libfuse3- libqcow1 libxxhash0; do
	dpkg-deb -f "$deb" Depends | grep -q "${library}[0-9t]* (>=" || fail "does not depend on $library"
done

step "lintian"
if command -v lintian >/dev/null; then
	setpriv --reuid=65534 --regid=65534 --clear-groups \
		env HOME=/ lintian --fail-on error "$deb"
else
	echo "left out: no lintian here"
fi

step "the files"
dpkg-deb -x "$deb" "$tmp/root"
mkdir "$tmp/control"
dpkg-deb -e "$deb" "$tmp/control"
(cd "$tmp/root" && md5sum --quiet -c "$tmp/control/md5sums")
[ "$(cat "$tmp/control/conffiles")" = "$(cd "$tmp/root" && find etc -type f -printf '/%p\n')" ] ||
	fail "conffiles: $(cat "$tmp/control/conffiles")"
words() {
	sed 's/^ \.$//' "$@" | tr -s ' \n' '\n' | grep .
}
diff <(sed '1,/^License:/d' "$tmp/root/usr/share/doc/fleecefs/copyright" | words) \
	<(sed '1,/^Copyright/d' "$repository/LICENSE" | words) || fail "copyright and LICENSE differ"
grep -q "$(sed -n 's/^Copyright (c) //p' "$repository/LICENSE")" "$tmp/root/usr/share/doc/fleecefs/copyright"
gzip -dc "$tmp/root/usr/share/doc/fleecefs/changelog.Debian.gz" | dpkg-parsechangelog -l - -S Version |
	grep -qx "$version-1"
! find "$tmp/root" -newermt "@$(($(stat -c %Y "$tmp/root/usr/sbin/fleecefs") + 1))" | grep . ||
	fail "times that depend on when it was built"
! strings -a "$tmp/root/usr/sbin/fleecefs" 2>/dev/null | grep -F -e "$tmp" -e "$repository" ||
	fail "paths of the build are in the program"

step "the unpacked program"
fleecefs=$tmp/root/usr/sbin/fleecefs
head -c 1M /dev/urandom >"$src/a.img"
cp "$src/a.img" "$tmp/ref"
timeout 60 "$tmp/root/usr/sbin/mount.fleecefs" "$src" "$mnt" -o "fleece-dir=$fleece"
mkdir "$mnt/snapshots/x"
printf 'changed' | dd of="$mnt/a.img" bs=1 seek=9999 conv=notrunc status=none
cmp "$mnt/snapshots/x/a.img" "$tmp/ref"
"$tmp/root/usr/bin/fleecectl" list "$fleece" | grep -q '^x '
rmdir "$mnt/snapshots/x"
mkdir "$tmp/backups"
FLEECE_BACKUP_DIR=$tmp/state "$tmp/root/usr/sbin/fleece-backup" --on "$mnt" --copy "$tmp/backups/%F" --keep-last 2
cmp "$mnt/a.img" "$tmp"/backups/*/a.img
umount_fs

step "dpkg installs and purges it"
admin=$tmp/admin
mkdir -p "$admin"/var/lib/dpkg/{updates,info} "$admin/etc/systemd/system/multi-user.target.wants"
: >"$admin/var/lib/dpkg/status"
dpkg_in() {
	dpkg --root="$admin" --force-script-chrootless --force-depends --force-architecture \
		--log="$tmp/dpkg.log" "$@" >"$tmp/out.txt" 2>&1 || fail "dpkg $*: $(cat "$tmp/out.txt")"
}
(cd "$admin" && find . -path ./var/lib/dpkg -prune -o -print | sort) >"$tmp/before"
dpkg_in -i "$deb"
(cd "$tmp/root" && find . ! -type d | sort) >"$tmp/packed"
(cd "$admin" && find . -path ./var/lib/dpkg -prune -o ! -type d -print | sort) | diff "$tmp/packed" -
echo SOURCE=/x >"$admin/etc/fleecefs/vm.conf"
mkdir -p "$admin/var/lib/fleece-backup/0123"
ln -s /usr/lib/systemd/system/fleecefs@.service \
	"$admin/etc/systemd/system/multi-user.target.wants/fleecefs@vm.service"
dpkg_in --remove fleecefs
[ -f "$admin/etc/fleecefs/vm.conf" ] || fail "remove takes the configuration"
dpkg_in --purge fleecefs
(cd "$admin" && find . -path ./var/lib/dpkg -prune -o -print | sort) >"$tmp/after"
# etc, the administrator's, was there before
diff "$tmp/before" "$tmp/after" || fail "purge leaves something behind"

[ "${2-}" = system ] || exit 0

# --- a Debian of its own ----------------------------------------------------------------------------

command -v debootstrap >/dev/null || skip "needs debootstrap"
codename=$(sed -n 's/^VERSION_CODENAME=//p' /etc/os-release)
# shellcheck disable=SC2016 # they are apt's
mirror=$(apt-get indextargets --format '$(ORIGIN)|$(CODENAME)|$(REPO_URI)' 'Created-By: Packages' |
	sed -n "s/^Debian|$codename|//p" | head -1)
[ -n "$mirror" ] || skip "apt has no package source of Debian here"
system=$tmp/system

step "debootstrap of $codename"
debootstrap --variant=minbase --include=systemd,systemd-sysv "$codename" "$system" "$mirror" >"$tmp/log" 2>&1 ||
	fail "debootstrap: $(tail -5 "$tmp/log")"
cp "$deb" "$system/root/"
deb=/root/${deb##*/}
mount --bind /dev "$system/dev"
mount -t proc proc "$system/proc"
inside() {
	timeout 300 chroot "$system" env DEBIAN_FRONTEND=noninteractive LC_ALL=C PATH=/usr/sbin:/usr/bin:/sbin:/bin "$@"
}
listing() {
	(cd "$system" && find . -xdev \( -path ./proc -o -path ./dev -o -path ./run -o -path ./tmp -o -path ./sys \
		-o -path ./var/cache -o -path ./var/log -o -path ./var/lib/apt -o -path ./var/lib/dpkg \
		-o -path ./etc/ld.so.cache \) -prune -o -type d -printf '%p d %m %u\n' \
		-o -printf '%p %y %m %u %s\n' | sort)
}

step "apt-get install"
{
	inside apt-get update
	inside apt-get satisfy -y --no-install-recommends "$(dpkg-deb -f "$tmp/out/"*.deb Depends)"
} >"$tmp/log" 2>&1 || fail "apt-get: $(tail -5 "$tmp/log")"
mkdir "$system/srv/images" "$system/srv/live" "$system/srv/fleece"
cp "$tmp/ref" "$system/srv/images/a.img"
cp "$tmp/ref" "$system/root/ref"
listing >"$tmp/before"
inside apt-get install -y "$deb" >"$tmp/log" 2>&1 || fail "apt-get: $(tail -5 "$tmp/log")"

step "mount, snapshot, read, drop, unmount"
use() {
	inside mkdir /srv/live/snapshots/x
	inside dd if=/dev/urandom of=/srv/live/a.img bs=10k count=3 seek=$RANDOM conv=notrunc status=none
	inside fleecectl list /srv/fleece | grep -q '^x '
	inside cmp -n 1048576 /srv/live/snapshots/x/a.img /root/ref
	inside rmdir /srv/live/snapshots/x
	cp "$tmp/ref" "$system/srv/live/a.img"
}
inside fleecefs /srv/images /srv/live --fleece-dir=/srv/fleece
use
inside umount /srv/live
inside mount -t fleecefs /srv/images /srv/live -o fleece-dir=/srv/fleece,allow_other
use
inside apt-get install -y --reinstall "$deb" >"$tmp/log" 2>&1 || fail "apt-get: $(tail -5 "$tmp/log")"
use # an upgrade leaves it as it is
! inside apt-get purge -y fleecefs >"$tmp/log" 2>&1 || fail "removed under a mount"
grep -q 'still mounted' "$tmp/log" || fail "$(tail -5 "$tmp/log")"
inside umount /srv/live

step "purge leaves nothing"
inside apt-get purge -y fleecefs >"$tmp/log" 2>&1 || fail "apt-get: $(tail -5 "$tmp/log")"
rm -rf "$system/srv/fleece/".[!.]*
listing >"$tmp/after"
diff "$tmp/before" "$tmp/after" || fail "purge leaves something behind"

step "as a service of systemd, in a container"
command -v systemd-nspawn >/dev/null || skip "the rest needs systemd-nspawn"
inside apt-get install -y "$deb" >"$tmp/log" 2>&1 || fail "apt-get: $(tail -5 "$tmp/log")"
umount "$system/proc" "$system/dev"
install -m 755 "$here/deb_service.sh" "$system/root/check"
cp "$repository/scripts/system/logcheck" "$system/root/logcheck"
cat >"$system/etc/systemd/system/check.service" <<EOT
[Service]
ExecStart=/root/check
StandardOutput=append:/root/output
StandardError=inherit
ExecStopPost=/usr/bin/systemctl --no-block start poweroff.target
EOT
mkdir -p "$system/etc/systemd/system/multi-user.target.wants"
ln -s ../check.service "$system/etc/systemd/system/multi-user.target.wants/"
timeout 120 systemd-nspawn -q -D "$system" --register=no --keep-unit --bind=/dev/fuse -b </dev/null \
	>"$tmp/log" 2>&1 || true
[ -f "$system/root/output" ] || skip "no container can be booted here: $(tail -3 "$tmp/log")"
cat "$system/root/output"
[ "$(tail -1 "$system/root/output")" = passed ] || fail "the service does not work"
