# Set-up shared by the scripts of this folder; sourced, not run.
#
#   . "$here/common.sh"
#   setup run|test|dev     make .venv hold the project and what that group needs
#   say TEXT               one line of progress
#   fail TEXT              one sentence on standard error, then exit 1
#
# Sets root (the checkout), python and bin (of .venv). Written for bash 3.2, which macOS ships.

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
venv="$root/.venv"
bin="$venv/bin"
python="$bin/python"
log="$venv/spectral-install.log"
needed_mb=3000  # measured: 1.7 GB for .venv with the CPU build of torch, plus pip's downloads

unset PYTHONHOME PYTHONPATH  # they would leak another Python's packages into .venv

say() { printf '== %s\n' "$*"; }

fail() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}

# Prints the first interpreter >= 3.11 on PATH that can make virtual environments.
find_python() {
  local name path without_venv=""
  for name in python3.13 python3.12 python3.11 python3 python; do
    path="$(command -v "$name" 2>/dev/null)" || continue
    "$path" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 || continue
    if "$path" -c 'import ensurepip, venv' >/dev/null 2>&1; then
      printf '%s\n' "$path"
      return
    fi
    [ -n "$without_venv" ] || without_venv="$path"
  done
  [ -z "$without_venv" ] ||
    fail "$without_venv has no venv module; install it (Debian and Ubuntu: apt install python3-venv)."
  fail "No Python >= 3.11 was found on PATH (tried python3.13, 3.12, 3.11, python3 and python);" \
    "install one from https://www.python.org/downloads/."
}

check_disk() {
  local free_mb
  free_mb="$(df -Pk "$root" | awk 'NR == 2 { print int($4 / 1024) }')" || return 0
  [ "${free_mb:-$needed_mb}" -ge "$needed_mb" ] ||
    fail "The installation needs about $needed_mb MB of free disk space in $root, which has $free_mb MB."
}

# A venv is good when its interpreter starts, is new enough and has pip; a broken link, a
# half-made one or one of an older Python is not.
venv_is_good() {
  "$python" -c 'import sys, pip; sys.exit(sys.version_info < (3, 11) or sys.prefix == sys.base_prefix)' \
    >/dev/null 2>&1
}

make_venv() {
  local found
  found="$(find_python)" || exit 1
  if [ -e "$venv" ]; then
    say "Rebuilding .venv, which is incomplete or made by another Python"
  else
    say "Creating .venv with $found"
  fi
  "$found" -m venv --clear "$venv" >/dev/null 2>&1 ||
    fail "$found could not create a virtual environment in $venv; remove that folder and try again."
}

has_torch() { "$python" -c 'import importlib.util as u, sys; sys.exit(u.find_spec("torch") is None)'; }

# What an installation depends on: a second run with the same answer installs nothing. The path
# is part of it because an editable installation breaks when the checkout is moved.
fingerprint() {
  "$python" - "$root" "${SPECTRAL_TORCH_INDEX:-}" <<'PY'
import hashlib, pathlib, sys

root = pathlib.Path(sys.argv[1])
parts = [*sys.argv[1:], sys.version, *((root / name).read_text() for name in ("pyproject.toml", "constraints.txt"))]
print(hashlib.sha256("\0".join(parts).encode()).hexdigest())
PY
}

pip_install() {
  PIP_USER=0 PIP_NO_INPUT=1 "$python" -m pip install --disable-pip-version-check \
    -c constraints.txt "$@" >>"$log" 2>&1 && return
  if grep -q "No space left on device" "$log"; then
    fail "The disk of $root or of the temporary folder is full; free about $needed_mb MB and try again."
  fi
  fail "pip could not install the packages; its output is in $log."
}

# setup GROUP: run < test < dev, and each holds the one before.
setup() {
  local group="$1" held want
  cd "$root" || fail "$root cannot be entered."
  if venv_is_good; then
    want="$(fingerprint)" || fail "pyproject.toml or constraints.txt cannot be read in $root."
    for held in dev test run; do
      if [ -x "$bin/spectral" ] && [ "$(cat "$venv/spectral-$held.stamp" 2>/dev/null)" = "$want" ]; then
        say "Already installed in .venv"
        return
      fi
      [ "$held" != "$group" ] || break
    done
    has_torch || check_disk
  else
    check_disk
    make_venv
    want="$(fingerprint)" || fail "pyproject.toml or constraints.txt cannot be read in $root."
  fi

  say "Installing into .venv; the first time takes some minutes (log: $log)"
  : >"$log" || fail "$log cannot be written."
  pip_install --upgrade pip
  # torch first, so that a CPU build is taken where one is configured: the default Linux build
  # brings several GB of CUDA libraries with it.
  if [ -n "${SPECTRAL_TORCH_INDEX:-}" ]; then
    pip_install torch --extra-index-url "$SPECTRAL_TORCH_INDEX"
  else
    pip_install torch
  fi
  if [ "$group" = run ]; then
    pip_install --build-constraint constraints.txt -e .
  else
    pip_install --build-constraint constraints.txt -e . --group "$group"
  fi
  printf '%s\n' "$want" >"$venv/spectral-$group.stamp"
  say "Installed"
}
