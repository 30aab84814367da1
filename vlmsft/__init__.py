"""Fine-tune vision-language models on NeMo 2.0, driven by YAML."""

import os

# megatron-core 0.15.3 compiles a CUDA stub at import. With a CUDA toolkit but no GPU, torch can't guess the
# architecture and dies with an IndexError; any named one will do, the stub is never run.
if not os.path.exists("/dev/nvidiactl"):
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "9.0")
