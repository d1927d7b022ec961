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
    --run.out runs/tinystories --run.resume auto \
    --data.train data/tinystories \
    --model.preset d6 --model.max-seq-len 512 --run.micro-batch 64 --data.batch-tokens 131072 \
    --optim.lr 1e-3 --optim.warmup 200 --optim.final 0.1 --optim.weight-decay 0.1 --optim.beta2 0.95 \
    --run.steps 0 --run.save-every 500 \
    --run.val-every 250 --run.val-tokens 1048576 --run.sample-every 1000 --run.prompt "Once upon a time" \
    "$@"
