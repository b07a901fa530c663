#!/bin/sh
# Trains a hippocampus for SmolLM2-135M-Instruct, Q4_1, with three seeds, and reads validation texts with each:
# minutes on one GPU, a day and more on two CPU cores. Ship the seed with the lowest perplexity of both validation texts
# (geometric mean): copy its config.json and model.safetensors to src/hippoformer/pretrained/smollm2-135m. The hippocampus
# that is shipped now has read a ninth of this (see its card).
set -e
novels=data/public-domain-novels articles=data/wikitext-2-raw
for seed in 42 43 44; do
  run=runs/pretrained-$seed
  hippoformer train --output_dir $run --seed $seed --cache_dir hidden_states --resume_from_checkpoint auto \
    --text $novels/train $articles/wiki.train.first-part.raw data/wikipedia-long-2014/train.txt \
    --max_samples 288 --max_document_tokens 12288 --planted_documents 30 --planted_facts 36 \
    --max_seq_length 512 --batch_size 32 --max_steps 900 --learning_rate 2e-3 --recall_share 0.65 \
    --credit_documents 128 --foresight_passes 6 --save_steps 100 --logging_steps 20
  python -m evaluation perplexity --model $run --text $novels/validation --limit_tokens 12288 --output $run/novels.json
  python -m evaluation perplexity --model $run --text $articles/wiki.valid.raw --documents 16 --output $run/articles.json
done
