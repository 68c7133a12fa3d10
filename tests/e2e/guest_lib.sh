# shellcheck shell=bash
# shellcheck disable=SC2154 # it is lib.sh's
# For tests with the guest of guest.py: its kernel and busybox, in $tmp/root.

command -v qemu-system-x86_64 >/dev/null || skip "needs qemu-system-x86_64"
command -v cpio >/dev/null || skip "needs cpio"

step "fetch a kernel and a static busybox"
packages=$tmp/packages
mkdir "$packages" "$tmp/root"
kernel=$(apt-cache depends linux-image-cloud-amd64 2>/dev/null | awk '/Depends: linux-image/ { print $2; exit }')
[ -n "$kernel" ] || skip "apt knows no linux-image-cloud-amd64"
(cd "$packages" && apt-get download -qq "$kernel" busybox-static 2>"$tmp/apt.log") ||
	skip "apt-get download: $(tail -1 "$tmp/apt.log")"
for deb in "$packages"/*.deb; do
	dpkg -x "$deb" "$tmp/root"
done
