#!/bin/bash
# fleece-backup's ways out: what COMMAND says, hooks, signals and kills at any moment, a full target, a snapshot
# that breaks, two runs at once. Nothing is left after any, or after the next start.
#
#   backup_ends.sh FLEECEFS [--long]     SEED=N: of the moments at which it is cut
# shellcheck source=tests/e2e/lib.sh
. "$(dirname "$0")/lib.sh"
# shellcheck source=tests/e2e/backup_lib.sh
. "$here/backup_lib.sh"
rounds=6
[ "${2-}" != --long ] || rounds=60
RANDOM=${SEED:=$(od -An -N2 -tu2 /dev/urandom | tr -d ' ')}

where=(--mount "$src" --fleece-dir "$fleece")
head -c 4M /dev/urandom >"$src/a.img"
head -c 1M /dev/urandom >"$src/b &.img"
mounts() { grep -cF "$tmp/state" /proc/self/mounts || true; }

step "COMMAND: its words, its place, its status, its input"
# shellcheck disable=SC2016
backup 0 -- sh -c 'cmp "$1" "$FLEECE_SNAPSHOT/a.img" && cmp a.img "$1" && [ "$2" = "x$FLEECE_SNAPSHOT/b &.img" ] &&
	[ -f "${2#x}" ] && [ "$(pwd)" = "$FLEECE_SNAPSHOT" ] && ! touch new 2>/dev/null' - '{}/a.img' 'x{}/b &.img'
nothing_left
for status in 1 7 126 255; do
	backup $status -- sh -c "exit $status"
done
backup 127 -- no-such-program
backup 143 -- sh -c 'kill -TERM $$'
[ "$(echo input | timeout 60 "$script" "${where[@]}" --quiet -- cat)" = input ] || fail "COMMAND has no standard input"
nothing_left

step "usage"
for words in "" "--tar" "--tar a --copy b" "--tar a -- true" "--nonsense 1 -- true" "--on a -- true" "--bwlimit x --tar a" \
	"--name a/b -- true" "--verify -- true" "--hook /nowhere -- true" "--lock-wait soon -- true" "--keep-last 2 --rsync a" "true" "--"; do
	# shellcheck disable=SC2086
	backup 64 $words
done
where=()
backup 64 -- true
backup 66 --on "$tmp" -- true
backup 66 --mount "$tmp/nowhere" -- true
where=(--mount "$src" --fleece-dir "$fleece")
backup 73 --mount-options no_such_option -- true
backup 0 --dry-run --tar "$tmp/out/x.tar"
[ "$(mounts)" = 0 ] || fail "--dry-run mounts"
nothing_left

step "hooks"
cat >"$tmp/hook" <<'END'
#!/bin/sh
here=; [ ! -d "$FLEECE_SNAPSHOT" ] || here=" there"
echo "$*$here${FLEECE_STATUS:+ $FLEECE_STATUS}" >>"$LOG"
[ "$1" != "$FAIL" ]
END
chmod +x "$tmp/hook"
export LOG=$tmp/hook.log FAIL=
called() { # by a run with status $1 that fails at $2: what is expected
	: >"$LOG"
	FAIL=$2 backup "$1" --hook "$tmp/hook" --tar "$tmp/out/h.tar"
	[ "$(tr '\n' ';' <"$LOG")" = "$3" ] || fail "called when $2 fails: $(cat "$LOG")"
	nothing_left
}
n="snapshot fleece-backup"
began="job-start;backup-start $n;pre-stop $n;post-restart $n there;"
called 0 none "${began}backup-end $n there;job-end;"
called 78 job-start "job-start;job-abort 78;"
called 78 backup-start "job-start;backup-start $n;backup-abort $n 78;job-abort 78;"
called 78 pre-stop "job-start;backup-start $n;pre-stop $n;post-restart $n;backup-abort $n 78;job-abort 78;"
called 78 backup-end "${began}backup-end $n there;backup-abort $n 78;job-abort 78;"
called 78 job-end "${began}backup-end $n there;job-end;"

