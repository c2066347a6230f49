# CPU:            docker build -t lct .
# NVIDIA GPUs:    docker build --build-arg ACCELERATOR=cuda13 -t lct:cuda13 .
# Run:            docker run --rm --gpus all --shm-size 16g -v "$PWD/runs:/lct/runs" lct:cuda13 \
#                     python experiments/extend.py --config experiments/configs/smoke.py --workdir runs/smoke
FROM python:3.11-slim-bookworm

# cpu, or cuda13: the CUDA libraries come as packages, the driver from the host
ARG ACCELERATOR=cpu
ENV PYTHONUNBUFFERED=1 NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility

WORKDIR /lct
# before the code, so that a change of the code installs nothing again
COPY locks/${ACCELERATOR}.txt locks/
RUN pip install --no-cache-dir --require-hashes -r "locks/${ACCELERATOR}.txt"
COPY setup.py pyproject.toml README.md LICENSE ./
COPY lct lct
RUN pip install --no-cache-dir --no-deps .
COPY experiments experiments
COPY notebooks notebooks

# compiled programs are kept in the user's home, and a work directory is written to runs/
RUN useradd --create-home --uid 1000 lct && mkdir runs && chown lct runs
USER 1000
CMD ["python", "experiments/doctor.py"]
