#include "batcher.hpp"

#include <algorithm>
#include <cmath>

namespace dit_runtime {
namespace {

// Rows of the network that a ticket's next call evaluates, of all its samples.
std::size_t rows_of(const Ask& ask) { return ask.places() * ask.number(); }

// The step's inputs but the state and guidance for the samples from `first` to before `last` of all asks together,
// [G, B, ...], in `stacked`.
const Arrays& side_by_side(const Manifest& manifest, const std::vector<Ask*>& asks, std::size_t first, std::size_t last,
                           Arrays& stacked) {
    if (asks.size() == 1) return (*asks[0]->memo)(asks[0]->step, first, last, asks[0]->groups);
    const std::size_t groups = asks[0]->number(), samples = last - first;
    for (const TensorSpec& spec : manifest.step().reads) {
        if (!spec.starts("groups")) continue;
        Tensor& tensor = stacked[spec.name];
        tensor.shape = with_rows(samples, spec.row());
        tensor.shape.insert(tensor.shape.begin(), static_cast<std::int64_t>(groups));
        spec.dtype == "int64" ? tensor.integers.resize(count(tensor.shape)) : tensor.floats.resize(count(tensor.shape));
        std::size_t begin = 0;  // of the ask's samples among all
        for (Ask* ask : asks) {
            const std::size_t low = std::max(first, begin), high = std::min(last, begin + ask->places());
            if (low < high)
                ask->memo->write(ask->step, low - begin, high - begin, ask->groups, spec, tensor, low - first, samples);
            begin += ask->places();
        }
    }
    return stacked;
}

void append(std::vector<float>& to, const std::vector<float>& values) {
    to.insert(to.end(), values.begin(), values.end());
}

// The share of the answer that begins at a sample, of so many among all.
std::vector<float> cut(const std::vector<float>& values, std::size_t first, std::size_t samples, std::size_t all) {
    const auto size = values.size() / all;
    const auto begin = values.begin() + static_cast<std::ptrdiff_t>(first * size);
    return {begin, begin + static_cast<std::ptrdiff_t>(samples * size)};
}

}  // namespace

Overloaded::Overloaded(double seconds)
    : std::runtime_error(
          text("too busy to finish in time; try again in ", std::max(0.1, std::ceil(10 * seconds) / 10), " s")),
      retry_after(seconds) {}

Batcher::Batcher(Pipeline& opened, Settings settings)
    : pipe(opened),
      clock_(settings.clock),
      memo_bytes_(settings.memo_bytes),
      memo_(opened.runner(), settings.memo_bytes),
      scheduler_(1, costs_) {
    std::vector<std::string> names = {pipe.manifest.size};
    for (const Manifest& other : pipe.manifest.sizes) names.push_back(other.size);
    std::size_t most = 0;
    for (const std::string& name : names) {
        Pipeline& at = pipe.at(name);
        const auto sized = sizes_.try_emplace(name, at, measure(at), settings.places).first;
        most = std::max(most, sized->second.places);
    }
    const double row = sizes_.at(names[0]).row;
    for (auto& entry : sizes_) entry.second.weight = entry.second.row / row;
    costs_.update("row", row);
    scheduler_.places = most;
    charged_ = clock_();
    thread_ = std::thread([this] { guarded_loop(); });
}

std::shared_ptr<Ticket> Batcher::submit(Request request, Submission submission) {
    const double now = clock_();
    Sized& sized = sizes_.at(pipe.manifest.at(request.size).size);
    const Manifest& manifest = sized.pipe.manifest;
    if (!submission.latents) sized.pipe.require_decoder();
    const Checked checked = check(manifest, request);
    const auto ticket = std::make_shared<Ticket>();
    const std::size_t samples = checked.condition.rows, groups = checked.negative.rows ? 2 : 1;
    ticket->evaluations_ = static_cast<int>(checked.timesteps.size());
    ticket->rows_ = checked.timesteps.size() * groups;
    ticket->samples = static_cast<double>(samples);
    ticket->left = ticket->samples * static_cast<double>(ticket->rows_);
    ticket->kind = {manifest.size, groups};
    ticket->places = samples;
    ticket->most = sized.places;
    ticket->weight = sized.weight;
    ticket->sized_ = &sized;
    ticket->arrived = now;
    if (submission.deadline) ticket->deadline = now + *submission.deadline;
    ticket->request_ = std::move(request);
    ticket->latents_ = submission.latents;
    ticket->listener_ = std::move(submission.listener);
    ticket->ended_ = std::move(submission.ended);
    const std::lock_guard<std::mutex> lock(mutex_);
    if (closing_) throw Closed("this bundle takes no more requests");
    if (const double late = scheduler_.lateness(*ticket); late > 0) {
        ++counts_.refused;
        throw Overloaded(late);
    }
    scheduler_.push(ticket);
    wake_.notify_one();
    return ticket;
}

double Batcher::lateness(double deadline) const {
    Job any;
    any.samples = 0;
    any.arrived = clock_();
    any.deadline = any.arrived + deadline;
    const std::lock_guard<std::mutex> lock(mutex_);
    return scheduler_.lateness(any);
}

void Batcher::count_refused() {
    const std::lock_guard<std::mutex> lock(mutex_);
    ++counts_.refused;
}

void Batcher::close(bool drain) {
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        closing_ = true;
        if (!drain) {
            for (const auto& ticket : scheduler_.jobs) ticket->cancel();
            for (const auto& ticket : undecoded_) ticket->cancel();
        }
        wake_.notify_one();
    }
    const std::lock_guard<std::mutex> lock(closer_);  // of two who close, one comes second
    if (thread_.joinable()) thread_.join();
}

