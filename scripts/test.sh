#!/usr/bin/env bash
# Creates .venv-test and runs the tests in two processes; arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ ! -x .venv-test/bin/python ]; then
    "${PYTHON:-python3}" -m venv .venv-test
fi
.venv-test/bin/python -m pip install --quiet --constraint constraints.txt --editable ".[text,vision,test]"
exec .venv-test/bin/python -m pytest --numprocesses 2 "$@"
