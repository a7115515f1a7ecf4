/* dit.h: draws pictures from a bundle of dit-export, with no Python and no PyTorch.
 *
 *     dit_pipeline *pipe = dit_new();
 *     if (dit_open(pipe, "first-bundle", NULL) != DIT_OK) {
 *         fprintf(stderr, "%s\n", dit_message(pipe));
 *         ...
 *     }
 *     int64_t labels[2] = {207, 360};
 *     dit_request request = DIT_REQUEST_INIT;
 *     request.labels = labels;
 *     request.count = 2;
 *     if (dit_generate(pipe, &request, pixels, sizeof pixels) == DIT_OK) ...
 *     dit_free(pipe);
 *
 * Threads: a pipeline is used by one thread at a time, whichever that is; a call that finds another one inside returns
 * DIT_BUSY and does nothing. Different pipelines do not know of each other. dit_free must be the last call. Engines
 * bring threads of their own; dit_open_options.threads bounds them.
 *
 * Ownership: strings that a function returns belong to the library. dit_message's stays until the next fallible call on
 * the pipeline; all others stay until dit_free. Arguments stay the caller's and are copied; only on_step and user of a
 * dit_run_new are used for as long as the run. A dit_run belongs to its pipeline: dit_run_free comes before dit_free.
 *
 * Errors: each fallible call returns a dit_status. dit_message(pipe) then says in one sentence what, where, what was
 * expected and what to do; DIT_BUSY has no message, and the other call's must not be read while it runs. A pipeline
 * works on after any failure but that of dit_open.
 *
 * Versions: structs begin with their size, so a program that was compiled with an older dit.h runs with a newer
 * library; a struct that is larger than the library knows is refused.
 */
#ifndef DIT_DIT_H
#define DIT_DIT_H

#include <stddef.h>
#include <stdint.h>

#define DIT_VERSION_MAJOR 0
#define DIT_VERSION_MINOR 1
#define DIT_VERSION_PATCH 0

#if defined(_WIN32)
#ifdef DIT_BUILD
#define DIT_API __declspec(dllexport)
#else
#define DIT_API __declspec(dllimport)
#endif
#else
#define DIT_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef struct dit_pipeline dit_pipeline;
typedef struct dit_run dit_run;

typedef enum dit_status {
    DIT_OK = 0,
    DIT_BAD_ARGUMENT = 1,     /* a label, a number, a name, NULL, a struct of another version */
    DIT_BAD_BUNDLE = 2,       /* damaged, of another format, or it cannot run here */
    DIT_BUFFER_TOO_SMALL = 3, /* the message says how much is needed */
    DIT_ENGINE_FAILED = 4,    /* an engine gave no sound result */
    DIT_STOPPED = 5,          /* the progress callback or dit_run_cancel asked for it */
    DIT_NOT_VERIFIED = 6,     /* dit_verify: these engines do not draw PyTorch's pictures */
    DIT_OUT_OF_MEMORY = 7,
    DIT_BUSY = 8,    /* another call on this pipeline has not returned */
    DIT_INTERNAL = 9 /* a bug of this library */
} dit_status;

/* Options: start from the _INIT value, which sets struct_size. */

typedef struct dit_open_options {
    size_t struct_size;
    const char* backend; /* "onnxruntime", "openvino", …, or "auto"; NULL: the one that the bundle was built for */
    const char* device;  /* ONNX Runtime: cpu, cuda, cuda:1, tensorrt, tensorrt-rtx, openvino; OpenVINO: CPU, GPU;
                            TensorRT: cuda, cuda:1; NULL: CPU, or the first GPU */
    int threads;         /* of an engine on the CPU; 0: its own choice */
    int low_memory;      /* 1: one engine in memory at a time, opened when a run comes to it; slower */
    const int64_t* warm; /* batch sizes, from 1 to max_batch: dit_open runs every stage at each of them, guided and not,
                            so that a later request of such a size compiles nothing; not with low_memory */
    size_t num_warm;
    const char* size; /* what requests without a size draw, as dit_size names it; NULL: the bundle's first. The engines
                         of other sizes open when they are first drawn */
} dit_open_options;

