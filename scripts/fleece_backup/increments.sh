# shellcheck shell=bash
# Part of fleece-backup: --incremental, and what it leaves on the mount.
#
# Keys in the state (state.sh) beside those of every target:
#
#   folder    DIR/NAME-DATE, which the part becomes
#   record    the file that names this job's checkpoints
#   since     the token (see below) as of the freeze
#   spoilt    VMs write past the mount afterwards (--qmp), so that no checkpoint is worth keeping
#
# The rename of the part to the folder is what decides. Before it the snapshot is one to be dropped, as every
# other target's; after it, whoever clears away (this run at its end, or the next one if this was killed)
# makes it a checkpoint, and then drops the checkpoints of this job that it takes the place of. So the last
# folder that is published has its checkpoint at all times, unless fleecefs itself has lost it.
#
# $place/past holds a token that changes whenever a VM may have written past the mount without fleecefs seeing it: a
# run with --qmp (disks move back while the mount is there still), a mount of ours that died. A checkpoint
# of before that is not used: the record has the token with it.

job=

check_incremental() {
	job=$name
	[[ $every =~ ^(0|[1-9][0-9]?|1[0-9][0-9]|200)$ ]] || usage "--full-every $every: not a number up to 200"
	[ "$every" = 0 ] || [ "$kind" = incremental ] || usage "--full-every is for --incremental"
	if [ "$kind" = incremental ]; then
		absolute target "$target"
		command -v qemu-img >/dev/null || die 69 "qemu-img is not installed"
	fi
}

# --restore and --list need no mount, and no state.
without_mount() {
	local word path
	[ -z "$on$source$kind${command[*]-}" ] || usage "--restore and --list go without a mount, a target and a COMMAND"
	for word in python3 xxhsum qemu-img; do
		command -v "$word" >/dev/null || die 69 "$word is not installed"
	done
	[ -n "$named" ] || name=
	if [ -n "$list" ]; then
		absolute path "$list"
		exec "${python[@]}" "$parts/fleece_backup/helper.py" listing "$path" "$name" "$verify"
	fi
	absolute path "${restore[0]}"
	[[ ${restore[3]} == /* ]] || restore[3]=$PWD/${restore[3]}
	while [[ ${restore[3]} == ?*/ ]]; do restore[3]=${restore[3]%/}; done
	trap - PIPE
	exec "${python[@]}" "$parts/fleece_backup/helper.py" restore "$path" "${restore[@]:1}" "$name" "$quiet" "$dry"
}

