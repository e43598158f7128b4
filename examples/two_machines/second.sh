#!/usr/bin/env bash
# The second of two machines: denoisers, which find their work through the first one's Redis. Ctrl-C or SIGTERM drains them.
#
#   A=10.0.0.1 B=10.0.0.2 REDIS_PASSWORD=secret [DENOISERS=2] second.sh
#
# A: the first machine's address. B: this one's. REDIS_PASSWORD: the first machine's.
set -euo pipefail
: "${A:?is the address of the first machine}" "${B:?is the address of this machine}" "${REDIS_PASSWORD:?is the password of its Redis}"
twotower=${TWOTOWER:-.venv/bin/twotower}

services=()
drain() { kill -TERM "${services[@]}" 2>/dev/null || true; wait; exit 0; }
trap drain TERM INT

export TWOTOWER_REDIS_URL="redis://:$REDIS_PASSWORD@$A:${REDIS_PORT:-6379}"
for _ in $(seq "${DENOISERS:-1}"); do
  # Without GPUs on both machines, auto takes gRPC between them.
  $twotower denoiser --host "$B" --transport "${TRANSPORT:-auto}" &
  services+=($!)
done
wait -n
drain
