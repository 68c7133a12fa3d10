# shellcheck shell=bash
# shellcheck disable=SC2154 # they are lib.sh's
# For tests of fleece-backup: the script of this tree, with the fleecefs that is under test, and its state
# in a place of its own.

for program in xxhsum rsync zstd pv; do
	command -v $program >/dev/null || skip "needs $program"
done
script=$(realpath "$here/../../scripts/fleece-backup")
mkdir "$tmp/out" "$tmp/bin" "$tmp/state"
ln -s "$fleecefs" "$tmp/bin/fleecefs"
# a wrapper that chooses among versions would take longer than all the rest
ln -s "$(python3 -c 'import sys; print(sys.executable)')" "$tmp/bin/python3"
export FLEECE_BACKUP_DIR=$tmp/state PATH=$tmp/bin:$PATH
where=(--on "$mnt")

# Runs it with the options after $1, the status that it must have. What it says goes to $tmp/said.
backup() {
	local expected=$1 status=0
	shift
	timeout 120 "$script" "${where[@]}" "$@" >"$tmp/said" 2>&1 </dev/null || status=$?
	[ $status = "$expected" ] || fail "status $status, not $expected: fleece-backup $*: $(cat "$tmp/said")"
}

# Names in directory $1, in one line.
names() {
	find "$1" -mindepth 1 -maxdepth 1 -printf '%f\n' | sort | tr '\n' ' '
}

# No snapshot, no mount, no image, and no state.
nothing_left() {
	local left
	left=$(find "$tmp/state" -type f -name 'state*')
	[ -z "$left" ] || fail "left: $left: $(tr '\0' ' ' <"${left%%$'\n'*}")"
	! grep -F "$tmp/state" /proc/self/mounts || fail "a mount is left"
	[ ! -d "$mnt/snapshots" ] || [ -z "$(ls -A "$mnt/snapshots")" ] || fail "a snapshot is left: $(ls -A "$mnt/snapshots")"
	[ -z "$(images)" ] || fail "images are left: $(images)"
	[ -z "$(find "$tmp/out" -name '.*.part*')" ] || fail "left in the target: $(find "$tmp/out" -name '.*.part*')"
}
