# shellcheck shell=bash
# Part of fleece-backup: what is to be undone, and undoing it.
#
# $place/state holds pairs of a key and a value, each ended by a NUL byte; `made` is the same in memory.
# A key is written before what it names is made, so the file may name what is not there, and never
# the other way round:
#
#   guestN    --qga SOCKET or --virsh DOMAIN: its filesystems may be frozen
#   qmpN      SOCKET: disks of that VM may be on the mount ($place/qmpN is fleece-qmp's own state)
#   mount     MOUNTPOINT, which we mount
#   snapshot  its path. It outlives its mount, and a restart of the machine; so it stays named until it
#             has been seen to be gone on a living mount
#   part      what is written to the target and not whole yet
#   created   when that one was made: one of the same name that was made later is not ours
#   old       a copy that a new one takes the place of: .NAME.part.old
#   folder, record, since, spoilt   of --incremental: see increments.sh
#   token     stands in the environment of what we started, as FLEECE_RUN
#
# All of it may run in a trap, where a bare `return` means the status of what came before the signal: so
# each says what it returns.
#
# Order of undoing: guests go on; what we started ends; parts go; the snapshot; disks move back; the
# mount. The lock is on the source directory's own name, so that --on and --mount meet.

# Lines of /proc/self/mounts, as NUL-ended words: SOURCE, mount point, type.
mount_table() {
	local what where type
	while read -r what where type _; do
		printf '%b\0%b\0%s\0' "${what//\\/\\0}" "${where//\\/\\0}" "$type"
	done </proc/self/mounts
}

# What is mounted on $2: $1, a variable, becomes its SOURCE; fails if that is not a fleecefs.
mount_on() {
	local -n source_there=$1
	local what where type kind=''
	while IFS= read -r -d '' what && IFS= read -r -d '' where && IFS= read -r -d '' type; do
		[ "$where" = "$2" ] || continue
		# shellcheck disable=SC2034 # the caller's
		kind=$type source_there=$what
	done < <(mount_table)
	[ "$kind" = fuse.fleecefs ]
}
mounted() {
	# shellcheck disable=SC2034
	local ignored
	mount_on ignored "$1"
}

# Where $2, a SOURCE, is mounted: $1, a variable, becomes the mount point.
mount_of() {
	local -n mount_point=$1
	local what where type
	while IFS= read -r -d '' what && IFS= read -r -d '' where && IFS= read -r -d '' type; do
		if [ "$type" = fuse.fleecefs ] && [ "$what" = "$2" ]; then
			# shellcheck disable=SC2034 # the caller's
			mount_point=$where
			return 0
		fi
	done < <(mount_table)
	return 1
}

find_place() {
	local base=${FLEECE_BACKUP_DIR-} digest
	if [ -z "$base" ]; then
		[ "$(id -u)" = 0 ] && base=/var/lib/fleece-backup ||
			base=${XDG_STATE_HOME:-${HOME:-/tmp/fleece-backup-$(id -u)}/.local/state}/fleece-backup
	fi
	if [ -n "$on" ]; then
		absolute on "$on"
		mount_on source "$on" || die 66 "$on: not a fleecefs mount"
	else
		[ -d "$source" ] || die 66 "$source: no such directory"
		absolute source "$source"
		mount_of mnt "$source" || ! mounted "$source" || die 64 "$source is a mount of fleecefs: say --on"
	fi
	umask 077
	mkdir -p -- "$base" || die 73 "$base cannot be made"
	absolute base "$base"
	[ -O "$base" ] || die 73 "$base belongs to another user"
	digest=$(printf %s "$source" | sha256sum)
	place=$base/${digest:0:32}
	mkdir -p -- "$place" || die 73 "$place cannot be made"
	printf '%s\n' "$source" >"$place/source" || die 73 "$place cannot be written"
	state=$place/state
	exec 9>"$place/lock" || die 73 "$place/lock cannot be written"
	if ! flock -n 9; then
		[ "$lock_wait" = 0 ] || note "waiting for another run on $source"
		flock -w "$lock_wait" 9 || die 75 "another run is at work on $source (see --lock-wait)"
	fi
	umask 022
}

declare -A made=()
# Writes `made`, whole or not at all.
save() {
	local key
	(
		umask 077
		for key in "${!made[@]}"; do
			printf '%s\0%s\0' "$key" "${made[$key]}"
		done >"$state.new"
	) || return $?
	# the rest does not outlive a restart of the machine
	if [ -z "${made[snapshot]-}${made[part]-}${made[old]-}" ]; then
		mv -f -- "$state.new" "$state"
	else
		sync -- "$state.new" && mv -f -- "$state.new" "$state" && sync -- "$place"
	fi
}
will() {
	made[$1]=$2
	save || bail 73 "$state cannot be written"
}
load() {
	local key value
	while IFS= read -r -d '' key && IFS= read -r -d '' value; do
		made[$key]=$value
	done <"$state"
}

