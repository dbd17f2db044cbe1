#!/usr/bin/env bash
# Sets up, and runs the main job on this machine:
#   bash launch/local.sh
#       on the embedded environment, beside the rows that it is compared with; ends with a small table. In runs/concierge.
#   bash launch/local.sh -- --config.data=deal_or_no_deal --config.data_dir=DIR
#       everything after -- goes on to experiments/dream.py. The run directory is runs/dream, with the data and the variant added
#       to its name where they are given, unless --workdir=DIR says otherwise.
# The same command resumes an interrupted run.
set -euo pipefail

if [[ $# -gt 0 ]]; then
  if [[ $1 != -- ]]; then
    echo "error: write -- before the flags of the experiment: bash launch/local.sh -- $*" >&2
    exit 2
  fi
  shift
fi

name=dream
for flag in "$@"; do
  case $flag in
    --config.data=* | -config.data=* | --variant=* | -variant=*) name+=-${flag#*=} ;;
  esac
done

source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
if [[ $# -gt 0 ]]; then
  job=(experiments.dream --workdir="$ROOT/runs/$name" "$@")
else
  job=(experiments.ablations --rows=main --variant=short --workdir="$ROOT/runs/concierge")
fi
# -P: a folder named `experiments` where the command was given is not meant
PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH} exec "$PYTHON" -P -m "${job[@]}"
