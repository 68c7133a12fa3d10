# shellcheck shell=bash
# bash completion for fleecectl(8)

# Where fleecefs is mounted. The kernel writes a space in a path as \040.
_fleecectl_mounts() {
	local _ where type
	while read -r _ where type _; do
		[ "$type" != fuse.fleecefs ] || printf '%b\n' "${where//\\/\\0}"
	done </proc/self/mounts
}

# Completes with the lines of standard input that begin with $1.
_fleecectl_lines() {
	local line
	compopt -o filenames
	while IFS= read -r line; do
		[[ $line != "$1"* ]] || COMPREPLY+=("$line")
	done
}

# The snapshots of the mount that --on names, or of all.
_fleecectl_snapshots() {
	local i mount=
	for ((i = 1; i < ${#COMP_WORDS[@]} - 1; i++)); do
		case ${COMP_WORDS[i]} in
		-o | --on) mount=${COMP_WORDS[i + 1]} ;;
		esac
	done
	if [ -n "$mount" ]; then echo "$mount"; else _fleecectl_mounts; fi |
		while IFS= read -r mount; do
			ls -- "$mount/snapshots"
		done 2>/dev/null
}

_fleecectl() {
	local current=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD - 1]-} word command=
	local commands='status list create drop check gc map' options='--help --version'

	[ "$current" != = ] || current=
	[ "$before" != = ] || before=${COMP_WORDS[COMP_CWORD - 2]-}
	for word in "${COMP_WORDS[@]:1:COMP_CWORD-1}"; do
		case " $commands " in *" $word "*) command=$word && break ;; esac
	done
	case $before in
	-o | --on) _fleecectl_lines "$current" < <(_fleecectl_mounts) && return ;;
	-s | --source | -d | --fleece-dir)
		compopt -o filenames
		mapfile -t COMPREPLY < <(compgen -d -- "$current")
		return
		;;
	-W | --width) return ;;
	esac
	case $command in
	'') options="$commands $options" ;;
	status) options="$options --json --watch" ;;
	list) options="$options --json" ;;
	create | drop) options="$options --on" ;;
	check) options="$options --quick --quiet" ;;
	gc) options="$options --dry-run --source" ;;
	map) options="$options --on --fleece-dir --svg --width" ;;
	esac
	if [[ $current == -* || -z $command ]]; then
		mapfile -t COMPREPLY < <(compgen -W "$options" -- "$current")
		return
	fi
	case $command in
	drop | map) _fleecectl_lines "$current" < <(_fleecectl_snapshots) ;;
	create) ;;
	*)
		_fleecectl_lines "$current" < <(_fleecectl_mounts)
		mapfile -t -O ${#COMPREPLY[@]} COMPREPLY < <(compgen -d -- "$current")
		;;
	esac
}
complete -F _fleecectl fleecectl
