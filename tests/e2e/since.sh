#!/bin/bash
# snapshots/NEW/.since/OLD/: the README's example; names, rights and holds; what a copy costs; images
# that QEMU rebases and commits and libqcow reads; what cannot be known is an error; and a random
# life of disks.
#
#   since.sh FLEECEFS [SEED [NIGHTS]]
# shellcheck source=tests/e2e/lib.sh
. "$(dirname "$0")/lib.sh"

for tool in qemu-img rsync python3 xxhsum setfacl; do
	command -v $tool >/dev/null || skip "needs $tool"
done
snaps=$mnt/snapshots
seed=${2:-$RANDOM$RANDOM}
nights=${3:-5}

# Writes $3 random bytes at $2 of the file $1.
scratch() {
	head -c "$3" /dev/urandom | dd of="$1" bs=64k seek="$2" oflag=seek_bytes conv=notrunc status=none
}

# The image $1 reads as the file $2, whose size is a multiple of 512.
reads_as() {
	qemu-img check -q -f qcow2 "$1" || fail "qemu-img check $1"
	qemu-img compare -q -f qcow2 -F raw "$1" "$2" || fail "$1 does not read as $2"
}

# The member $2 of the snapshot $1 in status.json.
status() {
	python3 -c 'import json, sys
print(next(s[sys.argv[3]] for s in json.load(open(sys.argv[1]))["snapshots"] if s["name"] == sys.argv[2]))' \
		"$mnt/.fleecefs/status.json" "$1" "$2"
}

step "the README's example"
mkdir "$tmp/backup" "$tmp/restore"
head -c 3M /dev/urandom >"$src/vm1.img"
truncate -s 40M "$src/vm1.img"
head -c 1M /dev/urandom >"$src/vm2.img"
mount_fs
sed -n '/^# Tuesday/q;p' <(recipe /backup/mon) >"$tmp/monday"
sed -n '/^# Tuesday/,$p' <(recipe /backup/mon) >"$tmp/tuesday"
bash -euo pipefail "$tmp/monday"
cp "$snaps/mon/vm1.img" "$tmp/monday.img"
scratch "$mnt/vm1.img" 1000000 5000
scratch "$mnt/vm1.img" 30000000 100
fallocate -p -o 65536 -l 65536 "$mnt/vm1.img"
bash -euo pipefail "$tmp/tuesday" || fail "the README's example"
cmp "$mnt/vm1.img" "$tmp/restore/vm1.img"
cmp "$mnt/vm2.img" "$tmp/restore/vm2.img"
reads_as "$tmp/backup/mon/vm1.img.qcow2" "$tmp/monday.img"
[ "$(stat -c %s "$tmp/backup/tue/vm1.img.qcow2")" -lt 65536 ] || fail "an increment of $(stat -c %s "$tmp/backup/tue/vm1.img.qcow2") bytes"
[ "$(stat -c %y "$tmp/backup/tue/vm1.img.qcow2")" = "$(stat -c %y "$snaps/tue/.since/-/vm2.img.qcow2")" ] || fail "its time"

step "rebase makes an increment a full image, commit puts it into the older one"
cp -r "$tmp/backup" "$tmp/rebased"
qemu-img rebase -q -f qcow2 -b "" "$tmp/rebased/tue/vm1.img.qcow2"
rm "$tmp/rebased/mon/vm1.img.qcow2"
reads_as "$tmp/rebased/tue/vm1.img.qcow2" "$mnt/vm1.img"
qemu-img commit -q "$tmp/backup/tue/vm1.img.qcow2"
reads_as "$tmp/backup/mon/vm1.img.qcow2" "$mnt/vm1.img"

step "a full image is read right by libqcow, too"
if gcc -O1 -o "$tmp/qcow_read" "$here/qcow_read.c" -lqcow 2>"$tmp/err"; then
	cp "$snaps/tue/.since/-/vm1.img.qcow2" "$tmp/full.qcow2"
	"$tmp/qcow_read" "$tmp/full.qcow2" | cmp - "$snaps/tue/vm1.img"
	[ "$(stat -c %s "$tmp/full.qcow2")" -lt 4000000 ] || fail "holes are not left out"
else
	echo "no compiler: $(tail -1 "$tmp/err")"
fi

step "found, not listed, and read only; names that clash"
mkdir -p "$mnt/dir.qcow2" "$mnt/x/changes.json"
for name in dir both both.qcow2 x/plain x/$'odd\n "name' "x/$(printf 'l%.0s' {1..250})" .since.img; do
	printf '%s' "content of $name" >"$mnt/$name"
