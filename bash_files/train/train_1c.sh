#!/usr/bin/env bash
# Train a model of each of the ten classes; what it lacks of images, latents and training data is made first.
# usage: train_1c.sh sim1|sim2|sim3 [images per class: 1000] [OPTIONS]    (see bash_files/imagenet.sh)
set -euo pipefail
kinds="train" k=1
source "$(dirname "$0")/../imagenet.sh"
