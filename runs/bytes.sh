#!/usr/bin/env bash
# Bits per byte over bytes of state: an hour and a half on two CPU cores.
set -euo pipefail
cd "$(dirname "$0")/.."
evaluate() { python -m evaluation bytes --model smollm2-135m --text data/public-domain-novels/test --limit-characters 40000 "$@"; }
selected=$(for method in h2o snapkv; do for n in 43 86 172 345 516; do echo $method:$n; done; done)
# A megabyte is a window longer by 43 tokens, 43 selected keys a head, or 1,100 episodes.
evaluate --windows 555 598 684 857 1028 2048 4096 --buffers 1024 4096 8192 --kv $selected --output results/bytes_novels.json
evaluate --windows 555 7932 --buffers 640 --kv h2o:43 snapkv:43 --output results/bytes_novels_1mb.json
evaluate --windows 574 --dtype float32 --output results/bytes_novels_float32.json
