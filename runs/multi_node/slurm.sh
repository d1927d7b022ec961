#!/usr/bin/env bash
# GPT-2 124M on 2 machines with 8 GPUs each, by Slurm: sbatch runs/multi_node/slurm.sh
#
# edit   the lines of #SBATCH: machines, and GPUs of each (as tasks, too); your partition and account. Two
#        minutes before the time is over, --signal has the run save a checkpoint and stop; the next job resumes it
# needs  handgrad on every machine; one disk for runs/ and data/fineweb (handgrad data fineweb --out data/fineweb)
#SBATCH --job-name=gpt2-124m
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --time=02:00:00
#SBATCH --signal=TERM@120
set -eu
exec srun handgrad train \
    --out runs/gpt2-124m --resume auto --train data/fineweb \
    --preset gpt2-124m --micro-batch 32 --recompute none --batch-tokens 524288 \
    --lr 6e-4 --warmup 700 --final 0 --weight-decay 0.1 --beta2 0.95 --steps 18865 \
    "$@"
