#!/usr/bin/env bash
# Sets up once, then serves. ./launch.sh --help explains the options.
set -euo pipefail
root=$(dirname "$(readlink -f "$0")")
"$root/dev/setup.sh"
unset PYTHONDONTWRITEBYTECODE
exec "$root/.venv/bin/python" -m nanogpt.launch "$@"
