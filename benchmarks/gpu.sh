#!/usr/bin/env bash
# All that a GPU has to show, in calls of less than 10 minutes each and without a network:
#
#   benchmarks/gpu.sh [FOLDER_OF_WHEELS]                  speed: reports/bench/gpu.json, gpu-train.{json,md} and
#                                                         gpu-decode.{json,md}, with BUNDLE=FOLDER of that bundle too
#   PARTS=presets benchmarks/gpu.sh [FOLDER_OF_WHEELS]    quality: a row and a model card for each of PRESETS
#   PARTS=ablations benchmarks/gpu.sh [FOLDER_OF_WHEELS]  what each part of the recipe is worth at 20M parameters:
#                                                         reports/bench/gpu-ablations{,-documents}.{json,md}
#
# Presets and ablations read their corpora from SMALLGPT_DATA_DIR. A call that ran out of time is gone on with by the
# next: the presets from .smallgpt/gpu, where their models stay, the ablations from their table. With OUT, tables, rows
# and cards are written there; `python -m smallgpt.results table` joins rows that were brought back.
#
# The machine needs torch, numpy, sentencepiece, pyyaml and safetensors, for the presets requests and matplotlib too. What
# else is missing there (pydantic, filelock, tqdm; transformers for the peers) is taken from the wheels and put into a
# temporary folder. MLflow and DVC are not used. A part that fails is named, keeps what it has measured, and the rest goes
# on. With DEVICE=cpu and OUT=FOLDER a machine without a GPU rehearses: SHAPES=tiny-gpt2 SEQ_LEN=32 BATCH=4 STEPS=1
# PER_ROUND=1 TOKENS=20 the first, PRESETS=stories-tiny the second, ONLY=control EPOCHS=0.1 the third. Lists have commas:
# PARTS=train,ddp.
set -uo pipefail
data=${SMALLGPT_DATA_DIR:+$(realpath "$SMALLGPT_DATA_DIR")}
[ -z "$data" ] || export SMALLGPT_DATA_DIR=$data
wheels=${1:+$(realpath -m "$1")} OUT=${OUT:+$(realpath -m "$OUT")} BUNDLE=${BUNDLE:+$(realpath -m "$BUNDLE")}
python=$(realpath -s "$(command -v "${PYTHON:-python3}")")
cd "$(dirname "$0")/.."
device=${DEVICE:-cuda} shapes=${SHAPES:-gpt2,llama}
parts=,${PARTS:-train,ddp,decode}, limit=560
asked() { [[ $parts == *,$1,* ]]; }
if [[ ! $parts =~ ^,(presets|ablations|(train|ddp|decode)(,(train|ddp|decode))*),$ ]]; then
  echo "PARTS is ${PARTS}; it must be presets, ablations, or of train,ddp,decode" >&2
  exit 2
fi
if [ "$device" != cpu ] && ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "PyTorch sees no CUDA device; DEVICE=cpu rehearses" >&2
  exit 4
