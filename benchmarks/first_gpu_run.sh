#!/usr/bin/env bash
# Builds a checkout on a machine with a GPU, installs it, and checks, times and tests its kernels, the
# most informative parts first. Each part has a time limit. If a part fails or hangs, the next one
# still runs; only a failed build ends the script.
#
#   benchmarks/first_gpu_run.sh first OUT    the CUDA kernels: correctness, speed, tests
#   benchmarks/first_gpu_run.sh second OUT   cuDNN tests, the dispatch table, compute-sanitizer, Triton
#
# Either run takes at most 400 s. The folder OUT gets summary.txt with a line for each part, log.txt
# with the output of all parts, and the reports of gpu_check.py. They are written during the run.
#
# Requirements: Python (PYTHON, else python3) with pip, torch, pybind11 and setuptools 77 or newer;
# cmake, ninja and nvcc (CUDACXX, else nvcc on the PATH or in /usr/local/cuda). The package is
# installed into that Python. No package registry is used: missing packages can be put as wheels into
# the folder wheels/ of the checkout and are installed first. To download them where there is one:
#
#   pip download --only-binary=:all: --no-deps --dest wheels expecttest pytest-timeout pybind11
set -uo pipefail

if [[ ${1-} != first && ${1-} != second || -z ${2-} ]]; then
  echo "usage: $0 first|second OUT" >&2
  exit 2
fi
python=$(command -v "${PYTHON:-python3}") || { echo "$0: ${PYTHON:-python3}: not found" >&2; exit 2; }
python=$(realpath -s "$python")  # keeps the symbolic link of a virtual environment
root=$(realpath "$(dirname "$0")/..")
mkdir -p "$2"
out=$(realpath "$2")
cd "$root/tests"  # in the root Python would import the package of the checkout, which is not built
total=400
export PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1
export PIP_BREAK_SYSTEM_PACKAGES=1  # allows pip to install into a Linux distribution's Python
PATH+=":$(dirname "$python")"  # where cmake and ninja are if they are Python packages
export CUDACXX=${CUDACXX:-$(command -v nvcc || echo /usr/local/cuda/bin/nvcc)}

# within SECONDS: SECONDS or, if less, the time left minus 10 s for ending a part that hangs.
within() {
  local left=$((total - SECONDS - 10))
  echo $(($1 < left ? $1 : left))
}

# part NAME SECONDS COMMAND...
part() {
  local name=$1 limit status=124 outcome start=$SECONDS
  limit=$(within "$2")
  shift 2
  if ((limit <= 0)); then
    outcome="no time left"
  else
    printf '\n===== %s: %s\n' "$name" "$*" >>"$out/log.txt"
    timeout -k 5 "$limit" "$@" >>"$out/log.txt" 2>&1
    status=$?
    case $status in
      0) outcome=done ;;
      124 | 137) outcome="cut off" ;;
      *) outcome="failed, status $status," ;;
    esac
    outcome+=" after $((SECONDS - start)) s; $(tail -n 1 "$out/log.txt")"
  fi
  echo "$name: $outcome" | tee -a "$out/summary.txt"
  return $status
}

# missing MODULE...: the modules that Python cannot find.
missing() {
  timeout -k 5 30 "$python" - "$@" <<'END'
import importlib.util, sys
print(*(name for name in sys.argv[1:] if not importlib.util.find_spec(name)))
END
}

# check NAME SECONDS OPTION...: gpu_check.py; report.md becomes OUT/NAME.md, the rest an archive. The
# limit passed to it is 15 s shorter, for importing torch and for its last lines.
check() {
  local name=$1 limit
  limit=$(within "$2")
  shift 2
  part "$name" "$limit" "$python" "$root/benchmarks/gpu_check.py" --output "$out/$name" \
    --limit $((limit - 15)) "$@"
  if [ -d "$out/$name" ]; then
    cp "$out/$name/report.md" "$out/$name.md"
    tar -czf "$out/$name.tar.gz" -C "$out" "$name" && rm -r "${out:?}/$name"
  fi
}

# tests NAME SECONDS OPTION...: pytest, if it is installed.
tests() {
  local name=$1 limit=$2
  shift 2
  if [ -n "$no_tests" ]; then
    echo "$name: not run, missing: $no_tests" | tee -a "$out/summary.txt"
    return
  fi
  part "$name" "$limit" "$python" -m pytest -v --tb=short "${timeout_options[@]}" "$@"
}

if compgen -G "$root/wheels/*.whl" >/dev/null; then
  part wheels 60 "$python" -m pip install --no-index --no-deps "$root"/wheels/*.whl
fi
needed=$(missing pip torch pybind11 setuptools numpy PIL safetensors tqdm) || exit 1
for program in cmake ninja "$CUDACXX"; do
  command -v "$program" >/dev/null || needed+=" $program"
done
if [ -n "$needed" ]; then
  echo "cannot build, missing: $needed" | tee -a "$out/summary.txt"
  exit 1
fi
no_tests=$(missing pytest xdist hypothesis)
timeout_options=(--timeout 60 --timeout-method thread)
[ -z "$(missing pytest_timeout)" ] || timeout_options=()
optional=$(missing triton pytest xdist hypothesis pytest_timeout expecttest skimage torchvision)
if [ -n "$optional" ]; then
  echo "some parts are skipped, missing: $optional" | tee -a "$out/summary.txt"
fi

part build 150 "$python" -m pip install --no-build-isolation --no-deps "$root" || exit 1
part architectures 30 "$python" -c '
from deeplab_fast import _C
built = _C.build_info()
print(built)
assert "90a-real" in built["architectures"], f"architectures: expected 90a-real, got {built}"
' || exit 1

convolutions=(ops/test_{dilated_conv2d,dilated_conv2d_backward,dilated_conv2d_and_mean}.py
  ops/test_{fused_conv2d,aspp}.py)
upsampling=(ops/test_upsample_{argmax,argmax_rules,cross_entropy,cross_entropy_limits}.py)
cuda=(sm90 argmax cross-entropy depthwise sm80)

if [ "$1" = first ]; then
  tests conformance 60 -n 0 emulator/test_emulator{,_hopper}.py -k conformance
  check check 180 --family-limit 40 --time --variants --families "${cuda[@]}"
  tests sm80 60 "${convolutions[@]}" -k sm80
  tests upsampling 60 "${upsampling[@]}" -k "cuda and not triton"
  tests sm90 60 "${convolutions[@]}" -k "cuda and not sm80 and not triton"
else
  tests cudnn 120 ops/test_cudnn_reference.py
  part dispatch-table 120 "$python" "$root/benchmarks/tune_dispatch_table.py" --dtype bf16 --batch 8 \
    --output "$out/dispatch-table" --table "$out/dispatch_table.csv"
  check check-sanitizer 110 --family-limit 40 --sanitize memcheck racecheck \
    --families "${cuda[@]}"
  check check-triton 120 --time --families triton
  tests triton 90 backends/test_triton.py "${upsampling[@]}" "${convolutions[@]}" -k triton
  tests all 400 .
fi
echo "$((SECONDS)) s in total; results in $out" | tee -a "$out/summary.txt"
