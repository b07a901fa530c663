#!/usr/bin/env bash
# Adapts the base to books and articles by LoRA, then measures what the shipped memory is worth beside it: an hour a seed on a CPU core.
set -euo pipefail
cd "$(dirname "$0")/.."
for seed in 1 2 3; do
  folder=runs/lora-$seed
  [ -f $folder/config.json ] || hippoformer train --hippocampus smollm2-135m --memory_off --lora_r 16 --dtype float32 \
    --text data/public-domain-novels/train data/wikitext-2-raw/wiki.train.first-part.raw --max_samples 44 --max_document_tokens 4096 \
    --learning_rate 5e-3 --max_steps 80 --batch_size 2 --max_seq_length 512 --save_steps 1000 --seed $seed --output_dir $folder
  evaluate() { python -m evaluation perplexity --model $folder --conditions memory off unigram "$@"; }
  evaluate --text data/public-domain-novels/test --limit-tokens 30000 --batch-size 6 --output $folder/novels.json
  evaluate --text data/wikitext-2-raw/wiki.test.raw --documents 16 --output $folder/articles.json
done
for text in novels articles; do
  python -m evaluation.seeds runs/lora-{1,2,3}/$text.json --output results/lora_${text}_test.json
done
