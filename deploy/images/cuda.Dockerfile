# syntax=docker/dockerfile:1
# Towers on NVIDIA GPUs. torch brings its CUDA libraries and Triton; the driver comes from the host. From the repository's root:
#   docker build -f deploy/images/cuda.Dockerfile -t twotower:cuda .
ARG PYTHON_IMAGE=python:3.12.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
RUN python -m venv /opt/twotower
COPY deploy/images/constraints.txt ./
# The largest layer, which changes when torch does.
RUN /opt/twotower/bin/pip install --constraint constraints.txt torch
COPY pyproject.toml README.md LICENSE ./
COPY services services
COPY kernels kernels
RUN /opt/twotower/bin/pip install --constraint constraints.txt . \
    && /opt/twotower/bin/python -m compileall -q /opt/twotower/lib

FROM ${PYTHON_IMAGE}
# A compiler: Triton builds the launchers of its kernels with it, at the first use.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++=4:12.2.0-3 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --user-group --home-dir /cache --no-create-home twotower \
    && install --directory --owner=10001 --group=10001 /cache /cache/triton
COPY --from=build /opt/twotower /opt/twotower
COPY deploy/images/healthcheck.py /usr/local/lib/twotower/healthcheck.py
ENV PATH=/opt/twotower/bin:$PATH HOME=/cache TRITON_CACHE_DIR=/cache/triton PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
# What is written, so that everything else can be read-only: compiled kernels. A volume that stays saves their compilation.
VOLUME /cache
USER 10001:10001
EXPOSE 8000 50051 50052 50053 9090
HEALTHCHECK --interval=10s --timeout=10s --start-period=30m --start-interval=2s --retries=3 \
    CMD ["python", "/usr/local/lib/twotower/healthcheck.py"]
ENTRYPOINT ["twotower"]
CMD ["--help"]
