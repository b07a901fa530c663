#!/bin/sh
# LoRA on the base, three seeds, then test texts with and without memory: the rows of results/lora_*_test.json.
# LoRA learns by the base's own loss; the shipped hippocampus was trained on the base without it.
# An hour and a quarter a seed on one core of an AMD EPYC.
set -e
for seed in 1 2 3; do
  hippoformer train --memory_off --hippocampus smollm2-135m --seed $seed --output_dir runs/lora-$seed \
    --text data/public-domain-novels/train data/wikitext-2-raw/wiki.train.first-part.raw \
    --max_samples 44 --max_document_tokens 4096 --lora_r 16 --learning_rate 5e-3 \
    --max_steps 80 --batch_size 2 --max_seq_length 512 --save_steps 1000 --dtype float32
  python -m evaluation perplexity --model runs/lora-$seed --conditions memory off unigram \
    --text data/public-domain-novels/test --limit_tokens 30000 --batch_size 6 --output results/lora_novels_$seed.json
  python -m evaluation perplexity --model runs/lora-$seed --conditions memory off unigram \
    --text data/wikitext-2-raw/wiki.test.raw --documents 16 --output results/lora_articles_$seed.json
done
