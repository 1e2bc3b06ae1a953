#!/usr/bin/env bash
# Images, VAE latents, reference statistics and training data of each class on its own of a similarity level.
# usage: convert_1c.sh sim1|sim2|sim3 [images per class: 1000] [OPTIONS]    (see bash_files/imagenet.sh)
set -euo pipefail
kinds="convert encode ref data" k=1
source "$(dirname "$0")/../imagenet.sh"
