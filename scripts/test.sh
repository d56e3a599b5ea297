#!/usr/bin/env bash
# Creates .venv-test and runs the tests in two processes; arguments go to pytest. environment.sh names the variables that
# choose Python, torch and pins. EXTRAS=gpu-codegen installs Triton too (200 MB), without which the tests of the GPU's code are
# skipped; it goes with the pinned torch alone.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh "text,vision,test,dev${EXTRAS:+,$EXTRAS}"
# half of the tests each, in order, and then of what is left: tests that share a fixture, or a compilation, meet in one process
exec .venv-test/bin/python -m pytest --numprocesses 2 --dist worksteal "$@"
