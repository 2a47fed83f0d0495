# shellcheck shell=bash
# Functions that the scripts share. Each script takes its settings from environment variables, only
# prints what it would run with DRY=1, and prints the comment at its top with --help.

export DRY=${DRY:-}

# Runs a command, or with DRY=1 prints it as one would type it.
run() {
  if [[ $DRY == 1 ]]; then
    quoted "$@"
  else
    "$@"
  fi
}

# Like `run`, but replaces the script by the command: a script would not pass SIGTERM on to it.
become() {
  [[ $DRY == 1 ]] || exec "$@"
  run "$@"
}

# Prints the arguments quoted for a shell.
quoted() {
  local word line='' quote="'\\''"
  for word in "$@"; do
    if [[ ! $word || $word == *[!A-Za-z0-9_@%+=:,./-]* ]]; then
      word="'${word//\'/$quote}'"
    fi
    line+=" $word"
  done
  echo "${line:1}"
}

fail() {
  echo "error: $*" >&2
  exit 2
}

need() { # VARIABLE...
  local variable
  for variable in "$@"; do
    [[ ${!variable:-} ]] || fail "$variable is not set; $(basename "$0") --help explains"
  done
}

# Prints the comment at the top of the script and exits, for --help or with fewer than LEAST
# arguments.
help() { # LEAST "$@"
  local least=$1
  shift
  local status=0
  if (($# < least)); then
    status=2
  elif [[ ${1:-} != -h && ${1:-} != --help ]]; then
    return
  fi
  sed -n '2,/^[^#]/{/^#/!d;/^#SBATCH/d;s/^# \{0,1\}//p}' "$0" >&$((status ? 2 : 1))
  exit "$status"
}
