#!/usr/bin/env bash
# until_done.sh COMMAND...: runs a command and restarts it when it dies, until it succeeds.
#
# The command contains `--resume auto`, so every start continues from the newest complete checkpoint. It is not
# restarted after a user error (exit code 2), after Ctrl-C or kill (130; the run saves a checkpoint and stops), or after
# five deaths in a row within a minute of its start.
# PAUSE: seconds before a restart; default 10.
set -u
quick=0
while true; do
    begin=$SECONDS
    "$@"
    code=$?
    case $code in 0 | 2 | 130) exit "$code" ;; esac
    if ((SECONDS - begin < 60)); then quick=$((quick + 1)); else quick=0; fi
    if ((quick == 5)); then
        echo "until_done.sh: died five times within a minute of its start, the last time with exit code $code" >&2
        exit "$code"
    fi
    echo "until_done.sh: exit code $code; again in ${PAUSE:-10} s" >&2
    sleep "${PAUSE:-10}" || exit 130
done
