#!/usr/bin/env bash
# Sets up, checks the style and runs the tests:
#   bash launch/test.sh           those that take seconds
#   bash launch/test.sh --slow    all
# Everything after these goes on to pytest.
set -euo pipefail

select=(-m "not slow")
if [[ ${1-} == --slow ]]; then
  select=()
  shift
fi

source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$ROOT"
say "test: style"
"$PYTHON" -m ruff check --quiet .
say "test: pytest"
exec "$PYTHON" -m pytest --quiet --numprocesses 2 --dist loadfile "${select[@]}" "$@"
