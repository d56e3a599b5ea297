#!/usr/bin/env bash
# Creates .venv-test and runs the tests in two processes; arguments go to pytest. environment.sh names the variables that
# choose Python, torch and pins.
set -euo pipefail
cd "$(dirname "$0")/.."
extras=text,vision,test,dev
if [ -n "${CONSTRAINTS-constraints.txt}" ]; then
    extras+=,gpu-codegen # goes with the pinned torch alone; elsewhere its tests are skipped
fi
source scripts/environment.sh "$extras"
exec .venv-test/bin/python -m pytest --numprocesses 2 "$@"