done
mkdir "$snaps/wed"
# a disk and a directory that have the name of the image of the one with the long name
image=$(basename "$snaps"/wed/.since/-/x/lll*)
rmdir "$snaps/wed"
printf '%s' "content of ${image%.qcow2}" >"$mnt/x/${image%.qcow2}"
mkdir "$mnt/x/$image" "$snaps/wed"
since=$snaps/wed/.since/tue
[ -z "$(ls -A "$snaps/wed/.since")" ] || fail ".since lists something"
[ -z "$(find "$snaps/wed" -name .since)" ] || fail ".since is listed"
(cd "$since" && find . -type f | sort) >"$tmp/names"
for name in vm1.img.qcow2 dir.qcow2.qcow2 both.qcow2 both.qcow2.qcow2 x/plain.qcow2 .since.img.qcow2; do
	grep -qxF "./$name" "$tmp/names" || fail "$name is not listed: $(cat "$tmp/names")"
done
[ "$(find "$since" -type f | wc -l)" = "$(find "$snaps/wed" -type f | wc -l)" ] || fail "not an image for each file"
find "$since" -type f -exec cat {} + >/dev/null
[ "$(find "$since/x" -name 'lll*' -type f | wc -l)" = 2 ] || fail "long names: $(ls "$since/x")"
for path in "$snaps"/wed/x/lll*; do
	[ -f "$path" ] || continue
	grep -aqF "content of ${path##*/x/}" "$since"/x/lll*.qcow2 || grep -aqF "content of x/${path##*/x/}" "$since"/x/lll*.qcow2 || fail "no image of $path"
done
qemu-img convert -O raw "$since/dir.qcow2.qcow2" "$tmp/raw" && grep -q 'content of dir' "$tmp/raw"
qemu-img convert -O raw "$since/both.qcow2" "$tmp/raw" && grep -q 'content of both' "$tmp/raw"
qemu-img convert -O raw "$since/both.qcow2.qcow2" "$tmp/raw" && grep -q 'content of both.qcow2' "$tmp/raw"
python3 - "$since/changes.json" "$snaps/wed" <<'EOF'
import json, os, sys
said = json.load(open(sys.argv[1]))
paths = {d["path"]: d for d in said["disks"]}
assert paths["x/odd\n \"name"]["new"] and not paths["vm1.img"]["new"], paths
assert paths["vm1.img"]["ranges"] == [], paths["vm1.img"]
assert len(paths) == sum(len(f) for _, _, f in os.walk(sys.argv[2]))
assert paths["both.qcow2"]["ranges"] == [{"offset": 0, "length": 21, "zero": False}], paths["both.qcow2"]
EOF
cmp "$since/x/plain" "$mnt/x/plain"
for path in nothing .since/none .since/wed .since/../.since/tue/nothing; do
	[ ! -e "$snaps/wed/$path" ] || fail "there is a $path"
done
[ ! -e "$snaps/tue/.since/wed" ] || fail "an older snapshot compares with a newer one"
for command in "touch $since/vm1.img.qcow2" "rm $since/vm1.img.qcow2" "mkdir $since/new" "rmdir $snaps/wed/.since" "mv $since/x $since/y" "truncate -s 0 $since/vm1.img"; do
	$command 2>"$tmp/err" && fail "$command"
	grep -q 'Read-only' "$tmp/err" || fail "$command: $(cat "$tmp/err")"
done
find "$mnt" "$since" "$snaps/wed/.since/-" "$snaps/wed/.since/" "$since/vm1.img" "$since/changes.json" -printf '%20i %p\0' |
	sort -z | uniq -z -w 20 -D | tr '\0' '\n' >"$tmp/twice"
[ ! -s "$tmp/twice" ] || fail "two of a number: $(cat "$tmp/twice")"

python3 - "$since" <<'EOF'
import os, sys
for path, _, _ in os.walk(sys.argv[1]):
    for e in os.scandir(path):
        assert e.inode() == os.lstat(e.path).st_ino, e.path
EOF

step "who may not read the disk may not read what is made of it"
chmod 640 "$mnt/vm1.img"
setfacl -m u:65533:r,g::- "$mnt/vm1.img"
chmod 755 "$tmp"
umount_fs
mount_fs -o allow_other
mkdir "$snaps/thu"
since=$snaps/thu/.since/wed
as() {
	setpriv --reuid "$1" --regid "$2" --clear-groups cat "$3" >/dev/null 2>&1
}
for file in "$snaps/thu/vm1.img" "$since/vm1.img.qcow2" "$since/vm1.img" "$snaps/thu/.since/-/vm1.img.qcow2"; do
	as 65533 65533 "$file" || fail "$file: the list lets 65533 in"
	! as 65534 65534 "$file" || fail "$file: for all to read"
	! as 65534 0 "$file" || fail "$file: the list keeps its group out"
done
for file in "$since/changes.json" "$snaps/thu/.xxh128"; do
	! as 65534 65534 "$file" || fail "$file: for all to read"
