#!/bin/bash
# fleece-backup --incremental: ten nights of busy disks. Each night's restore is what was frozen, that night and at the
# end, whatever came between: unmounts, kills of fleece-backup and of fleecefs, a power failure, writes past the mount,
# damage, pruning, other jobs. And what is wrong is said, not restored.
#
#   incremental.sh FLEECEFS [--long]     SEED=N
# shellcheck source=tests/e2e/lib.sh
. "$(dirname "$0")/lib.sh"
# shellcheck source=tests/e2e/backup_lib.sh
. "$here/backup_lib.sh"
for tool in qemu-img setpriv; do
	command -v $tool >/dev/null || skip "needs $tool"
done
long=
[ "${2-}" != --long ] || long=1
RANDOM=${SEED:=$(od -An -N2 -tu2 /dev/urandom | tr -d ' ')}
echo "seed $SEED"

dir=$tmp/out
snaps=$mnt/snapshots
mkdir -p "$tmp/ref/out" "$tmp/ref/out2"
head -c 600000 /dev/urandom >"$src/a.img"
truncate -s 3M "$src/a.img"
head -c 200001 /dev/urandom >"$src/b.img"

# What is frozen, kept under the name that the folder gets.
cat >"$tmp/hook" <<'END'
#!/bin/sh
PATH=/usr/bin:/bin
[ "$1" != post-restart ] || { rm -rf "$REF${FLEECE_TARGET#"$BASE"}" && cp -a "$FLEECE_SNAPSHOT" "$REF${FLEECE_TARGET#"$BASE"}"; }
END
chmod +x "$tmp/hook"
export REF=$tmp/ref BASE=$tmp

