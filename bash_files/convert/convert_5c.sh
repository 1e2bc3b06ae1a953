#!/usr/bin/env bash
# Images, VAE latents, reference statistics and training data of the first five classes together of a similarity level.
# usage: convert_5c.sh sim1|sim2|sim3 [images per class: 1000] [OPTIONS]    (see bash_files/imagenet.sh)
set -euo pipefail
kinds="convert encode ref data" k=5
source "$(dirname "$0")/../imagenet.sh"
