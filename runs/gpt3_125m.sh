#!/usr/bin/env bash
# GPT-3 Small (125 million parameters, 2048 tokens of context) on 300 billion tokens of FineWeb, on one GPU.
#
# loss   expected: unknown, we have not run this recipe; GPT-3 Small reaches 0.337 on HellaSwag (llm.c's notebook)
# time   152 hours on one H100 (estimated: 572,204 steps of 524,288 tokens at 548,000 a second, 48 % of the peak as
#        measured for GPT-2 124M; bench/results has no run of this size): 6.3 days
# cost   $532 (computed, at $3.50 an hour); llm.c: 24 hours of eight H100, about $336
# needs  200 GB of disk for the shards
set -eu
[ -e data/fineweb-100b/meta.json ] || handgrad data fineweb --sample 100B --out data/fineweb-100b
exec "$(dirname "$0")/until_done.sh" handgrad train \
    --out runs/gpt3-125m --resume auto \
    --train data/fineweb-100b \
    --preset gpt3:c768 --micro-batch 32 --recompute none --batch-tokens 524288 \
    --lr 6e-4 --warmup 700 --final 0.1 --weight-decay 0.1 --beta2 0.95 \
    --steps 572204 --save-every 1000 --keep-last 5 --keep-every 50000 \
    --val-every 250 --val-tokens 1048576 --sample-every 25000 \
    --skip-loss-z 7 --skip-grad-z 7 \
    "$@"
