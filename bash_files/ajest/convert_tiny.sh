#!/usr/bin/env bash
# Tiny ImageNet as published (100 000 training images of 200 classes, 64x64), and its reference statistics.
# usage: convert_tiny.sh [--dry-run]    (SOURCE: tiny-imagenet-200.zip or its folder, default downloads/tiny-imagenet-200.zip)
set -euo pipefail
cd "$(dirname "$0")/../.."
source bash_files/ajest/common.sh
run python dataset_tool.py convert --source="${SOURCE:-downloads/tiny-imagenet-200.zip}" --dest="$tiny"
run python calculate_metrics.py ref --data="$tiny" --dest="$ref" ${METRICS:+--metrics="$METRICS"}