step "a full target"
mkdir "$tmp/full"
mount -t tmpfs -o size=3M none "$tmp/full"
echo precious >"$tmp/full/old.tar"
for target in "--tar $tmp/full/old.tar" "--copy $tmp/full/c" "--tar $tmp/full/new.tar.zst"; do
	status=0
	# shellcheck disable=SC2086
	timeout 60 "$script" "${where[@]}" $target >"$tmp/said" 2>&1 || status=$?
	[ $status != 0 ] || fail "$target: no failure"
	[ "$(find "$tmp/full" -mindepth 1 -printf '%P ')" = "old.tar " ] || fail "left: $(find "$tmp/full")"
	nothing_left
done
[ "$(cat "$tmp/full/old.tar")" = precious ] || fail "the old archive is gone"
umount "$tmp/full"

step "a snapshot that breaks, and COMMAND does not notice"
# fleece storage of 1 MiB, and a guest that overwrites four
# shellcheck disable=SC2016
backup 74 --mount-options fleece-limit=1M -- sh -c 'dd if=/dev/urandom of="$FLEECE_MOUNT/a.img" bs=64k count=64 conv=notrunc status=none'
grep -q 'a.img is broken' "$tmp/said" || fail "the disk is not named: $(cat "$tmp/said")"
cat >"$tmp/hook" <<'END'
#!/bin/sh
[ "$1" != post-restart ] || dd if=/dev/urandom of="$FLEECE_MOUNT/a.img" bs=64k count=64 conv=notrunc status=none
END
status=0
backup 74 --mount-options fleece-limit=1M --hook "$tmp/hook" --exclude 'a.img' --tar "$tmp/out/broken.tar"
[ ! -e "$tmp/out/broken.tar" ] || fail "an archive of a broken snapshot got its name"
nothing_left

step "what is mounted below SOURCE cannot be frozen: that is said"
mkdir "$src/below"
mount -t tmpfs none "$src/below"
backup 74 --tar "$tmp/out/below.tar"
grep -q 'mounted below SOURCE' "$tmp/said" || fail "not said: $(cat "$tmp/said")"
[ ! -e "$tmp/out/below.tar" ] || fail "an archive without it got its name"
backup 0 --mount-options exclude=below --tar "$tmp/out/below.tar"
umount "$src/below"
rmdir "$src/below"
rm "$tmp/out/below.tar"
nothing_left

step "two runs at once, by either name"
mount_fs
mkfifo "$tmp/go"
"$script" --on "$mnt" --quiet -- sh -c "read -r _ <'$tmp/go'" &
first=$!
children+=("$first")
wait_for 20 test -d "$mnt/snapshots/fleece-backup" || fail "no snapshot"
backup 75 -- true
grep -q 'at work' "$tmp/said" || fail "$(cat "$tmp/said")"
backup 75 --name other --lock-wait 1 -- true
"$script" --on "$mnt" --lock-wait 60 -- true >"$tmp/second" 2>&1 &
second=$!
children+=("$second")
wait_for 20 grep -q waiting "$tmp/second" || fail "it does not say that it waits"
echo >"$tmp/go"
wait $first
wait $second
mkdir "$mnt/snapshots/fleece-backup"
backup 73 -- true
[ -d "$mnt/snapshots/fleece-backup" ] || fail "somebody else's snapshot was dropped"
rmdir "$mnt/snapshots/fleece-backup"
nothing_left
umount_fs

step "COMMAND's own children, and a terminal that is lost"
# what goes on in the background in the frozen directory is ended
backup 0 -- sh -c 'sleep 1000 & sleep 1001 >/dev/null 2>&1 & :'
nothing_left
python3 - "$script" "${where[@]}" -- sleep 1000 <<'END'
import os, pty, signal, sys, time
pid, terminal = pty.fork()
if pid == 0:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup(1) may have started this test
    os.execv(sys.argv[1], sys.argv[1:])
said = b""
while b"to be backed up" not in said:
    said += os.read(terminal, 4096)
