#!/usr/bin/env bash
# Sourced by the conversion and training scripts: the ten ImageNet classes of each similarity level of the multi-source
# experiments (Wang et al., ICML 2025), as indices of the sorted WordNet ids. sim3: dogs, sim2: mammals, sim1: one per
# high-level category. In the paper sim1 is "Sim=1" and sim3 is "Sim=2"; its Python code calls sim3, sim2, sim1 level1, 2, 3.
source bash_files/common.sh
# shellcheck disable=SC2034 # of the scripts
datasets=${DATASETS:-datasets}
classes_of() {
  case "$1" in
    sim3 | Sim3 | level1) echo 171,182,198,208,215,231,236,244,245,258 ;;
    sim2 | Sim2 | level2) echo 171,269,279,283,294,330,340,366,370,386 ;;
    sim1 | Sim1 | level3) echo 171,1,18,31,46,532,579,609,849,980 ;;
    *) echo "Error: '$1' is no similarity level: give sim1, sim2 or sim3" >&2; exit 2 ;;
  esac
}