#define DIT_OPEN_OPTIONS_INIT {sizeof(dit_open_options), NULL, NULL, 0, 0, NULL, 0, NULL}

typedef struct dit_info {
    size_t struct_size;
    int64_t num_classes;      /* labels are 0 to num_classes - 1; 0 where the network takes none */
    int has_labels;           /* whether classes have names */
    int64_t latent_shape[3];  /* channels, height, width; all 0 where the state has another rank than 3 */
    int64_t image_shape[3];   /* height, width, 3; all 0 without a decoder */
    int64_t max_batch;        /* what the denoiser takes at a time; longer requests are split */
    int64_t train_steps;      /* the most steps of a run */
    const char* model;        /* its name, such as "XL/2" */
    const char* solver;       /* the bundle's default */
    const char* backend;      /* that the denoiser runs on here */
    const char* precision;    /* of the denoiser */
    int64_t caption_shape[2]; /* of the port "captions": the most tokens, and numbers a token; both 0 without it */
    int state_rank;           /* of what a run changes, such as latents */
    int64_t state_shape[8];   /* its sizes, channels first */
    const char* note;         /* a line for people where a graph does not compute here in its precision; else "" */
    int batch_invariant; /* 1: the build saw on these engines, on a CPU, that a sample has the same bits in each batch;
                            0: it differs, or was not measured */
    int64_t steps;       /* the bundle's default */
    double guidance;     /* the bundle's default */
    const char* guidance_port; /* the port that takes the weight of a network which is guided by itself; a request
                                  leaves it out, and has no negative. "": guidance leads away from a negative */
} dit_info;

#define DIT_INFO_INIT                                                                                    \
    {sizeof(dit_info),         0,    0, {0, 0, 0}, {0, 0, 0}, 0,   0, NULL, NULL, NULL, NULL, {0, 0}, 0, \
     {0, 0, 0, 0, 0, 0, 0, 0}, NULL, 0, 0,         0.0,       NULL}

/* A size of the pictures that the bundle draws. dit_info has the shapes of the one that requests without a size draw.
 */
typedef struct dit_size {
    size_t struct_size;
    const char* name;       /* "512", or "512x768" for height x width; "": the bundle has one, without a name */
    int state_rank;         /* of what a run changes */
    int64_t state_shape[8]; /* its sizes, channels first */
    int64_t image_shape[3]; /* height, width, 3; all 0 without a decoder */
} dit_size;

#define DIT_SIZE_INIT {sizeof(dit_size), NULL, 0, {0, 0, 0, 0, 0, 0, 0, 0}, {0, 0, 0}}

typedef enum dit_dtype { DIT_FLOAT32 = 0, DIT_INT64 = 1 } dit_dtype;

/* An input that conditions the network: labels, prompt embeddings, masks, sizes, … */
typedef struct dit_port {
    size_t struct_size;
    const char* name;
    dit_dtype dtype;
    int rank;          /* of a row */
    int64_t shape[8];  /* of a row: the first size is the most tokens where a mask marks them */
    int64_t size;      /* of DIT_INT64: values are 0 to size - 1 */
    const char* masks; /* the port whose tokens this one marks with 1 or 0; "" where it is no mask */
    int has_null;      /* whether guidance leads away from a constant, so that a negative is not needed */
} dit_port;

#define DIT_PORT_INIT {sizeof(dit_port), NULL, DIT_FLOAT32, 0, {0, 0, 0, 0, 0, 0, 0, 0}, 0, NULL, 0}

/* What a prompt becomes with one tokenizer. A bundle with text encoders takes these arrays in the place of the ports
 * that the encoders give. libdit has no tokenizer: put the words into the template and tokenize them elsewhere. */
