# syntax=docker/dockerfile:1
# Two images from one recipe, which are the Makefile's own targets, of the files that locks/ names by
# hash; each holds what it is made of in /opt/shoal/sbom.json (CycloneDX):
#   docker build --target cpu  -t shoal:0.1.0 .
#   docker build --target cuda -t shoal:0.1.0-cuda .
# CUDA itself comes with torch's wheels; the host brings the driver and the container toolkit.
# The CPU image takes PyTorch's CPU-only wheel: give its index with --secret id=pip,src=pip.conf.

ARG PYTHON_IMAGE=python:3.11.14-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
RUN apt-get update \
 && apt-get install --yes --no-install-recommends make \
 && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/shoal
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
COPY Makefile pyproject.toml constraints.txt README.md LICENSE ./
COPY locks locks
COPY policies policies
COPY models models
COPY router router

FROM build AS build-cpu
RUN --mount=type=secret,id=pip,target=/etc/pip.conf make install LOCKED=1 IMAGE=cpu
RUN --mount=type=secret,id=pip,target=/etc/pip.conf make sbom

FROM build AS build-cuda
RUN --mount=type=secret,id=pip,target=/etc/pip.conf make install LOCKED=1 IMAGE=cuda
RUN --mount=type=secret,id=pip,target=/etc/pip.conf make sbom

FROM ${PYTHON_IMAGE} AS base
# wget is what KubeRay's probes and the health check below ask with; llama.cpp needs libgomp1.
RUN apt-get update \
 && apt-get install --yes --no-install-recommends wget tini libgomp1 \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --uid 1000 --user-group --create-home --shell /bin/bash shoal \
 && install --directory --owner shoal --group shoal /var/lib/shoal \
 && echo 'export PATH=/opt/shoal/.venv/bin:$PATH' > /etc/profile.d/shoal.sh
ENV PATH=/opt/shoal/.venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    RAY_USAGE_STATS_ENABLED=0 \
    SHOAL_LEDGER=sqlite:////var/lib/shoal/shoal.db
# Relative paths, the ledger's too, start here.
WORKDIR /var/lib/shoal
USER 1000:1000
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=3 \
    CMD ["wget", "-q", "-T", "4", "-O", "/dev/null", "http://127.0.0.1:8000/health"]
ENTRYPOINT ["tini", "--"]
CMD ["shoal", "serve", "--host", "0.0.0.0"]

FROM base AS cpu
COPY --from=build-cpu /opt/shoal/.venv /opt/shoal/.venv
COPY --from=build-cpu /opt/shoal/sbom.json /opt/shoal/sbom.json
RUN python -c "from router.haproxy import find_haproxy; assert find_haproxy(), 'no HAProxy'"

FROM base AS cuda
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=build-cuda /opt/shoal/.venv /opt/shoal/.venv
COPY --from=build-cuda /opt/shoal/sbom.json /opt/shoal/sbom.json
RUN python -c "from router.haproxy import find_haproxy; assert find_haproxy(), 'no HAProxy'"
