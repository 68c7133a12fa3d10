# shellcheck shell=bash
# Part of fleece-backup: the mount, the VMs' disks, and the snapshot while guests hold still.

token=$$-$RANDOM$RANDOM-$EPOCHSECONDS
started=
mnt=
snapshot=

qmp_call() {
	local program
	find_program program fleece-qmp || {
		complain "fleece-qmp is not installed"
		return 69
	}
	"$program" "$@" </dev/null 7>&- 8>&- 9>&-
}

mount_source() {
	local program options=() begin=$SECONDS
	[ -z "$on" ] || mnt=$on
	[ ${#qmp[@]} = 0 ] || written_past || bail 73 "$place cannot be written"
	if [ -n "$mnt" ]; then
		[ -z "$fleece_dir$mount_options" ] || note "$source is mounted on $mnt already: that is used, as it is"
	else
		find_program program fleecefs || bail 69 "fleecefs is not installed"
		mnt=$place/mnt
		mkdir -p -- "$mnt" || bail 73 "$mnt cannot be made"
		[ -z "$fleece_dir" ] || options+=("--fleece-dir=$fleece_dir")
		[ -z "$mount_options" ] || options+=(-o "$mount_options")
		if [ ${#qmp[@]} -gt 0 ]; then
			options+=(--source-lock=off)
			if [ "$(id -u)" = 0 ]; then # QEMU may be another user
				options+=(-o allow_other)
				chmod 711 "${place%/*}" "$place" "$mnt"
			fi
		fi
		will mount "$mnt"
		# a session of its own: a terminal's signal to both would leave a mount that comes later
		setsid -w "$program" "$source" "$mnt" "${options[@]}" </dev/null 7>&- 8>&- 9>&- || bail 73 "$source cannot be mounted"
		note "mounted $source on $mnt in $((SECONDS - begin)) s"
	fi
	status_file=$mnt/.fleecefs/status.json
	helper places "$status_file" >"$place/places" || bail 66 "$mnt does not answer"
	IFS= read -r -d '' snapdir <"$place/places" || bail 66 "$mnt does not answer"
	if [ -n "${made[snapshot]-}" ]; then # of an earlier run, and it was not mounted
		made[snapshot]=$mnt/$snapdir/${made[snapshot]##*/}
		drop_snapshot || bail 70 "what an earlier run has left cannot be cleared away"
		save || bail 73 "$state cannot be written"
	fi
	[ "$kind" != incremental ] || name_folder
	snapshot=$mnt/$snapdir/$name
	[ ! -e "$snapshot" ] ||
		bail 73 "$snapshot exists already, and no earlier run has left it: drop it with rmdir, or use --name"
	started=1
}

move_in() {
	local number begin=$SECONDS
	for number in "${!qmp[@]}"; do
		will "qmp$number" "${qmp[number]}"
		qmp_call move-in --qmp "${qmp[number]}" --source "$source" --mount "$mnt" --snapdir "$snapdir" \
			--state "$place/qmp$number" >"$place/disks" ||
			bail 69 "the disks of the VM at ${qmp[number]} were not moved"
		note "moved onto the mount in $((SECONDS - begin)) s: $(paste -sd ' ' "$place/disks")"
	done
}

# Whole milliseconds since $1, an $EPOCHREALTIME.
milliseconds() {
	local now=$EPOCHREALTIME
	echo $(((${now/[.,]/} - ${1/[.,]/}) / 1000))
}

freeze() {
	local number count began status=0 pids=()
	if [ ${#guests[@]} -gt 0 ] || [ -n "$hook" ]; then
		stopped=1
		run_hook pre-stop || bail 78 "not begun"
	fi
	for number in "${!guests[@]}"; do
		made["guest$number"]=${guests[number]}
	done
	will snapshot "$snapshot" # before guests hold still, for this may take its time
	# in the file for all, in memory for those that we have frozen: another's freeze is not ours to end
	for number in "${!guests[@]}"; do unset "made[guest$number]"; done
	began=$EPOCHREALTIME
	for number in "${!guests[@]}"; do
		made["guest$number"]=${guests[number]}
		qmp_call freeze --caller $$ "${guests[number]%% *}" "${guests[number]#* }" >"$place/frozen" || {
			[ $? != 1 ] || unset "made[guest$number]" # refused
			bail 69 "the guest was not frozen: ${guests[number]#* }"
		}
		note "frozen: $(cat "$place/frozen") filesystems of ${guests[number]#* }"
	done
	mkdir -- "$snapshot" 2>"$place/error" 7>&- 8>&- 9>&- || status=$?
	if [ $status != 0 ]; then
		# one that was made by somebody else meanwhile is not ours; but a mkdir that was killed may have made it
		[ $status -gt 128 ] || unset "made[snapshot]"
		bail 73 "no snapshot: $(cat "$place/error")"
	fi
	for number in "${!guests[@]}"; do
		qmp_call thaw "${guests[number]%% *}" "${guests[number]#* }" >"$place/thawed$number" &
		pids+=($!)
	done
	for number in "${!guests[@]}"; do
		wait "${pids[number]}" || bail 69 "the guest does not thaw: ${guests[number]#* }"
		unset "made[guest$number]"
		count=$(cat "$place/thawed$number")
		[ "$count" != 0 ] || bail 69 "the guest did not hold still until the snapshot was made: ${guests[number]#* }"
	done
	note "made the snapshot $snapshot${guests[*]+; guests held still for $(milliseconds "$began") ms}"
	if [ -n "$stopped" ]; then
		stopped=
		run_hook post-restart || bail 78 "the hook failed"
	fi
}

# Whether all that was frozen is still there.
check_snapshot() {
	local failed=0
	helper summary "$status_file" "$name" >"$place/summary" || failed=1
	[ -n "$quiet" ] || while IFS= read -r line; do note "$line"; done <"$place/summary"
	if [ $failed != 0 ]; then
		complain "the snapshot broke: what was written is not to be used"
	fi
	check_past || failed=1
	return $failed
}

# What a VM writes past the mount is not frozen at all.
check_past() {
	[ ${#qmp[@]} -gt 0 ] || return 0
	helper past "$parts" "$source" "$place/list" >&2 || {
		complain "name that VM with --qmp too, or leave its disks out with --exclude"
		return 1
	}
}
