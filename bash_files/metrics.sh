#!/usr/bin/env bash
# The table: FID and FD-DINOv2 of one model of K classes against a model of each, over five blocks of sampling seeds, with the
# paper's numbers beside ours. What is not there yet is converted, trained and scored first.
# usage: metrics.sh sim1|sim2|sim3 [images per class: 1000] [OPTIONS]    (K: 10; the rest: see bash_files/imagenet.sh)
set -euo pipefail
kinds="score table" k=${K:-10}
source "$(dirname "$0")/imagenet.sh"
