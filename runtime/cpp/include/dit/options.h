/* How a bundle is opened. Included by dit.h. */
#ifndef DIT_OPTIONS_H
#define DIT_OPTIONS_H

typedef struct dit_open_options {
    size_t struct_size;
    const char* backend; /* "onnxruntime", "openvino", …, or "auto"; NULL: the one that the bundle was built for */
    const char* device;  /* ONNX Runtime: cpu, cuda, cuda:1, tensorrt, tensorrt-rtx, openvino; OpenVINO: CPU, GPU;
                            TensorRT: cuda, cuda:1; NULL: CPU, or the first GPU */
    int threads;         /* of an engine on the CPU; 0: its own choice */
    int low_memory;      /* 1: one engine in memory at a time, opened when a run comes to it; slower */
    const int64_t* warm; /* batch sizes, from 1 to max_batch: every stage runs at each of them, guided and not,
                            so that a later request of such a size compiles nothing; not with low_memory */
    size_t num_warm;
    const char* size; /* what requests without a size draw, as dit_size names it; NULL: the bundle's first. The engines
                         of other sizes open when they are first drawn */
    const char* manifest_sha256; /* the sum that manifest.json must have, 64 hexadecimal digits; as the manifest has the
                                    sums of all other files, the bundle is then this one. NULL: any bundle */
} dit_open_options;

#define DIT_OPEN_OPTIONS_INIT {sizeof(dit_open_options), NULL, NULL, 0, 0, NULL, 0, NULL, NULL}

#endif /* DIT_OPTIONS_H */
