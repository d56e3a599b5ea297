# Sourced by the scripts beside it: makes .venv-test and installs the library, editable, with the extras in $1.
#   PYTHON        the interpreter that makes .venv-test (python3)
#   CONSTRAINTS   the file of pins (constraints.txt); empty: the newest packages
#   TORCH         a requirement of torch's version, for example 'torch==2.11.*'; empty: what the pins or the library say
if [ ! -x .venv-test/bin/python ]; then
    "${PYTHON:-python3}" -m venv .venv-test
fi
pins="${CONSTRAINTS-constraints.txt}"
.venv-test/bin/python -m pip install --quiet ${pins:+--constraint "$pins"} ${TORCH:+"$TORCH"} --editable ".[$1]"
