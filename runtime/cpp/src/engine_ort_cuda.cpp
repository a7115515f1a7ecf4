// ONNX Runtime's CUDA provider on memory of the GPU that never moves, so that a step can be replayed as a CUDA graph.
// Mirrors dit_runtime/backends/ort_cuda.py.
#include <algorithm>
#include <string>
#include <utility>

#include "cuda.hpp"
#include "ort.hpp"

namespace dit_runtime::ort {
namespace {

using cuda::Buffer;
using cuda::Device;

using Shapes = std::map<std::string, Shape>;  // of the inputs

void log_without(Log* log, const std::string& reason) {
    log(Severity::WARNING, "no CUDA graph of ONNX Runtime's work, it runs without: " + reason);
}

// Shapes that keep their memory: with and without guidance, at eight batch sizes. What is recorded keeps it to the end,
// since the headers know no call that gives a recording up.
constexpr std::size_t SHAPES = 16;

// The memory of one shape.
struct Bound {
    std::map<std::string, Buffer> buffers;
    std::vector<Input> outputs;  // their names and shapes
    Binding binding;
    RunOptions settings;  // of runs that are recorded, or replay what was
    std::size_t runs = 0;
    std::uint64_t used = 0;  // the engine's last run of it
    bool recorded = false;
};

// A shape's inputs and outputs have addresses of their own, so that its work on them can be recorded as a CUDA graph.
// The first base's stream outlives the session.
class OrtCudaEngine : public cuda::DeviceEngine, public OrtEngine {
  public:
    OrtCudaEngine(const Path& path, const Stage& stage, const Options& options, bool records)
        : DeviceEngine(options),
          OrtEngine(path, options,
                    {{"user_compute_stream", text(reinterpret_cast<std::uintptr_t>(stream_->handle))},
                     {"enable_cuda_graph", records ? "1" : "0"}}),
          log_(options.log),
          stage_(stage),
          plain_(run_settings("-1")),
          records_(records) {
        OrtMemoryInfo* memory = nullptr;
        check(api().CreateMemoryInfo("Cuda", OrtDeviceAllocator, number_, OrtMemTypeDefault, &memory));
        memory_.reset(memory);
    }

    ~OrtCudaEngine() override {
        try {
            const Device here(number_);
            stream_->wait();
            close();
        } catch (const EngineError&) {  // the device is gone
            close();
        }
    }

    std::map<std::string, Output> run(const std::vector<Input>& arrays) override {
        const Device here(number_);  // a pipeline may move between threads
        stream_->wait();             // for what a run that failed has left
        Bound& bound = prepare(arrays);
        for (const Input& input : arrays) bound.buffers.at(input.name).upload(input, *stream_);
        enqueue(bound);
        std::map<std::string, const float*> views;
        for (const Input& output : bound.outputs)
            views[output.name] = bound.buffers.at(output.name).download(output.bytes(), *stream_);
        stream_->wait();
        std::map<std::string, Output> named;
        for (const Input& output : bound.outputs) {
            const float* const numbers = views.at(output.name);
            named[output.name] = {output.shape, {numbers, numbers + count(output.shape)}};
        }
        return named;
    }

    void run_into(const std::vector<Input>& arrays, const Into& into) override {
        const Device here(number_);
        wait_for_host(arrays);
        Bound& bound = prepare(arrays);
        for (const Input& output : bound.outputs)
            if (into.count(output.name)) require_shape(output.name, output.shape, into.at(output.name));
        for (const Input& input : arrays) bound.buffers.at(input.name).upload(input, *stream_);
        enqueue(bound);
        for (const auto& [name, rows] : into) bound.buffers.at(name).fill(rows, *stream_);
    }

  private:
    static RunOptions run_settings(const std::string& number) {
        OrtRunOptions* made = nullptr;
        check(api().CreateRunOptions(&made));
        RunOptions settings(made);
        check(api().AddRunConfigEntry(made, "gpu_graph_id", number.c_str()));
        check(api().AddRunConfigEntry(made, "disable_synchronize_execution_providers", "1"));  // we wait ourselves
        return settings;
    }

