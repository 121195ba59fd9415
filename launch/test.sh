#!/usr/bin/env bash
# Checks the sources (format, lint, types) and runs the tests. --all adds the long tier; what else is given goes to pytest:
# bash launch/test.sh tests/kernels -k bands
# Tests run on all cores, four at most; -n 0, -s and --pdb give one process, whose output is seen as it comes.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
prepare_environment test

# Paths in the arguments mean what they meant where this was called; without any, pytest takes them from pyproject.toml.
if [ "$PWD" != "$root" ] && [ $# -eq 0 ]; then
    cd "$root"
fi
(
    cd "$root"
    "$python" -m ruff format --check --quiet . || fail "ruff format: run '$venv/bin/ruff format' in $root"
    "$python" -m ruff check --quiet .
    "$python" -m mypy --no-error-summary
)
# One thread: tests run several processes side by side, and sums do not depend on the number of cores.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# worksteal: each process takes a stretch of neighbouring tests, so that modules seldom make their fixtures twice.
exec "$venv/bin/pytest" --rootdir "$root" --config-file "$root/pyproject.toml" --numprocesses auto --dist worksteal "$@"
