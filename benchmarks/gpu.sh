#!/usr/bin/env bash
# All that a GPU has to show, in calls of less than 10 minutes each and without a network:
#
#   benchmarks/gpu.sh [FOLDER_OF_WHEELS]                  speed: reports/bench/gpu.json and gpu-train.{json,md}
#   PARTS=presets benchmarks/gpu.sh [FOLDER_OF_WHEELS]    quality: a row and a model card for each of $PRESETS
#   PARTS=ablations benchmarks/gpu.sh [FOLDER_OF_WHEELS]  what each part of the recipe is worth at 20M parameters:
#                                                         reports/bench/gpu-ablations.{json,md}
#
# Presets and ablations read their corpora from SMALLGPT_DATA_DIR, and a call that ran out of time is gone on with by the
# next. With OUT everything is written there.
#
# The machine needs torch, numpy, sentencepiece, pyyaml and safetensors. What else is missing there (pydantic, filelock,
# tqdm; transformers for the peers) is taken from the wheels and put into a temporary folder. MLflow and DVC are not used.
# A part that fails is named and the rest goes on. DEVICE=cpu SHAPES=tiny-gpt2 SEQ_LEN=32 BATCH=4 STEPS=1 PER_ROUND=1
# rehearses the first call on a machine without a GPU, PRESETS=stories-tiny the second, ONLY=control EPOCHS=0.1 the third.
set -uo pipefail
cd "$(dirname "$0")/.."
python=$(realpath -s "$(command -v "${PYTHON:-python3}")") device=${DEVICE:-cuda} shapes=${SHAPES:-gpt2,llama}
parts=,${PARTS:-train,ddp,decode}, limit=570
mkdir -p "${OUT:-reports/bench}"
out=$(cd "${OUT:-reports/bench}" && pwd)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
if [ $# -gt 0 ]; then
  # One by one: a wheel for another Python must not keep out the rest.
  for wheel in "$1"/*.whl; do
    "$python" -m pip install -q --no-index --no-deps --disable-pip-version-check --target "$scratch/packages" "$wheel" ||
      echo "skipped $wheel" >&2
  done
fi
export PYTHONPATH="$PWD:$scratch/site" SMALLGPT_TRACKING=off PYTHONWARNINGS=ignore
mkdir -p "$scratch/site" "$scratch/packages"
# At the end of Python's path, so that the machine's own torch and numpy stay.
printf 'import sys\nsys.path.append("%s")\n' "$scratch/packages" > "$scratch/site/sitecustomize.py"

failed=()
part() { # name, seconds, command...
  local name=$1 seconds=$2
  shift 2
  echo "== $name" >&2
  timeout "$seconds" "$@" >&2 || { failed+=("$name"); echo "== $name failed" >&2; }
}
asked() { [[ $parts == *,$1,* ]]; }
rest() { echo $((limit > SECONDS ? limit - SECONDS : 1)); }

# What a person gets from `cp configs/NAME.yaml params.yaml && dvc repro`, without DVC and without the export.
preset() { # name, folder of results, page, folder of cards
  local name=$1 root=$PWD project=.smallgpt/gpu/$1
  mkdir -p "$project/configs" && cp "configs/$name.yaml" "$project/configs" || return 1
  cd "$project" && cp "configs/$name.yaml" params.yaml || return 1
  for stage in prepare tokenize train evaluate; do "$python" -m "stages.$stage" || return 1; done
  cd "$root" || return 1
  "$python" -m smallgpt.results add --project "$project" --config "configs/$name.yaml" --out "$2" --page "$3" --cards "$4"
}
export -f preset
export python
if asked presets; then
  where=(reports/results docs/results.md docs/models)
  [ -n "${OUT:-}" ] && where=("$out/results" "$out/results.md" "$out/models")
  for name in ${PRESETS:-shakespeare-25m stories-25m wikitext2-25m}; do
    part "$name" "$(rest)" bash -c 'preset "$@"' preset "$name" "${where[@]}"
  done
fi

if asked ablations; then
  table=$out/gpu-ablations.json
  [ -f "$table" ] || [ ! -f reports/bench/gpu-ablations.json ] || cp reports/bench/gpu-ablations.json "$table"
  part ablations "$(rest)" "$python" benchmarks/ablations.py ${ONLY:+--only "$ONLY"} --epochs "${EPOCHS:-12}" \
    --set model.embed_dim=512 --set model.num_heads=8 --set model.num_layers=6 --set model.dropout=0.2 --out "$table"
fi

if ! asked train && ! asked ddp && ! asked decode; then
  printf 'failed: %s\n' "${failed[*]:-nothing}"
  [ ${#failed[@]} -eq 0 ]
  exit
fi

systems=products,ours,peer
"$python" -c 'import transformers' 2> /dev/null || { systems=products,ours; failed+=(peers); }

if asked train; then part train 330 "$python" benchmarks/train.py --device "$device" --shape "$shapes" --only "$systems" --precision bf16 \
  --seq-len "${SEQ_LEN:-1024}" --batch-size "${BATCH:-64}" --steps "${STEPS:-5}" --per-round "${PER_ROUND:-20}" \
  --out "$out/gpu-train.json"; fi

# Two processes must have the loss curve of one.
ranks=2
[ "$device" = cuda ] && ranks=$("$python" -c 'import torch; print(min(2, torch.cuda.device_count()))')
curves() {
  root=$PWD
  for processes in 1 2; do
    mkdir -p "$scratch/$processes" && cd "$scratch/$processes" || return 1
    sed -e 's/precision: .*/precision: fp32/' -e "s/device: .*/device: $device/" -e 's/max_steps: .*/max_steps: 50/' \
      -e 's/warmup_steps: .*/warmup_steps: 10/' "$root/configs/stories-tiny.yaml" > params.yaml
    "$python" -m stages.prepare && "$python" -m stages.tokenize || return 1
  done
  (cd "$scratch/1" && "$python" -m stages.train) || return 1
  (cd "$scratch/2" && OMP_NUM_THREADS=1 "$python" -m torch.distributed.run --standalone --nproc-per-node 2 -m stages.train) || return 1
  "$python" - "$scratch/1" "$scratch/2" "$out/ddp.json" << 'END'
import csv, json, sys
one, two = ([float(row["loss"]) for row in csv.DictReader(open(f"{folder}/reports/train/train.csv"))] for folder in sys.argv[1:3])
difference = max(abs(a - b) / a for a, b in zip(one, two, strict=True))
json.dump({"steps": 50, "largest_relative_difference": difference, "last_loss": two[-1]}, open(sys.argv[3], "w"))
sys.exit(difference > 1e-4)
END
}
export -f curves
export device scratch out
rm -f "$out/ddp.json" "$out/decode.json"
if [ "$ranks" -gt 1 ] && asked ddp; then part ddp 120 bash -c curves; fi

if asked decode && grep -q -- --device benchmarks/decode.py; then  # once it can measure a GPU
  part decode 120 "$python" benchmarks/decode.py --device "$device" --out "$out/decode.json"
fi

"$python" - "$out" "$ranks" "${failed[@]}" << 'END'
import json, sys
from pathlib import Path

out, ranks, failed = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
parts = {"train": "gpu-train.json", "ddp": "ddp.json", "decode": "decode.json"}
found = {name: json.loads((out / file).read_text()) for name, file in parts.items() if (out / file).is_file()}
(out / "ddp.json").unlink(missing_ok=True)
(out / "gpu.json").write_text(json.dumps({**found, "processes": ranks, "failed": failed}, indent=2) + "\n")
print((out / "gpu-train.md").read_text() if (out / "gpu-train.md").is_file() else "no training results")
print("failed:", ", ".join(failed) or "nothing")
sys.exit(bool(set(failed) - {"peers"}))
END
