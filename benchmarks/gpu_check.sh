#!/usr/bin/env bash
# Everything that needs a GPU, in one command, offline and in less than ten minutes:
#
#     benchmarks/gpu_check.sh [WHEELS]
#
# It installs the wheels, builds the extension for the GPU at hand, runs the tests on it, compute-sanitizer over the CUDA
# kernels, and the benchmarks. The machine needs CUDA with nvcc, a C++ compiler, Python, PyTorch and Triton. The other
# packages are taken from the folder WHEELS (./wheels by default), where the machine does not have them; collect them
# beforehand on a machine with network:
#
#     python -m pip download --only-binary=:all: --python-version 3.12 --platform manylinux2014_x86_64 \
#         --platform manylinux_2_28_x86_64 --dest wheels pybind11 ninja setuptools numpy scipy scikit-learn matplotlib \
#         h5py pyyaml safetensors tensorboard tqdm pytest pytest-benchmark hypothesis
#
# OUT (gpu_check_results) receives a log per step, gpu-kernels.json, roofline.png, and summary.json: what each step's exit
# status and seconds were, written after every step. A failing step does not stop the others; the exit status is 1 if any
# failed. PYTHON (python3) is the interpreter; STEPS ("machine wheels build tests benchmarks roofline sanitizer") chooses
# what is done; "wheels training" measures, once built, whole training steps (training-profile-gpu.json). Where the sources
# are no git checkout, SEMISEG_COMMIT names their commit.
set -uo pipefail

WHEELS=$(realpath -m "${1:-wheels}")
OUT=$(realpath -m "${OUT:-gpu_check_results}")
PYTHON=${PYTHON:-python3}
STEPS=${STEPS:-machine wheels build tests benchmarks roofline sanitizer}
SECONDS_IN_ALL=585
SITE=$OUT/site-packages

cd "$(dirname "$0")/.." || exit 1
mkdir -p "$OUT" "$SITE"
export OUT PYTHON WHEELS SITE
export PYTHONPATH=$SITE:$PWD${PYTHONPATH:+:$PYTHONPATH}
export PATH=$SITE/bin:$PATH:/usr/local/cuda/bin:/usr/local/cuda/compute-sanitizer
export CUBLAS_WORKSPACE_CONFIG=:4096:8

entries=()
failed=0

# step NAME LIMIT COMMAND...: run a command for at most LIMIT seconds and note how it ended.
step() {
    local name=$1 limit=$2 start=$SECONDS status
    shift 2
    [[ " $STEPS " == *" $name "* ]] || return
    ((limit > SECONDS_IN_ALL - SECONDS)) && limit=$((SECONDS_IN_ALL - SECONDS))
    if ((limit <= 0)); then
        echo "no time left" >"$OUT/$name.log"
        status=124
    else
        echo "== $name (at most $limit s)"
        # An interrupted pytest still reports what it has.
        timeout --signal=INT --kill-after=10 "$limit" "$@" >"$OUT/$name.log" 2>&1
        status=$?
        tail -n 3 "$OUT/$name.log"
    fi
    ((status == 0)) || failed=1
    echo "== $name: exit status $status after $((SECONDS - start)) s"
    entries+=("\"$name\": {\"exit_status\": $status, \"seconds\": $((SECONDS - start))}")
    write_summary
}

write_summary() {
    local IFS=,
    printf '{"failed": %s, "seconds": %d, "steps": {%s}}\n' \
        "$( ((failed)) && echo true || echo false)" "$SECONDS" "${entries[*]}" >"$OUT/summary.json"
}

# Wheels of packages that Python does not find yet, into a folder of their own: the machine's installation stays as it is.
install_wheels() {
    local missing
    missing=$("$PYTHON" - "$WHEELS" <<'PYTHON_CODE'
import importlib.metadata
import pathlib
import sys

for wheel in sorted(pathlib.Path(sys.argv[1]).glob("*.whl")):
    try:
        importlib.metadata.version(wheel.name.split("-")[0])
    except importlib.metadata.PackageNotFoundError:
        print(wheel)
PYTHON_CODE
    ) || return
    [[ -z $missing ]] && return
    tr '\n' '\0' <<<"$missing" | sed -z '/^$/d' |
        xargs -0 "$PYTHON" -m pip install --no-index --no-deps --no-compile --target "$SITE"
}

# The build of the sources in place, without pip: PyTorch is not looked for, and nothing is isolated.
build() {
    local architecture
    architecture=$("$PYTHON" -c 'import torch; print(*torch.cuda.get_device_capability(), sep="")') || return
    echo "compute capability $architecture"
    SEMISEG_CUDA_ARCHITECTURES=$architecture "$PYTHON" setup.py egg_info build_ext --inplace || return
    "$PYTHON" -c '
from semiseg_kernels import available_backends
from semiseg_kernels.backends import device_type, missing
print({name: missing(name) or device_type(name) for name in ("cpu", "cuda", "triton")})
assert {"cuda", "triton"} <= set(available_backends())'
}

