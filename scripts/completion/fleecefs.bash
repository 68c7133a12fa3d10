# shellcheck shell=bash
# bash completion for fleecefs(8)

_fleecefs() {
	local current=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD - 1]-} values='' head=''
	local -a names=(fleece-dir= snapdir= snapshot= cluster-size= on-cbw-error= cbw-timeout=
		fleece-limit= fleece-reserve= source-lock= log-level= exclude= device= backing= durable)

	# = is a word of its own to readline.
	[ "$current" != = ] || current=
	[ "$before" != = ] || before=${COMP_WORDS[COMP_CWORD - 2]-}
	if [ "$before" = -o ] || [[ $before == *,* ]]; then
		case $current in *,*) head=${current%,*}, current=${current##*,} ;; esac
		values="${names[*]} allow_other allow_root clone_fd max_threads= max_idle_threads= debug ro"
		mapfile -t COMPREPLY < <(compgen -P "$head" -W "$values" -- "$current")
		compopt -o nospace
		return
	fi
	case $before in
	--fleece-dir)
		compopt -o filenames
		mapfile -t COMPREPLY < <(compgen -d -- "$current")
		return
		;;
	--cluster-size) values='4K 8K 16K 32K 64K 128K 256K 512K 1M 2M' ;;
	--on-cbw-error) values='break-snapshot break-guest-write' ;;
	--source-lock) values='on off' ;;
	--log-level) values='error warning info debug' ;;
	--snapdir | --snapshot | --cbw-timeout | --fleece-limit | --fleece-reserve | --exclude | --device | --backing) return ;;
	*)
		case $current in
		-*)
			values="${names[*]/#/--} --help --version -o -f -d -s -h -V"
			mapfile -t COMPREPLY < <(compgen -W "$values" -- "$current")
			[[ ${COMPREPLY[0]-} != *= ]] || compopt -o nospace
			;;
		*)
			compopt -o filenames
			mapfile -t COMPREPLY < <(compgen -d -- "$current")
			;;
		esac
		return
		;;
	esac
	mapfile -t COMPREPLY < <(compgen -W "$values" -- "$current")
}
complete -F _fleecefs fleecefs
