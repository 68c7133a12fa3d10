# shellcheck shell=bash
# Part of fleece-backup: what is written, how, and whether it is what was frozen.
#
# --tar and --copy write to a hidden name beside the wanted one, which is taken away if the run fails,
# and given the wanted name when all of it is on storage and has been verified. A tool of its own
# (rsync, borg, restic) leaves what such a tool leaves. --incremental is in increments.sh.

archive=

# Is $1 on another host, or some other service?
remote() { [[ ${1%%/*} == *:* ]]; }

check_target() {
	if [ -n "$bwlimit" ]; then
		[[ $bwlimit =~ ^[1-9][0-9]{0,8}[KMGTkmgt]?$ ]] || usage "--bwlimit $bwlimit: not like 50M"
		rate=$(numfmt --from=iec "${bwlimit^^}")
	fi
	if [ "$keep" != 0 ]; then
		[[ $keep =~ ^[1-9][0-9]{0,5}$ ]] || usage "--keep-last $keep: not a number"
		[[ $kind =~ ^(tar|copy|incremental)$ ]] || usage "--keep-last is for --tar, --copy and --incremental"
		[ "$kind" = incremental ] || helper prune --check "$target" || exit 64
	fi
	case $kind in
	'') [ -z "$bwlimit" ] || usage "--bwlimit is for a target" ;;
	tar | copy)
		absolute target "$target"
		wanted=$(date +"$target" && echo .)
		wanted=${wanted%??}
		[ -z "$bwlimit" ] || command -v pv >/dev/null || die 69 "--bwlimit with --$kind needs pv"
		case $wanted in *.zst) set -- zstd ;; *.gz) set -- gzip ;; *.xz) set -- xz ;; *) set -- tar ;; esac
		command -v "$1" >/dev/null || die 69 "$1 is not installed"
		;;
	incremental) ;;
	*) remote "$target" || absolute target "$target" ;;
	esac
	check_incremental
	if [ "$kind" = borg ] && [ -n "$bwlimit" ] && ! remote "$target"; then
		usage "--bwlimit: borg limits what it sends to another host only"
	fi
}

# Nothing may be written into what is being backed up, nor be taken for a target that is none.
check_places() {
	local there=${wanted:-$target} top
	[ -n "$kind" ] || return 0
	[ "$kind" = incremental ] || ! remote "$target" || return 0
	for top in "$source" "$mnt" "$place"; do
		[[ $there/ != "$top"/* ]] || bail 73 "$there: this is inside of $top"
	done
	case $kind in
	rsync | copy)
		for top in "$source" "$mnt" "$place"; do
			[[ $top/ != "${there%/}"/* ]] || bail 73 "$there: this has $top in it"
		done
		;;
	esac
	case $kind in
	tar) [ ! -e "$there" ] || [ -f "$there" ] || bail 73 "$there exists, and is not a file" ;;
	copy)
		[ ! -e "$there" ] || [ -f "$there/$COPY_MARK" ] || { [ -d "$there" ] && [ -z "$(ls -A -- "$there")" ]; } ||
			bail 73 "$there exists, and is not a copy of an earlier run (no $COPY_MARK in it): it is left alone"
		;;
	esac
}
COPY_MARK=.fleece-backup

dry_run() {
	local -a say=("would")
	[ ! -f "$state" ] || echo "would clear away what an earlier run has left"
	[ -n "$on$mnt" ] || echo "would mount $source on $place/mnt"
	[ ${#qmp[@]} = 0 ] || echo "would move the disks of the VMs at ${qmp[*]}"
	[ ${#guests[@]} = 0 ] || echo "would freeze the filesystems of ${guests[*]#* }"
	echo "would make the snapshot $name of:"
	helper choose --live "${on:-$source}" "$place/list" "${globs[@]}" >"$place/numbers" || exit 66
	tr '\0' '\n' <"$place/list" | sed 's/^/  /'
	case $kind in
	'') say+=(run "${command[@]}") ;;
	incremental)
		local plan line top=''
		mnt=${on:-$mnt}
		if [ -n "$mnt" ] && helper places "$mnt/.fleecefs/status.json" >"$place/places"; then
			IFS= read -r -d '' snapdir <"$place/places" || snapdir=snapshots
			top=$mnt/$snapdir
		fi
		plan_words
		echo "into $target:"
		helper forecast "${plan[@]}" "top=$top" "keep=$keep" >"$place/forecast" || exit 73
		while IFS= read -r line; do
			[[ $line == n* ]] && echo "${line:1}" || echo "would remove $target/${line:1}"
		done <"$place/forecast"
		keep=0 say=()
		;;
	*) say+=("write --$kind to ${wanted:-$target}") ;;
	esac
	[ ${#say[@]} = 0 ] || echo "${say[*]}"
	[ -z "$verify" ] || echo "would read it back and compare"
	if [ "$keep" != 0 ]; then
		helper prune --dry "$target" "$keep" "$wanted" | tr '\0' '\n' | sed 's/^/would remove /'
	fi
	exit 0
}

# Sets the numbers of files and bytes, and makes $place/list and $place/left.
choose() {
	local numbers
	helper choose "$1" "$place/list" "${globs[@]}" >"$place/numbers" || return $?
	read -r -a numbers <"$place/numbers"
	[ "${numbers[3]}" != - ] || return 1
	will created "${numbers[3]}"
	files=${numbers[0]} bytes=${numbers[1]} allocated=${numbers[2]}
	[ "$files" != 0 ] || [ ${#globs[@]} = 0 ] || bail 66 "no file matches --include and --exclude"
	note "to be backed up: $files files, $bytes bytes, of them $allocated on storage"
}

start_progress() {
	local total=$bytes
	[[ ! $kind =~ ^(tar|copy)$ ]] || total=$allocated
	[ "$kind" != incremental ] || total=$planned
	[ -z "$quiet" ] || return 0
	setpriv --pdeathsig TERM "${python[@]}" "$parts/fleece_backup/helper.py" progress "$status_file" "$name" "$total" \
		</dev/null 7>&- 8>&- 9>&- &
	progress=$!
}
progress=
stop_progress() {
	[ -n "$progress" ] || return 0
	kill -TERM "$progress" 2>/dev/null
	wait "$progress" 2>/dev/null
	progress=
}

compressor() {
	case $1 in
	*.zst) echo "zstd -q" ;;
	*.gz) echo gzip ;;
	*.xz) echo xz ;;
	*) echo cat ;;
	esac
}

back_up() {
	local status=0 begin=$SECONDS
	case $kind in
	'') run_command || status=$? ;;
	tar | copy) write_part || status=$? ;;
	incremental) write_folder || status=$? ;;
	*) "write_$kind" || status=$? ;;
	esac
	child=
	[ $status != 0 ] || note "${kind:-COMMAND} ended well in $((SECONDS - begin)) s${said:+: $said}"
	return $status
}
said=

run_command() {
	local word words=()
	for word in "${command[@]}"; do words+=("${word//\{\}/"$snapshot"}"); done
	FLEECE_SNAPSHOT=$snapshot FLEECE_MOUNT=$mnt FLEECE_FILES=$place/list run env -C "$snapshot" -- "${words[@]}"
}

write_part() {
	local part limit=cat pack
	# shellcheck disable=SC2016 # the inner shell expands them
	local tar='tar -C "$1" --null --no-recursion --verbatim-files-from -T "$3" -cSf -'
	[ -z "$bwlimit" ] || limit="pv -q -L $rate"
	pack=$(compressor "$wanted")
	mkdir -p -- "${wanted%/*}/" || return 73
	part=${wanted%/*}/.${wanted##*/}.part
	[ ! -e "$part" ] || bail 73 "$part exists, and no earlier run of this kind has left it: remove it"
	will part "$part"
	# shellcheck disable=SC2016
	if [ "$kind" = tar ]; then
		script "$tar | $limit | $pack"' >"$2" && sync -- "$2"' - "$snapshot" "$part" "$place/list" || return $?
	else
		script 'mkdir -- "$2" && '"$tar | $limit"' | tar -C "$2" -xpSf - && find "$2" -type f -print0 | xargs -0r sync -- &&
			find "$2" -type d -print0 | xargs -0 sync --' - \
			"$snapshot" "$part" "$place/list" || return $?
	fi
	said="$(du -s -B1 -- "$part" | cut -f1) bytes on storage"
}

write_rsync() {
	local options=(-aHS --delete --stats --from0 "--exclude-from=$place/left.rsync")
	helper patterns rsync "$place/left" >"$place/left.rsync" || return 70
	[ -z "$bwlimit" ] || options+=("--bwlimit=$((rate / 1024 + 1))")
	run rsync "${options[@]}" -- "$snapshot/" "$target/" >"$place/said" || return $?
	said=$(helper said rsync <"$place/said")
}

# borg does not remember, and reads again the next time, whatever is as new as the newest file that it
# has seen. So a little file that is newer than all goes along, which says what this is.
write_borg() {
	local options=(--sparse --json '--files-cache=ctime,size,inode')
	archive=$name-$(date +%Y-%m-%dT%H:%M:%S)
	[ -z "$bwlimit" ] || options+=("--upload-ratelimit=$((rate / 1024 + 1))")
	mkdir -p -- "$place/about" && printf '%s\n' "$source, frozen as $name on $(date -R)" \
		>"$place/about/.fleece-backup" || return 73
	# shellcheck disable=SC2016
	script 'cd "$1" && shift && exec <"$1" && shift && exec borg create "$@"' - \
		"$snapshot" "$place/list.borg" "${options[@]}" --paths-from-stdin --paths-delimiter '\0' \
		"$target::$archive" >"$place/said" || return $?
	said="archive $archive, $(helper said borg <"$place/said")"
}

write_restic() {
	local options=(--json --exclude-file="$place/left.restic")
	helper patterns restic "$place/left" "$snapshot" >"$place/left.restic" || return 64
	[ -z "$bwlimit" ] || options+=("--limit-upload=$((rate / 1024 + 1))")
	run env -C "$snapshot" restic -r "$target" -q backup "${options[@]}" . >"$place/said" || return $?
	archive=$(helper said restic-id <"$place/said")
	said="snapshot $archive, $(helper said restic <"$place/said")"
}

verify_it() {
	local begin=$SECONDS unpack written=$place/written.xxh128 status=0
	if [ "$kind" = incremental ]; then
		verify_folder
		return $?
	fi
	# shellcheck disable=SC2016 # the inner shell expands it
	local sums='python3 -I -S -B "$0" sums'
	unpack=$(compressor "$wanted")
	[ "$unpack" = cat ] || unpack+=" -d"
	if [ "$kind" = rsync ] && remote "$target"; then
		# both ends read all files again
		run rsync -aHSn --checksum --delete --from0 "--exclude-from=$place/left.rsync" --out-format=%n -- \
			"$snapshot/" "$target/" >"$written" || return $?
		[ ! -s "$written" ] || {
			head -5 "$written" >&2
			complain "what was written is not what was frozen"
			return 74
		}
		note "verified: $files files by rsync's own checksums, in $((SECONDS - begin)) s"
		return 0
	fi
	set -- "$parts/fleece_backup/helper.py" "$written" "$place/list" "${made[part]-$target}" "$archive"
	run "${python[@]}" "$1" sums tree "$snapshot" "$3" >"$place/frozen.xxh128" || return 74
	# shellcheck disable=SC2016
	case $kind in
	tar) script "$unpack"' <"$3" | '"$sums"' tar >"$1"' "$@" ;;
	copy | rsync) script "$sums"' written "$3" "$2" >"$1"' "$@" ;;
	borg) script 'borg export-tar "$3::$4" - | '"$sums"' tar >"$1"' "$@" ;;
	restic) script 'restic -q -r "$3" dump --archive tar "$4" / | '"$sums"' tar >"$1"' "$@" ;;
	esac || status=$?
	child=
	[ $status = 0 ] || {
		complain "what was written cannot be read back"
		return 74
	}
	helper compare "$place/frozen.xxh128" "$written" >&2 || {
		complain "what was written is not what was frozen${archive:+: do not use $archive}"
		return 74
	}
	note "verified: $files files, $bytes bytes are what was frozen, in $((SECONDS - begin)) s"
}