Batcher::Counts Batcher::counts() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    Counts counts = counts_;
    for (const auto& ticket : scheduler_.jobs) ++(ticket->started ? counts.active : counts.queued);
    counts.active += undecoded_.size();
    counts.memo_hits = memo_.hits;
    counts.memo_misses = memo_.misses;
    return counts;
}

// Leaves nobody waiting where the loop itself breaks down.
void Batcher::guarded_loop() {
    try {
        loop();
    } catch (...) {
        Tickets waiting;
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            closing_ = true;
            waiting.swap(scheduler_.jobs);
            waiting.insert(waiting.end(), undecoded_.begin(), undecoded_.end());
            undecoded_.clear();
        }
        for (const auto& ticket : waiting) settle(*ticket, {}, std::current_exception());
    }
    alive_ = false;
}

void Batcher::loop() {
    for (;;) {
        Tickets picked;
        Failures gone;
        {
            std::unique_lock<std::mutex> lock(mutex_);
            while (scheduler_.jobs.empty() && undecoded_.empty() && !closing_) {
                wake_.wait(lock);
                charged_ = clock_();
            }
            if (scheduler_.jobs.empty() && undecoded_.empty()) return;
            gone = drop_out();
            picked = scheduler_.pick();
            for (const auto& ticket : picked) {
                if (ticket->started) continue;
                ticket->started = true;
                ticket->stats_.queue = clock_() - ticket->arrived;
            }
        }
        for (auto& [ticket, error] : gone) settle(*ticket, {}, error);
        bool fresh = false;
        for (const auto& ticket : picked)
            if (!ticket->run_) {
                start(ticket);
                fresh = true;
            }
        if (fresh) continue;  // their first call may be of another kind
        if (!picked.empty()) step(picked);
        decode();
    }
}

// Lets go of requests that were cancelled or whose deadline is over, those that wait for the decoder too; the caller
// has the lock.
Batcher::Failures Batcher::drop_out() {
    const double now = clock_();
    Failures gone;
    const auto look = [&](const std::shared_ptr<Ticket>& ticket) {
        if (ticket->cancelled_) {
            const Stopped error(text("stopped after step ", ticket->done(), " of ", ticket->evaluations_));
            gone.emplace_back(ticket, std::make_exception_ptr(error));
            ++counts_.cancelled;
        } else if (ticket->deadline && now > *ticket->deadline) {
            const Late error(text("not finished within ", *ticket->deadline - ticket->arrived, " s"));
            gone.emplace_back(ticket, std::make_exception_ptr(error));
            ++counts_.late;
        }
    };
    std::for_each(scheduler_.jobs.begin(), scheduler_.jobs.end(), look);
    std::for_each(undecoded_.begin(), undecoded_.end(), look);
    for (const auto& failure : gone) leave(failure.first);
    return gone;
}

