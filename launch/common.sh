# shellcheck shell=bash
# What the scripts share. They take their settings from variables, print what they would run where DRY=1,
# and explain themselves with --help.

export DRY=${DRY:-}

# Runs a command, or prints it as one would type it.
run() {
  if [[ $DRY == 1 ]]; then
    quoted "$@"
  else
    "$@"
  fi
}

# As `run`, in place of the script: a signal to stop reaches the command, not a shell that knows nothing of it.
become() {
  [[ $DRY == 1 ]] || exec "$@"
  run "$@"
}

# The words as a shell would read them again.
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

# Prints the comment at the top of the script and ends it, where that is asked for or too few words came.
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
