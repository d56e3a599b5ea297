#!/usr/bin/env bash
# Creates .venv-test and runs the tests in two processes; arguments go to pytest. environment.sh names the variables that
# choose Python, torch and pins.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh text,vision,test,dev
exec .venv-test/bin/python -m pytest --numprocesses 2 "$@"