# test_file FILE EXPRESSION: the tests of a file that pytest's -k selects.
test_file() {
    local name
    name=$(basename "$1" .py)-${2//[^a-z0-9_]/-}
    OMP_NUM_THREADS=2 "$PYTHON" -m pytest -q -p no:cacheprovider --durations=5 -m "slow or not slow" "$1" -k "$2" \
        >"$OUT/tests-$name.log" 2>&1
    local status=$?
    ((status == 5)) && status=0 # nothing was selected
    echo "$1, $2: exit status $status, $(tail -n 1 "$OUT/tests-$name.log")"
    return $status
}

# Most of the time goes into compiling Triton kernels on the CPU, so its tests are spread over many processes.
tests() {
    local file dtype layout part
    local shared="test_accuracy and (dtype0 or dtype1 or dtype2) and (contiguous or channels_last)"
    {
        for part in peak_memory offsets "not (peak_memory or offsets)"; do
            printf '%s\0' tests/kernels/test_gpu.py "triton and $part"
        done
        printf '%s\0' tests/kernels/test_gpu.py cuda tests/kernels/test_cuda.py cuda
        for file in prototype_head prototype_info_nce cluster_mean prototype_similarity; do
            for dtype in dtype0 dtype1 dtype2; do
                for layout in contiguous channels_last; do
                    printf '%s\0' "tests/kernels/test_$file.py" "triton and test_accuracy and $dtype and $layout"
                done
            done
            printf '%s\0' "tests/kernels/test_$file.py" "triton and not ($shared)"
        done
        local -a others=(dice_ce prompt_mix masked_class_mean batch_norm_relu linear_classifier linear_upsampling
            largest_components compile determinism momentum_update layouts differentiation recomputation)
        for file in "${others[@]}"; do
            printf '%s\0' "tests/kernels/test_$file.py" triton
        done
        for file in prototype_head prototype_info_nce cluster_mean prototype_similarity "${others[@]}"; do
            printf '%s\0' "tests/kernels/test_$file.py" cuda
        done
        for file in engine/test_precision engine/test_deterministic_algorithms engine/test_cuda_graph \
            data/test_training_tensors; do
            printf '%s\0' "tests/$file.py" gpu
        done
    } | xargs -0 -n 2 -P "$(nproc)" bash -c 'test_file "$1" "$2"' test_file
}

# Blocks from cudaMalloc, each checked for itself, instead of PyTorch's large ones.
sanitize() {
    local -a options=(--error-exitcode 1 --target-processes all)
    [[ $1 == memcheck ]] && options+=(--report-api-errors no) # PyTorch asks for things it can do without
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" "${options[@]}" \
        "$PYTHON" benchmarks/every_cuda_path.py >"$OUT/sanitizer-$1.log" 2>&1
    local status=$?
    echo "$1: exit status $status, $(tail -n 1 "$OUT/sanitizer-$1.log")"
    return $status
}

sanitizer() {
    printf '%s\0' memcheck racecheck initcheck | xargs -0 -n 1 -P 3 bash -c 'sanitize "$1"' sanitize
}

# What is compiled beforehand, on all cores, is not compiled while the GPU is measured.
benchmarks() {
    local name dtype
    for name in $(PYTHONPATH=benchmarks:$PYTHONPATH "$PYTHON" -c 'import workloads; print(*workloads.OPERATIONS)'); do
        for dtype in float32 bfloat16; do
            printf '%s\0' "$name" "$dtype"
        done
    done | xargs -0 -r -n 2 -P "$(nproc)" "$PYTHON" benchmarks/compile_triton.py
    echo "compiled after $SECONDS s"
    "$PYTHON" -m pytest benchmarks/test_gpu_kernels.py --benchmark-only -q -p no:cacheprovider \
        --results "$OUT/gpu-kernels.json"
}

roofline() {
    "$PYTHON" benchmarks/roofline.py "$OUT/gpu-kernels.json" "$OUT/roofline.png"
}

export -f install_wheels build test_file tests sanitize sanitizer benchmarks roofline

step machine 30 bash -c 'nvidia-smi && nvcc --version && "$PYTHON" -c "import torch, triton, sys; print(sys.version, torch.__version__, triton.__version__)"'
step wheels 60 bash -c install_wheels
step build 180 bash -c build
step tests 220 bash -c tests
step benchmarks 220 bash -c benchmarks
step roofline 30 bash -c roofline
step training 400 "$PYTHON" benchmarks/training_profile.py --results "$OUT/training-profile-gpu.json"
step sanitizer 120 bash -c sanitizer

cat "$OUT/summary.json"
exit "$failed"
