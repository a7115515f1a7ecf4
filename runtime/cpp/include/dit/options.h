/* How a bundle is opened. Included by dit.h. */
#ifndef DIT_OPTIONS_H
#define DIT_OPTIONS_H

/* A switch that any thread may throw: each call that was made with it then returns DIT_STOPPED, within a step of the
 * network and 20 ms, or at once where it opens, compiles or decodes. A compilation goes on in the background until it
 * is done, and is dropped; the process waits for it when its main thread ends it, if that thread loaded the library. A
 * switch stays thrown: make a new one for the next call. */
typedef struct dit_cancellation dit_cancellation;

/* NULL where memory is short. */
DIT_API dit_cancellation* dit_cancellation_new(void);

/* Any thread may call it, before dit_cancellation_free; NULL is fine. */
DIT_API void dit_cancel(dit_cancellation* cancellation);

/* May come while calls that were made with it go on, which then finish; NULL is fine. */
DIT_API void dit_cancellation_free(dit_cancellation* cancellation);

/* How much of a call is done, from 0 to 1. Return 0 to go on; any other number stops the call: DIT_STOPPED. Several
 * threads call it, one at a time, and wait for it. It must not throw. */
typedef int (*dit_on_progress)(double done, void* user);

/* A setting of one stage's engine, or of all:
 *
 *     backend     as dit_open_options.backend
 *     device      as dit_open_options.device: cpu, cuda:1, GPU, ...
 *     threads     1 or more
 *     affinity    CPUs of ONNX Runtime's threads, one each: 0-3,8. The thread that calls is the first of them, and runs
 *                 where it is
 *     cache       the folder for what TensorRT-RTX compiles; "": none
 *     onnxruntime.KEY, onnxruntime.provider.KEY, openvino.KEY
 *                 the backend's own: a session's config entry (session.intra_op.allow_spinning), a provider's option
 *                 (gpu_mem_limit), a property (NUM_STREAMS). A stage of another backend ignores it. OpenVINO refuses an
 *                 unknown property; ONNX Runtime ignores an unknown config entry
 *
 * Another key, one of TensorRT (tensorrt.KEY), or a stage that the bundle does not have, is DIT_BAD_ARGUMENT at
 * dit_model_open. */
typedef struct dit_setting {
    const char* stage; /* its name in manifest.json: "denoiser", "decoder", ...; NULL: every stage */
    const char* key;
    const char* value;
} dit_setting;

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
    const dit_setting* settings; /* where two of the same key apply to a stage, the later counts; settings win over
                                    backend, device and threads above */
    size_t num_settings;
    dit_on_progress on_progress;    /* of the bytes whose sums are compared; NULL: none */
    void* user;                     /* for on_progress */
    dit_cancellation* cancellation; /* NULL: none */
    uint64_t max_bytes;             /* of the files that are opened; a bundle with more is refused. 0: any number */
    const uint8_t* public_key; /* an Ed25519 key: a bundle that its owner has not signed (dit-export sign) is refused
                                  before any file but manifest.json is read. NULL: any bundle */
    size_t public_key_size;    /* 32 */
} dit_open_options;

#define DIT_OPEN_OPTIONS_INIT \
    {sizeof(dit_open_options), NULL, NULL, 0, 0, NULL, 0, NULL, NULL, NULL, 0, NULL, NULL, NULL, 0, NULL, 0}

#endif /* DIT_OPTIONS_H */
