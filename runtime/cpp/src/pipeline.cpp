#include "pipeline.hpp"

#include <algorithm>
#include <chrono>
#include <cstdlib>

#include "errors.hpp"
#include "images.hpp"
#include "sha256.hpp"

namespace dit_runtime {
namespace {

std::vector<std::string> names(const std::vector<TensorSpec>& specs) {
    std::vector<std::string> found;
    for (const TensorSpec& spec : specs) found.push_back(spec.name);
    return found;
}

std::vector<std::string> sorted(std::vector<std::string> words) {
    std::sort(words.begin(), words.end());
    return words;
}

Shape with_batch(std::size_t batch, const Shape& row) {
    Shape shape = {static_cast<std::int64_t>(batch)};
    shape.insert(shape.end(), row.begin(), row.end());
    return shape;
}

void append(std::vector<float>& to, const std::vector<float>& values) {
    to.insert(to.end(), values.begin(), values.end());
}

}  // namespace

Pipeline::Pipeline(const Path& where, const Options& options)
    : folder(std::filesystem::absolute(where.empty() ? Path(".") : where)), manifest(read(where)), options_(options) {
    if (!options_.low_memory) options_.cache = cache();  // to read what is kept takes more memory than to compile
    if (options.threads < 0) throw UsageError(text("threads is ", options.threads, "; expected 1 or more, or 0"));
    for (const auto& [name, graph] : manifest.graphs) check_files(folder, manifest, graph.files(backend(name).name));
    if (!options_.low_memory)
        for (const auto& graph : manifest.graphs) engine(graph.first);
}

// Where backends keep what they compile of this bundle: in the user's cache, by what the bundle holds; "" without one.
Path Pipeline::cache() const {
    std::string content;
    for (const auto& [name, file] : manifest.files) content += name + " " + file.sha256 + "\n";
    const char* home = std::getenv("XDG_CACHE_HOME");
    const bool own = home && *home;
    if (!own) home = std::getenv("HOME");
    if (!home || !*home) return {};
    Sha256 sum;
    sum.update(reinterpret_cast<const unsigned char*>(content.data()), content.size());
    const Path path = (own ? Path(home) : Path(home) / ".cache") / "dit-run" / sum.hex().substr(0, 32);
    std::error_code failure;
    std::filesystem::create_directories(path, failure);
    std::filesystem::permissions(path, std::filesystem::perms::owner_all, failure);
    return failure ? Path() : path;
}

// What the graph runs on here; in low memory the conditioner takes what loads in the least, if the choice is ours: a
// device is one of its backend.
const Backend& Pipeline::backend(const std::string& name) const {
    Graph graph = manifest.graphs.at(name);
    if (options_.low_memory && options_.backend.empty() && options_.device.empty() && name == "conditioner")
        for (const Backend& known : backends())
            if (known.name == LEANEST) graph.backend = LEANEST;
    return choose(graph, options_);
}

// The graph's engine, opened where it is not; with low memory, the others are closed first.
Engine& Pipeline::engine(const std::string& name) {
    const auto found = engines_.find(name);
    if (found != engines_.end()) return *found->second;
    if (options_.low_memory) engines_.clear();
    const Graph& graph = manifest.graphs.at(name);
    const Backend& backend = this->backend(name);
    std::vector<Path> paths;
    for (const auto& file : graph.files(backend.name)) paths.push_back(inside(folder, file));
    Options options = options_;
    if (name == "denoiser") options.guided_channels = static_cast<std::size_t>(manifest.guided_channels);
    std::unique_ptr<Engine> opened = backend.open(paths, graph, options);
    const auto inputs = names(graph.inputs), outputs = names(graph.outputs);
    if (sorted(opened->inputs) != sorted(inputs) || sorted(opened->outputs) != sorted(outputs))
        throw BundleError(text(folder.string(), ": ", name, " has inputs ", join(opened->inputs), " and outputs ",
                               join(opened->outputs), ", expected ", join(inputs), " and ", join(outputs)));
    return *(engines_[name] = std::move(opened));
}

std::vector<std::uint8_t> Pipeline::images(const Request& request) {
    require_decoder();
    const Array x = run(request);
    const std::vector<float> pictures = decode({x.begin(), x.end()});
    return to_uint8(pictures, with_batch(x.size() / count(manifest.latent_shape), image_shape()));
}

std::vector<float> Pipeline::latents(const Request& request) {
    const Array x = run(request);
    return {x.begin(), x.end()};
}

Array Pipeline::run(const Request& request) {
    std::optional<Captions> captions;
    if (request.captions) captions = fitting(*request.captions, "captions");
    const std::vector<std::int64_t> ids =
        captions ? std::vector<std::int64_t>(captions->count, manifest.null_label()) : request.labels;
    if (!captions) check_labels(request);
    const std::size_t batch = ids.size(), size = batch * count(manifest.latent_shape);
    const std::vector<float> weights = guidance(request.guidance, batch);
    const std::string& solver = request.solver.empty() ? manifest.diffusion.sampler.solver : request.solver;
    const Array timesteps = plan(manifest.diffusion, solver, request.steps, request.spacing);
    const Draw draw = dit_runtime::draw(request.seeds, batch);
    if (request.latents && (request.latents->size() != size || !all_finite(*request.latents)))
        throw UsageError(text("latents have ", request.latents->size(), " numbers; expected ", size, ", all finite"));
    const std::vector<float> x = request.latents ? *request.latents : draw(size);

    const bool guided = is_guided(weights);
    Contexts contexts = captions ? this->contexts(*captions, request.negative, guided) : examples(ids, guided);
    Table table = this->table(timesteps, ids, guided);
    const int steps = static_cast<int>(timesteps.size());
    int step = 0;
    const auto report = [&](const Array& state) {
        if (request.on_step && request.on_step(step, steps, state))
            throw Stopped(text("stopped after step ", step, " of ", steps));
    };
    const Denoise denoise = [&](const Array& state, double t) {
        if (step) report(state);
        const auto rows = [&](std::size_t first, std::size_t last) {
            return table(static_cast<std::size_t>(step), first, last);
        };
        Prediction found = this->denoise({state.begin(), state.end()}, rows, weights, contexts);
        ++step;
        if (!all_finite(found.prediction))
            throw EngineError(text("step ", step, " (t = ", t, "): the denoiser's prediction holds values not finite"));
        return found;
    };
    Array last = solve(manifest.diffusion, solver, request.steps, {x.begin(), x.end()}, draw, denoise, request.eta,
                       request.spacing);
    report(last);
    return last;
}

Table Pipeline::table(const Array& timesteps, const std::vector<std::int64_t>& ids, bool guided) {
    const auto null_label = guided ? std::optional<std::int64_t>(manifest.null_label()) : std::nullopt;
    const auto conditioner = [this](const std::vector<float>& times, const std::vector<std::int64_t>& labels) {
        return condition(times, labels);
    };
    return Table(conditioner, timesteps, ids, null_label, count(manifest.conditioning_shape()),
                 static_cast<std::size_t>(manifest.graphs.at("conditioner").max_batch));
}

std::vector<float> Pipeline::condition(const std::vector<float>& timesteps, const std::vector<std::int64_t>& labels) {
    const std::size_t size = static_cast<std::size_t>(manifest.graphs.at("conditioner").max_batch);
    std::vector<float> found;
    for (std::size_t first = 0; first < labels.size(); first += size) {
        const std::size_t batch = std::min(size, labels.size() - first);
        const Shape rows = {static_cast<std::int64_t>(batch)};
        std::vector<Input> inputs = {{"timesteps", rows, timesteps.data() + first}};
        if (manifest.caption_shape().empty()) inputs.push_back({"labels", rows, labels.data() + first, true});
        const auto part =
            run_engine("conditioner", inputs, {{"conditioning", with_batch(batch, manifest.conditioning_shape())}});
        append(found, part.at("conditioning"));
    }
    return found;
}

Context Pipeline::context(const Captions& captions) {
    const Shape one = manifest.caption_shape(), row = {one[0]};
    const std::size_t size = static_cast<std::size_t>(manifest.graphs.at("context").max_batch);
    Context found{captions.count, {}, {}};
    for (std::size_t first = 0; first < captions.count; first += size) {
        const std::size_t batch = std::min(size, captions.count - first);
        const auto part = run_engine(
            "context",
            {{"captions", with_batch(batch, one), captions.embeddings.data() + first * count(one)},
             {"mask", with_batch(batch, row), captions.mask.data() + first * count(row)}},
            {{"context", with_batch(batch, manifest.context_shape())}, {"context_mask", with_batch(batch, row)}});
        append(found.vectors, part.at("context"));
        append(found.mask, part.at("context_mask"));
    }
    return found;
}

Contexts Pipeline::examples(const std::vector<std::int64_t>& numbers, bool guided) {
    const Shape shape = manifest.caption_shape();
    if (shape.empty()) return Contexts();
    const auto read = [&](const std::vector<std::int64_t>& some) {
        return context(dit_runtime::examples(some, shape));
    };
    return Contexts(read(numbers), guided ? read({manifest.null_label()}) : Context());
}

Prediction Pipeline::denoise(const std::vector<float>& latents, const Rows& conditioning,
                             const std::vector<float>& guidance, Contexts& contexts) {
    const std::size_t samples = guidance.size(), one = count(manifest.latent_shape);
    const std::size_t size = static_cast<std::size_t>(manifest.graphs.at("denoiser").max_batch);
    const bool varies = contains(names(manifest.graphs.at("denoiser").outputs), "variance");
    Prediction whole;
    for (std::size_t first = 0; first < samples; first += size) {
        const std::size_t last = std::min(first + size, samples), batch = last - first;
        const std::vector<float> rows = conditioning(first, last);
        const std::size_t groups = rows.size() / (batch * count(manifest.conditioning_shape()));
        const auto grouped = [&](const Shape& each) { return with_batch(groups, with_batch(batch, each)); };
        const Shape shape = with_batch(batch, manifest.latent_shape);
        std::vector<Input> inputs = {{"latents", shape, latents.data() + first * one},
                                     {"conditioning", grouped(manifest.conditioning_shape()), rows.data()},
                                     {"guidance", {static_cast<std::int64_t>(batch)}, guidance.data() + first}};
        const Context& context = contexts(first, last);
        if (context.count) {
            inputs.push_back({"context", grouped(manifest.context_shape()), context.vectors.data()});
            inputs.push_back({"context_mask", grouped({manifest.caption_shape()[0]}), context.mask.data()});
        }
        std::map<std::string, Shape> expected = {{"prediction", shape}};
        if (varies) expected["variance"] = shape;
        auto part = run_engine("denoiser", inputs, expected);
        append(whole.prediction, part["prediction"]);
        append(whole.variance, part["variance"]);
    }
    return whole;
}

std::vector<float> Pipeline::decode(const std::vector<float>& latents) {
    require_decoder();
    const std::size_t one = count(manifest.latent_shape), samples = latents.size() / one;
    const std::size_t size = static_cast<std::size_t>(manifest.graphs.at("decoder").max_batch);
    std::vector<float> pictures;
    for (std::size_t first = 0; first < samples; first += size) {
        const std::size_t batch = std::min(size, samples - first);
        const Shape shape = with_batch(batch, manifest.latent_shape);
        const std::vector<float> part = run_engine("decoder", {{"latents", shape, latents.data() + first * one}},
                                                   {{"images", with_batch(batch, image_shape())}})
                                            .at("images");
        append(pictures, part);
    }
    if (!all_finite(pictures)) throw EngineError("the decoder's pictures hold values that are not finite");
    return pictures;
}

// Outputs of an engine, of the shapes that are expected; no other shape is ever read.
std::map<std::string, std::vector<float>> Pipeline::run_engine(const std::string& name,
                                                               const std::vector<Input>& inputs,
                                                               const std::map<std::string, Shape>& expected) {
    Engine& opened = engine(name);
    const auto start = std::chrono::steady_clock::now();
    std::map<std::string, Output> outputs;
    try {
        outputs = opened.run(inputs);
    } catch (const EngineError& error) {
        throw EngineError(text("the ", name, " failed: ", error.what()));
    }
    engine_seconds += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    std::map<std::string, std::vector<float>> taken;
    for (const auto& [key, shape] : expected) {
        const auto found = outputs.find(key);
        if (found == outputs.end()) throw BundleError(text(folder.string(), ": ", name, " has no output ", key));
        if (found->second.shape != shape)
            throw EngineError(
                text("the ", name, "'s ", key, " has shape ", shown(found->second.shape), ", expected ", shown(shape)));
        taken[key] = std::move(found->second.values);
    }
    return taken;
}

Contexts Pipeline::contexts(const Captions& captions, const std::optional<Given>& negative, bool guided) {
    if (!guided) return Contexts(context(captions));
    if (!negative) throw UsageError("guidance needs negative captions, the embedding of an empty text; or guidance 1");
    if (negative->count != 1 && negative->count != captions.count)
        throw UsageError(
            text(negative->count, " negative captions; expected one, or one for each of ", captions.count));
    const Captions null = fitting(*negative, "negative captions");
    return Contexts(context(captions), context(null));
}

void Pipeline::require_decoder() const {
    if (!manifest.graphs.count("decoder"))
        throw UsageError("this bundle has no decoder; ask for latents (dit-generate: -o FILE.npy)");
}

Shape Pipeline::image_shape() const { return manifest.graphs.count("decoder") ? manifest.image_shape() : Shape(); }

}  // namespace dit_runtime
