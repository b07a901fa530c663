#!/bin/sh
# Questions about stories hidden in novels: results/babilong*_test.json. An hour and a half on two CPU cores.
# 1. LoRA learns from short stories to say first what was told and then the answer. 2. On that base the shipped
# hippocampus learns from other stories, some longer than the window. 3. Its gate learns from the credit of still others.
set -e
novels=data/public-domain-novels/train common="--max_seq_length 256 --dtype float32 --logging_steps 5 --seed 42"

stories() { # name, then options: writes runs/NAME.jsonl
  name=$1 && shift
  python -m evaluation babilong --model smollm2-135m --text $novels --babi_split train --reasons \
    --write runs/$name.jsonl "$@"
}
short() { # questions about short contexts: N of a file
  python -c "import json, random, sys; rows = [r for r in open(sys.argv[1]) if len(json.loads(r)['context']) < 1000]; \
random.Random(0).shuffle(rows); sys.stdout.writelines(rows[: int(sys.argv[2])])" "$1" "$2"
}

stories qa1 --tasks 10k-qa1 --lengths 0 100 400 --cases 200 --seed 1
stories qa2 --tasks 10k-qa2 --lengths 0 300 --cases 200 --seed 2
{ short runs/qa1.jsonl 380 && short runs/qa2.jsonl 150; } > runs/babi-stories.jsonl
hippoformer train --questions runs/babi-stories.jsonl --memory_off --hippocampus smollm2-135m --output_dir runs/babi \
  --num_epochs 1 --max_document_tokens 2048 --batch_size 8 --lora_r 16 --learning_rate 1e-2 $common
python -c "import hippoformer; model, tokenizer = hippoformer.load('runs/babi'); \
model.merge_lora().save_pretrained('runs/babi-base'); tokenizer.save_pretrained('runs/babi-base')"

stories qa1-recall --tasks 10k-qa1 --lengths 0 200 --cases 60 --seed 11
stories qa2-recall --tasks 10k-qa2 --lengths 0 300 --cases 30 --seed 12
stories qa1-long --tasks 10k-qa1 --lengths 1100 --cases 40 --seed 13
cat runs/qa1-recall.jsonl runs/qa2-recall.jsonl runs/qa1-long.jsonl > runs/babi-memory.jsonl
hippoformer train --base_model runs/babi-base --hippocampus smollm2-135m --questions runs/babi-memory.jsonl \
  --output_dir runs/babi-memory --cache_dir hidden_states --num_epochs 4 --batch_size 8 --max_document_tokens 2048 \
  --recall_share 1.0 --credit_documents 0 $common --max_seq_length 1024 --learning_rate 1e-3

stories qa1-credit --tasks 10k-qa1 --lengths 1500 --cases 40 --seed 14
hippoformer train --base_model runs/babi-base --hippocampus runs/babi-memory --questions runs/qa1-credit.jsonl \
  --output_dir runs/babi-credit --cache_dir hidden_states --max_steps 1 --batch_size 8 --max_document_tokens 2048 \
  --recall_share 0.0 --credit_documents 40 --foresight_passes 6 --learning_rate 5e-4 $common

ask() { # model, output, episodes, decay, then options
  model=$1 output=$2 episodes=$3 decay=$4 && shift 4
  python -m evaluation babilong --model runs/$model --buffer_size $episodes --decay_rate $decay \
    --text data/public-domain-novels/test --reply_tokens 32 --output results/$output.json "$@"
}
ask babi babilong_test 16384 0.99975 --tasks qa1 qa2 --lengths 0 1000 4000 --cases 10 10 6 --windows 4608
ask babi babilong_64k_test 16384 0.99975 --tasks qa1 --lengths 64000 --cases 3 --windows 4608
ask babi babilong_64k_all_test 65536 0.99994 --tasks qa1 --lengths 64000 --cases 3 --windows 4608
ask babi-memory babilong_memory_test 16384 0.99975 --tasks qa1 --lengths 0 1000 4000 --cases 10 10 6
ask babi-memory babilong_memory_qa2_test 16384 0.99975 --tasks qa2 qa3 --lengths 0 1000 --cases 10 --windows 4608
ask babi-credit babilong_credit_test 16384 0.99975 --tasks qa1 --lengths 16000 64000 --cases 5 --windows 4608
