# Triton with the packages that a model of `dit-export triton` needs:
# docker build -f deploy/docker/triton.Dockerfile -t dit-triton .
# A test lints this file and checks what it names. It was not built: the project's machines have no container daemon.
FROM nvcr.io/nvidia/tritonserver:25.10-py3
ENV APIS=model-repository,shared-memory,trace,logging
WORKDIR /source
COPY constraints.txt ./
COPY runtime runtime
RUN pip install --no-cache-dir --constraint constraints.txt './runtime[serve,text,openvino,onnxruntime]'
# triton-server, a user of that image
USER 1000:1000
EXPOSE 8000 8001 8002
# Clients without the word in ADMIN can draw, and neither unload models nor reach shared memory.
ENTRYPOINT ["sh", "-c", "exec tritonserver --model-repository=/models --http-restricted-api=\"$APIS:admin=${ADMIN:?}\" --grpc-restricted-protocol=\"$APIS:admin=${ADMIN:?}\""]
