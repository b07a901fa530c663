#!/usr/bin/env bash
# Perplexity of test novels and articles, as the README reports it: about 25 minutes on two CPU cores.
set -euo pipefail
cd "$(dirname "$0")/.."
novels="--text data/public-domain-novels/test --batch-size 6"
evaluate() { python -m evaluation perplexity --model smollm2-135m "$@"; }
evaluate $novels --limit-tokens 30000 --conditions memory off window-only unigram --output results/novels_test.json
evaluate $novels --limit-tokens 8192 --conditions memory off other-document --output results/novels_other_test.json
evaluate --text data/wikitext-2-raw/wiki.test.raw --conditions memory off window-only unigram --output results/wikitext2_test.json
