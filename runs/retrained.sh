#!/usr/bin/env bash
# Trains the hippocampus again without each of its parts, three seeds, and measures what that costs: many hours on two CPU cores.
# What is already there is not made again. Every run is small: differences mean something, absolute figures less.
set -euo pipefail
cd "$(dirname "$0")/.."
text="--text data/public-domain-novels/train data/wikitext-2-raw/wiki.train.first-part.raw"
budget="--max_samples 44 --max_document_tokens 4096 --planted_documents 16 --planted_facts 16 --max_steps 100 --learning_rate 1e-3"
budget+=" --credit_documents 16 --foresight_passes 4 --save_steps 1000 --cache_dir hidden_states"
declare -A variants=(
  [shipped]="" [no-memory]="buffer_size=0" [fifo]="selection=fifo" [random]="selection=random" [surprise]="selection=surprise"
  [no-gate]="importance_weight_range=[1.0,1.0]" [replay]="max_replay_rounds=10" [no-following]="following=false"
  [layer-8]="memory_layer=8" [layer-16]="memory_layer=16" [layer-24]="memory_layer=24" [layer-last]="memory_layer=-1"
  [buffer-512]="buffer_size=512" [buffer-4096]="buffer_size=4096" [unigram]="unigram_weight=0.75"
)
evaluate() { python -m evaluation "$1" --text data/public-domain-novels/validation "${@:2}"; }
for seed in 1 2 3; do
  trained=()
  for name in "${!variants[@]}"; do
    folder=runs/retrained/$name-$seed
    [ -f $folder/config.json ] || hippoformer train $text $budget --seed $seed --output_dir $folder \
      --set buffer_size=1024 decay_rate=0.998 unigram_weight=0.0 ${variants[$name]}
    [ $name = shipped ] || trained+=("$name=$folder")
  done
  base="--model runs/retrained/shipped-$seed --variant shipped --trained ${trained[*]}"
  evaluate variants --limit-tokens 12288 $base --output runs/retrained/novels-$seed.json
  evaluate recall_variants --streams 3 --distances 2000 8000 $base --output runs/retrained/recall-$seed.json
done
for kind in novels recall; do
  python -m evaluation.seeds runs/retrained/$kind-{1,2,3}.json --output results/retrained_$kind.json
done
