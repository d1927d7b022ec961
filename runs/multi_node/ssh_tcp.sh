#!/usr/bin/env bash
# GPT-2 124M on 2 machines with 8 GPUs each, with nothing but ssh: it starts every rank, and they meet by TCP at the
# first host. Ctrl-C ends the ssh sessions (-tt: a terminal that closes), and the run saves a checkpoint. If one session
# ends with an error, the script ends the others and exits with its code.
#
# edit   HOSTS; GPUS: of each; PORT: free on the first host
# needs  handgrad in the PATH of ssh on every host; this folder under the same path on all, on one disk, with
#        data/fineweb (handgrad data fineweb --out data/fineweb)
set -eu
HOSTS=${HOSTS:-node1 node2} GPUS=${GPUS:-8} PORT=${PORT:-29500}
set -- \
    --out runs/gpt2-124m --resume auto --train data/fineweb \
    --preset gpt2-124m --micro-batch 32 --recompute none --batch-tokens 524288 \
    --lr 6e-4 --warmup 700 --final 0 --weight-decay 0.1 --beta2 0.95 --steps 18865 \
    "$@"
read -ra hosts <<<"$HOSTS"
code=0
trap 'code=130; kill $(jobs -p)' INT TERM
for ((rank = 0; rank < ${#hosts[@]} * GPUS; rank++)); do
    place="--ranks $((${#hosts[@]} * GPUS)) --rank $rank --ranks-per-machine $GPUS --rendezvous ${hosts[0]}:$PORT"
    ssh -n -tt "${hosts[rank / GPUS]}" "cd $(printf %q "$PWD") && exec handgrad train $place$(printf ' %q' "$@")" &
done
while [ "$(jobs -p)" ]; do
    wait -n || { status=$?; ((code)) || kill $(jobs -p) || true; code=$((code ? code : status)); }
done
exit "$code"
