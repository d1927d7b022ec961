#!/usr/bin/env bash
# GPT-2 350M (355 million parameters) on 31 billion tokens of FineWeb, on one GPU.
#
# loss   expected: below the 3.083 of OpenAI's weights on FineWeb's validation shard (llm.c's notebook). We have not run
#        this recipe
# time   36.6 hours on one H100 (computed: 60,000 steps of 524,288 tokens at 238,860 a second,
#        bench/results/gpu_step_alone.json)
# cost   $128 (computed, at $3.50 an hour); llm.c: 13.7 hours of eight A100, about $200
# needs  60 GB of disk for the shards
set -eu
[ -e data/fineweb-100b/meta.json ] || handgrad data fineweb --sample 100B --out data/fineweb-100b
exec "$(dirname "$0")/until_done.sh" handgrad train \
    --out runs/gpt2-350m --resume auto \
    --train data/fineweb-100b \
    --preset gpt2-355m --micro-batch 32 --recompute none --batch-tokens 524288 \
    --lr 3e-4 --warmup 700 --final 0 --weight-decay 0.1 --beta2 0.95 \
    --steps 60000 --save-every 1000 \
    --val-every 250 --val-tokens 1048576 --sample-every 10000 \
    "$@"
