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
    --run.out runs/gpt2-774m --run.resume auto \
    --data.train data/fineweb-100b \
    --model.preset gpt2-774m --run.micro-batch 16 --run.recompute none --data.batch-tokens 524288 \
    --optim.lr 2.5e-4 --optim.warmup 700 --optim.final 0 --optim.weight-decay 0.1 --optim.beta2 0.95 \
    --run.steps 286102 --run.save-every 1000 --run.keep-every 50000 \
    --run.val-every 250 --run.val-tokens 1048576 --run.sample-every 25000 \
    "$@"
