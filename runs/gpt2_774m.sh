#!/usr/bin/env bash
# GPT-2 774M on 150 billion tokens of FineWeb, on one GPU.
#
# loss   expected: below the 3.0006 of OpenAI's weights on FineWeb's validation shard (llm.c's notebook). We have not run
#        this recipe
# time   376 hours on one H100 (computed: 286,102 steps of 524,288 tokens at 110,728 a second,
#        bench/results/gpu_step_alone.json): 16 days
# cost   $1,317 (computed, at $3.50 an hour); llm.c: 5.6 days of eight A100, about $2,000
# needs  37 GiB of GPU memory, 200 GB of disk for the shards
set -eu
[ -e data/fineweb-100b/meta.json ] || handgrad data fineweb --sample 100B --out data/fineweb-100b
exec "$(dirname "$0")/until_done.sh" handgrad train \
    --out runs/gpt2-774m --resume auto \
    --train data/fineweb-100b \
    --preset gpt2-774m --micro-batch 16 --recompute none --batch-tokens 524288 \
    --lr 2.5e-4 --warmup 700 --final 0 --weight-decay 0.1 --beta2 0.95 \
    --steps 286102 --save-every 1000 --keep-every 50000 \
    --val-every 250 --val-tokens 1048576 --sample-every 25000 \
    "$@"
