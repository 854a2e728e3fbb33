#!/usr/bin/env bash
# Decoding, prefill and training of Llama 2's shapes on one GPU; sized for ten minutes on an H200.
#
#     benchmarks/gpu.sh                            # all parts, into gpu-results/
#     benchmarks/gpu.sh decode-16 train-110m       # some of them
#     SMALL=1 benchmarks/gpu.sh                    # tiny shapes, on any machine
#
# Each part prints into a file of its own as it goes, so that what was measured is kept if the script
# is stopped. OUT names another folder, PART_SECONDS when a part is ended, PYTHON an interpreter.
set -uo pipefail
parts=(decode-1 decode-16 decode-64 prefill flags train-110m train-1.1b train-7b)
[ $# -gt 0 ] || set -- "${parts[@]}"
for name in "$@"; do
    case " ${parts[*]} " in
        *" $name "*) ;;
        *) echo "unknown part $name; expected some of: ${parts[*]}" >&2; exit 2 ;;
    esac
done
out=$(realpath "${OUT:-gpu-results}")
mkdir -p "$out" || exit 1
cd "$(dirname "$0")/.." || exit 1
python=${PYTHON:-python}
small=()
if [ -n "${SMALL:-}" ]; then
    small=(--model 260k --dtype float32 --prompt 33 --context 128 --new_tokens 17)
fi

failed=0
for name in "$@"; do
    roofline=("$python" benchmarks/roofline.py --rounds 3)
    # Of 64 sequences, the caches of three programs have to share the memory.
    case $name in
        decode-1) run=("${roofline[@]}" --only copy,float,int8,int4) ;;
        decode-16) run=("${roofline[@]}" --only copy,float,int8,int4 --batch 16 --prompt 1024 --context 2048) ;;
        decode-64) run=("${roofline[@]}" --only copy,float,int8,int4 --batch 64 --prompt 512 --context 1024) ;;
        prefill) run=("${roofline[@]}" --only copy,prefill) ;;
        flags) run=("${roofline[@]}" --only copy,float --flags=--xla_gpu_enable_command_buffer=+WHILE) ;;
        train-*)
            model=${SMALL:+260k}
            model=${model:-${name#train-}}
            run=("$python" benchmarks/train.py --only "$model,$model-packed" --rounds 3 --no_peers)
            ;;
    esac
    [[ $name == train-* ]] || run+=("${small[@]}")
    echo "== $name: ${run[*]}"
    begun=$SECONDS
    timeout "${PART_SECONDS:-150}" "${run[@]}" 2>&1 | tee "$out/$name.txt"
    code=${PIPESTATUS[0]}
    echo "$name: $((SECONDS - begun)) s, exit code $code" | tee -a "$out/$name.txt"
    [ "$code" = 0 ] || failed=1
done
exit "$failed"
