# The commands of the package, for CPU or CUDA:
#   docker build -t rollingq .
#   docker build -t rollingq:cuda --build-arg EXTRAS=demo,datasets,cuda .
#   docker run --rm -v "$PWD:/work" rollingq train --config av_digits --workdir runs/demo
# For CUDA `docker run` takes `--gpus all` too, which needs NVIDIA's container toolkit; the base is the
# same, since jax brings CUDA's libraries along.
FROM python:3.11-slim
ARG EXTRAS=demo,datasets
COPY pyproject.toml constraints.txt README.md LICENSE /src/
COPY rollingq_jax /src/rollingq_jax
COPY configs /src/configs
RUN python -m pip install --no-cache-dir "/src[${EXTRAS}]" -c /src/constraints.txt && rm -r /src
# Whoever runs it owns what it writes: docker run --user "$(id -u):$(id -g)".
ENV HOME=/tmp
WORKDIR /work
ENTRYPOINT ["rollingq"]
CMD ["--help"]
