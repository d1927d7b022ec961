#!/usr/bin/env bash
# GPT-2 124M on 2 machines with 8 GPUs each, started by PyTorch's torchrun. Run it on each machine, with the machine's
# number: runs/multi_node/torchrun.sh 0 on the first, runs/multi_node/torchrun.sh 1 on the other.
#
# edit   NODES: how many machines; GPUS: of each; FIRST: the first machine; PORT: free there, as is the next one
# needs  handgrad and PyTorch on every machine; one disk for runs/ and data/fineweb (handgrad data fineweb --out
#        data/fineweb)
set -eu
NODES=${NODES:-2} GPUS=${GPUS:-8} FIRST=${FIRST:-node1} PORT=${PORT:-29500} node=${1:?the number of this machine, from 0}
shift
exec torchrun --nnodes "$NODES" --node-rank "$node" --nproc-per-node "$GPUS" \
    --master-addr "$FIRST" --master-port "$PORT" --no-python handgrad train \
    --out runs/gpt2-124m --resume auto --train data/fineweb \
    --preset gpt2-124m --micro-batch 32 --recompute none --batch-tokens 524288 \
    --lr 6e-4 --warmup 700 --final 0 --weight-decay 0.1 --beta2 0.95 --steps 18865 \
    "$@"
