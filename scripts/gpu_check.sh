#!/usr/bin/env bash
# Check and measure the target cuda on a machine with an NVIDIA GPU, Python 3.12, torch for CUDA 13, and no network.
#
#   scripts/gpu_check.sh pack FOLDER            on a machine with a network: everything to transfer, into FOLDER/parts
#   scripts/gpu_check.sh run [STEP...]          on the machine with the GPU: all steps, or the named ones
#   scripts/gpu_check.sh rehearse [STEP...]     the same on the CPU provider with small models, anywhere
#
# PARTS: folder of the parts (.gpu/parts); WORK: folder where they are unpacked and finished steps are recorded, so that
# a second run continues the first (/tmp/edgelm-gpu); OUT: folder for results (WORK/out); PYTHON: python3.
# Each step has a time limit, and its results are written at once: OUT/steps, OUT/results.jsonl, OUT/logs.tgz.
set -uo pipefail
cd "$(dirname "$0")/.."
mode=${1:-}; shift || true
here=scripts/gpu
PYTHON=${PYTHON:-python3}
WORK=${WORK:-/tmp/edgelm-gpu}
PARTS=${PARTS:-.gpu/parts}
OUT=${OUT:-$WORK/out}
results=$OUT/results.jsonl
bundles=$WORK/bundles

main() {
    case $mode in
    pack) pack "$@" ;;
    run) provider=cuda contexts="128 1024 1900" small=135m large=1b; steps "$@" ;;
    rehearse) provider=cpu contexts="16 40" small=small large=small; steps "$@" ;;
    *) sed -n '2,/^set/{/^set/!s/^# \{0,1\}//p}' "$0" >&2; exit 2 ;;
    esac
}

pack() {
    local folder=$1 schemes="int8-weight fp16 int4-weight"
    "$PYTHON" $here/skeleton.py scripts/reference/config.json "$folder/135m" $schemes &&
        "$PYTHON" $here/skeleton.py scripts/reference/tinyllama.json "$folder/1b" $schemes &&
        "$PYTHON" $here/pack.py "$folder" --add "$folder/135m" "$folder/1b"
}

# The most important steps first.
steps() {
    mkdir -p "$WORK/logs" "$WORK/done" "$OUT"
    [ $provider = cpu ] || setup
    export PYTHONPATH=$WORK/site:${PYTHONPATH:-} PYTHONUNBUFFERED=1 ORT_DISABLE_TELEMETRY=1 HF_HUB_OFFLINE=1
    wanted=" $* "
    if [ $provider = cpu ]; then step skeleton 600 skeleton; else step install 90 install || exit 1; fi
    step probe 60 "$PYTHON" $here/probe.py "$results" --provider $provider || { echo "the provider does not start"; show probe; exit 1; }
    step weights-small 60 weights $small
    step speed-small 150 speed_small
    step kernels-small 60 each kernels.py $small int8-weight fp16
    step weights-large 90 weights $large
    step speed-large 150 speed_large
    step tokens 150 tokens
    step torch-small 60 torch_speed scripts/reference/config.json
    step torch-large 60 torch_speed scripts/reference/tinyllama.json
    step kernels-large 60 each kernels.py $large int8-weight
    step switches 120 switches
    step tests 200 "$PYTHON" -m pytest tests/test_cuda.py -q --tb=short --show-capture=no -p no:cacheprovider --no-header -rfEs
    step compiled-small 120 torch_speed scripts/reference/config.json --compiled
    step compiled-large 120 torch_speed scripts/reference/tinyllama.json --compiled
    cat "$OUT/steps"
}

# step NAME SECONDS COMMAND...
step() {
    local name=$1 limit=$2 started=$SECONDS status
    shift 2
    [[ $wanted == "  " || $wanted == *" $name "* ]] || return 0
    [ ! -e "$WORK/done/$name" ] || return 0
    export -f install skeleton weights tokens each speed_small speed_large switches torch_speed
    export here PYTHON WORK PARTS OUT results bundles provider contexts small large mode
    if [ "$(type -t "$1")" = function ]; then
        timeout -k 5 "$limit" bash -c '"$@"' step "$@" >"$WORK/logs/$name.log" 2>&1
    else
        timeout -k 5 "$limit" "$@" >"$WORK/logs/$name.log" 2>&1
    fi
    status=$?
    [ $status -ne 0 ] || touch "$WORK/done/$name"
    echo "$name: status $status, $((SECONDS - started)) s of $limit" | tee -a "$OUT/steps"
    [ $status -eq 0 ] || show "$name"
    tar -czf "$OUT/logs.tgz" -C "$WORK" logs
    return $status
}