typedef struct dit_prompt {
    size_t struct_size;
    const char* ids;  /* the array of token ids, int64 [rows, tokens] */
    const char* mask; /* the array that is 1 for each token of the prompt, else 0, int64 [rows, tokens]; "": none */
    int64_t tokens;
    int64_t size;                  /* ids are 0 to size - 1 */
    const char* tokenizer;         /* a file of the bundle: a tokenizer.json that truncates and pads to `tokens` */
    const char* prompt_template;   /* the words stand where it has {} */
    const char* negative_template; /* the same for negative prompts, of which the usual one is "" */
    int lowercase;                 /* 1: the words are lowered and stripped before, as str.lower and str.strip do */
} dit_prompt;

#define DIT_PROMPT_INIT {sizeof(dit_prompt), NULL, NULL, 0, 0, NULL, NULL, NULL, 0}

/* Called after each step; solver heun has two for each of the request's. What is not 0 stops the run.
 * `latents` holds the numbers of state_shape for each picture. It must not throw and must not call this pipeline. */
typedef int (*dit_on_step)(int step, int steps, const double* latents, size_t size, void* user);

/* Rows for one port, or token ids or their mask for a dit_prompt. A port that another one masks takes shorter rows too;
 * a mask of a port that is not there is 1 for each of their tokens. */
typedef struct dit_array {
    size_t struct_size;
    const char* name;        /* of the port, or of dit_prompt */
    size_t rows;             /* one a picture; of a negative one for all, or one each */
    size_t size;             /* numbers in all, a multiple of rows */
    const float* floats;     /* size numbers; or NULL, and */
    const int64_t* integers; /* size numbers, which fit a port of floats too */
} dit_array;

#define DIT_ARRAY_INIT {sizeof(dit_array), NULL, 0, 0, NULL, NULL}

/* Prompt embeddings: the ports "captions" and "mask" of a bundle that has them. */
typedef struct dit_captions {
    size_t struct_size;
    size_t count;            /* of texts */
    size_t tokens;           /* of each, up to dit_info.caption_shape[0]; shorter ones have a mask */
    const float* embeddings; /* count · tokens · caption_shape[1] numbers */
    const float* mask;       /* count · tokens: 1 where a text has a token, else 0; NULL: all are tokens */
    size_t size;             /* numbers in embeddings, which is checked; 0: it is not */
} dit_captions;

#define DIT_CAPTIONS_INIT {sizeof(dit_captions), 0, 0, NULL, NULL, 0}

/* An integer of a dit_request that has its default. */
#define DIT_DEFAULT INT32_MIN

typedef struct dit_request {
    size_t struct_size;
    const int64_t* labels;
    size_t count;          /* of labels, and so of pictures; 0 where arrays or captions say how many; the number of
                              pictures where nothing conditions the network */
    const uint64_t* seeds; /* NULL: 0 */
    size_t num_seeds;      /* 1: one stream of noise for all, as PyTorch draws; count: one each, so that a picture does
                              not depend on its neighbours */
    const float* guidance; /* NULL: the bundle's */
    size_t num_guidance;   /* 1, or count */
    int steps;             /* 0: the bundle's */
    const char* solver;    /* ddpm, ddim, dpm++1, dpm++, dpm++3, sde-dpm++1, sde-dpm++, unipc1, unipc, unipc3, deis,
                              deis3; of a model that predicts a velocity dpm++1, dpm++, dpm++3, euler, heun, sde, scm,
                              sde-dpm++1, sde-dpm++, unipc1, unipc, unipc3, deis, deis3; NULL: the bundle's */
    const char* spacing;   /* stride, respaced, leading, trailing, linspace, karras, exponential, beta; of a velocity
                              trailing, linspace, discrete, integer, karras, exponential, beta; or the times themselves,
                              "999, 640, 300": training steps, or σ of a velocity; NULL: the bundle's */
    double eta;            /* noise of ddim, 0 to 1 */
    const float* latents;  /* for each picture the numbers of state_shape to start from; NULL: the seeds' noise */
    dit_on_step on_step;   /* NULL: none */
    void* user;            /* for on_step */
    const dit_captions* captions; /* instead of labels; count is then 0 or theirs */
    const dit_captions* negative; /* of an empty text, which guidance leads away from: one, or one a caption */
    const dit_array* arrays;      /* conditions by port or by token ids, beside labels or captions or alone */
    size_t num_arrays;
    const dit_array* negative_arrays; /* what guidance leads away from, where a port has no constant for that */
    size_t num_negative_arrays;
    size_t latents_size;         /* numbers in latents, which is checked; 0: it is not */
    double guidance_interval[2]; /* steps are guided between these fractions of the time: of t over train_steps, of a
                                    model that predicts a velocity of σ; both ends count. {0, 1}: all steps, or the
                                    preset's */
    const char* guidance_policy; /* constant, rescale, zero_star, apg, as "NAME" or "NAME KEY=VALUE …"; NULL: constant,
                                    the network's own guidance */
    const char* cache;  /* of outputs: taylorseer, easycache, which decides for all pictures of a request at once;
                           NULL: none */
    int cache_interval; /* taylorseer evaluates each step of so many */
    int max_order;      /* of taylorseer, 0 to 2 */
    int disable_cache_before_step; /* earlier steps are evaluated */
    int disable_cache_after_step;  /* this step and later ones are evaluated; below 0: from the end */
    double cache_threshold;        /* the error that easycache lets grow; below 0: its default */
    const char* preset;            /* of the bundle (dit_preset): values for the fields above that have their _INIT
                                      values; NULL: none */
    const char* size;              /* one of the bundle's, as dit_size names it; its shapes are then those of the
                                      buffers and of latents; NULL: the pipeline's */
} dit_request;

