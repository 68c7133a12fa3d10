#!/bin/bash
# fleece-qmp and fleece-backup with a real guest, whose disks lie on SOURCE itself: they are moved onto a mount while it
# writes, frozen, copied and moved back; its filesystem is frozen by the real guest agent. --long: killed
# at every step.
# shellcheck source=tests/e2e/lib.sh
. "$(dirname "$0")/lib.sh"

for program in qemu-system-x86_64 qemu-img cpio gcc debugfs; do
	command -v $program >/dev/null || skip "needs $program"
done

step "fetch a kernel and the guest agent"
mkdir "$tmp/packages" "$tmp/root"
kernel=$(apt-cache depends linux-image-cloud-amd64 2>/dev/null | awk '/Depends: linux-image/ { print $2; exit }')
[ -n "$kernel" ] || skip "apt knows no linux-image-cloud-amd64"
(cd "$tmp/packages" && apt-get download -qq "$kernel" qemu-guest-agent 2>"$tmp/apt.log") ||
	skip "apt-get download: $(tail -1 "$tmp/apt.log")"
for deb in "$tmp/packages"/*.deb; do
	dpkg -x "$deb" "$tmp/root"
done
gcc -static -O1 -Wall -Werror -o "$tmp/init" "$here/qmp_guest.c" || skip "needs a compiler and libc.a"

python3 "$here/qmp.py" "$fleecefs" "$tmp" "$tmp/root" "$tmp/root" "$tmp/init" "${@:2}"
