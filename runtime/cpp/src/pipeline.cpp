#include "pipeline.hpp"

#include <algorithm>
#include <cstdlib>

#include "errors.hpp"
#include "facts.hpp"
#include "images.hpp"
#include "log.hpp"
#include "run.hpp"
#include "sha256.hpp"
#include "warming.hpp"

namespace dit_runtime {
namespace {

// Rows, by when their stage runs: two of a VAE would need twice the memory for their activations.
const std::map<std::string, std::size_t> AT_ONCE = {{START, 1}, {"step", 2}, {"end", 1}};

std::vector<std::string> names(const std::vector<TensorSpec>& specs) {
    std::vector<std::string> names;
    for (const TensorSpec& spec : specs) names.push_back(spec.name);
    return names;
}

std::vector<std::string> sorted(std::vector<std::string> words) {
    std::sort(words.begin(), words.end());
    return words;
}

void append(std::vector<float>& to, const std::vector<float>& values) {
    to.insert(to.end(), values.begin(), values.end());
}

}  // namespace

Pipeline::Pipeline(const Path& where, const Options& options, const std::vector<std::int64_t>& warm,
                   const std::string& size)
    : folder(std::filesystem::absolute(where.empty() ? Path(".") : where)),
      manifest(read(where, options.manifest_sha256, options.public_key).at(size)),
      options_(options) {
    options_.cache = cache();
    if (options.threads < 0) throw UsageError(text("threads is ", options.threads, "; expected 1 or more, or 0"));
    require_warmable(manifest, warm, options.low_memory);
    check_settings(options, manifest);
    try {
        unless_cancelled([] { return backends().size(); });  // their libraries take a while to load
        checking(files(), [&] {
            if (!options_.low_memory)
                for (const Stage& stage : manifest.stages)
                    if (stage.runs != START) opened_->engines[stage.name] = open(stage);
        });
        dit_runtime::warm(*this, warm);
    } catch (const Stopped&) {
        destroy_later(std::move(opened_));  // engines take a while to close
        throw;
    }
}

Pipeline::Pipeline(const Pipeline& whole, Manifest sized)
    : folder(whole.folder), manifest(std::move(sized)), options_(whole.options_), opened_(whole.opened_) {
    checking(files(), [] {});
}

// Compares the files' sums while the call opens them: a wrong sum is the error, whatever an engine made of the file.
template <typename Call>
void Pipeline::checking(const std::vector<std::string>& names, const Call& call) {
    require_room(names);
    Checking sums(folder, manifest, names, opened_->checked);
    try {
        call();
    } catch (const std::exception&) {
        sums.finish();
        throw;
    }
    sums.finish();
}

Pipeline& Pipeline::at(const std::string& size) {
    if (size.empty() || size_name(size) == manifest.size) return *this;
    Manifest sized = manifest.at(size);
    const Turns::Turn turn(opened_->turns);
    auto& pipe = sizes_[sized.size];
    if (!pipe) pipe.reset(new Pipeline(*this, std::move(sized)));
    return *pipe;
}

void Pipeline::close() {
    const Turns::Turn turn(opened_->turns);
    opened_->engines.clear();
}

// The files that this size's engines are opened from, but for the encoder's of pictures, which not every run needs.
std::vector<std::string> Pipeline::files() const {
    std::vector<std::string> files;
    for (const Stage& stage : manifest.stages) {
        if (stage.runs == START) continue;
        for (const auto& file : files_for(stage, backend(stage), options_of(stage, options_).device))
            files.push_back(file);
    }
    return files;
}

// Refuses files of more bytes than the options allow; all of them count as expected progress.
void Pipeline::require_room(const std::vector<std::string>& files) const {
    std::uint64_t bytes = 0;
    std::vector<std::string> counted;
    for (const std::string& name : files) {
        const auto file = manifest.files.find(name);
        if (file == manifest.files.end() || contains(counted, name)) continue;
        counted.push_back(name);
        bytes += file->second.size;
        if (options_.max_bytes && bytes > options_.max_bytes)
            throw BundleError(text(folder.string(), ": its engines have ", bytes,
                                   " bytes or more, of which max_bytes allows ", options_.max_bytes));
    }
    if (const auto& progress = current_call().progress; progress && progress->of_bytes) progress->expect(bytes);
}

void Pipeline::warm(const std::vector<std::int64_t>& batches) {
    require_warmable(manifest, batches, options_.low_memory);
    dit_runtime::warm(*this, batches);
}

// The folder for what backends compile of this bundle, which they make: in the user's cache, by the bundle's sums; ""
// without a cache, or where it is somebody else's.
Path Pipeline::cache() const {
    std::string content;
    for (const auto& [name, file] : manifest.files) content += name + " " + file.sha256 + "\n";
    const char* home = std::getenv("XDG_CACHE_HOME");
    const bool own = home && *home;
    if (!own) home = std::getenv("HOME");
    if (!home || !*home) return {};
    Sha256 sum;
    sum.update(reinterpret_cast<const unsigned char*>(content.data()), content.size());
    const Path all = (own ? Path(home) : Path(home) / ".cache") / "dit-run", folder = all / sum.hex().substr(0, 32);
    return is_trusted(all) && is_trusted(folder) ? folder : Path();
}

// The stage's backend. With low memory, and unless the user chose a backend or device, stages before the loop run on
// the one that loads in the least memory. Text encoders run where the loop does if their own backend is not here, or
// the user chose a device, which is the loop's.
const Backend& Pipeline::backend(const Stage& stage) const {
    const Options options = options_of(stage, options_);
    if (options.low_memory && options.backend.empty() && options.device.empty() &&
        (stage.runs == PROMPT || stage.before_loop()))
        for (const Backend& known : backends())
            if (known.name == LEANEST && contains(known.precisions, stage.precision)) return known;
    const Stage& step = manifest.step();
    if (stage.runs == PROMPT && stage.backend != step.backend && options.backend.empty() &&
        contains(fact_names("precisions"), stage.backend)) {
        Stage moved = stage;
        moved.backend = step.backend;
        const auto is_own = [&stage](const Backend& known) { return known.name == stage.backend; };
        if (!options.device.empty() || std::none_of(backends().begin(), backends().end(), is_own))
            return choose(moved, options);
    }
    return choose(stage, options);
}

std::string Pipeline::note() const {
    for (const Stage& stage : manifest.stages)
        if (const auto note = backend(stage).note)
            if (const std::string line = note(stage.precision, options_of(stage, options_)); !line.empty()) return line;
    return "";
}

bool Pipeline::on_cpu(const Stage& stage) const {
    const std::string name = backend(stage).name, device = lower(options_of(stage, options_).device);
    return (name == "onnxruntime" || name == "openvino") && (device.empty() || device == "cpu");
}

bool Pipeline::batch_invariant() const {
    return manifest.batch_invariant &&
           std::all_of(manifest.stages.begin(), manifest.stages.end(), [&](const Stage& stage) {
               return (stage.runs != "step" && stage.runs != "end") ||
                      (on_cpu(stage) && backend(stage).name == stage.backend);
           });
}

// The stage's engine, opened where it is not; with low memory, the others are closed first. It is the caller's turn.
Engine& Pipeline::engine(const Stage& stage) {
    auto& engines = opened_->engines;
    if (const auto open = engines.find(stage.name); open != engines.end()) {
        require_unwritten(folder, manifest, opened_->checked, opened_->files.at(stage.name));
        return *open->second;
    }
    if (options_.low_memory) engines.clear();
    const auto names = files_for(stage, backend(stage), options_of(stage, options_).device);
    std::unique_ptr<Engine> opened;
    checking(names, [&] { opened = open(stage); });
    return *(engines[stage.name] = std::move(opened));
}

// The stage's engine, of files whose sums the caller compares.
std::unique_ptr<Engine> Pipeline::open(const Stage& stage) {
    const Stopwatch opening(&Timing::opening);
    const auto start = std::chrono::steady_clock::now();
    const Backend& backend = this->backend(stage);
    Options options = options_of(stage, options_);
    std::vector<Path> paths;
    const auto files = files_for(stage, backend, options.device);
    for (const auto& file : files) paths.push_back(inside(folder, file));
    opened_->files[stage.name] = files;
    options.engine_sha256 = manifest.files.at(files.at(0)).sha256;
    options.streamed = stage.runs == PROMPT && stage.precision == "fp32" && !on_cuda(options.device);
    if (const auto rows = AT_ONCE.find(stage.runs); rows != AT_ONCE.end()) options.at_once = rows->second;
    const std::string place = text(backend.name, " ", options.device);
    for (const auto& entry : opened_->engines)
        if (const auto* const other = dynamic_cast<Resident*>(entry.second.get()))
            if (entry.second->place == place) options.stream = other->stream();
    std::unique_ptr<Engine> opened;
    try {
        opened = unless_cancelled([&backend, paths, stage, options] { return backend.open(paths, stage, options); });
    } catch (const UsageError& error) {
        throw_if_grave(error.what());
        throw;
    }
    opened->place = place;
    const auto inputs = names(stage.reads), outputs = names(stage.gives);
    if (sorted(opened->inputs) != sorted(inputs) || sorted(opened->outputs) != sorted(outputs))
        throw BundleError(text(folder.string(), ": ", stage.name, " has inputs ", join(opened->inputs), " and outputs ",
                               join(opened->outputs), ", expected ", join(inputs), " and ", join(outputs)));
    log(Severity::INFO, text(stage.name, ": opened with ", backend.name, " in ",
                             std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count(), " s"));
    return opened;
}

std::vector<std::uint8_t> Pipeline::images(const Request& request) {
    at(request.size).require_decoder();
    return Run(*this, request).pictures();
}

std::vector<float> Pipeline::latents(const Request& request) { return Run(*this, request).latents(); }

RunStage Pipeline::runner() {
    return [this](const Stage& stage, const std::vector<Input>& inputs, std::size_t rows) {
        return run(stage, inputs, rows);
    };
}

Rows Pipeline::encode(const Rows& condition) { return opened_->prompts(manifest, runner(), condition); }

Prediction Pipeline::denoise(const std::vector<float>& state, const Conditioned& inputs,
                             const std::vector<float>& guidance) {
    const Stage& stage = manifest.step();
    const Port& port = manifest.state();
    const std::size_t samples = guidance.size(), numbers = count(port.shape);
    const std::size_t size = static_cast<std::size_t>(stage.max_batch);
    Prediction whole;
    for (std::size_t first = 0; first < samples; first += size) {
        const std::size_t last = std::min(first + size, samples), batch = last - first;
        std::vector<Input> all = {{port.name, with_rows(batch, port.shape), state.data() + first * numbers}};
        for (const auto& [name, tensor] : inputs(first, last)) all.push_back(tensor.input(name));
        if (manifest.mixes_guidance()) all.push_back({GUIDANCE, with_rows(batch, {}), guidance.data() + first});
        auto part = run(stage, all, batch);
        if (batch == samples) return {std::move(part["prediction"]), std::move(part["variance"])};
        append(whole.prediction, part["prediction"]);
        append(whole.variance, part["variance"]);
    }
    return whole;
}

std::map<std::string, std::vector<float>> Pipeline::encode_pictures(const std::vector<float>& pictures) {
    const std::size_t numbers = count(manifest.picture_shape()), samples = pictures.size() / numbers;
    const Stage& stage = *manifest.start();
    const std::size_t size = static_cast<std::size_t>(stage.max_batch);
    std::map<std::string, std::vector<float>> latents;
    for (std::size_t first = 0; first < samples; first += size) {
        const std::size_t batch = std::min(size, samples - first);
        const Input input = {stage.reads.at(0).name, with_rows(batch, manifest.picture_shape()),
                             pictures.data() + first * numbers};
        for (const auto& [name, values] : run(stage, {input}, batch)) append(latents[name], values);
    }
    for (const auto& entry : latents)
        if (!all_finite(entry.second))
            throw NotFinite(text("the ", stage.name, "'s latents hold values that are not finite"));
    return latents;
}

std::vector<float> Pipeline::decode(const std::vector<float>& latents) {
    require_decoder();
    const Port& port = manifest.state();
    const std::size_t numbers = count(port.shape), samples = latents.size() / numbers;
    const std::size_t size = static_cast<std::size_t>(manifest.end()->max_batch);
    std::vector<float> images;
    for (std::size_t first = 0; first < samples; first += size) {
        const std::size_t batch = std::min(size, samples - first);
        const Input state = {port.name, with_rows(batch, port.shape), latents.data() + first * numbers};
        append(images, run(*manifest.end(), {state}, batch).at("images"));
    }
    if (!all_finite(images)) throw NotFinite("the decoder's pictures hold values that are not finite");
    return images;
}

std::vector<std::uint8_t> Pipeline::pictures(const std::vector<float>& latents) {
    const std::vector<float> images = decode(latents);
    return to_uint8(images, with_rows(latents.size() / count(manifest.state().shape), manifest.image_shape()));
}

void Pipeline::require_decoder() const {
    if (!manifest.end()) throw UsageError("this bundle has no decoder; ask for latents (dit-generate: -o FILE.npy)");
}

}  // namespace dit_runtime