// Takes a ticket out of the line, or out of the decoder's; the caller has the lock.
void Batcher::leave(const std::shared_ptr<Ticket>& ticket) {
    const auto place = std::find(undecoded_.begin(), undecoded_.end(), ticket);
    if (place != undecoded_.end()) {
        undecoded_.erase(place);
        scheduler_.undecoded -= ticket->samples * ticket->weight;
    } else {
        scheduler_.remove(ticket);
    }
}

void Batcher::fail(const std::shared_ptr<Ticket>& ticket, std::exception_ptr error) {
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        leave(ticket);
        ++counts_.failed;
    }
    settle(*ticket, {}, std::move(error));
}

// Ends a request that has left: with what it drew, or what went wrong.
void Batcher::settle(Ticket& ticket, Drawn drawn, std::exception_ptr error) {
    ticket.ask_.reset();
    ticket.run_.reset();
    error ? ticket.promise_.set_exception(std::move(error)) : ticket.promise_.set_value(std::move(drawn));
    if (const auto ended = std::exchange(ticket.ended_, nullptr)) ended();
}

// Encodes the prompts, and runs the stages before the loop.
void Batcher::start(const std::shared_ptr<Ticket>& ticket) {
    const double began = clock_();
    std::exception_ptr error;
    try {
        const RunRows compute = [this](const Stage& stage, const std::vector<Input>& inputs, std::size_t rows) {
            return memo_(stage, inputs, rows);
        };
        ticket->run_ = std::make_unique<Run>(ticket->sized_->pipe, ticket->request_, compute,
                                             memo_bytes_ / (2 * ticket->sized_->places));  // so many are under way
        if (const auto planned = ticket->run_->planned_rows()) ticket->rows_ = *planned;   // a cache decides as it goes
        advance(*ticket, true);
        if (ticket->ask_)
            ticket->ask_->memo->fill(ticket->ask_->step);
        else
            finish(ticket);
    } catch (...) {
        error = std::current_exception();
    }
    ticket->stats_.conditions += clock_() - began;
    charge("start", 1);
    if (error) fail(ticket, error);
}

void Batcher::step(const Tickets& tickets) {
    const double began = clock_();
    std::vector<Answer> answers;
    try {
        answers = evaluate(tickets);
    } catch (...) {
        // Each of them alone: then only those fail that the engine fails for.
        if (tickets.size() == 1) answers.emplace_back(Prediction(), std::current_exception());
    }
    if (answers.empty())
        for (const auto& ticket : tickets) {
            try {
                answers.push_back(std::move(evaluate({ticket}).front()));
            } catch (...) {
                answers.emplace_back(Prediction(), std::current_exception());
            }
        }
    const double spent = clock_() - began;
    std::size_t places = 0, rows = 0;
    for (const auto& ticket : tickets) places += ticket->places, rows += rows_of(*ticket->ask_);
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        ++counts_.calls;
        counts_.rows += rows;
        counts_.samples += places;
        counts_.step += spent;
    }
    const double units = static_cast<double>(rows) * tickets[0]->weight;
    for (std::size_t index = 0; index < tickets.size(); ++index) {
        const auto& ticket = tickets[index];
        ++ticket->stats_.calls;
        ticket->stats_.batched += places;
        ticket->stats_.steps += spent;
        try {
            if (answers[index].second) std::rethrow_exception(answers[index].second);
            tell(ticket, std::move(answers[index].first));
        } catch (...) {
            fail(ticket, std::current_exception());
        }
    }
    charge("row", units);
}

