#!/usr/bin/env bash
# The first minutes of a checkout on a GPU: builds it and runs what says most first, each part under
# a time limit. A part that fails or hangs does not keep the next one from running.
#
#   benchmarks/first_gpu_run.sh first OUT    the CUDA kernels: right, how fast, tests, sanitizer
#   benchmarks/first_gpu_run.sh second OUT   tests against cuDNN, the automatic choice, Triton
#
# Either takes at most 400 s. OUT/summary.txt has a line for each part, OUT/log.txt what all of them
# printed; both are written as the run goes on.
#
# Needs Python (PYTHON, else python3) with torch, pybind11 and setuptools, cmake, ninja and nvcc
# (CUDACXX, else the one on the path), but no package registry: wheels in the folder wheels/ of the
# checkout are installed first. On a machine with a registry:
#
#   pip download --only-binary=:all: --no-deps --dest wheels expecttest pytest-timeout pybind11
set -uo pipefail

case ${1-} in first | second) ;; *)
  echo "usage: $0 first|second OUT" >&2
  exit 2
  ;;
esac
python=${PYTHON:-python3}
root=$(realpath "$(dirname "$0")/..")
mkdir -p "$2"
out=$(realpath "$2")
cd "$root/tests"  # at the top Python would import the checkout's package, which has no kernels
total=400
export PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1
export CUDACXX=${CUDACXX:-$(command -v nvcc || echo /usr/local/cuda/bin/nvcc)}

# part NAME SECONDS COMMAND...
part() {
  local name=$1 limit=$2 start=$SECONDS status outcome left=$((total - SECONDS - 10))
  shift 2
  limit=$((limit < left ? limit : left))
  status=124 outcome="no time left"
  if ((limit > 0)); then
    printf '\n===== %s: %s\n' "$name" "$*" >>"$out/log.txt"
    timeout -k 5 "$limit" "$@" >>"$out/log.txt" 2>&1
    status=$?
    case $status in
      0) outcome=done ;;
      124 | 137) outcome="cut off" ;;
      *) outcome="failed, status $status" ;;
    esac
  fi
  printf '%s: %s after %d s; %s\n' "$name" "$outcome" $((SECONDS - start)) \
    "$(tail -n 1 "$out/log.txt")" | tee -a "$out/summary.txt"
  return $status
}

missing() {  # which of these modules Python cannot find
  "$python" - "$@" <<'END'
import importlib.util, sys
print(*(name for name in sys.argv[1:] if not importlib.util.find_spec(name)))
END
}

# check NAME SECONDS OPTION...: gpu_check; its report stays a file, all the rest becomes an archive.
check() {
  local name=$1 limit=$2
  shift 2
  part "$name" "$limit" "$python" "$root/benchmarks/gpu_check.py" --output "$out/$name" \
    --limit $((limit - 5)) "$@"
  if [ -d "$out/$name" ]; then
    cp "$out/$name/report.md" "$out/$name.md"
    tar -czf "$out/$name.tar.gz" -C "$out" "$name" && rm -r "${out:?}/$name"
  fi
}

# tests NAME SECONDS OPTION...: pytest, if it is there.
tests() {
  local name=$1 limit=$2
  shift 2
  if [ -n "$no_tests" ]; then
    echo "$name: not run without $no_tests" | tee -a "$out/summary.txt"
    return
  fi
  part "$name" "$limit" "$python" -m pytest -v --tb=short "${timeout_options[@]}" "$@"
}

if compgen -G "$root/wheels/*.whl" >/dev/null; then
  part wheels 60 "$python" -m pip install --no-index --no-deps "$root"/wheels/*.whl
fi
needed=$(missing torch pybind11 setuptools numpy PIL safetensors tqdm)
for program in cmake ninja "$CUDACXX"; do
  command -v "$program" >/dev/null || needed+=" $program"
done
if [ -n "$needed" ]; then
  echo "missing, nothing can be built: $needed" | tee -a "$out/summary.txt"
  exit 1
fi
no_tests=$(missing pytest xdist hypothesis)
timeout_options=(--timeout 60 --timeout-method thread)
[ -z "$(missing pytest_timeout)" ] || timeout_options=()
optional=$(missing triton pytest xdist hypothesis pytest_timeout expecttest skimage torchvision)
if [ -n "$optional" ]; then
  echo "missing, what needs it is left out: $optional" | tee -a "$out/summary.txt"
fi

part build 150 "$python" -m pip install --no-build-isolation --no-deps "$root" || exit 1
part architectures 30 "$python" -c '
from deeplab_fast import _C
built = _C.build_info()
print(built)
assert "90a-real" in built["architectures"], "there are no kernels for sm_90a"
' || exit 1

convolutions=(test_{dilated_conv2d,dilated_conv2d_backward,dilated_conv2d_and_mean}.py
  test_{fused_conv2d,aspp}.py)
upsampling=(test_upsample_{argmax,argmax_rules,cross_entropy,cross_entropy_limits}.py)
cuda=(sm90 argmax cross-entropy depthwise sm80)

if [ "$1" = first ]; then
  tests conformance 60 -n 0 test_emulator.py test_emulator_hopper.py -k conformance
  check check 180 --time --variants --families "${cuda[@]}"
  tests sm80 60 "${convolutions[@]}" -k sm80
  tests upsampling 60 "${upsampling[@]}" -k "cuda and not triton"
  tests sm90 60 "${convolutions[@]}" -k "cuda and not sm80 and not triton"
  check sanitizer 90 --sanitize memcheck racecheck --families "${cuda[@]}"
else
  tests cudnn 120 test_cudnn_reference.py
  part choices 120 "$python" "$root/benchmarks/measure_choices.py" --dtype bf16 --batch 8 \
    --output "$out/choices" --table "$out/measured.csv"
  check check-triton 120 --time --families triton
  tests triton 90 test_triton.py "${upsampling[@]}" "${convolutions[@]}" -k triton
  tests all 400 .
fi
echo "$((SECONDS)) s in all; in $out" | tee -a "$out/summary.txt"
