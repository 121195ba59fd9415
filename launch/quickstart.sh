#!/usr/bin/env bash
# Trains configs/quickstart.yaml on all GPUs of this machine, or on 2 CPU processes where there is none.
# Settings of the configuration can be given: bash launch/quickstart.sh train.steps=100
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
prepare_environment ""

processes=2
if has_nvidia_gpu; then
    gpus="$("$python" -c 'import torch; print(torch.cuda.device_count())')"
    [ "$gpus" -gt 0 ] && processes="$gpus"
fi
cores="$("$python" -c 'import os; print(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())')"
threads=$((cores / processes))
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}"

cd "$root"
exec "$venv/bin/torchrun" --standalone --nproc-per-node "$processes" launch/train.py --config configs/quickstart.yaml "$@"