#define DIT_REQUEST_INIT  \
    {sizeof(dit_request), \
     NULL,                \
     0,                   \
     NULL,                \
     0,                   \
     NULL,                \
     0,                   \
     0,                   \
     NULL,                \
     NULL,                \
     0.0,                 \
     NULL,                \
     NULL,                \
     NULL,                \
     NULL,                \
     NULL,                \
     NULL,                \
     0,                   \
     NULL,                \
     0,                   \
     0,                   \
     {0.0, 1.0},          \
     NULL,                \
     NULL,                \
     DIT_DEFAULT,         \
     DIT_DEFAULT,         \
     DIT_DEFAULT,         \
     DIT_DEFAULT,         \
     -1.0,                \
     NULL,                \
     NULL}

/* A pipeline without a bundle; NULL where memory is short. */
DIT_API dit_pipeline* dit_new(void);

/* NULL is fine. */
DIT_API void dit_free(dit_pipeline* pipe);

/* Opens a bundle. Its manifest is checked first; the sha256 of an engine file is checked before that is opened, the one
 * of a graph while it is. A wrong sum refuses the bundle. All of this is done once: an engine that is opened later, as
 * all are with low_memory, takes its files as they are then. A pipeline opens one bundle; options may be NULL. What
 * TensorRT-RTX compiles is kept in $XDG_CACHE_HOME/dit-run (or ~/.cache/dit-run). */
DIT_API dit_status dit_open(dit_pipeline* pipe, const char* bundle, const dit_open_options* options);

DIT_API dit_status dit_get_info(dit_pipeline* pipe, dit_info* info);

/* The number of sizes that the bundle draws; 0 without a bundle. */
DIT_API size_t dit_size_count(const dit_pipeline* pipe);

/* The sizes from 0, which requests without a size draw, to dit_size_count - 1; start from DIT_SIZE_INIT. */
DIT_API dit_status dit_get_size(dit_pipeline* pipe, size_t index, dit_size* size);

/* The number of ports that condition the network; 0 without a bundle. */
DIT_API size_t dit_port_count(const dit_pipeline* pipe);

/* The ports from 0 to dit_port_count - 1; start from DIT_PORT_INIT. */
DIT_API dit_status dit_get_port(dit_pipeline* pipe, size_t index, dit_port* port);

/* The number of tokenizers that a prompt goes through; 0 without text encoders or without a bundle. */
DIT_API size_t dit_prompt_count(const dit_pipeline* pipe);

