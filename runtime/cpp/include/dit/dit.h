/* dit.h: draws pictures from a bundle of dit-export, with no Python and no PyTorch.
 *
 *     dit_model* model = NULL;
 *     if (dit_model_open("first-bundle", NULL, &model) != DIT_OK) {
 *         fprintf(stderr, "%s\n", dit_last_message());
 *         ...
 *     }
 *     int64_t labels[2] = {207, 360};
 *     dit_request request = DIT_REQUEST_INIT;
 *     request.labels = labels;
 *     request.count = 2;
 *     if (dit_model_generate(model, &request, pixels, sizeof pixels) == DIT_OK) ...
 *     dit_model_release(model);
 *
 * Include this header alone, and link with libdit (CMake: dit::dit; pkg-config: dit). Engines are found when the first
 * bundle is opened or dit_backends is called: libdit-NAME.so beside libdit opens ONNX Runtime, OpenVINO or TensorRT.
 * These plugins stay loaded until the process ends.
 *
 * Objects: a dit_model is an open bundle, its manifest, weights and engines; it does not change. A dit_run is one
 * drawing: its noise, conditions and steps. pipeline.h has a handle of older programs.
 *
 * Threads: any number of threads may use a model at the same time. A run may move between threads, but takes one call
 * at a time: a second call returns DIT_BUSY and does nothing. Any thread may call dit_cancel and dit_run_cancel. Runs
 * of one model take turns at its engines, call by call, in the order in which they ask: an engine fills all its threads
 * (dit_open_options.threads) with one call. So more threads draw no faster, and need little more memory; a larger
 * `count` does draw faster. Do not fork while a model is open.
 *
 * Blocking: dit_model_open takes seconds, for it reads all files, compares their sums and compiles. dit_run_step takes
 * a call of the network, the first one also the stages before the loop. dit_run_result and dit_run_preview decode,
 * dit_model_generate does all of that, dit_model_verify twice and more. Each of these can be cancelled. A request of
 * another size than the model's waits for its turn at the engines, in dit_run_begin too; the first request of a size
 * also compares the sums of its files. All other calls return at once.
 *
 * Callbacks: on_step and dit_on_check run on the thread that made the call, on_progress and dit_on_log on any, on_event
 * on the batcher's. The call waits for a callback, so a slow callback slows it, and the call of one that never returns
 * does not return: there is no timeout, and no dit_cancel helps. Other runs of the model go on meanwhile, but not
 * during dit_on_log; during on_event, no request of the batcher does. Pointers that a callback gets are valid until it
 * returns. It must not throw, nor leave by longjmp. It may make the calls dit_cancel and dit_run_cancel, and no other
 * on the model or run that calls it. on_progress and dit_on_check end with the call that they were passed to, on_step
 * with dit_run_free.
 *
 * Ownership: a model is counted. dit_model_open gives the first reference, dit_model_retain another, and the last
 * dit_model_release closes the model. A run holds a reference until dit_run_free. Buffers for results are the caller's.
 * Arguments stay the caller's and are copied; only on_step and user of a request are used for as long as its run.
 * Strings that a model gives live as long as the model.
 *
 * Strings: those that come from a bundle (dit_info, labels, presets, sizes, ports) are its author's. They are valid
 * UTF-8, and end at their first 0. They may hold line breaks and a terminal's control characters: escape them before
 * you print them. dit_last_message and the strings that callbacks get are escaped, each one line of at most 300
 * characters.
 *
 * Memory: a model takes about the size of its files, about twice that while OpenVINO opens them, and its engines'
 * activations for the largest batch so far, which stay. A run takes its latents and what the stages before the loop
 * give, up to 256 MB at a time. low_memory holds one engine at a time.
 *
 * Errors: each fallible call returns a dit_status. dit_last_message() then says in one sentence what, where, what was
 * expected and what to do; read it on the thread that made the call. A failed call writes no result: buffers, *more and
 * structs stay as they were, and a new handle is NULL. Models and runs work on after any failure but DIT_DEVICE_LOST,
 * and a run not after DIT_STOPPED. No C++ exception leaves the library. Nothing is printed.
 *
 * Lengths: each array has its length beside it, and is not read beyond it. A length that does not fit is refused.
 *
 * Units: a length counts elements: numbers, or bytes of pixels. Times are seconds. Arrays are dense and row-major: the
 * last axis varies fastest. Pixels are 8-bit sRGB: red, green, blue, row after row from the top left. Latents are
 * float, channels first, as the network has them. Strings are UTF-8 and end in 0. A path is the system's; a relative
 * one counts from the working directory at dit_model_open.
 *
 * Defaults: start each struct from its _INIT value, which sets struct_size and means the bundle's own defaults: its
 * solver, steps, guidance and backend, seed 0, and as many threads as the engine thinks right.
 *
 * Determinism: a seed gives the noise of torch.randn on every machine, up to rounding. The pictures are PyTorch's
 * within the tolerances that dit_model_verify checks. The same request on the same engine, CPU and threads gives the
 * same bits; dit_info.batch_invariant says whether that holds in every batch, too. Threads of the caller and other runs
 * change nothing.
 *
 * Versions: until 1.0 a minor version may change this header, and the library's soname has it (libdit.so.0.2). Within a
 * minor version, structs only grow: a program that was compiled with an older dit.h runs with a newer library.
 * struct_size says which: the library reads and writes that many bytes, and later fields have their defaults. A size
 * that the struct never had, or a larger one, is DIT_BAD_ARGUMENT. In an array of dit_array all have the first one's
 * size; dit_setting has no size and never grows. Enums may get more values: treat an unknown status as a failure.
 *
 * Files: keep the folder as it is until the model is closed, because engines read from it later: for other sizes, and
 * with low_memory for each stage. A bundle may come from anybody. Its sums are checked before use, nothing outside of
 * its folder is read, and what the manifest says is held to limits; but its sums are its own, so pin it with
 * manifest_sha256 or public_key where that matters. Only TensorRT-RTX writes: what it compiles, into
 * $XDG_CACHE_HOME/dit-run (or
 * ~/.cache/dit-run). Nothing uses the network.
 */
