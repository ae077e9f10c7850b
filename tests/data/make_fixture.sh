#!/usr/bin/env bash
# Make d597169.tar.xz: a tiny run in the folders of commit d597169, written by its own scripts.
#
#     tests/data/make_fixture.sh CHECKOUT    # of that commit, with its .venv; takes eight minutes
#
# The folders named -half are of processes that were ended with SIGKILL.
set -euo pipefail
checkout=$(cd "$1" && pwd)
archive=$(cd "$(dirname "$0")" && pwd)/d597169.tar.xz
python=$checkout/.venv/bin/python
export OMP_NUM_THREADS=1 # sums in one order
fail() {
    echo "$*" >&2
    exit 1
}
[[ $(git -C "$checkout" rev-parse HEAD) == d597169* ]] || fail "$1 must be a checkout of d597169."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"

run() { # SCRIPT FLAGS...
    "$python" "$checkout/$1.py" "${@:2}"
}

begin() { # SCRIPT FLAGS...: the same in the background
    "$python" "$checkout/$1.py" "${@:2}" &
    process=$!
}

await() { # CONDITION...: waits until it holds, while the process runs
    until "$@"; do
        kill -0 $process || fail "The process ended too early for: $*"
        sleep 0.002
    done
}

kill_it() {
    kill -KILL $process
    wait $process && fail "The process ended before it was killed." || true
}

has_lines() { # FILE NUMBER
    [[ -e $1 && $(wc -l <"$1") -ge $2 ]]
}

has_backups() { # FOLDER NUMBER: of a sweep
    [[ $(find "$1" -name 'sweep-*.keras' | wc -l) -ge $2 ]]
}

"$python" - "$checkout" "$work" <<'PYTHON'
import json, sys
from pathlib import Path
checkout, work = map(Path, sys.argv[1:])
sys.path.insert(0, str(checkout / "tests"))
from conftest import make_texts, save_tiny_model
save_tiny_model(work / "model")
records = ({"text": text, "meta": {"pile_set_name": name}} for text, name in make_texts(60))
(work / "text.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
PYTHON

flags=(--model-name model --layer 1 --dtype float32 --dataset text.jsonl --n-tokens 3072
    --context-length 32 --contexts-per-batch 4 --tokens-per-shard 512)
run save_activations "${flags[@]}" --activations-dir activations
begin save_activations "${flags[@]}" --activations-dir activations-half
await test -e activations-half/tokens-00002.npy
kill_it

common=(--activations-dir activations --held-out 0.2 --batch-size 64 --dead-after 2000
    --backend torch)
flags=("${common[@]}" --learning-rate 1e-3 --n-passes 10 --log-every 20 --backup-every 4)
run train_autoencoder "${flags[@]}" --k 4 --n-latents 64 --autoencoder-dir autoencoder
run train_autoencoder "${flags[@]}" --k 4 --n-latents 32 --autoencoder-dir autoencoder-small
run train_autoencoder "${flags[@]}" --kind l1 --sparsity-coefficient 0.3 --n-latents 64 \
    --autoencoder-dir autoencoder-l1
begin train_autoencoder "${flags[@]}" --k 4 --n-latents 64 --autoencoder-dir autoencoder-half
await has_lines autoencoder-half/training_log.csv 11 # a head and ten rounds; a backup of eight
kill_it

# A sweep backs up every 300 s: it is made to wait so long in its middle.
flags=("${common[@]}" --k 4 --learning-rate-decay 0.5 --sweep-latents 8 16 --sweep-steps 32 64 128
    --sweep-learning-rates 0.5 1 2)
run train_autoencoder "${flags[@]}" --autoencoder-dir sweep
begin train_autoencoder "${flags[@]}" --autoencoder-dir sweep-half
await has_lines sweep-half/scaling_laws.csv 3
kill -STOP $process
sleep 301
kill -CONT $process
await has_backups sweep-half 4
kill_it

flags=(--activations-dir activations --autoencoder-dir autoencoder --n-loss-tokens 512
    --n-reported 5 --batch-size 1024 --no-map-features --other-autoencoders autoencoder-small)
run analyze_features "${flags[@]}" --analysis-dir analysis
begin analyze_features "${flags[@]}" --analysis-dir analysis-half
await test -e analysis-half/study-completeness.json
kill_it

flags=(--autoencoder-dir autoencoder --analysis-dir analysis --influence-dir influence)
run influence_llm "${flags[@]}" --prompt "rose tulip ship" --feature anchor --strength 0 1 2 \
    --max-new-tokens 12
run influence_llm "${flags[@]}" --study evidence --n-features 1 --max-new-tokens 16

find . -name '*.png' -delete # large, and no script reads them again
find . -name '.lock*' -delete
tar --sort=name --owner=0 --group=0 --numeric-owner -cf - ./* | xz -9e >"$archive"
ls -l "$archive"
