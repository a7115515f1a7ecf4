// OpenVINO through its C++ API: compiles the ONNX form when it is opened.
#include <fstream>
#include <mutex>
#include <openvino/openvino.hpp>

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

// What OpenVINO computes the fp32 of a graph in.
const std::map<std::string, ov::element::Type> HINTS = {
    {"fp32", ov::element::f32}, {"bf16", ov::element::bf16}, {"int8", ov::element::bf16}};

// The first shape that runs gets a model of its own, which is faster; all others share one with free dimensions.
class OvEngine : public Engine {
  public:
    OvEngine(const Path& path, const Graph& graph, const Options& options) : core_(shared_core()), path_(path) {
        if (!options.device.empty()) device_ = options.device;
        for (char& letter : device_) letter = static_cast<char>(std::toupper(static_cast<unsigned char>(letter)));
        try {
            core_->get_property(device_, ov::device::full_name);  // asks this device's plugin and no other
        } catch (const std::exception& error) {
            throw UsageError(text("device '", options.device, "' is not known to OpenVINO: ", reason(error.what())));
        }
        settings_ = {ov::hint::performance_mode(ov::hint::PerformanceMode::LATENCY),
                     ov::hint::inference_precision(HINTS.at(graph.precision))};
        if (options.threads) settings_.insert(ov::inference_num_threads(options.threads));
        if (!options.cache.empty()) settings_.insert(ov::cache_dir(options.cache.string()));
        const auto model = read_model();
        for (const auto& port : model->inputs()) inputs.push_back(port.get_any_name());
        for (const auto& port : model->outputs()) outputs.push_back(port.get_any_name());
    }

    std::map<std::string, Output> run(const std::vector<Input>& given) override {
        std::map<std::string, Shape> shapes;
        for (const Input& input : given) shapes[input.name] = input.shape;
        if (first_.empty()) {
            fixed_ = request(&shapes);
            first_ = shapes;
        }
        if (shapes != first_ && !free_) free_ = request(nullptr);
        ov::InferRequest& request = shapes == first_ ? fixed_ : free_;
        std::map<std::string, Output> named;
        try {
            for (const Input& input : given) {
                const ov::Shape shape(input.shape.begin(), input.shape.end());
                // Inputs are only read.
                request.set_tensor(input.name, ov::Tensor(input.integers ? ov::element::i64 : ov::element::f32, shape,
                                                          const_cast<void*>(input.data)));
            }
            request.infer();
            for (const auto& name : outputs) {
                const ov::Tensor tensor = request.get_tensor(name);
                if (tensor.get_element_type() != ov::element::f32)
                    throw EngineError(
                        text("output ", name, " is ", tensor.get_element_type().to_string(), ", expected float32"));
                const float* numbers = static_cast<const float*>(tensor.data());
                const ov::Shape shape = tensor.get_shape();
                named[name] = {Shape(shape.begin(), shape.end()),
                               std::vector<float>(numbers, numbers + tensor.get_size())};
            }
        } catch (const ov::Exception& error) {
            throw EngineError(reason(error.what()));
        }
        return named;
    }

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

    ov::InferRequest request(const std::map<std::string, Shape>* shapes) const {
        const auto model = read_model();
        try {
            if (shapes) {
                std::map<std::string, ov::PartialShape> fixed;
                for (const auto& [name, shape] : *shapes)
                    fixed[name] = ov::PartialShape(std::vector<ov::Dimension>(shape.begin(), shape.end()));
                model->reshape(fixed);
            }
            return core_->compile_model(model, device_, settings_).create_infer_request();
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
    ov::InferRequest fixed_, free_;
};

}  // namespace

std::string ov_version() { return ov::get_openvino_version().buildNumber; }

std::unique_ptr<Engine> open_ov(const std::vector<Path>& files, const Graph& graph, const Options& options) {
    return std::make_unique<OvEngine>(files.at(0), graph, options);
}

}  // namespace dit_runtime