// Takes all time since the last charge for the cost of so many units: so an estimate has what a call of an engine has
// not, the work around it.
void Batcher::charge(const std::string& what, double units) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const double now = clock_();
    costs_.update(what, now - charged_, units);
    charged_ = now;
}

// Each ticket's answer, from as few calls of the step stage as its largest batch allows.
std::vector<Batcher::Answer> Batcher::evaluate(const Tickets& tickets) {
    Pipeline& pipe = tickets[0]->sized_->pipe;
    std::vector<Ask*> asks;
    std::vector<float> state, weights;
    for (const auto& ticket : tickets) asks.push_back(&*ticket->ask_);
    for (const Ask* ask : asks) append(state, ask->state), append(weights, ask->weights);
    const auto inputs = [&](std::size_t first, std::size_t last) -> const Arrays& {
        return side_by_side(pipe.manifest, asks, first, last, stacked_);
    };
    Prediction all = pipe.denoise(state, inputs, weights);
    std::vector<Answer> answers;
    if (asks.size() == 1) {
        answers.emplace_back(std::move(all), nullptr);
        return answers;
    }
    std::size_t first = 0;
    for (const Ask* ask : asks) {
        Prediction own = {cut(all.prediction, first, ask->places(), weights.size()),
                          cut(all.variance, first, ask->places(), weights.size())};
        answers.emplace_back(std::move(own), nullptr);
        first += ask->places();
    }
    return answers;
}

// Lets the run go its step; those that need no network are gone with it.
void Batcher::tell(const std::shared_ptr<Ticket>& ticket, Prediction answer) {
    const bool more = ticket->run_->tell(std::move(answer));
    ticket->done_ = ticket->run_->done();
    advance(*ticket, more);
    if (ticket->listener_) ticket->listener_(ticket->run_->done(), ticket->evaluations_);
    if (!ticket->ask_) finish(ticket);
}

// Lets a request leave the line for the decoder's.
void Batcher::finish(const std::shared_ptr<Ticket>& ticket) {
    const std::lock_guard<std::mutex> lock(mutex_);
    leave(ticket);
    undecoded_.push_back(ticket);
    scheduler_.undecoded += ticket->samples * ticket->weight;
}

// Finds what the next call of a run needs; goes steps that need no network.
void Batcher::advance(Ticket& ticket, bool more) {
    Run& run = *ticket.run_;
    std::optional<Ask> ask;
    while (more && !(ask = run.ask())) more = run.tell();
    const std::lock_guard<std::mutex> lock(mutex_);  // who submits reads what is left
    if (ask) {
        ticket.kind = {ticket.sized_->pipe.manifest.size, ask->number()};
        ticket.places = ask->places();
    }
    const std::size_t rows = std::max(ticket.rows_, run.rows()) - run.rows();
    ticket.left = ticket.samples * static_cast<double>(rows);
    ticket.ask_ = std::move(ask);
}

// Decodes the picture that has waited longest; where more wait than a call has samples, all but so many.
void Batcher::decode() {
    const std::size_t waiting = undecoded_.size();
    const std::size_t places = scheduler_.places,
                      number = std::max<std::size_t>(1, waiting - std::min(waiting, places));
    for (std::size_t index = 0; index < number && !undecoded_.empty(); ++index) {
        const std::shared_ptr<Ticket> ticket = undecoded_.front();
        const double began = clock_();
        Drawn drawn;
        try {
            std::vector<float> latents = ticket->run_->latents();
            if (ticket->latents_)
                drawn.latents = std::move(latents);
            else
                drawn.pictures = ticket->sized_->pipe.pictures(latents);
        } catch (...) {
            fail(ticket, std::current_exception());
            continue;
        }
        const double now = clock_();
        ticket->stats_.decode = now - began;
        ticket->stats_.total = now - ticket->arrived;
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            leave(ticket);
            counts_.decode += ticket->stats_.decode;
            counts_.drawn += ticket->count();
        }
        charge("decode", ticket->samples * ticket->weight);
        settle(*ticket, std::move(drawn), nullptr);
    }
}

}  // namespace dit_runtime
