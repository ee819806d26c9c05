#!/usr/bin/env bash
# The demo: trains a small GPT on real English text with every weight matrix measured at every step.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)"

case "${1:-}" in
  -h | --help)
    cat <<'TEXT'
usage: bash scripts/demo.sh [options of `spectral fit`]

Creates .venv in the checkout, installs the project, trains a small GPT on the English
documentation that ships with Python (configs/gpt_quickstart.yaml), says how to look at the
spectra in TensorBoard, and generates a text sample from the checkpoint. A second run installs
nothing. Arguments go to `spectral fit`: bash scripts/demo.sh --trainer.max_steps 50

Environment:
  SPECTRAL_TORCH_INDEX  package index for torch, e.g. https://download.pytorch.org/whl/cpu
                        for the CPU-only build, which is several GB smaller on Linux.
TEXT
    exit 0
    ;;
esac

. "$here/common.sh"
started="$(mktemp)"  # older than whatever this run writes
trap 'rm -f "$started"' EXIT
setup run
runs="runs/gpt_quickstart"

say "Training: spectral fit --config configs/gpt_quickstart.yaml $*"
"$bin/spectral" fit --config configs/gpt_quickstart.yaml "$@" </dev/null

checkpoint="$(find "$runs" -name '*.ckpt' -newer "$started" -exec ls -t {} + 2>/dev/null | head -n 1)" || true
if [ -z "$checkpoint" ]; then
  say "This run left no checkpoint in $root/$runs, so there is no text sample"
  exit 0
fi

say "The spectra of this run are in $root/${checkpoint%/checkpoints/*}"
say "See them: \"$bin/tensorboard\" --logdir \"$root/$runs\""
say "A text sample from $checkpoint"
"$bin/spectral" generate --checkpoint "$checkpoint" --prompt "The function returns" </dev/null
