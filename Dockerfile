# syntax=docker/dockerfile:1
# CPU:  docker build -t rheostat .
# CUDA: docker build -t rheostat:cuda --build-arg DEVICE=cuda .
# The default build of torch for Linux serves both and brings the CUDA libraries along. For a small CPU image, name the
# package index that has torch's CPU builds: --build-arg TORCH_INDEX_URL=...
ARG PYTHON=3.12
FROM python:${PYTHON}-slim AS build
ARG TORCH_INDEX_URL=
WORKDIR /src
RUN python -m venv /opt/rheostat
ENV PATH=/opt/rheostat/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
COPY constraints.txt ./
RUN pip install --constraint constraints.txt ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} torch
COPY pyproject.toml README.md LICENSE ./
COPY model ./model
COPY service ./service
RUN pip install --constraint constraints.txt .

FROM python:${PYTHON}-slim
ARG DEVICE=cpu
COPY --from=build /opt/rheostat /opt/rheostat
RUN useradd --create-home --uid 10001 rheostat
USER rheostat
WORKDIR /home/rheostat
ENV PATH=/opt/rheostat/bin:$PATH \
    NUMBA_CACHE_DIR=/home/rheostat/.cache/numba \
    RHEOSTAT_DEVICE=${DEVICE} \
    RHEOSTAT_HOST=0.0.0.0
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
CMD ["rheostat", "serve"]