show() { tail -n 12 "$WORK/logs/$1.log" | cut -c1-400; }

# torch's packages bring CUDA's libraries.
setup() {
    local site libraries
    site=$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
    libraries=$(printf '%s:' "$site"/nvidia/*/lib)
    export LD_LIBRARY_PATH=$libraries${LD_LIBRARY_PATH:-}
}

install() {
    set -eo pipefail
    (cd "$PARTS" && sha256sum -c digests)
    cat "$PARTS"/site.tar.xz.* | "$PYTHON" -c 'import sys, tarfile
tarfile.open(fileobj=sys.stdin.buffer, mode="r|xz").extractall(sys.argv[1], filter="data")' "$WORK"
    # Like an editable installation, without a build.
    mkdir -p "$WORK"/site/edgelm "$WORK"/site/edgelm-0.dist-info
    for part in export runtime targets; do ln -sfn "$PWD/$part" "$WORK/site/edgelm/$part"; done
    printf 'Metadata-Version: 2.1\nName: edgelm\nVersion: 0\n' >"$WORK/site/edgelm-0.dist-info/METADATA"
}

# A small model to rehearse with.
skeleton() { "$PYTHON" $here/skeleton.py scripts/reference/small.json "$bundles/small" int8-weight fp16 int4-weight; }

# Make the weights of one model's bundles in parallel.
weights() {
    local folder
    for folder in "$bundles/$1"/*/; do "$PYTHON" $here/random_weights.py "${folder%/}" & done
    wait
    for folder in "$bundles/$1"/*/; do [ -s "$folder/model.onnx.data" ] || return 1; done
}

# each SCRIPT MODEL SCHEME... [-- OPTION...]
each() {
    local script=$1 model=$2 status=0
    shift 2
    while [ $# -gt 0 ] && [ "$1" != -- ]; do
        "$PYTHON" $here/$script "$bundles/$model/$1" "$results" --provider $provider "${extra[@]:-"--note="}" || status=1
        shift
    done
    return $status
}

tokens() {
    local status=0 prompt=100 count=200
    [ $provider = cuda ] || { prompt=20; count=12; }
    for bundle in $small/fp16 $small/int8-weight $large/fp16 $large/int8-weight; do
        "$PYTHON" $here/tokens.py "$bundles/$bundle" "$results" --provider $provider --prompt $prompt --tokens $count || status=1
    done
    "$PYTHON" $here/tokens.py "$bundles/$small/fp16" "$results" --provider $provider --prompt $prompt --tokens $count \
        --capacity $((prompt + count / 4)) || status=1
    return $status
}

speed_small() { extra=(--contexts $contexts); each speed.py $small int8-weight fp16 int4-weight; }
speed_large() { extra=(--contexts $contexts); each speed.py $large int8-weight fp16 int4-weight; }

# Each of onnxruntime's own switches alone: other kernels for few-bit products, and for attention of one token.
switches() {
    local status=0 switch
    extra=(--contexts $contexts --quick)
    for switch in ORT_FPA_INTB_GEMM ORT_ENABLE_XQA; do
        extra=(--contexts $contexts --quick --note "$switch=1")
        env_each "$switch=1" $large || status=1
        env_each "$switch=1" $small || status=1
    done
    return $status
}

env_each() {
    export "${1?}"
    each speed.py "$2" int8-weight
    local status=$?
    unset "${1%%=*}"
    return $status
}

torch_speed() {
    local device=cuda config=$1
    shift
    [ $provider = cuda ] || { device=cpu; config=scripts/reference/small.json; }
    "$PYTHON" $here/torch_speed.py "$config" "$results" --device $device --contexts $contexts "$@"
}

export -f env_each
main "$@"