done

step "an open one keeps both snapshots; names follow a renamed one, not a new one"
# shellcheck disable=SC2217 # it holds the file open
sleep 60 <"$since/vm1.img.qcow2" &
reader=$!
children+=("$reader")
sleep 0.3
! rmdir "$snaps/wed" 2>/dev/null || fail "the older snapshot is dropped under a reader"
! rmdir "$snaps/thu" 2>/dev/null || fail "the newer snapshot is dropped under a reader"
kill "$reader"
backing() {
	qemu-img info -U --output=json "$1" | python3 -c 'import json, sys; print(json.load(sys.stdin).get("backing-filename"))'
}
[ "$(backing "$since/vm1.img.qcow2")" = ../wed/vm1.img.qcow2 ] || fail "backing: $(backing "$since/vm1.img.qcow2")"
mv "$snaps/wed" "$snaps/mittwoch"
[ ! -e "$since" ] || fail "the old name is still there"
since=$snaps/thu/.since/mittwoch
[ "$(backing "$since/x/plain.qcow2")" = ../../mittwoch/x/plain.qcow2 ] || fail "backing: $(backing "$since/x/plain.qcow2")"
mv "$mnt/x/plain" "$mnt/moved"
rm "$mnt/dir"
scratch "$mnt/vm1.img" 0 10
mkdir "$snaps/fri"
[ "$(backing "$snaps/fri/.since/thu/moved.qcow2")" = ../thu/x/plain.qcow2 ] || fail "a moved disk is not followed"
old_path() {
	getfattr --only-values --absolute-names -n user.fleecefs.old_path "$1"
}
[ "$(old_path "$snaps/fri/.since/thu/moved.qcow2")" = x/plain ] || fail "the old path of a moved disk"
[ "$(old_path "$snaps/fri/.since/thu/vm1.img.qcow2")" = vm1.img ] || fail "the old path of a disk"
! old_path "$snaps/fri/.since/-/vm1.img.qcow2" 2>/dev/null || fail "a full image has an old path"
python3 - "$snaps/fri/.since/thu/changes.json" <<'EOF'
import json, sys
said = json.load(open(sys.argv[1]))
moved = next(d for d in said["disks"] if d["path"] == "moved")
assert moved["renamed_from"] == "x/plain" and not moved["new"] and not moved["ranges"], moved
assert said["deleted"] == [{"path": "dir"}], said["deleted"]
EOF
cat "$since/vm1.img.qcow2" >"$tmp/thu1"
rmdir "$snaps/mittwoch"
mkdir "$snaps/mittwoch"
[ ! -e "$since/vm1.img.qcow2" ] || fail "an older snapshot of that name is no more"
scratch "$mnt/vm1.img" 500000 10
mkdir "$snaps/sat"
! cmp -s "$snaps/sat/.since/thu/vm1.img" "$snaps/sat/.since/fri/vm1.img" || fail "the same changes since two"
rmdir "$snaps/mittwoch"

step "what did not change is not read"
read_before=$(status sat read_bytes)
scratch "$mnt/vm1.img" 20000000 1
rsync -aS "$snaps/sat/.since/fri/" "$tmp/copied"
[ $(($(status sat read_bytes) - read_before)) -le 8192 ] || fail "read $(($(status sat read_bytes) - read_before)) bytes to copy a changed cluster"
stat "$snaps/sat/.since/-/"* >/dev/null
[ $(($(status sat read_bytes) - read_before)) -le 8192 ] || fail "the layout reads the disk"
umount_fs

step "a copy that was cut short goes on after a restart, whatever became of holes meanwhile"
mount_fs
truncate -s 4M "$mnt/cut"
scratch "$mnt/cut" 0 1000000
scratch "$mnt/cut" 3000000 1000000
dd if=/dev/zero of="$mnt/cut" bs=64k count=4 seek=8 conv=notrunc status=none # zeros that are data
mkdir "$snaps/sun"
mkdir "$tmp/resumed"
head -c 700000 "$snaps/sun/.since/-/cut.qcow2" >"$tmp/resumed/cut.qcow2"
cat "$snaps/sun/.since/-/cut.qcow2" >"$tmp/cut"
dd if=/dev/zero of="$mnt/cut" bs=64k count=4 seek=24 conv=notrunc status=none
fallocate -p -o $((8 * 65536)) -l 262144 "$mnt/cut"
forget "$src/cut"
umount_fs
mount_fs
rsync -a --append "$snaps/sun/.since/-/cut.qcow2" "$tmp/resumed"
cmp "$tmp/cut" "$tmp/resumed/cut.qcow2"
reads_as "$tmp/resumed/cut.qcow2" "$snaps/sun/cut"
rm "$mnt/cut"
rmdir "$snaps/sun"
umount_fs

