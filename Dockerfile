# gptcore serve on CPUs: docker build -t gptcore . && docker run -p 127.0.0.1:8000:8000 -v MODEL_FOLDER:/model:ro gptcore
FROM python:3.12-slim AS build
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /source
COPY constraints.txt ./
RUN python -m venv /opt/gptcore \
 && /opt/gptcore/bin/pip install --no-cache-dir -c constraints.txt --extra-index-url https://download.pytorch.org/whl/cpu torch
COPY . .
RUN GPTCORE_CUDA=OFF PIP_CONSTRAINT=constraints.txt /opt/gptcore/bin/pip install --no-cache-dir ".[serve]"

FROM python:3.12-slim
RUN apt-get update && apt-get install -y --no-install-recommends libgomp1 && rm -rf /var/lib/apt/lists/* \
 && useradd --uid 10001 --no-create-home gptcore
COPY --from=build /opt/gptcore /opt/gptcore
USER gptcore
ENV XDG_CACHE_HOME=/tmp/cache PYTHONUNBUFFERED=1
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s \
  CMD ["/opt/gptcore/bin/python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=2)"]
ENTRYPOINT ["/opt/gptcore/bin/gptcore", "serve", "/model", "--host", "0.0.0.0"]
