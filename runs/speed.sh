#!/usr/bin/env bash
# Speed of reading and generating with memory, without, and of transformers' own base: minutes on two CPU cores.
set -euo pipefail
cd "$(dirname "$0")/.."
python -m benchmarks.speed --model smollm2-135m --output results/speed.json