/* The prompts from 0 to dit_prompt_count - 1; start from DIT_PROMPT_INIT. */
DIT_API dit_status dit_get_prompt(dit_pipeline* pipe, size_t index, dit_prompt* prompt);

/* The name of a preset, from 0 on; NULL where there is none. */
DIT_API const char* dit_preset(const dit_pipeline* pipe, size_t index);

/* The name of a class; NULL where there is none. */
DIT_API const char* dit_label(const dit_pipeline* pipe, int64_t label);

/* The class of a name, one of its synonyms, or a number as text. */
DIT_API dit_status dit_find_label(dit_pipeline* pipe, const char* name, int64_t* label);

/* Draws pictures, uint8 [count, height, width, 3]; `size` is in bytes. */
DIT_API dit_status dit_generate(dit_pipeline* pipe, const dit_request* request, uint8_t* pixels, size_t size);

/* Samples without decoding, float [count, state_shape]; `size` is in numbers. */
DIT_API dit_status dit_generate_latents(dit_pipeline* pipe, const dit_request* request, float* latents, size_t size);

/* A run that the caller steps, so that a service owns the loop and may have several under way:
 *
 *     dit_run* run = NULL;
 *     int more = 1;
 *     dit_status status = dit_run_new(pipe, &request, &run);
 *     while (status == DIT_OK && more) status = dit_run_step(run, &more);
 *     if (status == DIT_OK) status = dit_run_result(run, pixels, sizeof pixels);
 *     dit_run_free(run);
 *
 * Its calls are calls on its pipeline: DIT_BUSY where another one is inside, and dit_message(pipe) has the sentence.
 * dit_run_new checks the whole request and keeps what it needs of it; request.user must live as long as the run. */
DIT_API dit_status dit_run_new(dit_pipeline* pipe, const dit_request* request, dit_run** run);

/* Goes one step; *more is then 1 while there is more to do, else 0. After DIT_ENGINE_FAILED the same step
 * can be tried again. */
DIT_API dit_status dit_run_step(dit_run* run, int* more);

/* The state after the steps so far, float [count, state_shape]; `size` is in numbers. */
DIT_API dit_status dit_run_latents(dit_run* run, float* latents, size_t size);

/* The rows that the network evaluated for each picture: 2 for a guided step, 1 for one without guidance, 0 for a step
 * of a cache. *planned is what that is when the run has ended, -1 where its cache decides that step by step. */
DIT_API dit_status dit_run_rows(dit_run* run, int64_t* rows, int64_t* planned);

/* Does what is left of the run and decodes it, uint8 [count, height, width, 3]; `size` is in bytes. */
DIT_API dit_status dit_run_result(dit_run* run, uint8_t* pixels, size_t size);

/* The run's next step, or the end of the one that is under way, is DIT_STOPPED. Any thread may call it before
 * dit_run_free; NULL is fine. */
DIT_API void dit_run_cancel(dit_run* run);

/* NULL is fine. Not while another call on the run is inside. */
DIT_API void dit_run_free(dit_run* run);

/* One figure of dit_verify: the value, the limit that it must not exceed, or reach where at_least is 1 (infinite for a
 * value that is only reported), and where it was measured. It must not throw and must not call this pipeline. */
typedef void (*dit_on_check)(const char* name, double value, double limit, int at_least, int passed, const char* where,
                             void* user);

/* Replays PyTorch's reference run with the engines here: DIT_OK, or DIT_NOT_VERIFIED with the first gate that failed.
 * on_check may be NULL. */
DIT_API dit_status dit_verify(dit_pipeline* pipe, dit_on_check on_check, void* user);

/* The sentence of the last fallible call; "" after success. */
DIT_API const char* dit_message(const dit_pipeline* pipe);

/* "DIT_OK" and so on. */
DIT_API const char* dit_status_name(dit_status status);

/* The version of this library, "0.1.0". */
DIT_API const char* dit_version(void);

/* The engines this library was built with, "onnxruntime 1.31.0, openvino 2026.4". */
DIT_API const char* dit_backends(void);

#ifdef __cplusplus
}
#endif

#endif /* DIT_DIT_H */
