#!/bin/sh
# Measure in about ten minutes what the documentation leaves empty for GPUs, and write benchmarks/results/DATE-gpu-NAME.md:
#   sh benchmarks/gpu.sh
# The most valuable parts come first. Each has a time limit, and the next begins if one fails. Needs data/shakespeare_char;
# other text is random. DEVICE=cpu tries all this with tiny models, on a machine without a GPU. RESULTS is the folder of the
# page, and MORE holds settings for the runs on Shakespeare, such as --root.
cd "$(dirname "$0")/.." || exit 1
PATH="$PWD/.venv/bin:$PATH"
DEVICE=${DEVICE:-cuda}
RESULTS=${RESULTS:-benchmarks/results}

if [ "$DEVICE" = cpu ]; then
    gpus=2 # processes
    name=dry-run
    machine="No GPU, tiny models: these figures mean nothing. $(uname -sm)"
    size="--n_layer=1 --n_head=2 --n_embd=32 --block_size=32 --batch_size=2 --vocab_size=65 --iters=2 --warmup=1 --dtype=float32"
    short="--n_layer=1 --n_head=2 --n_embd=32 --block_size=32 --batch_size=2 --max_iters=4 --eval_iters=1 --compile=False"
    shape="n_layer=1, n_head=2, n_embd=32, block_size=32"
    compile=False
else
    gpus=$(python -c 'import torch; print(torch.cuda.device_count())') || exit 1
    [ "$gpus" -gt 0 ] || { echo "gpu.sh: PyTorch sees no GPU here; DEVICE=cpu tries this script without one" >&2; exit 2; }
    gpu=$(nvidia-smi --query-gpu=name,memory.total,driver_version,power.limit --format=csv,noheader | head -n 1)
    name=$(python -c 'import re, torch; print(re.sub("[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()))')
    machine="$gpus x $gpu (name, memory, driver, power limit). $(uname -sm), $(nproc) cores"
    size="--vocab_size=50304 --dtype=auto"
    short=
    shape=
    compile=True
fi
mkdir -p "$RESULTS" || exit 1
page="$RESULTS/$(date +%F)-gpu-$name.md"

# part TITLE SECONDS COMMAND: run the command at most that long, and append what it prints to the page.
part() {
    title=$1
    limit=$2
    shift 2
    echo "gpu.sh: $title, at most $limit s" >&2
    # shellcheck disable=SC2016
    printf '\n## %s\n\n`%s`\n\n```\n' "$title" "$*" >>"$page"
    timeout "$limit" "$@" >>"$page" 2>"$page.errors"
    code=$?
    echo '```' >>"$page"
    [ "$code" = 0 ] && return
    why=$(tail -n 1 "$page.errors")
    [ "$code" = 124 ] && why="longer than $limit s"
    printf '\nNot measured: %s (exit code %s).\n' "$why" "$code" >>"$page"
}

# bench SECONDS TITLE CONFIG SETTINGS: iterations of two micro-batches.
bench() {
    limit=$1
    title=$2
    shift 2
    # shellcheck disable=SC2086
    part "$title" "$limit" python bench.py "$@" --device="$DEVICE" --gradient_accumulation_steps=2 $size
}

cat >"$page" <<EOF
# GPU: $name, $(date +%F)

$machine. $(python -c 'import platform, torch
print(f"PyTorch {torch.__version__}, CUDA {torch.version.cuda}, Python {platform.python_version()}")'),
commit $(git describe --always --dirty 2>/dev/null || echo unknown). Written by \`sh benchmarks/gpu.sh\`.
EOF

bench 60 "GPT-2 (124M), eager" config/train_gpt2.py --compile=False
bench 150 "GPT-2 (124M), compiled" config/train_gpt2.py --compile="$compile"
part "Shakespeare: time to the loss" 150 python benchmarks/time_to_loss.py --old= --target=1.4697 --seeds=1337 \
    --new="config/fast_shakespeare_char.py --device=$DEVICE $short $MORE"
part "Writing with GPT-2 (124M)" 60 python benchmarks/writing.py --device="$DEVICE" --shape="$shape" --compile="$compile"
bench 60 "GPT-2 (124M), activations computed again" config/train_gpt2.py --compile=False --checkpoint_activations=True
bench 150 "Modern architecture and Muon, compiled" config/fast_gpt2.py --compile="$compile"
if [ "$gpus" -gt 1 ]; then # as many micro-batches for each as above
    # shellcheck disable=SC2086
    part "GPT-2 (124M) on $gpus processes" 90 torchrun --standalone --nproc_per_node="$gpus" bench.py config/train_gpt2.py \
        --device="$DEVICE" --compile=False --gradient_accumulation_steps=$((2 * gpus)) $size
fi
rm -f "$page.errors"
echo "$page"