# Runs into one DIR exclude each other, whatever they freeze. It is ours while descriptor 8 is open.
lock_dir() {
	local top
	[ "$kind" = incremental ] || return 0
	for top in "$source" "${on:-$mnt}" "$place"; do
		[ -z "$top" ] || [[ $target/ != "$top"/* ]] || die 73 "$target: this is inside of $top"
	done
	mkdir -p -- "$target" || die 73 "$target cannot be made"
	exec 8>>"$target/.fleece-backup.lock" || die 73 "$target cannot be written"
	if ! flock -n 8; then
		[ "$lock_wait" = 0 ] || note "waiting for another run into $target"
		flock -w "$lock_wait" 8 || die 75 "another run is at work in $target (see --lock-wait)"
	fi
}

record_path() {
	local digest
	digest=$(printf '%s\0' "$job" "$target" | sha256sum)
	printf %s "$place/checkpoints-${digest:0:32}"
}

past() {
	local token=-
	[ ! -f "$place/past" ] || read -r token <"$place/past"
	printf %s "$token"
}

# From now on checkpoints of before are not used.
written_past() {
	printf '%s\n' "$token" >"$place/past.new" && sync -- "$place/past.new" && mv -f -- "$place/past.new" "$place/past" &&
		sync -- "$place"
}

# A name for the snapshot and the folder; and what killed runs have left in DIR goes.
name_folder() {
	local old
	helper folder_name "$target" "$job" "$mnt/$snapdir" "$source" >"$place/names" || bail 73 "no folder can be made in $target"
	{
		IFS= read -r -d '' name
		while IFS= read -r -d '' old; do
			rm -rf --one-file-system -- "${target:?}/$old" && note "removed $target/$old, which an earlier run has left"
		done
	} <"$place/names"
	wanted=$target/$name
}

plan_words() {
	plan=("dir=$target" "job=$job" "every=$every" "record=$(record_path)" "past=$(past)" "why=")
	[ ${#qmp[@]} = 0 ] || plan[5]="why=with --qmp, VMs write past the mount between two backups"
}

# Says lines of the helper's.
say_lines() {
	local line
	while IFS= read -r line; do note "$line"; done
}

# Sets `planned`: how much is to be written.
plan_folder() {
	local plan status=0
	will record "$(record_path)"
	will since "$(past)"
	[ ${#qmp[@]} = 0 ] || will spoilt 1
	will folder "$wanted"
	plan_words
	run "${python[@]}" "$parts/fleece_backup/helper.py" plan "${plan[@]}" "snapshot=$snapshot" "source=$source" \
		"list=$place/list" "draft=$place/draft" >"$place/planned" || status=$?
	child=
	[ $status = 0 ] || return $status
	{
		read -r planned
		say_lines
	} <"$place/planned"
}
planned=0

write_folder() {
	local part=$target/.$name.part
	will part "$part"
	run "${python[@]}" "$parts/fleece_backup/helper.py" increment "dir=$target" "part=$part" "snapshot=$snapshot" \
		"draft=$place/draft" "rate=${rate:-0}" || return $?
	said="$planned bytes of images"
}

verify_folder() {
	local begin=$SECONDS
	run "${python[@]}" "$parts/fleece_backup/helper.py" verify_increment "dir=$target" "part=${made[part]}" \
		"snapshot=$snapshot" "draft=${made[part]}/manifest.json" || return $?
	child=
	note "verified: $files files, $bytes bytes are what was frozen, in $((SECONDS - begin)) s"
}

publish_folder() {
	sync -- "${made[part]}" && mv -T -- "${made[part]}" "$wanted" && sync -- "$target" || return 73
	unset "made[part]"
	save || return 73
	note "written: $wanted"
	[ "$keep" = 0 ] || prune_folders
}

# Each is given a hidden name before it goes, so that none is ever there in part.
prune_folders() {
	local line status=0
	helper prune_chains "$target" "$job" "$keep" "$every" >"$place/pruned" || return 73
	while IFS= read -r line; do
		if [[ $line == n* ]]; then
			note "${line:1}"
		else
			line=${line:1}
			mv -T -- "$target/$line" "$target/.$line.gone" && rm -rf --one-file-system -- "$target/.$line.gone" &&
				note "removed $target/$line" || status=70
		fi
		[ $status = 0 ] || break # what it is against has to stay
	done <"$place/pruned"
	return $status
}

# The folder of the snapshot $1 is published, and it stands in the record: from now on it is a checkpoint alone, and those
# in $place/older go. 1: it is left to be done.
keep_checkpoint() {
	local path=$1 top=${1%/*} old state=''
	if [ -n "${made[spoilt]-}" ]; then
		persist rmdir -- "$path" || return 1
	elif [ ! -d "$path/.checkpoint" ] && ! persist mkdir -- "$path/.checkpoint"; then
		state=$(helper state "$path" 2>&1)
		if [[ $state =~ ^(ok|broken)$ ]]; then
			complain "no checkpoint could be made of $path"
			return 1
		fi
		complain "$path is $state: the next backup has to be a full one"
		persist rmdir -- "$path" || return 1
	else
		note "$path is a checkpoint now"
	fi
	while IFS= read -r -d '' old; do
		if persist rmdir -- "$top/$old"; then
			note "dropped the checkpoint $top/$old"
		else
			complain "the checkpoint $top/$old is left: $(cat "$place/error")"
			left_behind=1 # its name stays in the record: the next run tries again
		fi
	done <"$place/older"
	return 0
}
left_behind=