#ifndef DIT_DIT_H
#define DIT_DIT_H

#include <stddef.h>
#include <stdint.h>

#define DIT_VERSION_MAJOR 0
#define DIT_VERSION_MINOR 2
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

typedef struct dit_model dit_model;
typedef struct dit_run dit_run;
typedef struct dit_pipeline dit_pipeline; /* pipeline.h */

/* What a service can do: try the same call again after ENGINE_FAILED, OUT_OF_MEMORY (with fewer pictures) and BUSY;
 * give the sentence of a BAD_ARGUMENT to who asked; all others need another bundle, machine or version. */
typedef enum dit_status {
    DIT_OK = 0,
    DIT_BAD_ARGUMENT = 1,     /* a label, a number, a name, NULL, a struct of another version */
    DIT_BAD_BUNDLE = 2,       /* damaged, of another format, another than manifest_sha256, not signed by
                                 public_key, or it cannot run here */
    DIT_BUFFER_TOO_SMALL = 3, /* the message says how much is needed */
    DIT_ENGINE_FAILED = 4,    /* an engine gave no sound result */
    DIT_STOPPED = 5,          /* a callback, dit_cancel or dit_run_cancel asked for it */
    DIT_NOT_VERIFIED = 6,     /* these engines do not draw PyTorch's pictures */
    DIT_OUT_OF_MEMORY = 7,    /* of the process, or of a device */
    DIT_BUSY = 8,             /* another call on this run has not returned */
    DIT_INTERNAL = 9,         /* a bug of this library */
    DIT_NO_BACKEND = 10,      /* the engine library is not here, or is too old */
    DIT_NO_DEVICE = 11,       /* the engine library has no such device here */
    DIT_DEVICE_LOST = 12,     /* the device failed; only a new process can draw */
    DIT_OVERLOADED = 13,      /* a batcher has too much ahead of a request's deadline */
    DIT_LATE = 14,            /* a request's deadline has passed */
    DIT_CLOSED = 15           /* a batcher takes no more requests */
} dit_status;

