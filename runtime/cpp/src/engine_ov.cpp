// OpenVINO through its C++ API: compiles the ONNX form when it is opened.
#include <algorithm>
#include <filesystem>
#include <fstream>
#include <mutex>
#include <openvino/openvino.hpp>
#include <thread>

#include "engine.hpp"
#include "errors.hpp"

namespace dit_runtime {
namespace {

// One for all engines of the process while any lives: each ov::Core loads its plugins anew.
std::shared_ptr<ov::Core> shared_core() {
    static std::mutex mutex;
    static std::weak_ptr<ov::Core> shared;
    const std::lock_guard<std::mutex> lock(mutex);
    std::shared_ptr<ov::Core> core = shared.lock();
    if (!core) shared = core = std::make_shared<ov::Core>();
    return core;
}

// The type in which OpenVINO computes the fp32 of a graph.
const std::map<std::string, ov::element::Type> HINTS = {
    {"fp32", ov::element::f32}, {"bf16", ov::element::bf16}, {"int8", ov::element::bf16}};

// The first shape that runs gets a model of its own, which is faster; all others share one with free dimensions.
class OvEngine : public Engine {
  public:
    OvEngine(const Path& path, const Stage& stage, const Options& options) : core_(shared_core()), path_(path) {
        if (!options.device.empty()) device_ = options.device;
        for (char& letter : device_) letter = static_cast<char>(std::toupper(static_cast<unsigned char>(letter)));
        try {
            core_->get_property(device_, ov::device::full_name);  // asks this device's plugin and no other
        } catch (const std::exception& error) {
            throw UsageError(text("device '", options.device, "' is not known to OpenVINO: ", reason(error.what())));
        }
        settings_ = {ov::hint::performance_mode(ov::hint::PerformanceMode::LATENCY),
                     ov::hint::inference_precision(HINTS.at(stage.precision))};
        if (options.threads) settings_.insert(ov::inference_num_threads(options.threads));
        if (!options.cache.empty()) settings_.insert(ov::cache_dir(options.cache.string()));
        const auto model = read_model();
        for (const auto& port : model->inputs()) inputs.push_back(port.get_any_name());
        for (const auto& port : model->outputs()) outputs.push_back(port.get_any_name());
    }

    std::map<std::string, Output> run(const std::vector<Input>& arrays) override {
        return std::move(run_at_once({arrays}).front());
    }

    // All of the same shapes, each on its share of the threads.
    std::vector<std::map<std::string, Output>> run_at_once(const std::vector<std::vector<Input>>& asked) {
        std::map<std::string, Shape> shapes;
        for (const Input& input : asked.front()) shapes[input.name] = input.shape;
        if (fixed_.empty()) {
            fixed_ = requests(asked.size(), &shapes);
            first_ = shapes;
        }
        const bool first = asked.size() == fixed_.size() && shapes == first_;
        std::vector<ov::InferRequest>& taken = first ? fixed_ : free_[asked.size()];
        if (taken.empty()) taken = requests(asked.size(), nullptr);
        std::vector<std::map<std::string, Output>> results;
        try {
            for (std::size_t i = 0; i < asked.size(); ++i) {
                for (const Input& input : asked[i]) taken[i].set_tensor(input.name, tensor(input));
                taken[i].start_async();
            }
            for (ov::InferRequest& request : taken) request.wait();
            for (ov::InferRequest& request : taken) results.push_back(answer(request));
        } catch (const ov::Exception& error) {
            taken.clear();  // waits for those that still read the inputs
            throw EngineError(reason(error.what()));
        }
        return results;
    }

    bool on_the_cpu() const { return device_ == "CPU"; }

  private:
    std::shared_ptr<ov::Model> read_model() const {
        // OpenVINO tries every format that it knows on what is no ONNX; a model begins with one of its fields' tags.
        const int first = std::ifstream(path_, std::ios::binary).get();
        if (first < 0 || std::string("\x08\x12\x1a\x22\x28\x32\x3a\x42\x72\xa2\xca").find(static_cast<char>(first)) ==
                             std::string::npos)
            throw BundleError(path_.string() + ": OpenVINO does not open it: it is no ONNX model");
        try {
            return core_->read_model(path_.string());
        } catch (const std::exception& error) {
            throw BundleError(text(path_.string(), ": OpenVINO does not open it: ", reason(error.what())));
        }
    }

    static ov::Tensor tensor(const Input& input) {
        const ov::Shape shape(input.shape.begin(), input.shape.end());
        // Inputs are only read.
        return {input.integers ? ov::element::i64 : ov::element::f32, shape, const_cast<void*>(input.data)};
    }

    std::map<std::string, Output> answer(ov::InferRequest& request) const {
        std::map<std::string, Output> named;
        for (const auto& name : outputs) {
            const ov::Tensor tensor = request.get_tensor(name);
            if (tensor.get_element_type() != ov::element::f32)
                throw EngineError(
                    text("output ", name, " is ", tensor.get_element_type().to_string(), ", expected float32"));
            const float* numbers = static_cast<const float*>(tensor.data());
            const ov::Shape shape = tensor.get_shape();
            named[name] = {Shape(shape.begin(), shape.end()), std::vector<float>(numbers, numbers + tensor.get_size())};
        }
        return named;
    }

