#!/usr/bin/env bash
# A character-level GPT-2 with 0.8 million parameters on Shakespeare, on any machine: a good first run.
#
# loss   expected: validation at most 1.90 after 2000 steps (measured; tests/test_readme.py)
# time   34 s on two cores plus validation (computed: 2000 steps of 17 ms, bench/results/shakespeare.txt)
# cost   none
set -eu
exec "$(dirname "$0")/until_done.sh" handgrad train \
    --out runs/shakespeare --resume auto \
    --train shakespeare \
    --preset tiny --micro-batch 12 \
    --lr 2e-3 --warmup 100 --weight-decay 0.1 --beta2 0.99 \
    --steps 2000 --val-every 250 \
    "$@"