#include "dit/options.h"

#include "dit/info.h"

#include "dit/request.h"

/* Opens a bundle. Its manifest is checked first; the sha256 of an engine file is checked before that is opened, the one
 * of a graph while it is. A wrong sum refuses the bundle. A file that has changed is checked again before an engine is
 * opened later, as all are with low_memory; one that is written while an engine is open refuses the next call with
 * DIT_BAD_BUNDLE, and one that is put in its place changes nothing. Options may be NULL. *model is NULL after a
 * failure. What TensorRT-RTX compiles is kept in $XDG_CACHE_HOME/dit-run (or ~/.cache/dit-run), unless that is
 * somebody else's. */
DIT_API dit_status dit_model_open(const char* bundle, const dit_open_options* options, dit_model** model);

/* Returns the model, with one more reference; NULL for NULL. */
DIT_API dit_model* dit_model_retain(dit_model* model);

/* Gives up a reference; NULL is fine. */
DIT_API void dit_model_release(dit_model* model);

/* Runs every stage at these batch sizes, from 1 to max_batch, guided and not, at a size of the bundle (NULL: the
 * model's): a later request of such a size opens and compiles nothing. Not with low_memory. The cancellation may be
 * NULL. */
DIT_API dit_status dit_model_warm(dit_model* model, const int64_t* batches, size_t num_batches, const char* size,
                                  dit_cancellation* cancellation);

/* Draws pictures, uint8 [count, height, width, 3], or videos, [count, frames, height, width, 3]; `size` is in bytes. */
DIT_API dit_status dit_model_generate(dit_model* model, const dit_request* request, uint8_t* pixels, size_t size);

/* Samples without decoding, float [count, state_shape]; `size` is in numbers. */
DIT_API dit_status dit_model_generate_latents(dit_model* model, const dit_request* request, float* latents,
                                              size_t size);

/* Begins a run that the caller steps, so that a service owns the loop and may have several under way:
 *
 *     dit_run* run = NULL;
 *     int more = 1;
 *     dit_status status = dit_run_begin(model, &request, &run);
 *     while (status == DIT_OK && more) status = dit_run_step(run, &more);
 *     if (status == DIT_OK) status = dit_run_result(run, pixels, sizeof pixels);
 *     dit_run_free(run);
 *
 * It checks the whole request and keeps what it needs of it; request.user must live as long as the run. */
DIT_API dit_status dit_run_begin(dit_model* model, const dit_request* request, dit_run** run);

/* Goes one step; *more is then 1 while there is more to do, else 0. After DIT_ENGINE_FAILED the same step
 * can be tried again. On an NVIDIA GPU it may only queue the step: dit_run_latents, _result and _preview wait for it,
 * a cancelled run waits for what is queued, and values that are not finite are found there (DIT_ENGINE_FAILED). */
DIT_API dit_status dit_run_step(dit_run* run, int* more);

/* The state after the steps so far, float [count, state_shape]; `size` is in numbers. */
DIT_API dit_status dit_run_latents(dit_run* run, float* latents, size_t size);

/* The rows that the network evaluated for each picture: 2 for a guided step, 1 for one without guidance, 0 for a step
 * of a cache. *planned is what that is when the run has ended, -1 where its cache decides that step by step. */
DIT_API dit_status dit_run_rows(dit_run* run, int64_t* rows, int64_t* planned);

/* Does what is left of the run and decodes it, as dit_model_generate; `size` is in bytes. */
DIT_API dit_status dit_run_result(dit_run* run, uint8_t* pixels, size_t size);

/* Decodes the end of the path as the last step's prediction has it, as dit_model_generate; `size` is in bytes. The run
 * is not changed. It takes as long as the decoding of a result. */
DIT_API dit_status dit_run_preview(dit_run* run, uint8_t* pixels, size_t size);

