#!/bin/bash
# Guests' disks decoded: snapshots/NAME/.raw, against what qemu-img makes of the same images.
# shellcheck source=tests/e2e/lib.sh
. "$(dirname "$0")/lib.sh"

snaps=$mnt/snapshots
want=$tmp/want
mkdir "$want" "$src/vm" "$src/base" "$src/bad" "$src/empty" "$tmp/files" "$tmp/view"

img() {
	qemu-img "$@" >/dev/null
}
io() {
	local image=$1 c args=()
	shift
	for c; do args+=(-c "$c"); done
	qemu-io -f qcow2 "${args[@]}" "$image" >/dev/null
}
# Takes the format of the backing file out of an image: it becomes an extension that nobody knows.
unsay() {
	[ "$(od -An -tx4 --endian=big -j112 -N4 "$1")" = " e2792aca" ] || fail "$1: no such extension"
	printf '\1\2\3\4' | dd of="$1" bs=1 seek=112 conv=notrunc status=none
}

step "images of many kinds"
cp -r /etc/. "$tmp/files/" 2>/dev/null || true
head -c 3000000 /dev/urandom >"$tmp/files/noise"
truncate -s 24M "$tmp/guest.img"
mkfs.ext4 -q -F -d "$tmp/files" "$tmp/guest.img"
cp --sparse=always "$tmp/guest.img" "$src/base/guest.img" # so that holes are holes, cached or not
cd "$src/vm"
img convert -f raw -O qcow2 -c ../base/guest.img ../base/packed.qcow2
img convert -f raw -O qcow2 -c -o compression_type=zstd ../base/guest.img zstd.qcow2
img convert -f raw -O qcow2 -o compat=0.10,cluster_size=4k ../base/guest.img old
img convert -f raw -O qcow2 -o extended_l2=on ../base/guest.img subclusters.img
img convert -f raw -O qcow2 -o data_file=../vm/data.bin ../base/guest.img external.qcow2
img create -f qcow2 -F raw -b ../base/guest.img over-raw.qcow2 25M
img create -f qcow2 -F qcow2 -b ../base/packed.qcow2 -o cluster_size=2M over-packed.qcow2
img create -f qcow2 -F qcow2 -b over-packed.qcow2 -o extended_l2=on top.qcow2
img create -f qcow2 -F raw -b "$src/base/guest.img" absolute.qcow2
img create -f qcow2 -u -F raw -b "$mnt/base/guest.img" by-mount.qcow2 24M
img create -f qcow2 -F raw -b "json:{\"file\":{\"driver\":\"file\",\"filename\":\"$src/base/guest.img\"}}" json.qcow2
ln -s ../base/packed.qcow2 link
img create -f qcow2 -F qcow2 -b link by-link.qcow2
img create -f qcow2 -u -F qcow2 -b ../base/packed.qcow2 no-format.qcow2 24M
unsay no-format.qcow2
img create -f qcow2 -o preallocation=metadata metadata.qcow2 100M
img create -f qcow2 huge.qcow2 8T
for i in zstd.qcow2 old subclusters.img external.qcow2 over-raw.qcow2 over-packed.qcow2 top.qcow2 metadata.qcow2; do
	io $i 'write -P 7 16000k 300k' 'write -P 8 18000k 3k'
	case $i in old) ;; *) io $i 'write -z 16200k 100k' 'discard 20M 1M' ;; esac
done
io huge.qcow2 'write -P 9 7T 64k' 'write -P 3 1G 1M'
cd "$tmp"
good=()
for i in "$src"/vm/*; do
	name=${i##*/}
	case $name in link | data.bin | huge.qcow2) continue ;; esac
	target=$i
	if [ "$name" = by-mount.qcow2 ]; then # QEMU sees what the name means once it is mounted
		cp "$i" "$src/vm/x"
		img rebase -u -F raw -b ../base/guest.img "$src/vm/x"
		target=$src/vm/x
	fi
	(cd "$src/vm" && qemu-img convert -f qcow2 -O raw "$target" "$want/$name") # its data file is named from here
	rm -f "$src/vm/x"
	good+=("$name")
