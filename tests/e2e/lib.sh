# shellcheck shell=bash
#
# What the end-to-end tests share: a place of their own, mounts, and a cleanup that runs whatever
# happens. A test sources this file with the program's path as $1. Exit status: 0 passed, 77 could
# not run (with a line that says why), anything else failed.

set -Eeuo pipefail
shopt -s inherit_errexit
export LC_ALL=C
umask 022

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
[ $# -ge 1 ] || {
	echo "usage: $0 FLEECEFS" >&2
	exit 2
}
fleecefs=$(realpath "$1")

skip() {
	echo "SKIP: $*"
	exit 77
}

fail() {
	echo "FAIL: $*" >&2
	exit 1
}

step() {
	echo "--- $*"
}

# Each test has a mount namespace of its own, and nobody mounts in the one that all begin with. Else
# one that is made while another test runs would hold that one's mounts after their end. A machine
# that has none (IN_NAMESPACE is empty then) runs them one by one: meson test --num-processes 1.
if [ -z "${IN_NAMESPACE-}" ] && unshare --mount --propagation private true 2>/dev/null; then
	IN_NAMESPACE=1 exec unshare --mount --propagation private "$0" "$@"
fi

[ "$(id -u)" = 0 ] || skip "needs root, to mount"
{ [ -c /dev/fuse ] && : <>/dev/fuse; } 2>/dev/null || skip "/dev/fuse cannot be opened here"

tmp=$(mktemp -d "${TMPDIR:-/var/tmp}/fleecefs-e2e.XXXXXX")
tmp=$(realpath "$tmp")
chmod 755 "$tmp"
src=$tmp/source
mnt=$tmp/mnt
fleece=$tmp/fleece
mkdir "$src" "$mnt" "$fleece"
children=()
loops=()
links=()

