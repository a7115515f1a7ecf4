// OpenVINO through its C++ API. A stage of the loop, and the decoder, runs a row at a time: one sample, and of a step
// stage one of its groups. Rows of a call share two streams, each with half of the threads. So there is one shape to
// compile, when the stage is opened, and a row's bits depend neither on its batch nor on what ran before. Stages before
// the loop keep their free dimension. Mirrors dit_runtime/backends/ov.py.
#include <algorithm>
#include <cstring>
#include <filesystem>
#include <mutex>
#include <openvino/op/parameter.hpp>
#include <openvino/op/result.hpp>
#ifdef __linux__
#include <sched.h>

#include <thread>
#endif

#include "errors.hpp"
#include "facts.hpp"
#include "ov_graph.hpp"
#include "ov_running.hpp"

namespace dit_runtime {
namespace {

const char* const UNLIKE = "/sys/devices/cpu_atom";  // where Linux keeps the slower cores of a hybrid CPU

// The tensor of a step stage that has all groups, before guidance mixes them.
const std::string& meeting() {
    static const std::string name = constant_name("groups_meet");
    return name;
}

#ifdef __linux__
// The CPUs that this thread may use, fewer than the machine's in a container that has a set of them.
std::size_t usable_cpus() {
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0) return static_cast<std::size_t>(CPU_COUNT(&set));
    return std::thread::hardware_concurrency();  // more than fit into the set
}
#endif

ov::Tensor view(const Input& input) {
    const ov::Shape shape(input.shape.begin(), input.shape.end());
    // Inputs are only read.
    return {input.integers ? ov::element::i64 : ov::element::f32, shape, const_cast<void*>(input.data)};
}

// Appends the request's outputs to those of earlier rows.
void append(std::map<std::string, Output>& outputs, ov::InferRequest& request, const std::vector<std::string>& names) {
    for (const std::string& name : names) {
        const ov::Tensor tensor = request.get_tensor(name);
        if (tensor.get_element_type() != ov::element::f32)
            throw EngineError(
                text("output ", name, " is ", tensor.get_element_type().to_string(), ", expected float32"));
        const float* numbers = static_cast<const float*>(tensor.data());
        const ov::Shape shape = tensor.get_shape();
        auto& [whole, values] = outputs[name];
        if (whole.empty())
            whole.assign(shape.begin(), shape.end());
        else
            whole.front() += static_cast<std::int64_t>(shape.front());
        values.insert(values.end(), numbers, numbers + tensor.get_size());
    }
}

// Runs all rows in one request.
std::map<std::string, Output> infer(Running& running, ov::InferRequest& request, const std::vector<Input>& arrays,
                                    const std::vector<std::string>& names) {
    std::map<std::string, Output> outputs;
    try {
        for (const Input& input : arrays) request.set_tensor(input.name, view(input));
        running.start(request);
        request.wait();
        append(outputs, request, names);
    } catch (const ov::Exception& error) {
        throw EngineError(ov_reason(error.what()));
    }
    return outputs;
}

std::vector<std::string> names(const std::vector<ov::Output<ov::Node>>& ports) {
    std::vector<std::string> names;
    for (const auto& port : ports) names.push_back(port.get_any_name());
    return names;
}

// A stage whose rows run in one call, any number of them.
class OvEngine : public Engine {
  public:
    OvEngine(const OvGraph& graph, const Options& options) : graph_(graph), running_(options) {
        const auto model = graph_.read();
        inputs = names(model->inputs());
        outputs = names(model->outputs());
        request_ = graph_.compile(model, graph_.type).front();
    }

    std::map<std::string, Output> run(const std::vector<Input>& arrays) override {
        return infer(running_, request_, arrays, outputs);
    }
    void stop() noexcept override { running_.stop(); }
    void resume() noexcept override { running_.resume(); }

  private:
    const OvGraph graph_;  // whose core outlives what it compiled
    Running running_;
    ov::InferRequest request_;
};

// A stage whose rows run apart. Where a step stage mixes its groups, the graph is cut in two where they meet: the
// groups run apart as well, and what mixes them runs once, on all rows.
class RowEngine : public Engine {
  public:
    RowEngine(const OvGraph& graph, const Stage& stage, const Options& options)
        : graph_(graph), running_(options), model_(graph.read()), at_once_(rows_at_once(graph, options)) {
        for (const TensorSpec& spec : stage.reads)
            if (spec.starts("groups")) grouped_.push_back(spec.name);
        inputs = names(model_->inputs());
        outputs = names(model_->outputs());
        const auto rows = cut(model_->clone());
        row_outputs_ = mixes() ? std::vector<std::string>{meeting()} : outputs;
        if (!mixes() && !grouped_.empty()) return;  // a row has as many groups as a call brings
        std::map<std::string, Shape> shapes;
        for (const TensorSpec& spec : stage.reads)
            if (contains(inputs, spec.name) && reads(spec.name))
                for (const auto& size : spec.shape)
                    shapes[spec.name].push_back(
                        std::holds_alternative<std::int64_t>(size) ? std::get<std::int64_t>(size) : 1);
        requests(shapes, mixes() ? at_once_ : 1, rows);
    }

