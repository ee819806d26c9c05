#!/usr/bin/env bash
# Runs the tests in a fresh clone or an old one; installs what they need on the first run.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)"

case "${1:-}" in
  -h | --help)
    cat <<'TEXT'
usage: bash scripts/test.sh [pytest arguments]

Creates .venv in the checkout, installs the project with what its tests need, and runs them.
A second run installs nothing. Arguments go to pytest: bash scripts/test.sh -k monitor -x
Tests run in up to four processes; `-n 0` runs them in one, as `--pdb` needs it.

Environment:
  SPECTRAL_TORCH_INDEX  package index for torch, e.g. https://download.pytorch.org/whl/cpu
                        for the CPU-only build, which is several GB smaller on Linux.
  SPECTRAL_DATA         folder with real data sets; tests that need one are skipped without it.
TEXT
    exit 0
    ;;
esac

. "$here/common.sh"
setup test
say "Running the tests"
# One thread per process: the models are so small that threads wait for each other.
export OMP_NUM_THREADS=1
exec "$python" -m pytest -n auto --maxprocesses 4 --dist loadfile "$@" </dev/null