fi
mkdir -p "${OUT:-reports/bench}"
out=$(cd "${OUT:-reports/bench}" && pwd)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
if [ -n "$wheels" ]; then
  # One by one: a wheel for another Python must not keep out the rest.
  for wheel in "$wheels"/*.whl; do
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
  timeout -k 20 "$seconds" "$@" >&2 || { failed+=("$name"); echo "== $name failed" >&2; }
}
rest() { echo $((limit > SECONDS ? limit - SECONDS : 1)); }

# What a person gets from `cp configs/NAME.yaml params.yaml && dvc repro`, without DVC and without the export. A stage that
# was done with these settings and sources is not repeated.
preset() { # name, folder of results, page, folder of cards
  local name=$1 root=$PWD project=.smallgpt/gpu/$1 inputs
  trap : TERM # the stage saves its state first
  inputs=$(cat "configs/$name.yaml" smallgpt/*.py stages/*.py | sha256sum) || return 1
  mkdir -p "$project/configs" && cp "configs/$name.yaml" "$project/configs" || return 1
  cd "$project" && cp "configs/$name.yaml" params.yaml && touch done || return 1
  for stage in prepare tokenize train evaluate; do
    grep -qxF "$stage $inputs" done || { "$python" -m "stages.$stage" && echo "$stage $inputs" >> done; } || return 1
  done
  cd "$root" || return 1
  "$python" -m smallgpt.results add --project "$project" --config "configs/$name.yaml" --out "$2" --page "$3" --cards "$4"
}
export -f preset
export python
if asked presets; then
  where=(reports/results docs/results.md docs/models)
  [ -n "${OUT:-}" ] && where=("$out/results" "$out/results.md" "$out/models")
  presets=${PRESETS:-shakespeare-25m,stories-25m,wikitext2-25m}
  for name in ${presets//,/ }; do
    part "$name" "$(rest)" bash -c 'preset "$@"' preset "$name" "${where[@]}"
  done
fi

ablate() { # name of the table, arguments
  local table=$out/gpu-$1.json kept=reports/bench/gpu-$1.json
  [ -f "$table" ] || [ ! -f "$kept" ] || cp "$kept" "$table"
  part "$1" "$(rest)" "$python" benchmarks/ablations.py --epochs "${EPOCHS:-12}" --set model.embed_dim=512 \
    --set model.num_heads=8 --set model.num_layers=6 --set model.dropout=0.2 "${@:2}" --out "$table"
}
if asked ablations; then
  ablate ablations ${ONLY:+--only "$ONLY"}
  # Tiny Shakespeare is one document, so another order of documents is tried on the stories.
  [ -n "${ONLY:-}" ] || ablate ablations-documents --only 'control,documents reshuffled' \
    --set prepare.source=stories --set model.vocab_size=2048
fi

if asked presets || asked ablations; then
  printf 'failed: %s\n' "${failed[*]:-nothing}"
  exit $((${#failed[@]} > 0))
fi

if asked train; then
  rm -f "$out"/gpu-train.{json,md} # may be another GPU's
  systems=products,ours,peer
  "$python" -c 'import transformers' 2> /dev/null || { systems=products,ours; failed+=(peers); }
  part train 330 "$python" benchmarks/train.py --device "$device" --shape "$shapes" --only "$systems" \
    --precision bf16 --seq-len "${SEQ_LEN:-1024}" --batch-size "${BATCH:-32}" --steps "${STEPS:-5}" \
    --per-round "${PER_ROUND:-20}" --out "$out/gpu-train.json"
fi

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
  "$python" - "$scratch/1" "$scratch/2" "$scratch/ddp.json" << 'END'
import csv, json, sys
one, two = ([float(row["loss"]) for row in csv.DictReader(open(f"{folder}/reports/train/train.csv"))] for folder in sys.argv[1:3])
difference = max(abs(a - b) / a for a, b in zip(one, two, strict=True))
json.dump({"steps": 50, "largest_relative_difference": difference, "last_loss": two[-1]}, open(sys.argv[3], "w"))
sys.exit(difference > 1e-4)
END
}
export -f curves
export device scratch
if [ "$ranks" -gt 1 ] && asked ddp; then part ddp 120 bash -c curves; fi

if asked decode; then
  rm -f "$out"/gpu-decode.{json,md}
  part decode "$(rest)" "$python" benchmarks/decode_gpu.py --device "$device" --shape "${shapes%%,*}" --steps "${TOKENS:-400}" \
    ${BUNDLE:+--bundle "$BUNDLE"} --out "$out/gpu-decode.json"
fi

"$python" - "$out" "$scratch" "$parts" "$ranks" "${failed[@]}" << 'END'
import json, sys
from pathlib import Path

out, scratch = map(Path, sys.argv[1:3])
asked, ranks, failed = sys.argv[3].split(","), int(sys.argv[4]), sys.argv[5:]
report = json.loads((out / "gpu.json").read_text()) if (out / "gpu.json").is_file() else {}
files = {"train": out / "gpu-train.json", "ddp": scratch / "ddp.json", "decode": out / "gpu-decode.json"}
for name, file in files.items():
    if name in asked and (name != "ddp" or ranks > 1):
        report.pop(name, None)
        if file.is_file():  # of a part that failed what it had until then
            report[name] = json.loads(file.read_text())
(out / "gpu.json").write_text(json.dumps(report | {"processes": ranks, "failed": failed}, indent=2) + "\n")
for name in report.keys() & {"train", "decode"}:
    print((out / f"gpu-{name}.md").read_text())
print("failed:", ", ".join(failed) or "nothing")
sys.exit(bool(set(failed) - {"peers"}))
END
