// From labels or captions to pictures: the bundle's graphs around a solver. Mirrors dit_runtime/pipeline.py.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "captions.hpp"
#include "conditioning.hpp"
#include "engine.hpp"
#include "solvers.hpp"

namespace dit_runtime {

// Called after each evaluation of the network; true stops the run.
using OnStep = std::function<bool(int step, int steps, const Array& latents)>;

struct Request {
    std::vector<std::int64_t> labels;
    std::int64_t steps = 25;
    std::vector<float> guidance = {4.0f};    // one, or one a label
    std::vector<std::uint64_t> seeds = {0};  // one, or one a label
    std::string solver, spacing;             // empty: the bundle's
    double eta = 0.0;
    std::optional<std::vector<float>> latents;  // [N, C, H, W], instead of the seed's
    std::optional<Given> captions;              // instead of labels
    std::optional<Given> negative;              // one for all, or one each; needed with guidance
    OnStep on_step;
};

class Pipeline {
  public:
    // Opens a bundle, after its manifest and the sha256 of each file that is opened have been checked.
    Pipeline(const Path& folder, const Options& options);

    std::vector<std::uint8_t> images(const Request& request);  // [N, H, W, 3]
    std::vector<float> latents(const Request& request);        // [N, C, H, W]

    Table table(const Array& timesteps, const std::vector<std::int64_t>& ids, bool guided);
    // (N,), (N,) -> [N, K, D]; where there are captions, labels change nothing.
    std::vector<float> condition(const std::vector<float>& timesteps, const std::vector<std::int64_t>& labels);
    // (N, L, C), (N, L) -> [N, M, D], [N, L].
    Context context(const Captions& captions);
    // Of example captions; nothing where numbers are those of classes.
    Contexts examples(const std::vector<std::int64_t>& numbers, bool guided);
    // [B, C, H, W], [G, B, K, D], [B] -> guided prediction and, where it is learned, variance; split into what the
    // engine takes at a time.
    Prediction denoise(const std::vector<float>& latents, const Rows& conditioning, const std::vector<float>& guidance,
                       Contexts& contexts);
    // [N, C, H, W] -> [N, 3, 8H, 8W] in [0, 1].
    std::vector<float> decode(const std::vector<float>& latents);

    // The class number of a name ("golden retriever", one of its synonyms, or "207").
    std::int64_t label_id(const std::string& label) const;
    void check_label(std::int64_t label) const;
    void check_labels(const Request& request) const;
    // Whether the null rows are needed: not where they cannot change the result.
    bool is_guided(const std::vector<float>& weights) const;
    void require_decoder() const;
    const Backend& backend(const std::string& name) const;
    Shape image_shape() const;  // (3, H, W); empty without a decoder

    const Path folder;
    const Manifest manifest;
    double engine_seconds = 0;  // spent inside engines so far

  private:
    Array run(const Request& request);
    Path cache() const;
    Engine& engine(const std::string& name);
    std::map<std::string, std::vector<float>> run_engine(const std::string& name, const std::vector<Input>& inputs,
                                                         const std::map<std::string, Shape>& expected);
    Captions fitting(const Given& captions, const std::string& what) const;
    Contexts contexts(const Captions& captions, const std::optional<Given>& negative, bool guided);
    std::vector<float> guidance(const std::vector<float>& given, std::size_t count) const;

    Options options_;
    std::map<std::string, std::unique_ptr<Engine>> engines_;
};

}  // namespace dit_runtime
