#!/usr/bin/env bash
# Images of one model of the ten classes to look at, 64 of each class; what is not trained yet is trained first.
# usage: generate_10c.sh sim1|sim2|sim3 [images per class: 1000] [OPTIONS]    (see bash_files/imagenet.sh)
set -euo pipefail
kinds="generate" k=10
source "$(dirname "$0")/../imagenet.sh"
