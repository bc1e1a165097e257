# An image that serves the Docker it runs on:
#
#     docker build -t pynet .
#     mkdir -p -m 700 /var/lib/pynet
#     docker run --detach --name pynet --restart always --stop-timeout 20 \
#         --network host --pid host --cap-drop ALL \
#         --cap-add NET_ADMIN --cap-add NET_RAW --cap-add NET_BIND_SERVICE \
#         --cap-add SYS_ADMIN --security-opt apparmor=unconfined \
#         --security-opt systempaths=unconfined --volume /run:/run:rshared \
#         --volume /var/lib/pynet:/var/lib/pynet pynet
#
# Settings are `--env PYNET_STORE=…`, or a file: `--volume /etc/pynet:/etc/pynet`. The
# commands are in it: `docker exec pynet pynet status`.
# Docker starts it after it has restored its networks, so that containers of pynet's
# networks do not come up with Docker: where they must, use plugin-spec/build or
# deploy/pynet.service.
#
# The base needs Python 3.11 or newer with venv. One that has iptables and nft is taken
# as it is; on another, apt-get installs them. Where nothing can be reached,
#
#     pip download --require-hashes -r requirements.lock -d wheels
#     docker build --build-arg BASE=… --build-arg PIP_NO_INDEX=1 -t pynet .

ARG BASE=python:3.13-slim

FROM ${BASE} AS build
# pip's own settings, all of them empty if they are not given.
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG PIP_NO_INDEX
WORKDIR /src
# The second need not be there; what is in it is checked against the hashes too.
COPY requirements.lock wheel[s] wheels/
RUN python3 -m venv /pip \
    && /pip/bin/pip wheel --quiet --no-cache-dir --require-hashes \
        --find-links wheels --wheel-dir /wheels --requirement wheels/requirements.lock
COPY pyproject.toml README.md LICENSE ./
COPY cnmdriver cnmdriver
# From the wheels alone: their versions are the lock's, and only those that the
# package itself asks for are taken.
RUN python3 -m venv --without-pip /opt/pynet \
    && /pip/bin/pip --python /opt/pynet/bin/python install --quiet --no-cache-dir \
        --no-index --find-links /wheels .

FROM ${BASE}
RUN if ! command -v iptables || ! command -v nft; then \
        apt-get update --quiet=2 \
        && apt-get install --quiet=2 --yes --no-install-recommends iptables nftables \
        && rm -rf /var/lib/apt/lists/*; \
    fi
COPY --from=build /opt/pynet /opt/pynet
ENV PATH=/opt/pynet/bin:$PATH
# It stays root: Docker gives capabilities to no other user, and the plugin's socket is
# made in a directory that is root's. What root may do, the line above says.
ENTRYPOINT ["pynet", "serve"]
