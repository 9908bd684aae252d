#!/usr/bin/env bash
# The toy world end to end: supervised fine-tuning, two rounds, a report. Two cores, no network.
# Use: jobs/quickstart.sh [overrides], for example jobs/quickstart.sh rounds.limit=3
set -euo pipefail
exec rlhf run recipe=quickstart "$@"
