#!/usr/bin/env bash
# Exact recall of facts hidden in test novels: six minutes for the README's rows, an hour and a half for all, on two CPU cores.
set -euo pipefail
cd "$(dirname "$0")/.."
evaluate() { python -m evaluation recall --model smollm2-135m --text data/public-domain-novels/test "$@"; }
evaluate --streams 6 --facts 9 --output results/recall_test.json
evaluate --streams 6 --facts 9 --kinds moved --distances 2000 8000 --output results/recall_moved_test.json
evaluate --streams 2 --facts 15 --kinds reworded --distances 2000 8000 --reread-tokens 256 --output results/recall_reworded_test.json
far="--streams 1 --spacing 3200 --distances 2000 8000 32000 128000"
evaluate $far --facts 100 --output results/recall_million_test.json
evaluate $far --facts 60 --buffer-size 16384 --decay-rate 0.99975 --output results/recall_16384_test.json
