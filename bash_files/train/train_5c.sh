#!/usr/bin/env bash
# Train one model of the first five classes; what it lacks of images, latents and training data is made first.
# usage: train_5c.sh sim1|sim2|sim3 [images per class: 1000] [OPTIONS]    (see bash_files/imagenet.sh)
set -euo pipefail
kinds="train" k=5
source "$(dirname "$0")/../imagenet.sh"
