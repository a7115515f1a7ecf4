# A machine of a Ray cluster that draws shards and runs deploy/ray/app.py:
# docker build -f deploy/docker/ray.Dockerfile -t dit-ray .
# A test lints this file and checks what it names. It was not built: the project's machines have no container daemon.
FROM rayproject/ray:2.60.0-py312
WORKDIR /home/ray/source
COPY --chown=ray:users constraints.txt ./
COPY --chown=ray:users runtime runtime
COPY --chown=ray:users deploy/ray /home/ray/app
RUN pip install --no-cache-dir --constraint constraints.txt './runtime[serve,text,openvino,onnxruntime,ray-serve]'
WORKDIR /home/ray/app