time.sleep(1)
said += os.read(terminal, 4096)
assert b"[....................]   0%" in said, said
os.close(terminal)
_, status = os.waitpid(pid, 0)
assert os.WEXITSTATUS(status) == 129, status
END
nothing_left

step "ended by signals, seed $SEED"
# a target that takes its time, so that all steps have their share
slow=(--tar "$tmp/out/s.tar" --verify)
cut() { # signal $1 after $2 milliseconds
	local status=0
	env --default-signal=INT "$script" "${where[@]}" "${slow[@]}" >"$tmp/said" 2>&1 &
	local pid=$!
	children+=("$pid")
	sleep "$(printf '%d.%03d' $(($2 / 1000)) $(($2 % 1000)))"
	kill "-$1" $pid 2>/dev/null || true
	wait $pid || status=$?
	echo "$1 after $2 ms: status $status, $(tail -1 "$tmp/said")"
	[ $status = 0 ] || [ -z "${3-}" ] || [ $status = "$3" ] || fail "status $status: $(cat "$tmp/said")"
}
began=$EPOCHREALTIME
backup 0 "${slow[@]}"
whole=$(((${EPOCHREALTIME/./} - ${began/./}) / 1000 + 1))
for ((i = 0; i < rounds; i++)); do
	rm -f "$tmp/out/s.tar"*
	case $((i % 3)) in
	0) cut TERM $((RANDOM % whole)) 143 ;;
	1) cut HUP $((RANDOM % whole)) 129 ;;
	2) cut INT $((RANDOM % whole)) 130 ;;
	esac
	nothing_left
done

step "ended by a signal inside of a read, whose IFS is another"
cp -r "$(dirname "$script")" "$tmp/scripts"
# shellcheck disable=SC2016 # the script expands it
sed -i 's/^\tfreeze$/&\n\tIFS= read -r -d "" _ < <(exec 9>&-; sleep 0.2; kill -TERM $$; sleep 1)/' "$tmp/scripts/fleece-backup"
status=0
timeout 60 "$tmp/scripts/fleece-backup" "${where[@]}" -- false >"$tmp/said" 2>&1 </dev/null || status=$?
[ $status = 143 ] || fail "status $status: $(cat "$tmp/said")"
nothing_left

step "killed, and the next start"
for ((i = 0; i < rounds; i++)); do
	cut KILL $((RANDOM % whole))
	backup 0 -- true
	grep 'left by' "$tmp/said" || true
	nothing_left
done
# certainly in the middle; what the run before has said is no sign of this one
rm "$tmp/said"
"$script" "${where[@]}" -- sh -c "sleep 1000 & sleep 1001; :" >"$tmp/said" 2>&1 &
pid=$!
children+=("$pid")
wait_for 20 grep -q 'to be backed up' "$tmp/said" || fail "it does not begin: $(cat "$tmp/said")"
kill -KILL $pid
wait $pid || true
[ "$(mounts)" = 1 ] || fail "it was not in the middle"
backup 0 -- true
for what in mount snapshot; do
	grep -q "left by an earlier run: $what" "$tmp/said" || fail "no line about the $what: $(cat "$tmp/said")"
done
nothing_left
# and the mount is gone, too, as after a restart of the machine: the snapshot comes back with the next mount
"$script" "${where[@]}" --tar "$tmp/out/s.tar" --bwlimit 500K >"$tmp/said" 2>&1 &
pid=$!
children+=("$pid")
wait_for 20 test -s "$tmp/out/.s.tar.part" || fail "$(cat "$tmp/said")"
kill -KILL $pid
wait $pid || true
for daemon in $(daemons "$tmp/state"); do
	kill -KILL "$daemon"
done
dead=$(echo "$tmp"/state/*)/mnt # (whether it is there cannot be told of a dead mount)
wait_for 60 umount "$dead" || fail "the dead mount is in use"
backup 0 -- true
grep -q "dropped the snapshot" "$tmp/said" || fail "$(cat "$tmp/said")"
grep -q "removed $tmp/out/.s.tar.part" "$tmp/said" || fail "$(cat "$tmp/said")"
nothing_left
