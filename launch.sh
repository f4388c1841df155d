#!/usr/bin/env bash
# Sets up once, then serves. ./launch.sh --help explains the options.
set -euo pipefail
root=$(dirname "$(readlink -f "$0")")
# A web server needs no torch; whoever has a queue needs the client of Redis.
extra=
case " ${NANOGPT_QUEUE_URL:+--queue} $* " in *" --queue"[\ =]*) extra=redis ;; esac
case " ${NANOGPT_QUEUE_URL:-} $* " in *[\ =]sqs:* | *[\ =]sqs+http:*) extra=sqs ;; esac
case " --role ${NANOGPT_ROLE:-} $* " in *" --role web "* | *" --role=web "*) extra=web${extra#redis} ;; esac
"$root/dev/setup.sh" $extra
unset PYTHONDONTWRITEBYTECODE
exec "$root/.venv/bin/python" -m nanogpt.launch "$@"