# Guests go on. The watchdog of fleece-qmp thaws if this cannot.
thaw_guests() {
	local key
	for key in "${!made[@]}"; do
		[[ $key == guest* ]] || continue
		if qmp_call thaw "${made[$key]%% *}" "${made[$key]#* }" >"$place/thawed"; then
			note "thawed ${made[$key]#* }: $(cat "$place/thawed") filesystems"
		fi
		unset "made[$key]"
	done
}

drop_parts() {
	local old name
	if [ -n "${made[old]-}" ]; then
		old=${made[old]}
		name=${old##*/}
		name=${old%/*}/${name:1:-9} # .NAME.part.old
		if [ -e "$old" ] && [ ! -e "$name" ]; then
			if mv -T -- "$old" "$name"; then
				note "put back $name"
			else
				complain "$name is left as $old"
				return 0
			fi
		fi
		rm -rf --one-file-system -- "$old"
		unset "made[old]"
	fi
	if [ -n "${made[part]-}" ]; then
		[ ! -e "${made[part]}" ] || note "removed ${made[part]}, which was not whole"
		if rm -rf --one-file-system -- "${made[part]}"; then
			unset "made[part]"
		else
			complain "${made[part]} is left"
		fi
	fi
}

# Tries "$@" for ten seconds; what it says goes to $place/error.
persist() {
	local tries
	for tries in {20..1}; do
		"$@" 2>"$place/error" && return 0
		[ "$tries" = 1 ] || sleep 0.5
	done
	return 1
}

drop_snapshot() {
	local path=${made[snapshot]} top now past=${made[since]-} settled=3
	[ -z "${made[spoilt]-}" ] || past=
	top=${path%/*}
	if ! mounted "${top%/*}"; then
		# it comes back with the next mount
		[ -z "${started-}" ] || complain "the snapshot ${path##*/} is left, for the mount is gone: the next run drops it"
		return 2
	fi
	# not by test -e: of a mount that has just died the kernel remembers some names, and not others
	now=$(helper created "$path" 2>"$place/error") || {
		complain "the snapshot ${path##*/} is left, for the mount does not answer: the next run drops it"
		return 2
	}
	if [ "$now" != - ] && [ -n "${made[created]-}" ] && [ "$now" != "${made[created]}" ]; then
		note "the snapshot $path was made anew by somebody else: it is left"
	elif [ "$now" != - ]; then
		if [ -n "${made[folder]-}" ] && [ -n "${made[record]-}" ]; then
			settled=0
			helper settle "${made[folder]}" "${made[record]}" "$path" "$now" "$past" >"$place/older" || settled=$?
		fi
		case $settled in
		0) keep_checkpoint "$path" ;;
		3) persist rmdir -- "$path" && note "dropped the snapshot $path" ;;
		*) false ;;
		esac || {
			complain "the snapshot $path is left: $(cat "$place/error")"
			helper holders "$path" >&2
			return 1
		}
	fi
	forget_snapshot
}

forget_snapshot() {
	local key
	for key in "${OF_SNAPSHOT[@]}"; do unset "made[$key]"; done
}
OF_SNAPSHOT=(snapshot created folder record since spoilt)

# Is nothing left but a snapshot, which comes back with the next mount?
only_snapshot() {
	local key
	[ -n "${made[snapshot]-}" ] || return 1
	for key in "${!made[@]}"; do
		[[ " ${OF_SNAPSHOT[*]} " == *" $key "* ]] || return 1
	done
}

unmount() {
	local how=(umount --)
	[ "$(id -u)" = 0 ] || how=(fusermount3 -u --)
	if mounted "$1"; then
		persist "${how[@]}" "$1" || {
			complain "$1 is still mounted: $(cat "$place/error")"
			return 1
		}
		note "unmounted $1"
	fi
	rmdir -- "$1" 2>/dev/null
	return 0
}

