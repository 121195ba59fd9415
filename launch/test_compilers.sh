#!/usr/bin/env bash
# Compiles the kernels ahead of time, and runs those that need no GPU, with other versions of triton than the one in .venv:
# bash launch/test_compilers.sh 3.6.0 3.8.0
# Without versions: the oldest in which the Hopper kernels are supported, and the newest. Each is installed alone, once, into
# .venv/triton-VERSION (some 900 MB), from where python finds it before the other; tests run on all cores, four at most.
set -euo pipefail

if [ "${1:-}" = --help ] || [ "${1:-}" = -h ]; then
    sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
    exit
fi

source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
prepare_environment test

if [ "$(uname -sm)" != "Linux x86_64" ]; then
    say "No other versions of triton are tested: it exists for Linux on x86-64 only, and this is $(uname -sm)."
    exit
fi
cd "$root"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

# Compilations, the interpreter, and the Hopper kernels in the emulator: all that asks triton for anything.
tests=(tests/kernels/test_{gluon_ahead_of_time,ahead_of_time,triton,gluon}.py)

# install_triton VERSION: into $folder, unless it is there.
install_triton() {
    [ -f "$folder/.installed" ] && return
    say "Installing triton $1 into $folder"
    rm -rf "$folder"
    pip_install --no-deps --target "$folder" "triton==$1" || fail "pip could not install triton $1 (it says why above)." \
        "That takes a package index, once: connect, or name versions that $venv/triton-* already holds."
    touch "$folder/.installed"
}

[ $# -gt 0 ] || set -- 3.6.0 3.9.0
failed=""
for version; do
    folder="$venv/triton-$version"
    install_triton "$version"
    found="$(PYTHONPATH="$folder" "$python" -c 'import triton; print(triton.__version__)')"
    [ "$found" = "$version" ] || fail "expected triton $version from $folder, found $found. Remove that folder and start again."
    say "triton $version"
    PYTHONPATH="$folder" "$venv/bin/pytest" --numprocesses auto --dist worksteal "${tests[@]}" || failed="$failed $version"
done
[ -z "$failed" ] || fail "tests failed with triton$failed (above)"
