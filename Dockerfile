# Two images of the same server: one for machines without a GPU, one for NVIDIA GPUs.
#
#   docker build --target cpu  --build-arg TORCH_INDEX=<index with torch's CPU builds> -t eft:cpu .
#   docker build --target cuda -t eft:cuda .
#   docker run --read-only --tmpfs /tmp -p 127.0.0.1:8000:8000 \
#       -v eft-state:/var/lib/eft -v eft-cache:/var/cache/eft eft:cpu
#   docker run --read-only --tmpfs /tmp -p 8000:8000 -e EFT_SERVER_API_KEY \
#       -v eft-state:/var/lib/eft -v eft-cache:/var/cache/eft --gpus all eft:cuda serve <model>
#
# Nothing but the two volumes and /tmp is written. /var/lib/eft holds jobs, checkpoints and adapters: without a volume of
# its name they go with the container. /var/cache/eft holds models that were fetched, and what is made from them.
# The server in a container listens on every address: beyond this machine, give it an API key.
#
# TORCH_INDEX is the package index to take torch from. Empty, torch comes from pip's usual index, whose
# Linux builds need an NVIDIA driver to use the GPU, work without one, and are several GB larger. Packages come as the
# lock files have them, with their hashes, and so does the base image; --build-arg PYTHON_IMAGE=… takes another one. What an
# image consists of is in it, as CycloneDX: /usr/share/eft/sbom.json. .ci/chroot runs these steps without an engine.

ARG PYTHON_IMAGE=python:3.12.14-slim-bookworm@sha256:782412e85d0f0984994c290652577d4018aff08145c85b262bb63dc0c7522254

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
ARG REVISION=
LABEL org.opencontainers.image.title="Eft" \
      org.opencontainers.image.description="Serves a language model and fine-tunes adapters for it, from one copy of the weights" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.licenses="Apache-2.0 AND MIT" \
      org.opencontainers.image.vendor="The Eft authors" \
      org.opencontainers.image.base.name="docker.io/library/python:3.12.14-slim-bookworm"
COPY .ci/user /usr/local/sbin/eft-user
RUN eft-user
COPY --from=build /opt/eft /opt/eft
COPY --chmod=755 .ci/sbom /usr/local/sbin/eft-sbom
RUN eft-sbom /usr/share/eft/sbom.json /opt/eft
COPY --chmod=755 .ci/health /usr/local/bin/eft-health
ENV PATH=/opt/eft/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    XDG_CACHE_HOME=/var/cache/eft \
    TRITON_CACHE_DIR=/var/cache/eft/triton \
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

# Triton compiles a kernel's launcher with a C compiler when the kernel is first used.
FROM server AS cuda
USER 0:0
COPY .ci/compiler /usr/local/sbin/eft-compiler
RUN eft-compiler && eft-sbom /usr/share/eft/sbom.json /opt/eft
USER 10001:10001
ENV EFT_MODEL_DEVICE=cuda NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility

# Last, so that it is what `docker build .` makes.
FROM server AS cpu
ENV EFT_MODEL_DEVICE=cpu
