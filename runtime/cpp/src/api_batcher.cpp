// The C ABI of batcher.h.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "batcher.hpp"
#include "dit/batcher.h"
#include "handle.hpp"
#include "structs.hpp"
#include "translate.hpp"

namespace dit = dit_runtime;

struct dit_batcher {
    dit_batcher(dit_model* of, const dit::Batcher::Settings& settings)
        : model(dit_model_retain(of)), batcher(*of->pipe, settings) {}

    const std::unique_ptr<dit_model, dit_run::Release> model;
    dit::Batcher batcher;
};

struct dit_ticket {
    std::shared_ptr<dit::Ticket> ticket;
};

namespace {

dit::Ticket& of(dit_ticket* ticket) {
    dit::require(ticket, "ticket");
    return *ticket->ticket;
}

dit::Batcher& of(dit_batcher* batcher) {
    dit::require(batcher, "batcher");
    return batcher->batcher;
}

template <typename Value>
void copy(const std::vector<Value>& from, Value* to, std::size_t size, const char* unit) {
    if (size < from.size())
        throw dit::TooSmall(dit::text("the buffer holds ", size, " ", unit, "; expected ", from.size()));
    if (from.empty()) throw dit::UsageError("this request was submitted for the other kind of result");
    std::copy(from.begin(), from.end(), to);
}

}  // namespace

extern "C" {

dit_status dit_batcher_new(dit_model* model, const dit_batcher_options* options, dit_batcher** batcher) {
    if (batcher) *batcher = nullptr;
    return dit::attempt([&] {
        dit::require(model, "model");
        dit::require(batcher, "batcher");
        dit::Batcher::Settings settings;
        if (options) {
            const auto from = dit::known(options, dit_batcher_options DIT_BATCHER_OPTIONS_INIT, "dit_batcher_options");
            settings.places = from.places;
            if (from.memo_bytes) settings.memo_bytes = from.memo_bytes;
        }
        *batcher = new dit_batcher(model, settings);
    });
}

dit_status dit_batcher_submit(dit_batcher* batcher, const dit_request* request, const dit_submission* submission,
                              dit_ticket** ticket) {
    if (ticket) *ticket = nullptr;
    return dit::attempt([&] {
        dit::Batcher& own = of(batcher);
        dit::require(ticket, "ticket");
        dit_submission from = DIT_SUBMISSION_INIT;
        if (submission) from = dit::known(submission, from, "dit_submission");
        if (!(from.deadline >= 0) || std::isinf(from.deadline))
            throw dit::UsageError(dit::text("deadline is ", from.deadline, "; expected seconds, or 0 for none"));
        const char* const size = dit::known(request, dit_request DIT_REQUEST_INIT, "dit_request").size;
        dit::Request translated = dit::translate(own.pipe.at(size ? size : "").manifest, request);
        translated.on_step = {};
        dit::Batcher::Submission to;
        if (from.deadline > 0) to.deadline = from.deadline;
        to.latents = from.latents != 0;
        auto made = std::make_unique<dit_ticket>();
        if (from.on_event) {
            to.listener = [call = from.on_event, user = from.user](int done, int evaluations) {
                call(done, evaluations, 0, user);
            };
            to.ended = [call = from.on_event, user = from.user] { call(0, 0, 1, user); };
        }
        made->ticket = own.submit(std::move(translated), std::move(to));
        *ticket = made.release();
    });
}

dit_status dit_batcher_lateness(dit_batcher* batcher, double deadline, double* seconds) {
    return dit::attempt([&] {
        dit::require(seconds, "seconds");
        *seconds = of(batcher).lateness(deadline);
    });
}

dit_status dit_batcher_get_counts(dit_batcher* batcher, dit_batcher_counts* counts) {
    return dit::attempt([&] {
        auto filled = dit::known(counts, dit_batcher_counts DIT_BATCHER_COUNTS_INIT, "dit_batcher_counts");
        const dit::Batcher::Counts from = of(batcher).counts();
        filled.places = of(batcher).places();
        filled.calls = from.calls;
        filled.samples = from.samples;
        filled.rows = from.rows;
        filled.drawn = from.drawn;
        filled.refused = from.refused;
        filled.late = from.late;
        filled.cancelled = from.cancelled;
        filled.failed = from.failed;
        filled.queued = from.queued;
        filled.active = from.active;
        filled.memo_hits = from.memo_hits;
        filled.memo_misses = from.memo_misses;
        filled.step_seconds = from.step;
        filled.decode_seconds = from.decode;
        std::memcpy(counts, &filled, counts->struct_size);
    });
}

dit_status dit_batcher_close(dit_batcher* batcher, int drain) {
    return dit::attempt([&] { of(batcher).close(drain != 0); });
}

void dit_batcher_free(dit_batcher* batcher) { delete batcher; }

dit_status dit_ticket_wait(dit_ticket* ticket, double seconds, int* ended) {
    return dit::attempt([&] {
        dit::require(ended, "ended");
        // A clock of nanoseconds holds no more.
        *ended = of(ticket).wait(seconds < 0 ? 1e9 : std::min(seconds, 1e9));
    });
}

dit_status dit_ticket_result(dit_ticket* ticket, uint8_t* pixels, size_t size) {
    return dit::attempt([&] {
        dit::require(pixels, "pixels");
        copy(of(ticket).result().pictures, pixels, size, "bytes");
    });
}

dit_status dit_ticket_latents(dit_ticket* ticket, float* latents, size_t size) {
    return dit::attempt([&] {
        dit::require(latents, "latents");
        copy(of(ticket).result().latents, latents, size, "numbers");
    });
}

void dit_ticket_cancel(dit_ticket* ticket) {
    if (ticket) ticket->ticket->cancel();
}

dit_status dit_ticket_get_stats(dit_ticket* ticket, dit_ticket_stats* stats) {
    return dit::attempt([&] {
        auto filled = dit::known(stats, dit_ticket_stats DIT_TICKET_STATS_INIT, "dit_ticket_stats");
        dit::Ticket& from = of(ticket);
        filled.step = from.done();
        filled.steps = from.evaluations();
        if (from.wait(0)) {
            filled.queue = from.stats().queue;
            filled.conditions = from.stats().conditions;
            filled.calls_seconds = from.stats().steps;
            filled.decode = from.stats().decode;
            filled.total = from.stats().total;
            filled.calls = from.stats().calls;
            filled.batch = from.stats().batch();
        }
        std::memcpy(stats, &filled, stats->struct_size);
    });
}

void dit_ticket_free(dit_ticket* ticket) {
    dit_ticket_cancel(ticket);
    delete ticket;
}

}  // extern "C"