    // (B, ...) of (B, ...) and (G, B, ...).
    std::map<std::string, Output> run(const std::vector<Input>& arrays) override {
        std::size_t groups = 1, batch = 1;
        for (const Input& input : arrays) {
            if (!contains(grouped_, input.name))
                batch = static_cast<std::size_t>(input.shape.front());
            else if (mixes())
                groups = static_cast<std::size_t>(input.shape.front());
        }
        std::vector<Row> asked;  // the samples of a group, then those of the next
        for (std::size_t group = 0; group < groups; ++group)
            for (std::size_t sample = 0; sample < batch; ++sample) asked.push_back(row(arrays, group, sample));
        std::map<std::string, Output> rows = run_rows(asked);
        if (!mixes()) return rows;
        Output& met = rows.at(meeting());  // (G B, 1, ...)
        if (met.shape.size() < 2 || met.shape[0] != static_cast<std::int64_t>(groups * batch) || met.shape[1] != 1)
            throw EngineError(
                text(meeting(), " has shape ", shown(met.shape), ", expected [", groups * batch, ", 1, …]"));
        met.shape[0] = static_cast<std::int64_t>(groups);
        met.shape[1] = static_cast<std::int64_t>(batch);
        const auto weights =
            std::find_if(arrays.begin(), arrays.end(), [](const Input& i) { return i.name == GUIDANCE; });
        return infer(running_, *mix_, {{meeting(), met.shape, met.values.data()}, *weights}, outputs);
    }

    void stop() noexcept override { running_.stop(); }
    void resume() noexcept override { running_.resume(); }

  private:
    using Row = std::map<std::string, ov::Tensor>;

    bool mixes() const { return mix_.has_value(); }
    // Whether a row has this input.
    bool reads(const std::string& name) const { return !mixes() || name != GUIDANCE; }

    // Two where each can have half of the threads, of cores that are alike.
    static std::size_t rows_at_once(const OvGraph& graph, const Options& options) {
        std::size_t threads = 1;
#ifdef __linux__
        threads = options.threads ? static_cast<std::size_t>(options.threads) : usable_cpus();
#endif
        const bool alike =
            graph.device.name == "CPU" && threads && threads % 2 == 0 && !std::filesystem::exists(UNLIKE);
        return std::min<std::size_t>(options.at_once, alike && !options.low_memory ? 2 : 1);
    }

    // The model of a row; where groups meet in it, keeps what mixes them.
    std::shared_ptr<ov::Model> cut(const std::shared_ptr<ov::Model>& model) {
        std::optional<ov::Output<ov::Node>> met;
        for (const auto& node : model->get_ordered_ops())
            for (const auto& output : node->outputs())
                if (output.get_names().count(meeting())) met = output;
        if (!met || !contains(inputs, GUIDANCE)) return model;
        try {
            const auto given =
                std::make_shared<ov::op::v0::Parameter>(met->get_element_type(), met->get_partial_shape());
            for (auto reader : met->get_target_inputs()) reader.replace_source_output(given->output(0));
            given->output(0).set_names({meeting()});
            ov::ParameterVector mixing = {given}, own;
            for (const auto& port : model->get_parameters())
                (port->output(0).get_names().count(GUIDANCE) ? mixing : own).push_back(port);
            const auto mix = std::make_shared<ov::Model>(model->get_results(), mixing);
            if (!mixes()) mix_ = graph_.compile(mix, "fp32").front();
            return std::make_shared<ov::Model>(ov::ResultVector{std::make_shared<ov::op::v0::Result>(*met)}, own);
        } catch (const ov::Exception& error) {
            throw graph_.not_compiled(error);
        }
    }

    // Requests for rows of these shapes, one a stream.
    std::vector<ov::InferRequest>& requests(const std::map<std::string, Shape>& shapes, std::size_t streams,
                                            const std::shared_ptr<ov::Model>& model = nullptr) {
        std::vector<ov::InferRequest>& made = requests_[{shapes, streams}];
        if (!made.empty()) return made;
        const auto rows = model ? model : cut(model_->clone());
        std::map<std::string, ov::PartialShape> fixed;
        for (const auto& [name, shape] : shapes)
            fixed[name] = ov::PartialShape(std::vector<ov::Dimension>(shape.begin(), shape.end()));
        const auto make = [graph = graph_, rows, fixed, streams] {
            try {
                rows->reshape(fixed);
            } catch (const std::bad_alloc&) {
                throw;
            } catch (const std::exception& error) {
                throw graph.not_compiled(error);
            }
            return graph.compile(rows, graph.type, streams);
        };
        return made = model ? make() : running_.make(make);  // where it opens, its caller may leave
    }

