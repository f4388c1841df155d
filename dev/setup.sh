#!/usr/bin/env bash
# Set-up for ./launch.sh and ./tests/run: a virtual environment with the pinned dependencies, and
# the C++ kernels. Does nothing, without touching the network, when it has been done before.
#
#   dev/setup.sh [test|redis|sqs|web|websqs]   web: only what web servers need, without torch and
#                           kernels; sqs: for a queue there
#                           PYTHON=python3.12 chooses the interpreter (3.11 or later)
set -euo pipefail
cd "$(dirname "$0")/.."
extra=${1:-}
venv=.venv

fail() { echo "error: $*" >&2; exit 1; }

# Bytecode that is compiled once makes every later start seconds faster.
unset PYTHONDONTWRITEBYTECODE

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    fail "Python 3.11 or later is needed; install it or set PYTHON to its path"
}

if [ ! -x "$venv/bin/python" ]; then
    python=$(find_python)
    echo "setting up $venv with $("$python" --version)" >&2
    "$python" -m venv "$venv" || fail "can't make a virtual environment; on Debian: apt install python3-venv"
fi

# Read, not written: what root has set up, an ordinary user may start.
[ -e "$venv/.lock" ] || touch "$venv/.lock"
exec 9<"$venv/.lock"
flock 9
stamp=$(cat setup.cfg constraints.txt pyproject.toml | sha256sum | cut -c1-16)
all="$venv/.installed-test-$stamp"
stamp="$venv/.installed-${extra:-run}-$stamp"
[ ! -e "$all" ] || stamp=$all  # which has everything that the others have
if [ ! -e "$stamp" ]; then
    echo "installing the pinned dependencies (once; minutes)" >&2
    what=(--editable ".${extra:+[$extra]}")
    case "$extra" in web*) what=(--requirement configs/deploy/web-requirements.txt) ;; esac
    [ "$extra" != websqs ] || what+=(boto3)
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
        --constraint constraints.txt "${what[@]}" \
        || fail "the dependencies could not be installed; see above"
    "$venv/bin/python" -m compileall -q -j 0 nanogpt ./*.py
    date >"$stamp"
fi

if [ "$extra" = test ] && command -v npm >/dev/null; then
    # OpenAI's client for JavaScript; without it its tests are skipped.
    node="$venv/node/.installed-$(sha256sum tests/node/package.json | cut -c1-16)"
    if [ ! -e "$node" ]; then
        mkdir -p "$venv/node"
        cp tests/node/package.json "$venv/node/"
        npm install --prefix "$venv/node" --silent --no-audit --no-fund --no-package-lock >&2 \
            && touch "$node" || echo "the npm package openai could not be installed" >&2
    fi
fi

case "$extra" in web*) exit 0 ;; esac
kernels=$(cat nanogpt/engine/cpu/*.cpp nanogpt/engine/cpu/*.h nanogpt/engine/cpu/build.py <(
    grep -m 1 flags /proc/cpuinfo) "$stamp" | sha256sum | cut -c1-16)
kernels="$venv/.kernels-$kernels"
if [ ! -e "$kernels" ]; then
    "$venv/bin/python" -m nanogpt.engine.cpu.build >&2
    touch "$kernels"
fi
