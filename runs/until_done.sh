#!/usr/bin/env bash
# until_done.sh COMMAND...: starts a run, and starts it again when it dies, until it ends well.
#
# The command has `--run.resume auto` in it: every start goes on from the newest complete checkpoint. What would only
# fail again is not started again: a mistake, told in one line (exit code 2), and a run that died five times in a row
# within a minute of its start. Ctrl-C and kill (130) save and stop.
# PAUSE: seconds before the next start, 10 if not set.
set -u
quick=0
while true; do
    begin=$SECONDS
    "$@"
    code=$?
    case $code in 0 | 2 | 130) exit "$code" ;; esac
    if ((SECONDS - begin < 60)); then quick=$((quick + 1)); else quick=0; fi
    if ((quick == 5)); then
        echo "until_done.sh: died five times within a minute of its start, at last with exit code $code" >&2
        exit "$code"
    fi
    echo "until_done.sh: exit code $code; again in ${PAUSE:-10} s" >&2
    sleep "${PAUSE:-10}" || exit 130
done