# Ends what this test started, newest mount first, and removes its files.
cleanup() {
	local status=$? pid target loop
	trap - EXIT ERR
	set +e
	for pid in "${children[@]}"; do
		kill -KILL "$pid" 2>/dev/null
	done
	awk '{ print $2 }' /proc/self/mounts | grep -F "$tmp/" | tac | while read -r target; do
		umount "$target" 2>/dev/null || umount -l "$target" 2>/dev/null
	done
	for loop in "${loops[@]}"; do
		losetup -d "$loop" 2>/dev/null
	done
	for pid in $(daemons "$tmp/"); do
		kill -KILL "$pid" 2>/dev/null
	done
	[ ${#links[@]} -eq 0 ] || rm -f "${links[@]}"
	[ -n "${KEEP-}" ] || rm -rf --one-file-system "$tmp"
	exit "$status"
}
trap cleanup EXIT
trap 'echo "FAIL: line $LINENO: $BASH_COMMAND" >&2' ERR
trap 'exit 1' INT TERM HUP

# Pids of the fleecefs processes which have $1 in their command line.
daemons() {
	local dir exe args
	while read -r dir exe; do
		[ "$exe" = "$fleecefs" ] || continue
		args=$(tr '\0' ' ' <"$dir/cmdline" 2>/dev/null) || continue
		case $args in *"$1"*) echo "${dir#/proc/}" ;; esac
	done < <(find /proc/[0-9]*/exe -prune -printf '%h %l\n' 2>/dev/null || true)
}

# Waits up to $1 seconds until the rest of the line succeeds.
wait_for() {
	local tries=$(($1 * 20))
	shift
	until "$@" >/dev/null 2>&1; do
		tries=$((tries - 1))
		[ "$tries" -gt 0 ] || return 1
		sleep 0.05
	done
}

# Has process $1 ended? Some inits take their time to collect what ended, so a zombie counts.
gone() {
	! grep -q '^State:.[^ZX]' "/proc/$1/status" 2>/dev/null
}

# Mounts $src on $mnt, in the background. More options may follow.
mount_fs() {
	timeout 60 "$fleecefs" "$src" "$mnt" --fleece-dir="$fleece" "$@" </dev/null >/dev/null
	mountpoint -q "$mnt" || fail "fleecefs returned 0 without a mount"
}

# The same in the foreground, as a child whose pid is in $daemon.
mount_fg() {
	env --default-signal=INT "$fleecefs" "$src" "$mnt" --fleece-dir="$fleece" -f "$@" </dev/null >>"$tmp/log" 2>&1 &
	daemon=$!
	children+=("$daemon")
	wait_for 30 mountpoint -q "$mnt" || fail "no mount: $(cat "$tmp/log")"
}

# Unmounts $1 ($mnt) and waits for the daemon's end.
umount_fs() {
	local pid pids
	pids=$(daemons " ${1:-$mnt} ")
	umount "${1:-$mnt}"
	for pid in $pids; do
		wait_for 120 gone "$pid" || fail "the daemon outlives its mount by two minutes"
	done
}

# Has the kernel forget what it has of these files, and of no others: other tests run beside this one.
forget() {
	local file
	for file; do
		dd if="$file" iflag=nocache count=0 status=none
	done
}

# All fleecing images of snapshot $1 of disk $2; without arguments all that there are.
images() {
	if [ $# -eq 0 ]; then
		find "${image_dir:-$fleece}" -name '*.qcow2'
	else
		find "${image_dir:-$fleece}/$1" -path "*/$1/$2-fleece-*.qcow2"
	fi
}

# qemu-img finds no error in any image. After a kill leaked clusters would be harmless: $1 = leaks.
check_images() {
	local image status n=0
	while read -r image; do
		status=0
		qemu-img check -q -f qcow2 "$image" >"$tmp/check" 2>&1 || status=$?
		[ "$status" = 0 ] || { [ "$status" = 3 ] && [ "${1-}" = leaks ]; } ||
			fail "qemu-img check $image: status $status: $(cat "$tmp/check")"
		n=$((n + 1))
	done < <(images)
	echo "$n images check clean"
}

# The image of snapshot $1 of disk $2, read with its whole chain, is the disk in file $3: every
# byte of it, and zeros up to the next multiple of 512.
check_convert() {
	local image size padded
	image=$(images "$1" "$2")
	[ -f "$image" ] || fail "not exactly one image for $1/$2: $image"
	qemu-img convert -f qcow2 -O raw "$image" "$tmp/converted"
	size=$(stat -c %s "$3")
	padded=$(((size + 511) / 512 * 512))
	[ "$(stat -c %s "$tmp/converted")" = "$padded" ] ||
		fail "$image: $(stat -c %s "$tmp/converted") bytes, expected $padded"
	cp "$3" "$tmp/padded"
	truncate -s "$padded" "$tmp/padded"
	cmp "$tmp/padded" "$tmp/converted" || fail "$image does not read as the frozen disk"
	rm "$tmp/converted" "$tmp/padded"
}

# Starts the writer of busy.py in directory $1 with log $2; its pid is in $writer.
start_writer() {
	local directory=$1 log=$2
	shift 2
	/usr/bin/env python3 "$here/busy.py" write "$directory" "$log" "$@" &
	writer=$!
	children+=("$writer")
	wait_for 30 grep -q '^ACK 20$' "$log" || fail "the writer does not get on"
}

# Starts random changes of the given disks; the pid is in $scribbler.
start_scribbler() {
	rm -f "$tmp/scribbled"
	/usr/bin/env python3 "$here/scribble.py" --count "$tmp/scribbled" "$@" &
	scribbler=$!
	children+=("$scribbler")
	wait_for 30 test -s "$tmp/scribbled" || fail "the scribbler does not get on"
}

# Stops a child that ends by itself on SIGTERM, with success.
stop() {
	kill -TERM "$1"
	wait "$1"
}

# Do the trees $1 and $2 have the same files with the same bytes?
same_tree() {
	diff -r --no-dereference "$1" "$2" >"$tmp/diff" 2>&1 ||
		fail "$1 and $2 differ: $(head -5 "$tmp/diff")"
}

# The blocks of the README that contain $1, with our places.
recipe() {
	/usr/bin/env python3 - "$(realpath "$here/../..")/README.md" "$1" "$tmp" >"$tmp/block" <<'EOF'
import re, sys
name, word, tmp = sys.argv[1:]
places = {"/srv/images": "source", "/srv/live": "mnt", "/nvme/fleece": "fleece", "/run": "", "/backup": "backup",
          "/mnt": "files", "/restore": "restore"}
blocks = re.findall(r"^( *)```\w*\n(.*?)^ *```$", open(name, encoding="utf-8").read(), re.M | re.S)
found = [re.sub("^" + indent, "", body, flags=re.M) for indent, body in blocks if word in body]
if len(found) != 1:
    sys.exit(f"{len(found)} blocks contain {word}")
print(re.sub("|".join(places), lambda m: f"{tmp}/{places[m[0]]}".rstrip("/"), found[0]), end="")
EOF
	cat "$tmp/block"
}

# The command behind $1 fails, and says $1.
refused() {
	local what=$1
	shift
	! "$@" >"$tmp/out" 2>"$tmp/err" || fail "$* succeeds"
	grep -q "$what" "$tmp/err" || fail "$*: $(cat "$tmp/err")"
}
