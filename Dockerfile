# Two images of the same server: one for machines without a GPU, one for NVIDIA GPUs.
#
#   docker build --target cpu  --build-arg TORCH_INDEX=<index with torch's CPU builds> -t eft:cpu .
#   docker build --target cuda -t eft:cuda .
#   docker run -p 127.0.0.1:8000:8000 -v eft-state:/var/lib/eft -v eft-cache:/var/cache/eft eft:cpu
#   docker run -p 8000:8000 -e EFT_SERVER_API_KEY -v eft-state:/var/lib/eft -v eft-cache:/var/cache/eft \
#       --gpus all eft:cuda serve <model>
#
# /var/lib/eft holds jobs, checkpoints and adapters: without a volume of its name they go with the container.
# The server in a container listens on every address: beyond this machine, give it an API key.
#
# TORCH_INDEX is the package index to take torch from. Empty, torch comes from pip's usual index, whose
# Linux builds need an NVIDIA driver to use the GPU, work without one, and are several GB larger. Packages come as the
# lock files have them, with their hashes. The base image by its digest: --build-arg PYTHON_IMAGE=python@sha256:…

ARG PYTHON_IMAGE=python:3.12-slim-bookworm

# What is built here does not get into the images, but for the environment in /opt/eft.
FROM ${PYTHON_IMAGE} AS build
ARG TORCH_INDEX=
ENV PIP_NO_CACHE_DIR=1 VENV=/opt/eft
WORKDIR /src
COPY .ci/lib.sh .ci/python .ci/
COPY pyproject.toml requirements.lock requirements-torch.lock ./
RUN .ci/python deps
COPY README.md LICENSE ./
COPY kernels kernels
COPY settings settings
COPY runtime runtime
RUN .ci/python image

FROM ${PYTHON_IMAGE} AS server
COPY .ci/user /tmp/user
RUN /tmp/user && rm /tmp/user
COPY --from=build /opt/eft /opt/eft
COPY --chmod=755 .ci/health /usr/local/bin/eft-health
ENV PATH=/opt/eft/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    XDG_CACHE_HOME=/var/cache/eft \
    HF_HOME=/var/cache/eft/huggingface \
    EFT_SERVER_HOST=0.0.0.0
USER 10001:10001
WORKDIR /var/lib/eft
VOLUME ["/var/lib/eft", "/var/cache/eft"]
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=3 CMD ["eft-health"]
ENTRYPOINT ["eft"]
CMD ["serve"]

FROM server AS cuda
ENV EFT_MODEL_DEVICE=cuda NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility

# Last, so that it is what `docker build .` makes.
FROM server AS cpu
ENV EFT_MODEL_DEVICE=cpu
