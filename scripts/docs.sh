#!/usr/bin/env bash
# Builds the documentation into site/; a warning (a dead link, a page without a place, a name without docstring) is an error.
# `scripts/docs.sh serve` shows it while it is written.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh docs
.venv-test/bin/mkdocs "${1:-build}" --strict