done
[ ${#good[@]} -ge 13 ] || fail "only ${#good[@]} images"

sync -f "$src"

step "images that must not be read"
cd "$src/bad"
img create -f qcow2 -b /etc/passwd -F raw outside.qcow2
img create -f qcow2 -u -b ../../base/guest.img -F raw above.qcow2 1M
img create -f qcow2 -u -b gone.img -F raw missing.qcow2 1M
img create -f qcow2 -u -b two.qcow2 -F qcow2 one.qcow2 1M
img create -f qcow2 -u -b one.qcow2 -F qcow2 two.qcow2 1M
img create -f qcow2 -u -b nbd://localhost/x -F raw nbd.qcow2 1M
img create -f vmdk disk.vmdk 1M
img create -f qcow2 -u -b disk.vmdk -F vmdk vmdk.qcow2 1M
img create -f qcow2 -u -b disk.vmdk -F vmdk vmdk-unsaid.qcow2 1M
unsay vmdk-unsaid.qcow2
# LUKS measures the processor first, which fails now and then when others are busy
tries=0
until img create --object secret,id=s,data=x -f qcow2 \
	-o encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10 luks.qcow2 1M; do
	tries=$((tries + 1))
	[ $tries -lt 50 ] || fail "qemu-img makes no LUKS image"
done
img create -f qcow2 aes.qcow2 1M
printf '\1' | dd of=aes.qcow2 bs=1 seek=35 conv=notrunc status=none
img create -f qcow2 newer.qcow2 1M
printf '\200' | dd of=newer.qcow2 bs=1 seek=79 conv=notrunc status=none
img convert -f raw -O qcow2 "$tmp/files/noise" cut.qcow2
truncate -s 1M cut.qcow2
{ printf 'QFI\373\0\0\0\3' && head -c 500 /dev/zero; } >header
img create -f qcow old.qcow 1M
printf 'QFI\373' >magic
ln -s one.qcow2 symlink
cd "$tmp"

step "what .raw shows"
mount_fg -o allow_other
mkdir "$snaps/s"
raw=$snaps/s/.raw
[ "$(ls -A "$snaps/s")" = "$(printf '%s\n' bad base empty vm)" ] || fail "listed: $(ls -A "$snaps/s")"
[ "$(ls -A "$raw")" = "$(printf '%s\n' bad base empty vm)" ] || fail ".raw: $(ls -A "$raw")"
[ "$(ls -A "$raw/base")" = packed.qcow2 ] || fail ".raw/base: $(ls -A "$raw/base")"
[ -z "$(ls -A "$raw/empty")" ] || fail ".raw/empty: $(ls -A "$raw/empty")"
printf '%s\n' "${good[@]}" huge.qcow2 | sort | diff - <(ls -A "$raw/vm") || fail "not these in .raw/vm"
for i in base/guest.img vm/link vm/data.bin bad/old.qcow bad/magic bad/symlink bad/disk.vmdk none; do
	[ ! -e "$raw/$i" ] || fail ".raw/$i is there"
done
for i in "$raw/vm/.raw" "$raw/.raw" "$snaps/s/vm/.raw" "$mnt/.raw"; do
	[ ! -e "$i" ] || fail "$i is there"
done
if : 2>/dev/null >"$raw/vm/old"; then fail "written to"; fi
if mkdir "$raw/x" 2>/dev/null; then fail "mkdir in .raw"; fi

step "each reads as QEMU reads it; sizes, times, holes"
cat >"$tmp/holes.py" <<'PY'
import errno, os, sys
for path in sys.argv[1:]:
    fd = os.open(path, os.O_RDONLY)
    st, at, data = os.fstat(fd), 0, 0
    while at < st.st_size:
        try:
            begin = os.lseek(fd, at, os.SEEK_DATA)
        except OSError as e:
            assert e.errno == errno.ENXIO, e
            begin = st.st_size
        hole = at
        while hole < begin and hole - at < 1 << 26:
            piece = os.pread(fd, min(1 << 20, begin - hole), hole)
            assert piece and not piece.strip(b"\0"), f"{path}: {hole} is no hole"
            hole += len(piece)
        if begin == st.st_size:
            break
        at = os.lseek(fd, begin, os.SEEK_HOLE)
        assert at > begin
        data += at - begin
    # They were counted before. Of an unwritten extent the filesystem says one thing while its pages
    # are in memory and another when they are not any more.
    blocks = (data + 511) // 512
    assert abs(st.st_blocks - blocks) <= 64, f"{path}: {st.st_blocks} blocks, {blocks} of data"
    assert st.st_nlink == 1
    print(path.rsplit("/", 1)[1], st.st_size, data)
PY
compare() {
	local i
	for i in "${good[@]}"; do
		cmp "$want/$i" "$1/vm/$i" || fail "$i"
	done
}
compare "$raw"
python3 "$tmp/holes.py" "${good[@]/#/$raw/vm/}" "$raw/vm/huge.qcow2" >"$tmp/holes"
grep -q '^huge.qcow2 8796093022208 1114112$' "$tmp/holes" || fail "huge: $(grep huge "$tmp/holes")"
grep -Eq '^metadata.qcow2 104857600 [0-9]{6}$' "$tmp/holes" || fail "metadata: $(grep metadata "$tmp/holes")"
for i in "${good[@]}"; do
	[ "$(stat -c '%Y %a %u %g' "$raw/vm/$i")" = "$(stat -c '%Y %a %u %g' "$snaps/s/vm/$i")" ] || fail "$i: attributes"
	[ "$(stat -c %i "$raw/vm/$i")" != "$(stat -c %i "$snaps/s/vm/$i")" ] || fail "$i: inode number"
done
[ "$(stat -c %i "$raw"/*/* "$raw" | sort -u | wc -l)" = "$(stat -c %i "$raw"/*/* "$raw" | wc -l)" ] ||
	fail "inode numbers twice"
dd if="$raw/vm/huge.qcow2" bs=64k skip=$((7 << 24)) count=1 status=none | tr -d '\11' | wc -c | grep -qx 0
dd if="$raw/vm/top.qcow2" bs=4097 skip=3 count=1000 status=none | cmp -n 4097000 - \
	<(dd if="$want/top.qcow2" bs=4097 skip=3 count=1000 status=none) || fail "pieces"
dd if="$raw/vm/zstd.qcow2" bs=64k iflag=direct status=none | cmp - "$want/zstd.qcow2" || fail "direct"

step "while guests write to the images"
(
	for n in $(seq 25); do
		for i in top.qcow2 zstd.qcow2 over-raw.qcow2; do
			io "$mnt/vm/$i" "write -P $n $((n * 700))k 300k" "discard $((n * 900))k 64k" "write -P 1 15M 2M"
		done
	done
) &
writer=$!
children+=("$writer")
wait_for 30 test "$src/vm/top.qcow2" -nt "$want/top.qcow2"
compare "$raw"
kill -0 "$writer" 2>/dev/null || fail "the writer ended too early to prove anything"
wait "$writer"
dd if=/dev/urandom of="$mnt/base/guest.img" bs=1M count=8 conv=notrunc status=none
forget "${good[@]/#/$raw/vm/}"
compare "$raw"

step "a file of a guest, by mount"
if mount -o loop,ro,noload "$raw/vm/by-link.qcow2" "$tmp/view" 2>"$tmp/err"; then
	cmp "$tmp/files/noise" "$tmp/view/noise"
	if rmdir "$snaps/s" 2>/dev/null; then fail "dropped under a mount"; fi
	umount "$tmp/view"
else
	echo "no loop device: $(cat "$tmp/err")"
fi

step "what must not be read is not, and the log says why"
refused() { # FILE ERRNO-TEXT LOG-TEXT
	local status=0
	: >"$tmp/log"
	cat "$raw/bad/$1" >"$tmp/out" 2>"$tmp/err" || status=$?
	[ $status != 0 ] || fail "$1 is read"
	[ ! -s "$tmp/out" ] || fail "$1 gives bytes"
	grep -q "$2" "$tmp/err" || fail "$1: $(cat "$tmp/err"), not: $2"
	grep -q "bad/$1: .*$3" "$tmp/log" || fail "$1: the log says $(cat "$tmp/log"), not: $3"
	[ "$(stat -c %s "$raw/bad/$1")" -gt 0 ] || fail "$1 looks empty"
	[ "$(stat -c %b "$raw/bad/$1")" -gt 0 ] || fail "$1 looks like a hole"
}
eio='Input/output error' enotsup='Operation not supported'
refused outside.qcow2 "$eio" 'outside of the directory'
refused above.qcow2 "$eio" 'outside of the directory'
refused missing.qcow2 "$eio" 'gone.img.*not in the snapshot'
refused nbd.qcow2 "$enotsup" protocol
refused vmdk.qcow2 "$enotsup" 'format "vmdk"'
refused vmdk-unsaid.qcow2 "$enotsup" 'may be of the format VMDK'
refused luks.qcow2 "$enotsup" 'encrypted (LUKS)'
refused aes.qcow2 "$enotsup" 'encrypted (AES)'
refused newer.qcow2 "$enotsup" 'number 7'
refused header "$eio" 'impossible size'
for i in one two; do
	if cat "$raw/bad/$i.qcow2" 2>/dev/null; then fail "$i: a loop is read"; fi
done
grep -q 'lead back to themselves' "$tmp/log" || fail "of the loop the log says $(cat "$tmp/log")"
# of one that was cut, the first part is right and the rest an error
if dd if="$raw/bad/cut.qcow2" of="$tmp/out" bs=64k 2>"$tmp/err"; then fail "cut.qcow2 is read"; fi
grep -q "$eio" "$tmp/err" || fail "cut.qcow2: $(cat "$tmp/err")"
size=$(stat -c %s "$tmp/out")
[ "$size" -gt 0 ] || fail "cut.qcow2: not a byte"
cmp -n "$size" "$tmp/out" "$tmp/files/noise" || fail "cut.qcow2: $size bytes"

step "who may read what"
as_user() {
	setpriv --reuid=12345 --regid=12345 --clear-groups "$@"
}
try() { # EXPECTED: 0 or 1
	local status=0
	as_user cmp -n 100000 "$want/over-packed.qcow2" "$snaps/$1/.raw/vm/over-packed.qcow2" 2>"$tmp/err" || status=1
	[ $status = "$2" ] || fail "$1: $(cat "$tmp/err" "$tmp/log")"
	[ $status = 0 ] || grep -q 'Permission denied' "$tmp/err" || fail "$1: $(cat "$tmp/err")"
}
chmod 755 "$tmp" "$want"
try s 0
chmod 600 "$mnt/base/packed.qcow2"
mkdir "$snaps/mode"
chmod 644 "$mnt/base/packed.qcow2"
chmod 711 "$mnt/base"
mkdir "$snaps/look"
chmod 700 "$mnt/base"
mkdir "$snaps/closed"
chmod 755 "$mnt/base"
chown 12345 "$mnt/base/packed.qcow2"
chmod 400 "$mnt/base/packed.qcow2"
mkdir "$snaps/own"
try mode 1
try look 0
try closed 1
try own 0
chown 0:12345 "$mnt/base/packed.qcow2"
chmod 640 "$mnt/base/packed.qcow2"
mkdir "$snaps/group"
try group 0
if setfacl -m u:12345:--- "$mnt/base/packed.qcow2" 2>/dev/null; then
	mkdir "$snaps/acl"
	try acl 1
	rmdir "$snaps/acl"
fi
cmp "$snaps/mode/.raw/vm/over-packed.qcow2" "$want/over-packed.qcow2" || fail "root may not"
rmdir "$snaps"/{mode,look,closed,own,group}

step "an open one keeps its snapshot; numbers come back with the name"
numbers=$(cd "$raw" && stat -c '%i %n' . ./*/*)
exec 5<"$raw/vm/top.qcow2"
if rmdir "$snaps/s" 2>/dev/null; then fail "dropped though open"; fi
cmp -n 1000000 "$want/top.qcow2" /dev/fd/5 || fail "after a drop that failed"
exec 5<&-
umount_fs
mount_fg -o allow_other
compare "$raw"
rmdir "$snaps/s"
[ ! -e "$raw" ] || fail "dropped, and there"
mkdir "$snaps/s"
[ "$(cd "$raw" && stat -c '%i %n' . ./*/*)" = "$numbers" ] || fail "other inode numbers"
qemu-img compare -q -f raw -F qcow2 "$raw/vm/top.qcow2" "$mnt/vm/top.qcow2" || fail "the new snapshot"
tar -C "$raw" -cSf - vm/old vm/top.qcow2 | tar -C "$tmp" -xSf -
cmp "$tmp/vm/top.qcow2" "$raw/vm/top.qcow2"
rmdir "$snaps/s"

step "an image of exabytes, made of a few tables: no look at it lasts for long, nor keeps others waiting"
umount_fs
cat >"$tmp/endless.py" <<'PY'
import os, struct, sys, time
MIB, HALF = 1 << 20, 1 << 57
if sys.argv[1] == "make": # 2^19 entries in L1: the first half leads to a table of zeros, the rest to one of data
    with open(sys.argv[2], "wb") as f:
        f.write(struct.pack(">4sIQIIQIIQQIIQQQQII", b"QFI\xfb", 3, 0, 0, 21, 2 * HALF, 0, 1 << 19, 2 * MIB, 0, 0, 0, 0,
                            0, 0, 0, 4, 104))
        f.seek(2 * MIB)
        f.write(struct.pack(">Q", 6 * MIB) * (1 << 18) + struct.pack(">Q", 8 * MIB) * (1 << 18))
        f.write(struct.pack(">Q", 1) * (1 << 18) + struct.pack(">Q", 10 * MIB) * (1 << 18) + b"x" * (2 * MIB))
    sys.exit()
at, begin = {"zeros": 0, "data": HALF, "blocks": 0}[sys.argv[1]] + 5, time.monotonic()
fd = os.open(sys.argv[2], os.O_RDONLY)
if sys.argv[1] == "blocks":
    blocks = os.fstat(fd).st_blocks
    assert HALF // 512 < blocks <= 2 * HALF // 512, blocks
elif sys.argv[1] == "zeros":
    found = os.lseek(fd, at, os.SEEK_DATA)
    assert at < found <= HALF, found
    assert os.pread(fd, 10, found) == bytes(10)
else:
    found = os.lseek(fd, at, os.SEEK_HOLE)
    assert found == 2 * HALF, found
    assert os.pread(fd, 10, at) == b"x" * 10
took = time.monotonic() - begin
assert took < 20, took
print(f"{sys.argv[1]}: {took:.1f} s")
PY
for i in zeros data blocks; do # the kernel lets one at a time look at a file
	python3 "$tmp/endless.py" make "$src/bad/$i.qcow2"
done
mount_fg -s
mkdir "$snaps/s"
looks=()
for i in zeros data blocks; do
	python3 "$tmp/endless.py" $i "$raw/bad/$i.qcow2" &
	looks+=($!)
	children+=($!)
done
sleep 1
timeout 3 dd if=/dev/zero of="$mnt/bad/magic" bs=4k count=1 status=none || fail "a guest waits for who looks"
kill -0 "${looks[@]}" || fail "they ended too early to prove anything"
for i in "${looks[@]}"; do
	wait "$i" || fail "not as it should be"
done
rmdir "$snaps/s"

step "names that begin as SOURCE and MOUNTPOINT were given, by symlinks"
umount_fs
ln -s "$src" "$tmp/named"
ln -s "$mnt" "$tmp/seen"
img create -f qcow2 -u -F raw -b "$tmp/named/base/guest.img" "$src/vm/by-named.qcow2" 24M
img create -f qcow2 -u -F raw -b "$tmp/seen/base/guest.img" "$src/vm/by-seen.qcow2" 24M
img create -f qcow2 -u -F raw -b "$tmp/names/base/guest.img" "$src/bad/not-named.qcow2" 24M
cp "$src/base/guest.img" "$tmp/guest.now"
timeout 60 "$fleecefs" "$tmp/named" "$tmp/seen" --fleece-dir="$fleece" </dev/null >/dev/null
mkdir "$snaps/s"
cmp "$raw/vm/by-named.qcow2" "$tmp/guest.now"
cmp "$raw/vm/by-seen.qcow2" "$tmp/guest.now"
if cat "$raw/bad/not-named.qcow2" >/dev/null 2>&1; then fail "a name like SOURCE's is taken for it"; fi
rmdir "$snaps/s"
umount_fs "$tmp/seen"
mount_fg -o allow_other

step "a .raw of SOURCE itself is what is shown"
mkdir "$mnt/.raw"
echo mine >"$mnt/.raw/file"
mkdir "$snaps/s"
[ "$(cat "$raw/file")" = mine ] || fail "hidden by ours"
rmdir "$snaps/s"
umount_fs
