#!/usr/bin/env bash
# Builds the documentation into site/; a warning (a dead link, a page that no menu names, a docstring that is not understood) is
# an error. `scripts/docs.sh serve` shows it while it is written.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh docs
# the theme announces its successor at each start
NO_MKDOCS_2_WARNING=1 .venv-test/bin/mkdocs "${1:-build}" --strict
