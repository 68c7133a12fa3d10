#!/bin/bash
# fleece-backup and guests: agents and a virsh that are not real, QEMU without a guest whose disks are moved.
# (With a real guest: qmp.sh.)
# shellcheck source=tests/e2e/lib.sh
. "$(dirname "$0")/lib.sh"
# shellcheck source=tests/e2e/backup_lib.sh
. "$here/backup_lib.sh"

command -v qemu-system-x86_64 >/dev/null || skip "needs qemu-system-x86_64"
timeout 250 python3 "$here/backup_guests.py" "$tmp" "$script"
nothing_left
