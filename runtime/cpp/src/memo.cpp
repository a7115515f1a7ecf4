#include "memo.hpp"

#include <algorithm>
#include <atomic>

#include "facts.hpp"

namespace dit_runtime {

const std::size_t MEMO_BYTES = static_cast<std::size_t>(constant("memo_bytes"));

namespace {

template <typename T>
void add_new(std::vector<T>& values, const T& value) {
    if (std::find(values.begin(), values.end(), value) == values.end()) values.push_back(value);
}

std::vector<float>& values_of(Tensor& tensor, const float*) { return tensor.floats; }
std::vector<std::int64_t>& values_of(Tensor& tensor, const std::int64_t*) { return tensor.integers; }

std::vector<Input> inputs_of(const Stage& stage, const std::vector<Tensor>& tensors) {
    std::vector<Input> inputs;
    for (std::size_t index = 0; index < tensors.size(); ++index)
        inputs.push_back(tensors[index].input(stage.reads[index].name));
    return inputs;
}

// No other input of this process has it.
std::uint64_t new_version() {
    static std::atomic<std::uint64_t> last{0};
    return ++last;
}

}  // namespace

RunRows in_rows(RunStage run) {
    return [run = std::move(run)](const Stage& stage, const std::vector<Input>& inputs, std::size_t rows) {
        std::map<std::string, std::vector<SharedRow>> tensors;
        for (auto& [name, values] : run(stage, inputs, rows)) {
            const auto whole = std::make_shared<const std::vector<float>>(std::move(values));
            for (std::size_t row = 0; row < rows; ++row)
                tensors[name].emplace_back(whole, whole->data() + whole->size() / rows * row);
        }
        return tensors;
    };
}

Memo::Memo(const Manifest& manifest, RunRows run, const Array& timesteps, const Rows& condition, const Rows& negative,
           std::size_t budget, std::optional<Device> device)
    : manifest_(manifest),
      run_(std::move(run)),
      device_(std::move(device)),
      rows_(stack(condition, negative)),
      condition_rows_(condition.rows),
      negative_rows_(negative.rows) {
    for (const double t : timesteps) times_.push_back(static_cast<float>(t));
    const std::vector<float> asked = times_;
    std::sort(times_.begin(), times_.end());
    times_.erase(std::unique(times_.begin(), times_.end()), times_.end());
    for (const float t : asked)
        time_of_step_.push_back(
            static_cast<std::size_t>(std::lower_bound(times_.begin(), times_.end(), t) - times_.begin()));

    std::size_t bytes = 0;  // of a timestep
    for (const Stage& stage : manifest_.stages) {
        if (!stage.before_loop()) continue;
        Held held{&stage, stage.runs != "condition", {}, {}, {}, {}, {}};
        for (const TensorSpec& spec : stage.reads) {
            const Held* const source = giver(spec.name);
            if (source)
                for (const auto& port : source->ports) add_new(held.ports, port);
            else if (manifest_.port(spec.name)->role == "condition")
                add_new(held.ports, spec.name);
        }
        held.numbers = unique_rows(rows_, held.ports);
        for (std::size_t row = 0; row < rows_.rows; ++row)
            if (held.numbers[row] == held.examples.size()) held.examples.push_back(row);
        for (const TensorSpec& spec : stage.gives)
            if (held.timed) bytes += count(spec.row()) * sizeof(float) * held.examples.size();
        held_.push_back(std::move(held));
    }
    window_ = bytes ? std::max<std::size_t>(1, budget / bytes) : times_.size();
    for (Held& held : held_) {
        Pairs pairs;
        for (const std::size_t row : held.examples) pairs.emplace_back(0, row);
        if (!held.timed) this->run(held, pairs);
    }
}

const Arrays& Memo::operator()(std::size_t step, std::size_t first, std::size_t last, Groups groups) {
    fill(step);
    const Pairs pairs = this->pairs(step, first, last, groups);
    const bool same = first == first_ && last == last_ && groups == groups_;
    first_ = last_ = 0;  // an exception may leave half of the inputs
    const auto batch = static_cast<std::int64_t>(last - first);
    for (const TensorSpec& spec : manifest_.step().reads) {
        if (!spec.starts("groups") || (same && !timed(spec.name))) continue;
        inputs_.erase(spec.name);  // before there is another
        Tensor& tensor = inputs_[spec.name] = device_ ? choose(spec, pairs) : gather(spec, pairs);
        tensor.shape[0] = batch;
        tensor.shape.insert(tensor.shape.begin(), static_cast<std::int64_t>(pairs.size()) / batch);
        tensor.version = new_version();
    }
    first_ = first, last_ = last, groups_ = groups;
    return inputs_;
}

void Memo::write(std::size_t step, std::size_t first, std::size_t last, Groups groups, const TensorSpec& spec,
                 Tensor& to, std::size_t begin, std::size_t batch) {
    fill(step);
    const std::size_t samples = last - first;
    std::size_t number = 0;  // samples of a group, then those of the next
    each_row(spec, pairs(step, first, last, groups), [&](const auto* row, std::size_t size) {
        const std::size_t place = number / samples * batch + begin + number % samples;
        std::copy(row, row + size, values_of(to, row).data() + place * size);
        ++number;
    });
}

// The rows of the samples at an evaluation, group after group.
Memo::Pairs Memo::pairs(std::size_t step, std::size_t first, std::size_t last, Groups groups) const {
    Pairs pairs;
    const std::size_t time = time_of_step_.at(step);
    const auto negative = [&](std::size_t sample) { return condition_rows_ + (negative_rows_ == 1 ? 0 : sample); };
    for (std::size_t sample = first; sample < last; ++sample)
        if (groups == Groups::APART)
            pairs.emplace_back(time, sample < condition_rows_ ? sample : negative(sample - condition_rows_));
        else if (groups != Groups::NULLS)
            pairs.emplace_back(time, sample);
    if (negative_rows_ && (groups == Groups::BOTH || groups == Groups::NULLS))
        for (std::size_t sample = first; sample < last; ++sample) pairs.emplace_back(time, negative(sample));
    return pairs;
}

void Memo::fill(std::size_t step) {
    if (!places_.count(time_of_step_.at(step))) replace_window(step);
}

// Replaces the window by the timesteps from `step` on.
void Memo::replace_window(std::size_t step) {
    std::vector<std::size_t> times;
    for (std::size_t next = step; next < time_of_step_.size() && times.size() < window_; ++next)
        add_new(times, time_of_step_[next]);
    places_.clear();
    for (const std::size_t time : times) places_.emplace(time, places_.size());
    for (Held& held : held_)
        if (held.timed) held.tensors.clear(), held.resident.clear();
    try {
        for (Held& held : held_) {
            if (!held.timed) continue;
            Pairs pairs;
            for (const std::size_t time : times)
                for (const std::size_t row : held.examples) pairs.emplace_back(time, row);
            run(held, pairs);
        }
    } catch (...) {
        places_.clear();  // a retry fills the window anew
        throw;
    }
}

// Runs the stage for these pairs, as many at a time as it takes.
void Memo::run(Held& held, const Pairs& pairs) {
    const Stage& stage = *held.stage;
    if (device_ && device_->joins(stage)) return fill_device(held, pairs);
    const auto size = static_cast<std::size_t>(stage.max_batch);
    for (std::size_t first = 0; first < pairs.size(); first += size) {
        const auto begin = pairs.begin() + static_cast<std::ptrdiff_t>(first);
        const Pairs part(begin, begin + static_cast<std::ptrdiff_t>(std::min(size, pairs.size() - first)));
        const std::vector<Tensor> tensors = read(stage, part);
        const auto answer = run_(stage, inputs_of(stage, tensors), part.size());
        for (const TensorSpec& spec : stage.gives) {
            const std::vector<SharedRow>& rows = answer.at(spec.name);
            std::vector<SharedRow>& all = held.tensors[spec.name];
            all.insert(all.end(), rows.begin(), rows.end());
        }
    }
    if (!device_) return;
    for (const TensorSpec& spec : stage.gives) {
        std::vector<float> rows;
        for (const SharedRow& row : held.tensors.at(spec.name))
            rows.insert(rows.end(), row.get(), row.get() + count(spec.row()));
        held.resident.emplace(spec.name, device_->put({spec.name, with_rows(pairs.size(), spec.row()), rows.data()}));
    }
    held.tensors.clear();
}

// The same, where the stage's engine writes its rows on the device.
void Memo::fill_device(Held& held, const Pairs& pairs) {
    const Stage& stage = *held.stage;
    for (const TensorSpec& spec : stage.gives)
        held.resident.emplace(spec.name, device_->empty(with_rows(pairs.size(), spec.row()), false));
    const auto size = static_cast<std::size_t>(stage.max_batch);
    for (std::size_t first = 0; first < pairs.size(); first += size) {
        const std::size_t last = std::min(first + size, pairs.size());
        const auto begin = pairs.begin();
        const std::vector<Tensor> tensors =
            read(stage, {begin + static_cast<std::ptrdiff_t>(first), begin + static_cast<std::ptrdiff_t>(last)});
        Into into;
        for (const auto& [name, rows] : held.resident) into.emplace(name, rows.slice(first, last));
        device_->run(stage, inputs_of(stage, tensors), into);
    }
}

// What the stage reads for these pairs, in its order.
std::vector<Tensor> Memo::read(const Stage& stage, const Pairs& pairs) const {
    std::vector<Tensor> tensors;
    for (const TensorSpec& spec : stage.reads) tensors.push_back(gather(spec, pairs));
    return tensors;
}

// The stage that gives the tensor; NULL where a port does.
const Memo::Held* Memo::giver(const std::string& tensor) const {
    for (const Held& held : held_)
        if (find(held.stage->gives, tensor)) return &held;
    return nullptr;
}

bool Memo::timed(const std::string& tensor) const {
    const Held* const source = giver(tensor);
    return source ? source->timed : manifest_.port(tensor)->role == "time";
}

// The row of a stage's outputs that has the value of a timestep and a row of conditions.
std::size_t Memo::place(const Held& source, std::size_t time, std::size_t row) const {
    return (source.timed ? places_.at(time) : 0) * source.examples.size() + source.numbers[row];
}

// A tensor's rows for these pairs, [pairs, ...]; on the device where its stage has written them there.
Tensor Memo::gather(const TensorSpec& spec, const Pairs& pairs) const {
    Tensor tensor{with_rows(pairs.size(), spec.row())};
    const Held* const source = giver(spec.name);
    if (source && !source->resident.empty()) {
        std::vector<std::size_t> rows;
        for (const auto& [time, row] : pairs) rows.push_back(place(*source, time, row));
        const DeviceRows chosen = source->resident.at(spec.name).take(rows, {tensor.shape[0]});
        tensor.device = std::make_shared<const DeviceRows>(chosen);
        return tensor;
    }
    const std::size_t numbers = count(tensor.shape);
    spec.dtype == "int64" ? tensor.integers.reserve(numbers) : tensor.floats.reserve(numbers);
    each_row(spec, pairs, [&](const auto* row, std::size_t size) {
        auto& values = values_of(tensor, row);
        values.insert(values.end(), row, row + size);
    });
    return tensor;
}

// The same for the step: what comes from no stage is sent to the device once.
Tensor Memo::choose(const TensorSpec& spec, const Pairs& pairs) {
    if (giver(spec.name)) return gather(spec, pairs);
    const bool timed = this->timed(spec.name);
    const std::vector<std::size_t> distinct = timed ? std::vector<std::size_t>() : unique_rows(rows_, {spec.name});
    std::vector<std::size_t> rows;
    for (const auto& [time, row] : pairs) rows.push_back(timed ? time : distinct[row]);
    Tensor tensor{with_rows(pairs.size(), spec.row())};
    tensor.device = std::make_shared<const DeviceRows>(send(spec).take(rows, {tensor.shape[0]}));
    return tensor;
}

// All timesteps, or the distinct rows of a condition port.
const DeviceRows& Memo::send(const TensorSpec& spec) {
    const auto sent = sent_.find(spec.name);
    if (sent != sent_.end()) return sent->second;
    Pairs pairs;
    if (timed(spec.name)) {
        for (std::size_t time = 0; time < times_.size(); ++time) pairs.emplace_back(time, 0);
    } else {
        const std::vector<std::size_t> numbers = unique_rows(rows_, {spec.name});
        for (std::size_t row = 0, next = 0; row < rows_.rows; ++row)
            if (numbers[row] == next) pairs.emplace_back(0, row), ++next;
    }
    const Tensor all = gather(spec, pairs);
    return sent_.emplace(spec.name, device_->put(all.input(spec.name))).first->second;
}

// Calls `take` with each pair's row of a tensor and the row's length.
template <typename Take>
void Memo::each_row(const TensorSpec& spec, const Pairs& pairs, const Take& take) const {
    const std::size_t size = count(spec.row());
    if (const Held* const source = giver(spec.name)) {
        const std::vector<SharedRow>& rows = source->tensors.at(spec.name);
        for (const auto& [time, row] : pairs) take(rows[place(*source, time, row)].get(), size);
    } else if (manifest_.port(spec.name)->role == "time") {
        for (const auto& [time, row] : pairs) take(&times_[time], 1);
    } else if (const Tensor& tensor = rows_.arrays.at(spec.name); spec.dtype == "int64") {
        for (const auto& [time, row] : pairs) take(tensor.integers.data() + row * size, size);
    } else {
        for (const auto& [time, row] : pairs) take(tensor.floats.data() + row * size, size);
    }
}

}  // namespace dit_runtime
