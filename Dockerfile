# hope-pretrain with CUDA, for `docker run --gpus all`, and as the image of a SLURM site (pyxis, apptainer).
#
#   docker build -t hope-pretrain .
#   docker run --gpus all --ipc=host --ulimit memlock=-1 -v $PWD/data:/opt/hope-pretrain/data \
#       -v $PWD/runs:/opt/hope-pretrain/runs hope-pretrain torchrun --nproc-per-node 8 pretrain_hope.py CONFIG
#
# Not run here: no Docker daemon was at hand, so this image was never built. A test checks the file against the
# repository: what it copies exists, and the extras and programs that it names do.

# devel: DeepSpeed asks for nvcc when it is imported, and triton compiles its kernels with a C compiler
FROM nvidia/cuda:12.8.1-devel-ubuntu24.04

RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
       build-essential git python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
ENV VIRTUAL_ENV=/opt/venv PATH=/opt/venv/bin:$PATH PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1
RUN python3 -m venv "$VIRTUAL_ENV"

WORKDIR /opt/hope-pretrain
# torch first, in a layer of its own: 5 GB that change seldom. Keep the bounds of pyproject.toml.
RUN pip install "torch>=2.11,<2.14"
COPY pyproject.toml README.md LICENSE pretrain_hope.py ./
COPY hope hope
COPY parallel parallel
COPY configs configs
COPY launch launch
COPY data_prep data_prep
# editable: `python pretrain_hope.py` and `python -m launch` run the files in this folder. No operator of DeepSpeed's is
# compiled, none is used.
RUN DS_BUILD_OPS=0 pip install -e ".[data,hf,wandb]"

# kernels that triton has compiled; mount a folder here to keep them between containers
ENV TRITON_CACHE_DIR=/tmp/triton OMP_NUM_THREADS=1
CMD ["python", "pretrain_hope.py", "configs/quickstart.yaml", "--dry-run", "--devices", "8"]