typedef struct dit_stats {
    size_t struct_size;
    int64_t done;         /* steps, of which solver heun has two for each of the request's */
    int64_t steps;        /* in all */
    int64_t rows;         /* as dit_run_rows */
    int64_t planned_rows; /* as dit_run_rows */
    /* Seconds so far: */
    double waiting;     /* for other runs of the model */
    double opening;     /* of engines that were not open */
    double before_loop; /* in the stages that run once for a prompt, condition or timestep */
    double in_steps;    /* in the step stage */
    double decoding;    /* in the decoder, previews too */
} dit_stats;

#define DIT_STATS_INIT {sizeof(dit_stats), 0, 0, 0, 0, 0.0, 0.0, 0.0, 0.0, 0.0}

/* What the run has done and what it took. */
DIT_API dit_status dit_run_stats(dit_run* run, dit_stats* stats);

/* Stops the call that is under way, or else the next one: DIT_STOPPED. The run stays stopped: dit_run_step,
 * dit_run_result and dit_run_preview return DIT_STOPPED from then on, while dit_run_latents, dit_run_rows and
 * dit_run_stats still answer. A step that was interrupted does not count. Any thread may call it before dit_run_free;
 * NULL is fine. */
DIT_API void dit_run_cancel(dit_run* run);

/* NULL is fine. Not while another call on the run is inside. */
DIT_API void dit_run_free(dit_run* run);

/* One figure of a verification: the value, the limit that it must not exceed, or reach where at_least is 1 (infinite
 * for a value that is only reported), and where it was measured. It must not throw. */
typedef void (*dit_on_check)(const char* name, double value, double limit, int at_least, int passed, const char* where,
                             void* user);

typedef struct dit_verify_options {
    size_t struct_size;
    dit_on_check on_check;          /* NULL: none */
    dit_on_progress on_progress;    /* NULL: none */
    void* user;                     /* for both */
    dit_cancellation* cancellation; /* NULL: none */
} dit_verify_options;

#define DIT_VERIFY_OPTIONS_INIT {sizeof(dit_verify_options), NULL, NULL, NULL, NULL}

/* Replays PyTorch's reference run with the engines here: DIT_OK, or DIT_NOT_VERIFIED with the first gate that failed.
 * Options may be NULL. Engines of a size are closed before those of another one open, so other runs slow down. */
DIT_API dit_status dit_model_verify(dit_model* model, const dit_verify_options* options);

typedef enum dit_severity { DIT_LOG_ERROR = 0, DIT_LOG_WARNING = 1, DIT_LOG_INFO = 2, DIT_LOG_DEBUG = 3 } dit_severity;

/* A line of the library, without a line break. Any thread calls it, several at the same time, and other runs may wait
 * for it: return soon. */
typedef void (*dit_on_log)(dit_severity severity, const char* line, void* user);

/* Sends the process's lines of this severity and graver ones there; NULL: nowhere, as in the beginning. This version
 * logs at DIT_LOG_INFO when an engine has been opened, and at DIT_LOG_WARNING when an engine on an NVIDIA GPU runs
 * without a CUDA graph, and so slower. What makes a call fail is its message and not logged; a
 * precision that a machine computes in another one is dit_info.note. What engines log themselves is dropped. An earlier
 * on_log may be called until the calls that are inside return. */
DIT_API void dit_set_log(dit_on_log on_log, dit_severity least, void* user);

/* The sentence of the calling thread's last fallible call; "" after success. It stays until the thread's next fallible
 * call, one in a callback too. Never NULL. */
DIT_API const char* dit_last_message(void);

/* "DIT_OK" and so on. */
DIT_API const char* dit_status_name(dit_status status);

/* The version of this library, "0.2.0"; DIT_VERSION_MAJOR, _MINOR and _PATCH are the header's. */
DIT_API const char* dit_version(void);

/* The engines that are here, "onnxruntime 1.31.0, openvino 2026.4"; "" without any. It lives as long as the process. */
DIT_API const char* dit_backends(void);

#include "dit/pipeline.h"

#ifdef __cplusplus
}
#endif

#endif /* DIT_DIT_H */
