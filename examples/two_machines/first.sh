#!/usr/bin/env bash
# The first of two machines: Redis, a context tower, a gateway. Ctrl-C or SIGTERM drains them.
#
#   A=10.0.0.1 REDIS_PASSWORD=secret first.sh
#
# A: an address of this machine that the others can reach. REDIS_PASSWORD: any; the second machine needs the same.
set -euo pipefail
: "${A:?is the address of this machine}" "${REDIS_PASSWORD:?is needed: the port can be reached by others}"
redis=${REDIS_SERVER:-$(command -v valkey-server || command -v redis-server)}
redis_port=${REDIS_PORT:-6379}
twotower=${TWOTOWER:-.venv/bin/twotower}

services=()
drain() { kill -TERM "${services[@]}" 2>/dev/null || true; wait; exit 0; }
trap drain TERM INT

# By stdin, so that the password is on no command line. Nothing in it has to outlive it.
"$redis" - <<CONFIG >/dev/null &
bind $A
port $redis_port
requirepass $REDIS_PASSWORD
save ""
CONFIG
services+=($!)
until (exec 3<>"/dev/tcp/$A/$redis_port") 2>/dev/null; do kill -0 "${services[0]}"; sleep 0.1; done

export TWOTOWER_REDIS_URL="redis://:$REDIS_PASSWORD@$A:$redis_port"
$twotower context --host "$A" --port "${CONTEXT_PORT:-50052}" --transport "${TRANSPORT:-auto}" &
services+=($!)
$twotower gateway --host "$A" --grpc-port "${GRPC_PORT:-50051}" --http-port "${HTTP_PORT:-8000}" &
services+=($!)
wait -n  # whichever ends first
drain