# Clears away what `made` names. 0, or 1 with what is left still named in the state.
undo() {
	local key left=0 drop=0 force
	thaw_guests
	if [ -n "${made[token]-}" ]; then
		helper end "${made[token]}" "${made[snapshot]-/nonexistent}" "${child:-0}"
		unset "made[token]"
	fi
	drop_parts
	[ -z "${made[snapshot]-}" ] || drop_snapshot || drop=$?
	[ $drop = 0 ] || left=1
	# a folder without a snapshot: it was never frozen, or it is done
	[ -n "${made[snapshot]-}" ] || forget_snapshot
	if [ -n "${made[mount]-}" ] && { [ -z "$phase" ] || [ -n "$started" ]; } && ! [ -e "${made[mount]}/.fleecefs/status.json" ]; then
		written_past || left=1 # it died, and who knows what was done to SOURCE since
	fi
	force=
	[ $drop != 1 ] || force=1 # it is lost anyway, and the VM is to end where it began
	for key in "${!made[@]}"; do
		[[ $key == qmp* ]] || continue
		if qmp_call move-out --qmp "${made[$key]}" --state "$place/$key" ${force:+--force}; then
			note "moved back: the disks of the VM at ${made[$key]}"
			unset "made[$key]"
		else
			complain "disks of the VM at ${made[$key]} are still on the mount: the next run moves them back, or" \
				"fleece-qmp move-out --qmp ${made[$key]} --state $place/$key"
			left=2
		fi
	done
	if [ -n "${made[mount]-}" ] && [ $left != 2 ] && [ $drop != 1 ]; then
		if unmount "${made[mount]}"; then
			unset "made[mount]"
		else
			left=2
		fi
	fi
	if [ ${#made[@]} = 0 ]; then
		rm -f -- "$state" "$state.new"
	else
		save
	fi
	[ $left = 0 ] && [ -z "$left_behind" ]
}

# What a run that was killed has left. A snapshot may have to wait until there is a mount again.
clear_leftovers() {
	local what
	[ ! -f "$state" ] || load
	if [ -z "${made[mount]-}" ] && mounted "$place/mnt"; then
		made[mount]=$place/mnt
	fi
	[ ${#made[@]} -gt 0 ] || return 0
	for what in "${!made[@]}"; do
		case $what in token | created | record | since | spoilt) ;; *) note "left by an earlier run: ${what%%[0-9]*} ${made[$what]}" ;; esac
	done
	undo || only_snapshot ||
		bail 70 "what an earlier run has left cannot be cleared away"
	mnt=
	[ -n "$on" ] || mount_of mnt "$source" || mnt=
}

child=
# run() sleeps on this: nothing ever comes from here
exec 7<> <(:)
started=
phase=
stopped=
# The one way out after find_place.
finish() {
	# a trap runs inside of a `read` that waits, and then with that one's own IFS
	local status=$1 IFS=$' \t\n'
	trap '' INT TERM HUP QUIT
	trap - EXIT
	stop_progress
	thaw_guests
	[ -z "$stopped" ] || last_hook post-restart
	undo || [ "$status" != 0 ] || status=70
	if [ "$status" = 0 ]; then
		last_hook job-end || status=78
	else
		[ "$phase" != backup ] || FLEECE_STATUS=$status last_hook backup-abort
		[ -z "$phase" ] || FLEECE_STATUS=$status last_hook job-abort
		complain "FAILED with status $status after $SECONDS s"
	fi
	[ "$status" != 0 ] || note "done in $SECONDS s"
	exit "$status"
}
bail() {
	complain "${@:2}"
	finish "$1"
}
on_signal() {
	complain "ended by signal SIG$1"
	finish "$2"
}

# Runs "$@" in a session of its own and waits for it, so that a signal is answered at once. bash misses a signal
# that comes just before its `wait` begins to wait, until the child ends; so that waits for who has ended alone.
run() {
	local status=0
	FLEECE_RUN=$token setsid setpriv --pdeathsig TERM env --default-signal=INT,QUIT,HUP,TERM,PIPE -- "$@" <&0 7>&- 8>&- 9>&- &
	child=$!
	while kill -0 "$child" 2>/dev/null; do
		read -rt .1 -u 7 _ || :
	done
	wait "$child" || status=$?
	return $status
}
# The same for a script; $1 is it, and the rest its arguments from $0 on.
script() { FLEECE_SNAPSHOT=$snapshot run bash -o pipefail -c "$@"; }

hook_environment() {
	export FLEECE_SNAPSHOT=${snapshot-} FLEECE_MOUNT=${mnt-} FLEECE_TARGET=${wanted:-$target}
	export TARGET=$FLEECE_TARGET
}
hook_words() {
	words=("$hook" "$1")
	[[ $1 == job-* ]] || words+=(snapshot "$name")
}
run_hook() {
	local status=0 words
	[ -n "$hook" ] || return 0
	hook_words "$1"
	hook_environment
	run "${words[@]}" </dev/null || status=$?
	[ $status = 0 ] || complain "the hook failed at $1, with status $status"
	return $status
}
# On the way out, where nothing may stop us for long.
last_hook() {
	local words
	[ -n "$hook" ] || return 0
	hook_words "$1"
	hook_environment
	timeout -k 5 600 env --default-signal=INT,QUIT,HUP,TERM,PIPE -- "${words[@]}" </dev/null 7>&- 8>&- 9>&- || {
		complain "the hook failed at $1"
		return 1
	}
}
