#!/usr/bin/env bash
# Lint, format and types: what CI and pre-commit run. `scripts/lint.sh --fix` mends what can be mended by itself.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ ! -x .venv-test/bin/pyright ] || [ ! -x .venv-test/bin/ruff ]; then
    source scripts/environment.sh text,vision,test,dev
fi
if [ "${1:-}" = "--fix" ]; then
    .venv-test/bin/ruff check --fix .
    .venv-test/bin/ruff format .
else
    .venv-test/bin/ruff check .
    .venv-test/bin/ruff format --check .
fi
# passes/ is installed as slimfit_fx.passes: links show type checkers the same
rm -rf build/types
mkdir -p build/types/slimfit_fx
ln -s "$PWD"/slimfit_fx/* "$PWD"/passes build/types/slimfit_fx/
.venv-test/bin/pyright --pythonpath .venv-test/bin/python
