# Sourced by quickstart.sh and test.sh: makes .venv at the top of the repository and installs distattn into it, editable.
# Afterwards $python is its interpreter. When the environment stands, this costs a fraction of a second.
# PYTHON=/path/to/python3 chooses the interpreter; pip's own variables (an index with CPU builds of torch, say) are respected.

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="$root/.venv"
python="$venv/bin/python"

# The versions that machines without an NVIDIA GPU get, and that the tests were last run with.
cpu_torch="torch==2.13.0"
cpu_triton="triton==3.7.1"

say() { printf '%s\n' "$*" >&2; }

fail() {
    say "error: $*"
    exit 1
}

has_nvidia_gpu() {
    command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q '^GPU'
}

find_python() {
    local candidate found=""
    for candidate in ${PYTHON:+"$PYTHON"} python3 python3.13 python3.12 python3.11 python3.10; do
        if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' >/dev/null 2>&1; then
            printf '%s\n' "$candidate"
            return
        fi
        found="$found, $candidate: $("$candidate" --version 2>/dev/null || printf 'does not run')"
    done
    fail "distattn needs python 3.10 to 3.13 with its venv module. Found ${found#, }." \
        "Install one (on Debian and Ubuntu also python3-venv), or name it: PYTHON=/path/to/python3."
}

# What an installation depends on. A moved checkout, another interpreter or an edited pyproject.toml installs again.
installation_key() {
    "$python" - "$root" "$1" <<'PY'
import hashlib
import pathlib
import sys

root, extras = sys.argv[1:]
project = hashlib.sha256(pathlib.Path(root, "pyproject.toml").read_bytes()).hexdigest()
print(f"{root} | {extras} | python {sys.version.split()[0]} | {project}")
PY
}

pip_install() {
    "$python" -m pip install --quiet --quiet --disable-pip-version-check --no-input "$@"
}

# prepare_environment "" or prepare_environment test: the name of the extra that is wanted.
prepare_environment() {
    local extra="$1" stamp="$venv/.distattn-installed${1:+-$1}"
    if [ -f "$stamp" ] && [ -x "$python" ] && [ "$(installation_key "$extra" 2>/dev/null)" = "$(cat "$stamp")" ]; then
        return
    fi
    # pip's own script fails in a .venv that was interrupted, moved, or whose interpreter is gone.
    if ! "$venv/bin/pip" --version >/dev/null 2>&1; then
        local base
        base="$(find_python)"
        say "Creating $venv with $("$base" --version)"
        "$base" -m venv --clear "$venv"
    fi
    # Without this, pip would take torch's CUDA build with gigabytes of libraries that nothing here could use.
    if ! has_nvidia_gpu && ! "$python" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is None)'; then
        say "Installing $cpu_torch (no NVIDIA GPU found)"
        pip_install "$cpu_torch"
    fi
    if ! has_nvidia_gpu && [ "$extra" = test ] && [ "$(uname -sm)" = "Linux x86_64" ] &&
        ! "$python" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("triton") is None)'; then
        say "Installing $cpu_triton (for the interpreter and for compiling ahead of time)"
        pip_install "$cpu_triton"
    fi
    say "Installing distattn${extra:+[$extra]} into $venv (the first time this takes some minutes)"
    pip_install --editable "$root${extra:+[$extra]}"
    installation_key "$extra" >"$stamp"
}
