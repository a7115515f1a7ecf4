/* batcher.h: draws many requests of a model at once. Include it beside dit.h.
 *
 *     dit_batcher* batcher = NULL;
 *     dit_ticket* ticket = NULL;
 *     if (dit_batcher_new(model, NULL, &batcher) != DIT_OK) ...
 *     dit_submission submission = DIT_SUBMISSION_INIT;
 *     submission.deadline = 5.0;
 *     if (dit_batcher_submit(batcher, &request, &submission, &ticket) == DIT_OK)
 *         status = dit_ticket_result(ticket, pixels, sizeof pixels);
 *     dit_ticket_free(ticket);
 *     dit_batcher_free(batcher);
 *
 * Requests share calls of the engine, step by step, whatever their number of steps, solver, guidance, labels and seeds:
 * they join and leave between two calls. Each gets the bits that it gets alone where dit_info.batch_invariant is 1;
 * elsewhere a call has one request, unless `places` asks for more. A request that fails hurts no other.
 *
 * Threads: any thread may make any call at any time; a batcher has one thread of its own, which calls the model's
 * engines. A batcher holds a reference of its model. Tickets are freed before their batcher, and not while another call
 * on them is inside.
 *
 * Blocking: dit_batcher_new takes seconds, and cannot be cancelled. dit_ticket_wait, dit_ticket_result and
 * dit_ticket_latents wait for the request, dit_batcher_close for all requests in line, dit_batcher_free for the step,
 * decoding or start of a request that is under way. dit_batcher_submit of another size than the model's waits for a
 * call of an engine. All other calls return at once.
 *
 * Order: a request that arrives at time a with w seconds of work is due at a + 8 w, and the earliest due goes first. So
 * a short request passes a long one, and none waits for all that come later. */
#ifndef DIT_BATCHER_H
#define DIT_BATCHER_H

#include "dit/dit.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct dit_batcher dit_batcher;
typedef struct dit_ticket dit_ticket;

typedef struct dit_batcher_options {
    size_t struct_size;
    size_t places;     /* the most pictures that share a call; 0: as many as the step stage's measured times say */
    size_t memo_bytes; /* of rows of the stages before the loop, which requests share; 0: 256 MB */
} dit_batcher_options;

#define DIT_BATCHER_OPTIONS_INIT {sizeof(dit_batcher_options), 0, 0}

/* Measures the step stage at batches of 1, 2, 4, …, and starts the thread. Options may be NULL. */
DIT_API dit_status dit_batcher_new(dit_model* model, const dit_batcher_options* options, dit_batcher** batcher);

/* Called in the batcher's thread after each step of a request. It is called once with ended 1, and step and steps 0,
 * when the result or the failure is there. The first call may come before dit_batcher_submit returns. It must return at
 * once, must not throw, must not wait for a ticket, and must not close or free the batcher. */
typedef void (*dit_on_event)(int step, int steps, int ended, void* user);

typedef struct dit_submission {
    size_t struct_size;
    double deadline;       /* seconds from now until the result must be there; looked at between two calls; 0: none */
    dit_on_event on_event; /* NULL: none */
    void* user;            /* for on_event; it lives until that has been called with ended 1 */
    int latents;           /* 1: the result is the latents, and nothing is decoded */
} dit_submission;

#define DIT_SUBMISSION_INIT {sizeof(dit_submission), 0.0, NULL, NULL, 0}

/* Checks a request and puts it in line; submission may be NULL, and request.on_step is not called. DIT_OVERLOADED where
 * the deadline is out of reach, or others would miss theirs because of it; DIT_CLOSED after dit_batcher_close. */
DIT_API dit_status dit_batcher_submit(dit_batcher* batcher, const dit_request* request,
                                      const dit_submission* submission, dit_ticket** ticket);

/* Writes 0 if a request with this deadline would find room, else the seconds after which it may come again. A service
 * calls it before it reads a request. */
DIT_API dit_status dit_batcher_lateness(dit_batcher* batcher, double deadline, double* seconds);

typedef struct dit_batcher_counts {
    size_t struct_size;
    size_t places;                 /* that share a call at most */
    uint64_t calls, samples, rows; /* calls of the step stage, samples in them, and these times groups of conditions */
    uint64_t drawn;                /* pictures */
    uint64_t refused, late, cancelled, failed; /* requests */
    uint64_t queued, active;                   /* requests that wait to be started, and that are under way */
    uint64_t memo_hits, memo_misses;           /* rows of the stages before the loop */
    double step_seconds, decode_seconds;       /* in calls of these stages */
} dit_batcher_counts;

#define DIT_BATCHER_COUNTS_INIT {sizeof(dit_batcher_counts), 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0.0, 0.0}

DIT_API dit_status dit_batcher_get_counts(dit_batcher* batcher, dit_batcher_counts* counts);

/* Takes no more requests. With `drain` it returns when those in line are drawn; without, when they are stopped
 * (DIT_STOPPED). */
DIT_API dit_status dit_batcher_close(dit_batcher* batcher, int drain);

/* Closes the batcher without `drain`; NULL is fine. */
DIT_API void dit_batcher_free(dit_batcher* batcher);

/* Waits up to so many seconds, below 0 without end; *ended is 1 when the result, or what went wrong, is there, else 0.
 * DIT_OK also for a request that failed: dit_ticket_result has its status. */
DIT_API dit_status dit_ticket_wait(dit_ticket* ticket, double seconds, int* ended);

/* Waits, and copies the pictures, uint8 [count, height, width, 3]; `size` is in bytes. What went wrong is the status:
 * DIT_LATE, DIT_STOPPED after dit_ticket_cancel, DIT_ENGINE_FAILED, … It may be called again, with a larger buffer too.
 */
DIT_API dit_status dit_ticket_result(dit_ticket* ticket, uint8_t* pixels, size_t size);

/* The same for latents, float [count, state_shape]; `size` is in numbers. */
DIT_API dit_status dit_ticket_latents(dit_ticket* ticket, float* latents, size_t size);

/* The request leaves the batch before its next call; NULL is fine. */
DIT_API void dit_ticket_cancel(dit_ticket* ticket);

typedef struct dit_ticket_stats {
    size_t struct_size;
    int step, steps;      /* evaluations done, and in all */
    double queue;         /* seconds until it was started; these and the next are 0 until it has ended */
    double conditions;    /* in checks, prompts, and the stages before the loop */
    double calls_seconds; /* in calls of the step stage */
    double decode;
    double total; /* from dit_batcher_submit to the result */
    uint64_t calls;
    double batch; /* the mean number of samples in its calls */
} dit_ticket_stats;

#define DIT_TICKET_STATS_INIT {sizeof(dit_ticket_stats), 0, 0, 0.0, 0.0, 0.0, 0.0, 0.0, 0, 0.0}

DIT_API dit_status dit_ticket_get_stats(dit_ticket* ticket, dit_ticket_stats* stats);

/* Cancels the request where it is under way; NULL is fine. */
DIT_API void dit_ticket_free(dit_ticket* ticket);

#ifdef __cplusplus
}
#endif

#endif /* DIT_BATCHER_H */