step "another pattern for the older image's name"
for bad in '' '%' 'a%x'; do
	! "$fleecefs" "$src" "$mnt" --fleece-dir="$fleece" --backing="$bad" 2>/dev/null || fail "--backing=$bad is taken"
done
mount_fs --backing='%u../base/%o%%/%p'
[ "$(backing "$snaps/sat/.since/fri/x/changes.json/../../vm1.img.qcow2")" = '../../base/fri%/vm1.img.qcow2' ] || fail "backing: $(backing "$snaps/sat/.since/fri/vm1.img.qcow2")"
umount_fs

step "what cannot be known is an error, and the log says what to do"
refused() {
	local status=0
	cat "$1" >"$tmp/out" 2>"$tmp/err" || status=$?
	[ "$status" != 0 ] || fail "$1 can be read"
	[ ! -s "$tmp/out" ] || fail "$1: $(stat -c %s "$tmp/out") bytes, then an error"
	grep -q 'Input/output error' "$tmp/err" || fail "$1: $(cat "$tmp/err")"
}
mount_fg --fleece-limit=2M
mkdir "$snaps/b"
scratch "$mnt/vm1.img" 0 3000000 # more than may be saved: the views break
umount_fs
mount_fg
mkdir "$snaps/c"
[ "$(getfattr --only-values -n user.fleecefs.state "$snaps/b/vm1.img")" = broken ] || fail "nothing broke"
refused "$snaps/c/.since/b/vm1.img.qcow2"
refused "$snaps/c/.since/b/vm1.img"
refused "$snaps/c/.since/b/changes.json"
grep -q 'vm1.img: what changed since b cannot be known.*full' "$tmp/log" || fail "$(cat "$tmp/log")"
cat "$snaps/c/.since/b/vm2.img.qcow2" "$snaps/c/.since/-/vm1.img.qcow2" >/dev/null

# an increment that is opened where it lies leads to itself: that is said soon
since=$snaps/c/.since/b
status=0
(cd "$since" && timeout 10 qemu-img check vm2.img.qcow2) 2>"$tmp/err" || status=$?
[ $status = 1 ] || fail "status $status: $(cut -c1-300 "$tmp/err")"
grep -q 'Too many levels' "$tmp/err" || fail "$(cut -c1-300 "$tmp/err")"
grep -q 'against b was opened as its own backing file' "$tmp/log" || fail "the log does not tell: $(tail -3 "$tmp/log")"
qemu-img check -q --image-opts "driver=qcow2,file.filename=$since/vm2.img.qcow2,backing=" 2>"$tmp/err" || fail "by itself: $(cat "$tmp/err")"
python3 - "$since/vm2.img.qcow2" <<'END'
import os, sys, threading
for _ in range(3000):  # one after the other is no chain, though the mount hears late of the end of each
    os.close(os.open(sys.argv[1], os.O_RDONLY))
def some():
    for fd in [os.open(sys.argv[1], os.O_RDONLY) for _ in range(12)]:
        os.close(fd)
threads = [threading.Thread(target=some) for _ in range(12)]
failed = []
threading.excepthook = lambda args: failed.append(args.exc_value)
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert not failed, failed
END

for old in b sat fri thu tue; do
	[ ! -d "$snaps/$old" ] || rmdir "$snaps/$old"
done
mkdir "$snaps/d"
rm "$fleece"/c/vm1.img-fleece-*.qcow2
umount_fs
mount_fg
refused "$snaps/d/.since/c/vm1.img.qcow2"
cat "$snaps/d/.since/c/vm2.img.qcow2" "$snaps/d/.since/-/vm1.img.qcow2" >/dev/null
umount_fs

step "a large disk with large clusters: an L2 table is for more than is looked at in one go"
rm -f "$src"/*.img
mount_fs --cluster-size=2M
truncate -s $((80 << 30)) "$mnt/large"
printf 1 | dd of="$mnt/large" bs=1 seek=$((70 << 30)) conv=notrunc status=none
mkdir "$snaps/g"
rsync -aS "$snaps/g/.since/-/large.qcow2" "$tmp/large/g/" --mkpath
for at in 0 1 63 64 65 79; do
	scratch "$mnt/large" $((at << 30)) 2000
done
fallocate -p -o $((70 << 30)) -l 4096 "$mnt/large"
mkdir "$snaps/h"
rsync -aS "$snaps/h/.since/g/large.qcow2" "$tmp/large/h/" --mkpath
reads_as "$tmp/large/g/large.qcow2" "$snaps/g/large"
reads_as "$tmp/large/h/large.qcow2" "$snaps/h/large"
umount_fs

step "a random life"
python3 "$here/since.py" "$fleecefs" "$tmp/life" --seed "$seed" --nights "$nights"
