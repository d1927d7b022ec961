#!/usr/bin/env bash
# GPT-2 124M on 2 machines with 8 GPUs each, started by mpirun (MPICH's or Open MPI's). MPI only starts the ranks: they
# meet by TCP at the first host, and NCCL does the rest.
#
# edit   HOSTS: each machine with its number of GPUs; RANKS: their sum; FIRST: the first machine; PORT: free there
# needs  handgrad on every machine; one disk for runs/ and data/fineweb (handgrad data fineweb --out data/fineweb)
set -eu
HOSTS=${HOSTS:-node1:8,node2:8} RANKS=${RANKS:-16} FIRST=${FIRST:-node1} PORT=${PORT:-29500}
exec mpirun -host "$HOSTS" -n "$RANKS" handgrad train --rendezvous "$FIRST:$PORT" \
    --out runs/gpt2-124m --resume auto --train data/fineweb \
    --preset gpt2-124m --micro-batch 32 --recompute none --batch-tokens 524288 \
    --lr 6e-4 --warmup 700 --final 0 --weight-decay 0.1 --beta2 0.95 --steps 18865 \
    "$@"
