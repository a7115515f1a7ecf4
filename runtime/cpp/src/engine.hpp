// One file a backend; what they share. Mirrors dit_runtime/backends.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "call.hpp"
#include "log.hpp"
#include "manifest.hpp"
#include "resident.hpp"

namespace dit_runtime {

// A setting of a stage's engine; what it may be is checked by check_settings.
struct EngineSetting {
    std::string stage;  // its name; empty: every stage
    std::string key, value;
};

struct Options {
    std::string backend;               // empty: the bundle's own
    std::string device;                // empty: the CPU, or the one device an engine is for
    int threads = 0;                   // 0: as many as the backend thinks right
    bool low_memory = false;           // one engine at a time, smaller buffers
    std::string manifest_sha256 = {};  // that manifest.json must have; empty: any
    std::optional<std::vector<unsigned char>> public_key = std::nullopt;  // of who must have signed it; none: nobody
    bool streamed = false;  // of a stage that runs once a prompt: weights are packed and widened where they are used
    Path cache;             // where a backend may keep what it compiled; empty: nowhere
    std::string engine_sha256;               // of a stage's first file, if that is an engine: what it holds is code
    std::vector<std::size_t> affinity = {};  // the CPUs of an engine's threads; empty: any
    std::map<std::string, std::string> own = {};       // backends' own settings, by "BACKEND.KEY"
    std::vector<EngineSetting> settings = {};          // of stages; the last of a key and stage counts
    std::uint64_t max_bytes = 0;                       // of the files that are opened; 0: any number
    Log* log = dit_runtime::log;                       // the library's own, for engines in plugins
    decltype(Call::leave) leave = dit_runtime::leave;  // the same
    std::size_t at_once = 0;  // rows of a stage that may run at the same time; 0: its rows do not run apart
    // What OpenVINO's device computes, "BF16" among it; nothing: ask it.
    std::optional<std::vector<std::string>> capabilities = std::nullopt;
    std::shared_ptr<void> stream = {};  // of an open engine of the same backend and device, to work in order with
};

// An array that goes in; it belongs to the caller.
struct Input {
    std::string name;
    Shape shape;
    const void* data;
    bool integers = false;               // int64, else float32
    std::uint64_t version = 0;           // inputs of one version and name have the same values; 0: of no version
    const DeviceRows* device = nullptr;  // where the values are, in the place of `data`; only a Resident takes them

    std::size_t bytes() const { return count(shape) * (integers ? sizeof(std::int64_t) : sizeof(float)); }
};

// An array that comes out, float32.
struct Output {
    Shape shape;
    std::vector<float> values;
};

// A network, ready to run; arrays go in and come out by name.
class Engine {
  public:
    virtual ~Engine() = default;
    virtual std::map<std::string, Output> run(const std::vector<Input>& inputs) = 0;
    // Makes the run that is under way fail soon, and later ones, until `resume`. Another thread calls it.
    virtual void stop() noexcept {}
    virtual void resume() noexcept {}

    std::vector<std::string> inputs, outputs;  // names
    std::string place;                         // the backend and device that it was opened with
};

struct Backend {
    std::string name;
    bool opens_onnx;  // else it needs engine files of its own
    std::vector<std::string> precisions;
    std::string (*version)();
    std::unique_ptr<Engine> (*open)(const std::vector<Path>& files, const Stage& stage, const Options& options);
    // A line for people where it does not compute here in the precision that was asked for; else empty.
    std::string (*note)(const std::string& precision, const Options& options) = nullptr;
};

// The backends that are here; the first replaces a bundle's backend that is not among them.
const std::vector<Backend>& backends();

// Why others are not here, where that is known; else empty.
std::string missing_backends();

// "cuda:1" -> 1; "cuda" and nothing are the first.
int gpu_number(const std::string& device);

// True for "cuda" and what begins with "cuda:".
bool on_cuda(const std::string& device);

// The files of a stage for a backend and device.
std::vector<std::string> files_for(const Stage& stage, const Backend& backend, const std::string& device);

// The backend, driver and GPU of this machine.
struct Gpu {
    std::string version;     // of the backend
    int driver = 0;          // 1000 times its CUDA; 0: no driver
    std::string capability;  // "8.9"; empty: no GPU
};

// Why an engine that was built so cannot be opened here, from the manifest alone; empty where it can.
std::string refusal(const std::string& backend, const Built& built, const Gpu& here);

// While it loads: about the weights' size, where OpenVINO takes twice that.
inline const char* const LEANEST = "onnxruntime";

// Refuses settings that name no stage of the bundle, no key, or no value of it.
void check_settings(const Options& options, const Manifest& manifest);

// The options with the settings of a stage.
Options options_of(const Stage& stage, const Options& options);

// What `own` has for a backend, by its keys without the backend's name.
std::map<std::string, std::string> own_settings(const std::string& backend, const Options& options);

// Throws EngineMemory or DeviceLost where an engine's message is about that.
void throw_if_grave(const std::string& message);

// The backend that opens a stage, by the options' name or by the bundle's.
const Backend& choose(const Stage& stage, const Options& options);

// Up to the first line break: what an engine library says is long.
std::string first_line(const std::string& message);

// Of the backends, each in a file of its own.
std::string ort_version();
std::unique_ptr<Engine> open_ort(const std::vector<Path>& files, const Stage& stage, const Options& options);
std::string ov_version();
std::string ov_note(const std::string& precision, const Options& options);
std::unique_ptr<Engine> open_ov(const std::vector<Path>& files, const Stage& stage, const Options& options);
std::string trt_version();
std::unique_ptr<Engine> open_trt(const std::vector<Path>& files, const Stage& stage, const Options& options);

}  // namespace dit_runtime
