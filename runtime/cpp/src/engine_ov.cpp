// OpenVINO through its C++ API: compiles the ONNX form when it is opened.
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

class OvEngine : public Engine {
  public:
    OvEngine(const Path& path, const Graph& graph, const Options& options) : core_(shared_core()) {
        std::string device = options.device.empty() ? "CPU" : options.device;
        for (char& letter : device) letter = static_cast<char>(std::toupper(static_cast<unsigned char>(letter)));
        const std::vector<std::string> here = core_->get_available_devices();
        if (!contains(here, device.substr(0, device.find('.'))) && !contains(here, device))
            throw UsageError(text("device '", options.device, "' is not known to OpenVINO; here: ", join(here)));
        ov::AnyMap properties = {ov::hint::performance_mode(ov::hint::PerformanceMode::LATENCY)};
        // What is fp32 in the bundle stays so; a CPU with bf16 would take that otherwise.
        if (graph.precision == "fp32") properties.insert(ov::hint::inference_precision(ov::element::f32));
        if (options.threads && device == "CPU") properties.insert(ov::inference_num_threads(options.threads));
        try {
            compiled_ = core_->compile_model(path.string(), device, properties);
        } catch (const std::exception& error) {
            throw BundleError(text(path.string(), ": OpenVINO does not compile it: ", reason(error.what())));
        }
        request_ = compiled_.create_infer_request();
        for (const auto& port : compiled_.inputs()) inputs.push_back(port.get_any_name());
        for (const auto& port : compiled_.outputs()) outputs.push_back(port.get_any_name());
    }

    std::map<std::string, Output> run(const std::vector<Input>& given) override {
        std::map<std::string, Output> named;
        try {
            for (const Input& input : given) {
                const ov::Shape shape(input.shape.begin(), input.shape.end());
                // Inputs are only read.
                request_.set_tensor(input.name, ov::Tensor(input.integers ? ov::element::i64 : ov::element::f32, shape,
                                                           const_cast<void*>(input.data)));
            }
            request_.infer();
            for (const auto& name : outputs) {
                const ov::Tensor tensor = request_.get_tensor(name);
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
    // OpenVINO's messages begin with its own source lines; the last line says what happened.
    static std::string reason(std::string message) {
        message = strip(message);
        const std::size_t line = message.rfind('\n');
        return line == std::string::npos ? message : message.substr(line + 1);
    }

    std::shared_ptr<ov::Core> core_;
    ov::CompiledModel compiled_;
    ov::InferRequest request_;
};

}  // namespace

std::string ov_version() { return ov::get_openvino_version().buildNumber; }

std::unique_ptr<Engine> open_ov(const std::vector<Path>& files, const Graph& graph, const Options& options) {
    return std::make_unique<OvEngine>(files.at(0), graph, options);
}

}  // namespace dit_runtime
