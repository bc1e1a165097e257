# An image that serves the Docker it runs on:
#
#     docker build -t pynet .
#     docker run --detach --name pynet --restart always --privileged \
#         --network host --pid host \
#         --volume /run:/run --volume /var/lib/pynet:/var/lib/pynet pynet
#
# Docker starts it after it has restored its networks, so that containers of pynet's
# networks do not come up with Docker: where they must, use deploy/pynet.service.

ARG BASE=python:3.13-slim

FROM ${BASE} AS build
WORKDIR /src
COPY requirements.lock .
RUN pip wheel --quiet --no-cache-dir --require-hashes \
        --wheel-dir /wheels --requirement requirements.lock
COPY pyproject.toml README.md LICENSE ./
COPY cnmdriver cnmdriver
# From the wheels alone: their versions are the lock's, and only those that the
# package itself asks for are taken.
RUN python -m venv /opt/pynet \
    && /opt/pynet/bin/pip install --quiet --no-cache-dir \
        --no-index --find-links /wheels .

FROM ${BASE}
RUN apt-get update --quiet=2 \
    && apt-get install --quiet=2 --yes --no-install-recommends iptables nftables \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/pynet /opt/pynet
ENTRYPOINT ["/opt/pynet/bin/pynet", "serve"]