    std::vector<ov::InferRequest> requests(std::size_t count, const std::map<std::string, Shape>* shapes) const {
        const auto model = read_model();
        ov::AnyMap settings = settings_;
        if (count > 1) settings.insert(ov::num_streams(static_cast<std::int32_t>(count)));
        try {
            if (shapes) {
                std::map<std::string, ov::PartialShape> fixed;
                for (const auto& [name, shape] : *shapes)
                    fixed[name] = ov::PartialShape(std::vector<ov::Dimension>(shape.begin(), shape.end()));
                model->reshape(fixed);
            }
            ov::CompiledModel compiled = core_->compile_model(model, device_, settings);
            std::vector<ov::InferRequest> made(count);
            for (ov::InferRequest& request : made) request = compiled.create_infer_request();
            return made;
        } catch (const std::exception& error) {
            throw BundleError(text(path_.string(), ": OpenVINO does not compile it: ", reason(error.what())));
        }
    }

    // OpenVINO's messages begin with its own source lines; the last line says what happened.
    static std::string reason(std::string message) {
        message = strip(message);
        const std::size_t line = message.rfind('\n');
        return line == std::string::npos ? message : message.substr(line + 1);
    }

    std::shared_ptr<ov::Core> core_;
    const Path path_;
    std::string device_ = "CPU";
    ov::AnyMap settings_;
    std::map<std::string, Shape> first_;
    std::vector<ov::InferRequest> fixed_;
    std::map<std::size_t, std::vector<ov::InferRequest>> free_;  // by how many run at once
};

// A denoiser whose rows of the two groups run at once, each on half of the threads: that takes less time than both in
// one batch. Guidance is then mixed here, as the graph would.
class Halves : public Engine {
  public:
    Halves(std::unique_ptr<OvEngine> engine, const Stage& stage, std::size_t guided_channels)
        : engine_(std::move(engine)), guided_(guided_channels) {
        inputs = engine_->inputs;
        outputs = engine_->outputs;
        for (const TensorSpec& spec : stage.reads) {
            if (spec.starts("groups")) grouped_.push_back(spec.name);
            if (spec.starts("batch") && spec.name != GUIDANCE) state_ = spec.name;
        }
    }

    std::map<std::string, Output> run(const std::vector<Input>& arrays) override {
        const auto named = [&](const std::string& name) -> const Input& {
            return *std::find_if(arrays.begin(), arrays.end(), [&](const Input& input) { return input.name == name; });
        };
        if (named(grouped_.front()).shape.front() == 1) return engine_->run(arrays);
        auto answers = engine_->run_at_once({group(arrays, 0), group(arrays, 1)});
        const Shape& shape = named(state_).shape;  // B, C, ...
        for (auto& answer : answers) {
            const auto prediction = answer.find("prediction");
            if (prediction == answer.end() || prediction->second.shape != shape)
                return std::move(answer);  // to be refused
        }
        std::vector<float>& first = answers[0].at("prediction").values;
        const std::vector<float>& last = answers[1].at("prediction").values;
        const float* guidance = static_cast<const float*>(named(GUIDANCE).data);
        const std::size_t channel = count({shape.begin() + 2, shape.end()});
        const std::size_t sample = channel * static_cast<std::size_t>(shape[1]);
        for (std::size_t i = 0; i < first.size(); ++i)
            if (i % sample < guided_ * channel) first[i] = last[i] + guidance[i / sample] * (first[i] - last[i]);
        return std::move(answers[0]);
    }

  private:
    // (G, B, ...) -> (1, B, ...) of what has groups.
    std::vector<Input> group(std::vector<Input> arrays, std::size_t row) const {
        for (Input& input : arrays) {
            if (!contains(grouped_, input.name)) continue;
            const std::size_t item = input.integers ? sizeof(std::int64_t) : sizeof(float);
            const std::size_t numbers = count(input.shape) / static_cast<std::size_t>(input.shape.front());
            input.data = static_cast<const unsigned char*>(input.data) + row * numbers * item;
            input.shape.front() = 1;
        }
        return arrays;
    }

    const std::unique_ptr<OvEngine> engine_;
    const std::size_t guided_;
    std::vector<std::string> grouped_;
    std::string state_;
};

// True if two runs at once can have half of the threads each: an even number, of equal cores.
bool halves(const Options& options) {
#ifdef __linux__
    const unsigned threads =
        options.threads ? static_cast<unsigned>(options.threads) : std::thread::hardware_concurrency();
    return threads && threads % 2 == 0 && !std::filesystem::exists("/sys/devices/cpu_atom");  // slower cores
#else
    return static_cast<void>(options), false;
#endif
}

}  // namespace

std::string ov_version() { return ov::get_openvino_version().buildNumber; }

std::unique_ptr<Engine> open_ov(const std::vector<Path>& files, const Stage& stage, const Options& options) {
    auto engine = std::make_unique<OvEngine>(files.at(0), stage, options);
    const bool groups = std::any_of(stage.reads.begin(), stage.reads.end(),
                                    [](const TensorSpec& spec) { return spec.starts("groups"); });
    const bool mixes = options.guided_channels && groups && find(stage.reads, GUIDANCE);
    if (!mixes || !engine->on_the_cpu() || !halves(options)) return engine;
    return std::make_unique<Halves>(std::move(engine), stage, *options.guided_channels);
}

}  // namespace dit_runtime
