#!/bin/bash
# A backup reads every disk once. What it read of SOURCE must not stay in the host's page cache, next to the
# frozen file's own pages, where it would have thrown out what the host has use for; what was there before, must.
# The kernel drops a large folio only if no other thread reads in it at that moment: a reader whose requests are
# served by several threads leaves one here and there (of 64 MiB a little over 4 at most were seen, as with bare threads on a bare
# file). Without uncached reads all 64 MiB stay, so the line is drawn at a quarter.
# shellcheck source=tests/e2e/lib.sh
. "$(dirname "$0")/lib.sh"

command -v fincore >/dev/null || skip "needs fincore (util-linux)"
head -c 64M /dev/urandom >"$src/cold.img"
head -c 16M /dev/urandom >"$src/warm.img"
sync "$src"/*
python3 - "$src/cold.img" <<'END' || skip "this kernel or filesystem knows no uncached buffered reads"
import os, sys
fd = os.open(sys.argv[1], os.O_RDONLY)
try:
    os.preadv(fd, [bytearray(4096)], 0, 0x80)
except OSError as e:
    sys.exit(str(e))
END

cached() {
	fincore --bytes --noheadings --output RES "$1" | tr -d ' '
}

mount_fs
for f in cold warm; do
	dd if="$src/$f.img" iflag=nocache count=0 status=none
done
cat "$src/warm.img" >/dev/null
mkdir "$mnt/snapshots/s"

step "a backup leaves next to nothing of a cold disk, and what there was of a warm one"
[ "$(cached "$src/cold.img")" -le 65536 ] || skip "the page cache cannot be emptied here"
[ "$(cached "$src/warm.img")" = $((16 << 20)) ] || skip "the page cache is too small here"
for f in cold warm; do
	dd if="$mnt/snapshots/s/$f.img" of="$tmp/$f.copy" bs=1M status=none
done
n=$(cached "$src/cold.img")
[ "$n" -le $((16 << 20)) ] || fail "$n bytes of a cold disk stay in the page cache"
n=$(cached "$src/warm.img")
[ "$n" = $((16 << 20)) ] || fail "of 16 MiB in the page cache only $n bytes are left"

step "and it read the right bytes"
for f in cold warm; do
	cmp "$tmp/$f.copy" "$src/$f.img" || fail "$f: other bytes"
done
umount_fs
