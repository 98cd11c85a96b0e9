#!/usr/bin/env bash
# State tracking: HOPE whose erase rate goes up to 1.9, HOPE as it is, and a Transformer++, on parity and on S5.
#   bash benchmarks/state_tracking.sh OUT [more of hope.evaluate probe, such as --seeds 1 2 3]
# All runs of a probe at once on one device; OUT/PROBE_MODEL.json has the results, .txt the tables. An interrupted call
# goes on. STEPS and BATCH (6000, 256) are fewer than the published ones (20k steps, and 100 epochs of 100k examples).
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:?where to write}; shift
python=${PYTHON:-python}
mkdir -p "$out"
hope="configs/models/hope.yaml model.mixers.hope.static=projected model.mixers.hope.output_gate=sigmoid"
declare -A models=(
  [transformer]="configs/models/transformer.yaml"
  [hope]="$hope"
  [hope_erase_1.9]="$hope model.mixers.hope.erase_max=1.9"
)
for probe in ${PROBES:-parity s5}; do
  layers=2; [ "$probe" = s5 ] && layers=${S5_LAYERS:-4}
  pids=()
  for model in transformer hope hope_erase_1.9; do
    # shellcheck disable=SC2086 # words
    "$python" -m hope.evaluate probe "$probe" configs/quickstart.yaml ${models[$model]} model.width=128 model.heads=2 \
      --layers "$layers" --steps "${STEPS:-6000}" --batch "${BATCH:-256}" --json "$out/${probe}_$model.json" "$@" \
      >"$out/${probe}_$model.txt" 2>"$out/${probe}_$model.log" &
    pids+=($!)
  done
  for pid in "${pids[@]}"; do wait "$pid" || { tail -n 3 "$out/${probe}"_*.log; exit 1; }; done
  tail -n +1 "$out/${probe}"_*.txt
done