# What is whole gets its name, and what is too old goes.
publish() {
	local part=${made[part]-} old
	[ -n "$part" ] || return 0
	if [ "$kind" = incremental ]; then
		publish_folder
		return $?
	fi
	if [ "$kind" = copy ]; then
		printf '%s\n' "$source, frozen as $name on $(date -R)" >"$part/$COPY_MARK" && sync -- "$part/$COPY_MARK" "$part" ||
			return 73
	fi
	if [ "$kind" = copy ] && [ -e "$wanted" ]; then
		old=$part.old
		will old "$old"
		mv -T -- "$wanted" "$old" || return 73
	fi
	mv -T -- "$part" "$wanted" || return 73
	rm -f -- "$wanted.xxh128"
	if [ -n "$verify" ]; then
		cp -- "$place/frozen.xxh128" "$wanted.xxh128" && sync -- "$wanted.xxh128" || return 73
	fi
	sync -- "${wanted%/*}/" || return 73
	unset "made[part]"
	drop_parts
	save || return 73
	note "written: $wanted"
	[ "$keep" != 0 ] || return 0
	helper prune "$target" "$keep" "$wanted" | while IFS= read -r -d '' old; do
		rm -rf --one-file-system -- "$old" "$old.xxh128" && note "removed $old"
	done
}
