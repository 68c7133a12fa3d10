# shellcheck shell=bash
# bash completion for fleece-backup(8); its options are those that its help names

_fleece_backup() {
	local current=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD - 1]-} i

	for ((i = 1; i < COMP_CWORD; i++)); do
		[ "${COMP_WORDS[i]}" = -- ] || continue
		# the command
		compopt -o filenames
		if [ $((i + 1)) = "$COMP_CWORD" ]; then
			mapfile -t COMPREPLY < <(compgen -c -- "$current")
		else
			mapfile -t COMPREPLY < <(compgen -f -- "$current")
		fi
		return
	done
	[ "$current" != = ] || current=
	[ "$before" != = ] || before=${COMP_WORDS[COMP_CWORD - 2]-}
	for ((i = 1; i <= 4; i++)); do
		[ "$((COMP_CWORD > i)) ${COMP_WORDS[COMP_CWORD - i]-}" = "1 --restore" ] || continue
		# DIR DATE DISK OUT
		compopt -o filenames
		case $i in
		1) mapfile -t COMPREPLY < <(compgen -d -- "$current") ;;
		2)
			mapfile -t COMPREPLY < <(cd -- "${COMP_WORDS[COMP_CWORD - 1]}" 2>/dev/null &&
				compgen -W "latest $(printf '%s ' *-????-??-??T??-??-??*/ | tr -d /)" -- "$current")
			;;
		3) mapfile -t COMPREPLY < <(compgen -W . -- "$current") ;;
		4) mapfile -t COMPREPLY < <(compgen -f -- "$current") ;;
		esac
		return
	done
	case $before in
	--on)
		compopt -o filenames
		mapfile -t COMPREPLY < <(awk -v word="$current" '$3 == "fuse.fleecefs" && index($2, word) == 1 {
			gsub(/\\040/, " ", $2); print $2 }' /proc/self/mounts)
		;;
	--mount | --fleece-dir | --copy | --borg | --restic | --rsync | --incremental | --list)
		compopt -o filenames
		mapfile -t COMPREPLY < <(compgen -d -- "$current")
		;;
	--tar | --hook | --qmp | --qga)
		compopt -o filenames
		mapfile -t COMPREPLY < <(compgen -f -- "$current")
		;;
	*)
		case $current in
		-*) mapfile -t COMPREPLY < <(compgen -W "$("${COMP_WORDS[0]}" --help 2>/dev/null |
			grep -oE -- '--[a-z][a-z-]*[a-z]' | sort -u)" -- "$current") ;;
		*) mapfile -t COMPREPLY < <(compgen -f -- "$current") ;;
		esac
		;;
	esac
}
complete -F _fleece_backup fleece-backup
