#!/usr/bin/env bash
# GPT-2 with 30 million parameters on TinyStories (short stories in simple English), one epoch, on one GPU.
#
# loss   expected: unknown, we have not run this recipe to its end
# time   not measured; at 30 % of an H100's peak (a guess for so small a model), 1.6 million tokens a second: ten minutes
#        for 0.93 billion tokens
# cost   $0.60 (computed from that time, at $3.50 an hour)
# needs  2 GB of disk for the shards
set -eu
[ -e data/tinystories/meta.json ] || handgrad data tinystories --out data/tinystories
exec "$(dirname "$0")/until_done.sh" handgrad train \
    --out runs/tinystories --resume auto \
    --train data/tinystories \
    --preset d6 --max-seq-len 512 --micro-batch 64 --batch-tokens 131072 \
    --lr 1e-3 --warmup 200 --final 0.1 --weight-decay 0.1 --beta2 0.95 \
    --steps 0 --save-every 500 \
    --val-every 250 --val-tokens 1048576 --sample-every 1000 --prompt "Once upon a time" \
    "$@"