    // The memory of a shape; a new one takes the place of the one not used for longest.
    Bound& prepare(const std::vector<Input>& arrays) {
        Shapes shapes;
        for (const Input& input : arrays) shapes[input.name] = input.shape;
        if (!bound_.count(shapes)) {
            const auto age = [](const auto& entry) { return entry.second->recorded ? UINT64_MAX : entry.second->used; };
            const auto oldest = std::min_element(bound_.begin(), bound_.end(), [&](const auto& one, const auto& other) {
                return age(one) < age(other);
            });
            if (bound_.size() >= SHAPES && !oldest->second->recorded) {
                stream_->wait();  // for what is queued there
                bound_.erase(oldest);
            }
            bound_.emplace(shapes, bind(arrays, shapes));
        }
        Bound& bound = *bound_.at(shapes);
        bound.used = ++runs_;
        return bound;
    }

    // Allocates the memory of a shape, and binds it.
    std::unique_ptr<Bound> bind(const std::vector<Input>& arrays, const Shapes& shapes) {
        auto bound = std::make_unique<Bound>();
        OrtIoBinding* made = nullptr;
        check(api().CreateIoBinding(session_.get(), &made));
        bound->binding.reset(made);
        const auto add = [&](const Input& array, decltype(OrtApi::BindInput) bind) {
            const auto buffer = bound->buffers.try_emplace(array.name, array.bytes()).first;
            const Value value = this->value(array, buffer->second.device, memory_.get());
            check(bind(made, array.name.c_str(), value.get()));
        };
        for (const Input& input : arrays) add(input, api().BindInput);
        const auto rows = std::find_if(stage_.reads.begin(), stage_.reads.end(),
                                       [](const TensorSpec& spec) { return !spec.starts("groups"); });
        for (const TensorSpec& spec : stage_.gives) {
            const auto size = static_cast<std::size_t>(shapes.at(rows->name).at(0));
            bound->outputs.push_back({spec.name, with_rows(size, spec.row()), nullptr});
            add(bound->outputs.back(), api().BindOutput);
        }
        bound->settings = run_settings(std::to_string(++numbers_));  // 0 is ONNX Runtime's own
        return bound;
    }

    // Runs; a shape's first run sets everything up, the second is recorded, later ones replay it.
    void enqueue(Bound& bound) {
        const auto run = [&](const RunOptions& settings) {
            check(api().RunWithBinding(session_.get(), settings.get(), bound.binding.get()));
        };
        const bool full = !bound.recorded && recordings_ == SHAPES;
        if (!records_ || !bound.runs || full) {
            run(plain_);
        } else {
            try {
                run(bound.settings);
                recordings_ += !std::exchange(bound.recorded, true);
            } catch (const OrtFailure& error) {
                if (bound.recorded) throw;
                log_without(log_, error.what());
                records_ = false;
                run(plain_);
            }
        }
        ++bound.runs;
    }

    void close() {
        session_.reset();  // what it has recorded reads and writes the memory
        bound_.clear();
    }

    Log* const log_;
    const Stage stage_;
    const RunOptions plain_;
    Memory memory_;
    std::map<Shapes, std::unique_ptr<Bound>> bound_;
    std::uint64_t runs_ = 0, numbers_ = 0;
    std::size_t recordings_ = 0;
    bool records_;
};

}  // namespace

std::unique_ptr<Engine> open_cuda(const Path& path, const Stage& stage, const Options& options) {
    try {
        const Device here(gpu_number(options.device));
        try {
            return std::make_unique<OrtCudaEngine>(path, stage, options, true);
        } catch (const BundleError& error) {
            if (std::string(error.what()).find("graph capture") == std::string::npos) throw;
            log_without(options.log, error.what());
            return std::make_unique<OrtCudaEngine>(path, stage, options, false);
        }
    } catch (const cuda::CudaError& error) {
        throw NoDevice(text("device '", options.device, "' did not start here: ", error.what()));
    }
}

}  // namespace dit_runtime::ort