    // One sample; where groups run apart, one of its groups too.
    Row row(const std::vector<Input>& arrays, std::size_t group, std::size_t sample) const {
        Row row;
        for (const Input& input : arrays)
            if (reads(input.name)) row.emplace(input.name, part(input, group, sample));
        return row;
    }

    ov::Tensor part(Input input, std::size_t group, std::size_t sample) const {
        const bool grouped = contains(grouped_, input.name), apart = grouped && mixes();
        const std::size_t batch = static_cast<std::size_t>(input.shape.at(grouped));
        input.shape.at(grouped) = 1;
        if (apart) input.shape.front() = 1;
        const std::size_t groups = grouped ? static_cast<std::size_t>(input.shape.front()) : 1;
        const std::size_t item = input.integers ? sizeof(std::int64_t) : sizeof(float);
        const std::size_t size = count(input.shape) / groups * item;
        const auto* const bytes = static_cast<const unsigned char*>(input.data) + (apart ? group * batch * size : 0);
        if (groups == 1) {
            input.data = bytes + sample * size;
            return view(input);
        }
        ov::Tensor stacked(input.integers ? ov::element::i64 : ov::element::f32,
                           ov::Shape(input.shape.begin(), input.shape.end()));
        for (std::size_t i = 0; i < groups; ++i)
            std::memcpy(static_cast<unsigned char*>(stacked.data()) + i * size, bytes + (i * batch + sample) * size,
                        size);
        return stacked;
    }

    // The rows' outputs, in their order.
    std::map<std::string, Output> run_rows(const std::vector<Row>& asked) {
        std::map<std::string, Shape> shapes;
        for (const auto& [name, tensor] : asked.front()) {
            const ov::Shape shape = tensor.get_shape();
            shapes[name].assign(shape.begin(), shape.end());
        }
        std::vector<ov::InferRequest>& requests = this->requests(shapes, std::min(asked.size(), at_once_));
        const std::size_t streams = requests.size();
        std::map<std::string, Output> outputs;
        const auto collect = [&](std::size_t number) {
            requests[number % streams].wait();
            append(outputs, requests[number % streams], row_outputs_);
        };
        const Waiting waiting{requests};
        try {
            for (std::size_t number = 0; number < asked.size(); ++number) {
                if (number >= streams) collect(number - streams);
                for (const auto& [name, tensor] : asked[number]) requests[number % streams].set_tensor(name, tensor);
                running_.start(requests[number % streams]);
            }
            for (std::size_t number = asked.size() - streams; number < asked.size(); ++number) collect(number);
        } catch (const ov::Exception& error) {
            throw EngineError(ov_reason(error.what()));
        }
        return outputs;
    }

    // Waits in the end for each that still reads its inputs, whichever fails.
    struct Waiting {
        std::vector<ov::InferRequest>& requests;
        ~Waiting() {
            for (ov::InferRequest& request : requests) try {
                    request.wait();
                } catch (const std::exception&) {  // is already on its way
                }
        }
    };

    const OvGraph graph_;
    Running running_;
    const std::shared_ptr<ov::Model> model_;  // never read again: what is compiled later is a copy of what was checked
    const std::size_t at_once_;
    std::vector<std::string> grouped_, row_outputs_;
    std::optional<ov::InferRequest> mix_;
    std::map<std::pair<std::map<std::string, Shape>, std::size_t>, std::vector<ov::InferRequest>> requests_;
};

}  // namespace

std::string ov_version() { return ov::get_openvino_version().buildNumber; }

std::string ov_note(const std::string& precision, const Options& options) {
    if (precision != "bf16") return "";
    const OvDevice device(options);
    const std::string floats = device.float_type(precision);
    if (floats == precision) return "";
    return text("this ", device.name, " has no ", precision, ": openvino computes in ", floats,
                ", and nothing is gained over ", floats);
}

std::unique_ptr<Engine> open_ov(const std::vector<Path>& files, const Stage& stage, const Options& options) {
    if (!options.affinity.empty())
        throw UsageError("affinity is an option of onnxruntime; OpenVINO's threads run where the process does");
    const OvGraph graph(files.at(0), stage, options);
    std::unique_ptr<Engine> engine;
    if (options.at_once)
        engine = std::make_unique<RowEngine>(graph, stage, options);
    else
        engine = std::make_unique<OvEngine>(graph, options);
    return engine;
}

}  // namespace dit_runtime
