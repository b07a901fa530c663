#!/usr/bin/env bash
# What each mechanism is worth, nothing trained again: perplexity on validation texts, recall on test novels. Hours on two CPU cores.
set -euo pipefail
cd "$(dirname "$0")/.."
articles=data/wikitext-2-raw/wiki.valid.raw novels=data/public-domain-novels/validation
evaluate() { python -m evaluation "$1" --model smollm2-135m "${@:2}"; }
evaluate variants --text data/wikitext-2-raw/wiki.test.raw --documents 12 --limit-tokens 4096 --output results/ablations_articles.json
replay=$(for d in 0.998 0.99 0.95 0.9 0.8; do for n in 0 1 3 10; do echo "rounds-$n-decay-$d:max_replay_rounds=$n,decay_rate=$d"; done; done)
evaluate variants --text $novels --limit-tokens 12288 --variant $replay --output results/replay_novels_validation.json
evaluate variants --text $articles --documents 16 --variant $replay --output results/replay_wikitext2_validation.json
variants="shipped fifo:selection=fifo surprise:selection=surprise random:selection=random replay:max_replay_rounds=10"
variants+=" no-following:following=false no-forgetting:decay_rate=1.0"
evaluate recall_variants --text data/public-domain-novels/test --streams 6 --variant $variants --output results/recall_variants_test.json
