# The set-up that local.sh and test.sh share; sourced by them. Makes .venv in the clone and installs exactly the packages of
# requirements.lock into it. Afterwards $ROOT is the clone and $PYTHON its interpreter. Later calls take no time until the lock,
# setup.py or the Python version changes; a set-up that was interrupted starts anew.
# shellcheck shell=bash
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=$ROOT/.venv
PYTHON=$VENV/bin/python

say() { printf '%s\n' "$*" >&2; }

# Python 3.11 or newer that can make virtual environments.
suits() { "$@" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' >/dev/null 2>&1; }

find_python() {
  local name
  for name in python3 python3.12 python3.13 python3.11 python3.14; do
    if suits "$name"; then
      echo "$name"
      return
    fi
  done
  say "error: no Python from 3.11 to 3.14 with the venv module was found; install one (on Debian or Ubuntu:" \
    "apt install python3 python3-venv) and give the same command again"
  return 1
}

# What the environment was made from: when it changes, the environment is brought up to date.
fingerprint() {
  "$PYTHON" - "$ROOT/requirements.lock" "$ROOT/setup.py" <<'PY'
import hashlib, sys
digest = hashlib.sha256(repr((sys.version_info[:3], sys.prefix)).encode())
for path in sys.argv[1:]:
    digest.update(open(path, "rb").read())
print(digest.hexdigest())
PY
}

# The lines of the lock that pin the packages whose names are given.
pinned() {
  local name
  for name in "$@"; do
    awk -v name="$name" 'index($0, name "==") == 1 { on = 1; print; next } /^[^ ]/ { on = 0 } on && /--hash/' \
      "$ROOT/requirements.lock"
  done
}

install_packages() {
  local pip=("$PYTHON" -m pip --quiet --disable-pip-version-check install --no-input)
  # setuptools first, at the pinned version: it builds what has no wheel, and the editable install, without a download
  "${pip[@]}" --no-deps --require-hashes --requirement <(pinned setuptools)
  local locked=(--no-build-isolation --require-hashes --requirement "$ROOT/requirements.lock")
  if "${pip[@]}" --no-deps --require-hashes --requirement <(pinned uv) 2>/dev/null &&
    "$PYTHON" -m uv pip install --quiet --compile-bytecode --python "$PYTHON" "${locked[@]}"; then
    return
  fi
  say "set-up: going on with pip, which takes about a minute more"
  "${pip[@]}" "${locked[@]}"
}

set_up() {
  # two commands started at once in a fresh clone wait for each other
  if command -v flock >/dev/null; then
    exec 9<"$ROOT/requirements.lock"
    flock 9
  fi
  local stamp=$VENV/.set_up started=$VENV/.set_up_started
  if [[ ! -e $started && -e $stamp ]] && suits "$PYTHON" && [[ $(cat "$stamp") == "$(fingerprint)" ]]; then
    return
  fi
  local seconds=$SECONDS
  if [[ -e $started ]] || ! suits "$PYTHON"; then
    local python
    python=$(find_python)
    say "set-up: making $VENV with $("$python" --version)"
    "$python" -m venv --clear "$VENV"
  fi
  touch "$started"
  say "set-up: installing the packages of requirements.lock"
  install_packages
  "$PYTHON" -m pip --quiet --disable-pip-version-check install --no-deps --no-build-isolation --editable "$ROOT"
  fingerprint >"$stamp"
  rm "$started"
  say "set-up: done in $((SECONDS - seconds)) s"
}

set_up
if command -v flock >/dev/null; then
  exec 9<&-
fi
