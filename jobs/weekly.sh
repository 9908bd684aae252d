#!/usr/bin/env bash
# The weekly job: ingest what the vendor has delivered, then submit the rounds that became possible.
# weekly.cron and rlhf-weekly.timer call it. Use: INBOX=... RUN=... jobs/weekly.sh [overrides], where
# the overrides (recipe=, model.path=, launcher=, ...) hold for both commands.
#
# Every *.jsonl file in INBOX is ingested each time, in name order: a file that is in the store
# already changes nothing, so files may stay. A vendor moves a file in under its final name only when
# it is complete. A refused file ends the job before anything is launched, with exit code 2.
set -euo pipefail
export LC_ALL=C

inbox=${INBOX:?set INBOX to the folder that vendors deliver to}
run=${RUN:?set RUN to the name of the run}
runs=${RUNS:-runs}
store=${STORE:-store}
overrides=(run="$run" paths.runs="$runs" paths.store="$store" "$@")

if [[ ! -d $inbox ]]; then
    echo "weekly: INBOX=$inbox is not a folder: create it, or correct INBOX" >&2
    exit 2
fi

# The lock is kept across exec and released when the launch ends, however it ends.
mkdir -p "$store"
exec 9>"$store/.weekly.lock"
if ! flock --nonblock 9; then
    echo "weekly: another weekly job holds $store/.weekly.lock: nothing was done" >&2
    exit 1
fi

# A path with a slash before the first = is a file to rlhf, whatever its name.
[[ $inbox == */* ]] || inbox=./$inbox
shopt -s nullglob
files=("$inbox"/*.jsonl)
if ((${#files[@]} > 0)); then
    rlhf ingest "${files[@]}" "${overrides[@]}"
else
    # Still launch: what failed last week may be left.
    echo "weekly: no .jsonl file in INBOX=$inbox" >&2
fi
exec rlhf launch "${overrides[@]}"