about() { # -S: the test asks often, and nothing of what that leaves out is needed
	python3 -S "$here/incremental.py" about "$1"
}
kind() { # and its parent
	about "$1" | sed -n 1p
}
in_full() { # is $2 a full image in the increment $1?
	about "$1" | sed 1d | grep -xF "$2" >/dev/null
}
folders() {
	find "$dir" -mindepth 1 -maxdepth 1 -name "${1-vm}-2*" -printf '%f\n' | sort -V
}
newest() {
	folders "$@" | tail -1
}
# Names, kinds, modes, owners, sizes, times.
listing() {
	(cd "$1" && find . -type d -printf '%P %y %m %U %G %T@\0' -o -printf '%P %y %m %U %G %s %T@ %l\0' | sort -z)
}
restored=0
# The folder $1 reads as what was frozen.
right() {
	rm -rf "$tmp/restored"
	"$script" --restore "$dir" "$1" . "$tmp/restored" --quiet >"$tmp/said" 2>&1 || fail "restore of $1: $(cat "$tmp/said")"
	same_tree "$REF${dir#"$tmp"}/$1" "$tmp/restored"
	listing "$REF${dir#"$tmp"}/$1" >"$tmp/list1"
	listing "$tmp/restored" >"$tmp/list2"
	cmp -s "$tmp/list1" "$tmp/list2" || fail "$1: $(diff -a <(tr '\0' '\n' <"$tmp/list1") <(tr '\0' '\n' <"$tmp/list2"))"
	restored=$((restored + 1))
}
all_right() {
	local folder
	for folder in $(folders "${1-vm}"); do
		right "$folder"
	done
}
# The first and the last of them, and three others: in the long form all.
some_right() {
	local all=() folder
	mapfile -t all < <(folders)
	if [ -n "$long" ] || [ ${#all[@]} -le 5 ]; then
		all_right
		return 0
	fi
	right "${all[0]}"
	right "${all[-1]}"
	while read -r folder; do
		right "$folder"
	done < <(for folder in "${all[@]:1:${#all[@]}-2}"; do echo "$RANDOM $folder"; done | sort -n | sed 's/.* //;3q')
}
# One checkpoint of the job, that of its newest folder; and nothing is left.
one_checkpoint() {
	local left
	left=$(find "$snaps" -mindepth 1 -maxdepth 1 -name "${1-vm}-*" -printf '%f ')
	[ "$left" = "$(newest "$@") " ] || fail "snapshots: $left, newest: $(newest "$@")"
	[ "$(getfattr --only-values --absolute-names -n user.fleecefs.state "$snaps/$(newest "$@")")" = checkpoint ] ||
		fail "$(newest "$@") is no checkpoint"
	[ -z "$(find "$dir" -name '.*.part' -o -name '.*.gone')" ] || fail "left: $(find "$dir" -name '.*.part' -o -name '.*.gone')"
	[ -z "$(find "$tmp/state" -type f -name 'state*')" ] || fail "a state is left"
}
night=0
# One night, with the options after $1, what the folder must be: full, or increment, against the newest that there was.
nightly() {
	local kind=$1 before
	shift
	before=$(newest)
	night=$((night + 1))
	python3 "$here/incremental.py" change "$mnt" "$SEED" "$night"
	start_scribbler --seed "$SEED$night" "$mnt/a.img" "$mnt/b.img"
	backup 0 --name vm --incremental "$dir" --hook "$tmp/hook" "$@"
	stop "$scribbler"
	cp "$tmp/said" "$tmp/night"
	[ "$(newest)" != "$before" ] || fail "no new folder"
	[ "$kind" = full ] && before=None
	[ "$(kind "$dir/$(newest)")" = "$kind $before" ] || fail "$(about "$dir/$(newest)"), not $kind $before: $(cat "$tmp/said")"
	right "$(newest)"
	one_checkpoint
}

step "nights"
mount_fs
nightly full --verify
first=$(newest)
(cd "$dir/$first" && grep -v '^[\]' images.xxh128 | xxhsum -q -c) || fail "xxhsum -c of the images"
(cd "$tmp/restored" && grep -v '^[\]' "$dir/$first/disks.xxh128" | xxhsum -q -c) || fail "xxhsum -c of the disks"
nightly increment --verify --quiet
[ ! -s "$tmp/night" ] || fail "--quiet says $(cat "$tmp/night")"

step "unmounted in between, then with other names for older images; fleecefs killed in between"
umount_fs
mount_fs --backing='%u../base/%o%%/%p'
nightly increment --verify
pid=$(daemons " $mnt ")
kill -KILL "$pid"
wait_for 20 gone "$pid"
umount -l "$mnt"
mount_fs
nightly increment

step "fleecefs killed while it runs"
# shellcheck disable=SC2016
echo '[ "$1" != backup-end ] || { kill -KILL "$DAEMON"; sleep 0.2; }' >>"$tmp/hook"
for when in post-restart backup-end; do
	sed -i "\$s/.*/[ \"\$1\" != $when ] || { kill -KILL \"\$DAEMON\"; sleep 0.2; }/" "$tmp/hook"
	before=$(newest)
	status=0
	DAEMON=$(daemons " $mnt ") timeout 60 "$script" --on "$mnt" --name vm --incremental "$dir" --hook "$tmp/hook" \
		>"$tmp/said" 2>&1 || status=$?
	[ $status != 0 ] || fail "no failure when fleecefs dies: $(cat "$tmp/said")"
	# what is published before it dies is whole
	[ $when = post-restart ] || [ "$(newest)" != "$before" ] || fail "nothing was published: $(cat "$tmp/said")"
	[ $when = backup-end ] || [ "$(newest)" = "$before" ] || fail "published from a dead mount"
	umount -l "$mnt"
	mount_fs
done
sed -i '$d' "$tmp/hook"
nightly increment

step "written to past the mount while it was not there"
umount_fs
printf 'unseen' | dd of="$src/a.img" bs=1 seek=70000 conv=notrunc status=none
mount_fs
nightly increment
in_full "$dir/$(newest)" a.img || fail "a.img was changed unseen, and is an increment: $(about "$dir/$(newest)")"
grep -q 'a.img is written in full: fleecefs does not know' "$tmp/night" || fail "$(cat "$tmp/night")"

step "a power failure: torn"
pid=$(daemons " $mnt ")
kill -KILL "$pid"
wait_for 20 gone "$pid"
umount -l "$mnt"
sed -i '1s/.*/00000000-0000-0000-0000-000000000000/' "$fleece/.session"
mount_fs
nightly full
grep -q 'a full backup: .*torn' "$tmp/night" || fail "$(cat "$tmp/night")"

step "other jobs go their own ways"
nightly increment
main=$dir
for other in "--name vm --incremental $tmp/out2" "--name vm.2 --incremental $dir" "--name vm --incremental $tmp/out2"; do
	# shellcheck disable=SC2086
	backup 0 $other --hook "$tmp/hook"
	[ -d "$snaps/$(newest)" ] || fail "the checkpoint of another job is gone"
done
dir=$tmp/out2
[ "$(kind "$dir/$(newest)")" = "increment $(folders | sed -n 1p)" ] || fail "the other DIR: $(about "$dir/$(newest)")"
all_right
rmdir "$snaps/$(newest)" # its place is taken by a snapshot of somebody else
mkdir "$snaps/$(newest)"
backup 0 --name vm --incremental "$dir" --hook "$tmp/hook"
grep -q 'a full backup: the snapshot .* is not the one that it was' "$tmp/said" || fail "$(cat "$tmp/said")"
[ "$(find "$snaps" -mindepth 1 -maxdepth 1 | wc -l)" = 4 ] || fail "snapshots: $(ls "$snaps")"
rmdir "$snaps"/*
dir=$main
all_right vm.2
nightly full
grep -q 'a full backup: the checkpoint .* is not on the mount' "$tmp/night" || fail "$(cat "$tmp/night")"

step "damage: what is built on it is written in full"
damages=(cut)
[ -z "$long" ] || damages+=(symlink fifo backing)
for what in "${damages[@]}"; do
	cp -a "$dir/$(newest)" "$tmp/good"
	python3 "$here/incremental.py" forge "$dir/$(newest)" "$what"
	old=$(newest)
	nightly increment
	in_full "$dir/$(newest)" a.img || fail "a.img is built on an image that is damaged"
	grep -q "a.img is written in full: .*$old/a.img.qcow2: it " "$tmp/night" || fail "$(cat "$tmp/night")"
	rm -r "${dir:?}/$old"
	mv "$tmp/good" "$dir/$old"
done
if [ -n "$long" ]; then
	mv "$dir/$(newest)" "$tmp/aside"
	nightly full
	grep -q 'a full backup: the checkpoint' "$tmp/night" || fail "$(cat "$tmp/night")"
	nightly increment
fi
parent=$(kind "$dir/$(newest)" | sed 's/.* //')
mv "$dir/$parent" "$tmp/aside2"
nightly full
grep -q "a full backup: $parent: it is not there" "$tmp/night" || fail "$(cat "$tmp/night")"
status=0
"$script" --list "$dir" --name vm >"$tmp/said" || status=$?
[ $status = 74 ] || fail "--list: $status"
grep -q "damaged: $parent: it is not there" "$tmp/said" || fail "--list: $status, $(cat "$tmp/said")"
mv "$tmp/aside2" "$dir/$parent"
[ "$("$script" --list "$dir" --name vm --verify | grep -c ' ok$')" = "$(folders | wc -l)" ] || fail "$("$script" --list "$dir" --name vm)"
some_right

step "killed at any step, seed $SEED"
# These stand between fleece-backup and what changes anything. $tmp/cut: how many calls to let pass, then whether to kill
# before or after the next. $tmp/calls: how many there were.
for program in mv mkdir rmdir rm sync; do
	cat >"$tmp/bin/$program" <<END
#!/bin/bash
calls=\$(cat "$tmp/calls" 2>/dev/null)
echo \$((calls + 1)) >"$tmp/calls"
read -r count when what <"$tmp/cut" || exec $(command -v $program) "\$@"
match=
case "$program \$*" in *\$what*) match=1 ;; esac
[ -z "\$match" ] || echo "\$((count - 1)) \$when \$what" >"$tmp/cut"
[ -n "\$match" ] && [ "\$count" = 0 ] || exec $(command -v $program) "\$@"
: >"$tmp/cut"
[ "\$when" = before ] || $(command -v $program) "\$@"
kill -KILL \$PPID
END
	chmod +x "$tmp/bin/$program"
done
: >"$tmp/cut"
cut_options=(--keep-last 3 --full-every 3)
checked=$(newest)
cut_at() { # how many to let pass, before or after, and of which
	local status=0
	echo "$*" >"$tmp/cut"
	printf '%s' "$*" | dd of="$mnt/a.img" bs=1 seek=$((RANDOM * 16)) conv=notrunc status=none
	timeout 60 "$script" --on "$mnt" --name vm --incremental "$dir" --hook "$tmp/hook" "${cut_options[@]}" \
		>"$tmp/said" 2>&1 || status=$?
	: >"$tmp/cut"
	[ $status = 137 ] || { [ $status = 0 ] && [ -z "${3-}" ]; } || fail "cut at $*: status $status: $(cat "$tmp/said")"
	goes_on "$@"
}
# The next run builds on what is there, and all is as it should be.
goes_on() {
	local before
	"$script" --list "$dir" --name vm >"$tmp/listed" || fail "after a cut at $*: $(cat "$tmp/listed")"
	printf 'x%s' "$*" | dd of="$mnt/a.img" bs=1 seek=$((RANDOM * 16)) conv=notrunc status=none
	before=$(newest)
	night=$((night + 1))
	backup 0 --name vm --incremental "$dir" --hook "$tmp/hook"
	[ "$(kind "$dir/$(newest)")" = "increment $before" ] || fail "after a cut at $*: $(about "$dir/$(newest)"): $(cat "$tmp/said")"
	one_checkpoint
	[ "$before" = "$checked" ] || right "$before"
	right "$(newest)"
	checked=$(newest)
	echo "after a cut at $*: good"
}
# Killed after so many milliseconds, whatever it does.
cut_after() {
	local status=0 pid
	printf '%s' "$*" | dd of="$mnt/a.img" bs=1 seek=$((RANDOM * 16)) conv=notrunc status=none
	"$script" --on "$mnt" --name vm --incremental "$dir" --hook "$tmp/hook" --verify "${cut_options[@]}" >"$tmp/said" 2>&1 &
	pid=$!
	children+=("$pid")
	sleep "$(printf '%d.%03d' $(($1 / 1000)) $(($1 % 1000)))"
	kill -KILL "$pid" 2>/dev/null || true
	wait "$pid" || status=$?
	goes_on "$1 ms, with status $status"
}
cut_at 0 before "mv*.part */vm-"
cut_at 0 after "mv*.part */vm-"
[ -z "$long" ] || cut_at 0 before "mkdir*.checkpoint"
[ -z "$long" ] || cut_at 0 after "mkdir*.checkpoint"
[ -z "$long" ] || cut_at 0 before "rmdir*/vm-"
cut_at 0 after "rmdir*/vm-"
if [ -n "$long" ]; then
	: >"$tmp/calls"
	backup 0 --name vm --incremental "$dir" --hook "$tmp/hook" --keep-last 3 --full-every 3
	calls=$(cat "$tmp/calls")
	for ((i = 0; i < calls; i++)); do
		cut_at $i before
		cut_at $i after
		cut_after $((RANDOM % 2000))
	done
elif [ $((RANDOM % 2)) = 0 ]; then
	cut_after $((RANDOM % 1000))
else
	cut_at $((RANDOM % 32)) after
fi
[ -z "$long" ] || all_right

step "--full-every, --keep-last: whole chains"
rm -rf "${dir:?}"/vm-* "$REF"/out/vm-*
night=100
kinds=
for _ in 1 2 3 4; do
	backup 0 --name vm --incremental "$dir" --hook "$tmp/hook" --full-every 2 --keep-last 2
	kinds+="$(kind "$dir/$(newest)" | cut -c 1)$(folders | wc -l) "
	printf x | dd of="$mnt/a.img" bs=1 seek=$((RANDOM * 16)) conv=notrunc status=none
done
# the oldest chain goes when two newer folders are there that are not of it
[ "$kinds" = "f1 i2 f3 i2 " ] || fail "full or increment, and how many there were: $kinds"
[ -z "$long" ] || all_right
backup 0 --name vm --incremental "$dir" --dry-run --full-every 2 --keep-last 1
grep -q "would write a full backup: --full-every 2" "$tmp/said" || fail "$(cat "$tmp/said")"
[ "$(grep "would remove $dir/vm-" "$tmp/said" | sed 's/.*-//')" = "$(folders | sort -rV | sed 's/.*-//')" ] || fail "$(cat "$tmp/said")"
[ "$(folders | wc -l)" = 2 ] || fail "--dry-run has removed something"
backup 0 --name vm --incremental "$dir" --dry-run --full-every 3
grep -q "would write an increment against $(newest)" "$tmp/said" || fail "$(cat "$tmp/said")"
backup 0 --name vm --incremental "$dir" --hook "$tmp/hook" --keep-last 1
grep -q "kept beyond --keep-last 1, .*--full-every" "$tmp/said" || fail "$(cat "$tmp/said")"
[ "$(folders | wc -l)" = 3 ] || fail "$(folders)"
[ -z "$long" ] || all_right

cut_options=(--keep-last 1 --full-every 1)
cut_at 0 after "mv*.gone"
[ -z "$long" ] || cut_at 0 before "rm*.gone"
rm "$tmp"/bin/{mv,mkdir,rmdir,rm,sync}
hash -r
all_right

step "choices; two in a second; locks"
mkfifo "$mnt/pipe"
backup 0 --name vm --incremental "$dir" --hook "$tmp/hook" --exclude a.img --bwlimit 50M
grep -q 'left out, for it is no file: pipe' "$tmp/said" || fail "$(cat "$tmp/said")"
rm "$mnt/pipe"
backup 0 --name vm --incremental "$dir" --hook "$tmp/hook"
in_full "$dir/$(newest)" a.img || fail "built on an image that was left out: $(about "$dir/$(newest)")"
right "$(newest)"
mkfifo "$tmp/go"
cat >"$tmp/wait" <<END
#!/bin/sh
[ "\$1" != backup-start ] || read -r _ <"$tmp/go"
END
chmod +x "$tmp/wait"
mkdir "$tmp/source3" "$tmp/mnt3"
echo disk >"$tmp/source3/c"
"$fleecefs" "$tmp/source3" "$tmp/mnt3"
"$script" --on "$mnt" --name vm --incremental "$dir" --hook "$tmp/wait" >"$tmp/first" 2>&1 &
first=$!
children+=("$first")
wait_for 20 sh -c "ls $tmp/state/*/state" || fail "it does not begin"
where=(--on "$tmp/mnt3")
backup 75 --name vm3 --incremental "$dir"
grep -q "at work in $dir" "$tmp/said" || fail "$(cat "$tmp/said")"
echo >"$tmp/go"
wait "$first" || fail "$(cat "$tmp/first")"
backup 73 --name vm --incremental "$dir"
grep -q "of another SOURCE, $src" "$tmp/said" || fail "$(cat "$tmp/said")"
where=(--on "$mnt")
umount_fs "$tmp/mnt3"
rm -r "${dir:?}/$(newest)"

step "the README's example"
mkdir "$tmp/backup" "$tmp/restore"
ln -s "$script" "$tmp/bin/"
head -c 300000 /dev/urandom >"$mnt/vm1.img"
recipe "--list /backup/vms" >"$tmp/example"
sed -n 1p "$tmp/example" >"$tmp/night1"
bash -euo pipefail "$tmp/night1" >"$tmp/said" || fail "$(cat "$tmp/said")"
printf night | dd of="$mnt/vm1.img" bs=1 seek=123456 conv=notrunc status=none
# the other night is the first one
sed "s/2026-11-26/$(find "$tmp/backup/vms" -name 'fleece-*' -printf '%f\n' | sed 's/fleece-backup-//')/" "$tmp/example" >"$tmp/night2"
bash -euo pipefail "$tmp/night2" >"$tmp/said" || fail "$(cat "$tmp/said")"
[ "$(grep -c '  ok$' "$tmp/said")" = 2 ] || fail "--list: $(cat "$tmp/said")"
cmp "$tmp/restore/vm1.img" "$mnt/vm1.img"
cmp "$tmp/restore/all/a.img" "$mnt/a.img"
! cmp -s "$tmp/restore/all/vm1.img" "$mnt/vm1.img" || fail "the first night is the second"
recipe "fleece-backup@vms.timer" >/dev/null
# shellcheck disable=SC2046 # systemd splits it, too
fleece-backup $(sed -n "s/^echo 'OPTIONS=\(.*\)'.*/\1/p" "$tmp/block") --dry-run >"$tmp/said" || fail "$(cat "$tmp/said")"
grep -q "would write an increment" "$tmp/said" || fail "$(cat "$tmp/said")"
rmdir "$snaps"/fleece-backup-*
rm "$mnt/vm1.img"

step "restore: errors, and hostile folders"
restore() { # the status, a word of the message, the arguments
	local expected=$1 word=$2 status=0
	shift 2
	timeout 60 "$script" --restore "$@" >"$tmp/said" 2>&1 || status=$?
	[ $status = "$expected" ] || fail "status $status, not $expected: --restore $*: $(cat "$tmp/said")"
	grep -qF -- "$word" "$tmp/said" || fail "--restore $*: $(cat "$tmp/said")"
	[ $status = 0 ] || [ ! -e "$tmp/new" ] || fail "--restore $*: there is an OUT"
	[ -z "$(find "$tmp" -maxdepth 1 -name '.*.part')" ] || fail "--restore $*: a part is left"
}
last=$(newest)
restore 66 "there is vm-" "$dir" 1999 a.img "$tmp/new" --name vm
restore 66 "No such file" "$tmp/none" latest a.img "$tmp/new"
restore 66 "; it has " "$dir" latest none "$tmp/new" --name vm
restore 66 "latest of which?" "$dir" latest a.img "$tmp/new"
restore 66 "is not one, but" "$dir" 2 a.img "$tmp/new" --name vm
restore 64 "path below SOURCE" "$dir" latest ../a.img "$tmp/new" --name vm
restore 64 "path below SOURCE" "$dir" latest /a.img "$tmp/new" --name vm
echo precious >"$tmp/precious"
restore 73 exists "$dir" latest a.img "$tmp/precious" --name vm
[ "$(cat "$tmp/precious")" = precious ] || fail "an OUT was overwritten"
restore 73 "no such directory" "$dir" latest a.img "$tmp/none/new" --name vm
restore 64 needs "$dir" latest a.img
restore 0 "would restore" "$dir" "$last" . "$tmp/new" --dry-run
[ ! -e "$tmp/new" ] || fail "--dry-run restores"
restore 0 "restored: " "$dir" "${last#vm-}" ./a.img "$tmp/new"
cmp "$tmp/new" "$REF/out/$last/a.img"
rm "$tmp/new"
ln -s . "$tmp/ref/loop"
(cd "$tmp/ref/loop" && "$script" --restore "$dir" "$last" b.img new --quiet) || fail "a relative OUT"
cmp "$tmp/ref/new" "$REF/out/$last/b.img"
rm "$tmp/ref/new" "$tmp/ref/loop"
: >"$tmp/.new.part" # of one that was killed
restore 0 "restored: " "$dir" "$last" a.img "$tmp/new"
rm "$tmp/new"
echo secret >"$tmp/secret"
cp -a "$dir" "$tmp/hostile"
hostile=("../x" "a//b" image parent loop symlink fifo backing data cut json flip)
[ -z "$long" ] || hostile+=("/x" "sub/../../x" "." "" size version)
for what in "${hostile[@]}"; do
	rm -rf "$tmp/hostile/$last"
	cp -a "$dir/$last" "$tmp/hostile/"
	python3 "$here/incremental.py" forge "$tmp/hostile/$last" "$what"
	status=0
	timeout 60 "$script" --restore "$tmp/hostile" "$last" . "$tmp/new" >"$tmp/said" 2>&1 || status=$?
	[[ $status =~ ^(66|74)$ ]] || fail "hostile $what: status $status: $(cat "$tmp/said")"
	! ls -d "$tmp"/{new,.new.part,x} 2>/dev/null || fail "hostile $what: something was written"
	! grep -q Traceback "$tmp/said" || fail "hostile $what: $(cat "$tmp/said")"
	[ "$what" != json ] || restore 74 "the latest is damaged: $last" "$tmp/hostile" latest . "$tmp/new" --name vm
	verify=()
	[ "$what" != flip ] || verify=(--verify) # that takes reading
	! "$script" --list "$tmp/hostile" "${verify[@]}" >"$tmp/said" 2>&1 || fail "hostile $what: --list finds nothing"
	! grep -q Traceback "$tmp/said" || fail "hostile $what: $(cat "$tmp/said")"
done
rm -rf "$tmp/hostile/$last"
ln -s "$dir/$last" "$tmp/hostile/$last"
restore 66 "cannot be used" "$tmp/hostile" "$last" . "$tmp/new"

step "restored by an ordinary user"
mkdir "$tmp/home"
chown 54321:54321 "$tmp/home"
as_user() { # the script's own folder may be one that nobody else may enter
	setpriv --reuid=54321 --regid=54321 --clear-groups env HOME="$tmp/home" "$@"
}
chmod 755 "$dir"
if as_user test -x "$script"; then
	(cd / && as_user "$script" --restore "$dir" "$last" a.img "$tmp/home/a.img" --quiet) || fail "an ordinary user cannot restore"
	cmp "$tmp/home/a.img" "$REF/out/$last/a.img"
	[ "$(stat -c %u "$tmp/home/a.img")" = 54321 ] || fail "whose is it?"
	chmod 600 "$dir/$last/b.img.qcow2"
	! (cd / && as_user "$script" --restore "$dir" "$last" b.img "$tmp/home/b.img" >"$tmp/said" 2>&1) || fail "it may not be read"
	grep -q 'b.img.qcow2: Permission denied' "$tmp/said" || fail "$(cat "$tmp/said")"
else
	echo "left out: $script is not for other users"
fi

step "mounted for the backup alone; VMs on SOURCE itself in between"
umount_fs
rm -rf "$fleece" "$dir"
mkdir "$fleece"
where=(--mount "$src" --fleece-dir "$fleece")
for what in full increment written; do
	backup 0 --name vm --incremental "$dir" --hook "$tmp/hook" --verify
	case $what in
	full) [ "$(about "$dir/$(newest)")" = "full None" ] || fail "$(about "$dir/$(newest)")" ;;
	increment) [ "$(about "$dir/$(newest)")" = "increment $(folders | sed -n 1p)" ] || fail "$(about "$dir/$(newest)")" ;;
	written) [ "$(about "$dir/$(newest)" | tail -n +2)" = b.img ] || fail "$(about "$dir/$(newest)")" ;;
	esac
	[ $what != increment ] || printf 'unseen' | dd of="$src/b.img" bs=1 seek=7000 conv=notrunc status=none
	[ $what != increment ] || right "$(newest)"
done
all_right
# the mount dies, and a VM is started on SOURCE at once: sooner than fleecefs can tell
cat >"$tmp/killer" <<END
#!/bin/sh
[ "\$1" != backup-end ] || { kill -KILL \$(cat "$tmp/pid"); sleep 0.2; printf unseen | dd of="$src/a.img" bs=1 seek=5000 conv=notrunc status=none; }
[ "\$1" != backup-start ] || pgrep -f "fleecefs $src $tmp/state" >"$tmp/pid"
END
chmod +x "$tmp/killer"
backup 70 --name vm --incremental "$dir" --hook "$tmp/killer" || true
backup 0 --name vm --incremental "$dir" --hook "$tmp/hook" --verify
grep -q "a full backup: a VM may have written to SOURCE past the mount" "$tmp/said" || fail "$(cat "$tmp/said")"
right "$(newest)"

echo "$restored restores of folders"
