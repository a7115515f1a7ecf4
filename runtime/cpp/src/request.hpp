// Requests, and the checks of a request that need no engine. Mirrors dit_runtime/request.py.
#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "caches.hpp"
#include "call.hpp"
#include "condition.hpp"
#include "solvers.hpp"

namespace dit_runtime {

// Called after each step; true stops the run.
using OnStep = std::function<bool(int step, int steps, const Array& latents)>;

// Bytes of one picture for all samples, or of one each: [N, H, W, 3], or [N, H, W] of a mask.
struct Pictures {
    Shape shape;
    std::vector<std::uint8_t> bytes;
};

struct Request {
    std::vector<std::int64_t> labels;        // class numbers: rows of the port "labels"
    Arrays condition;                        // by port, or by inputs of the prompt stage
    Arrays negative;                         // what guidance leads away from: one row, or one for each picture
    std::size_t count = 0;                   // of pictures, where no condition says it; 0: one for each seed
    std::int64_t steps = 0;                  // 0: the bundle's
    std::vector<float> guidance;             // one, or one a picture; empty: the bundle's
    Interval guidance_interval;              // steps are guided between these fractions of the time; none: all steps
    std::string guidance_policy;             // "NAME KEY=VALUE …"; empty: the network's own guidance
    std::vector<std::uint64_t> seeds = {0};  // one, or one a picture
    std::string solver, spacing;             // empty: the bundle's; a spacing may list the times: "999, 640, 300"
    double eta = 0.0;
    std::string size;         // one of the bundle's: 512, or 512x768 for height x width; empty: the pipeline's
    std::string cache;        // of outputs: taylorseer or easycache
    Settings cache_settings;  // those that are not the defaults
    std::optional<std::vector<float>> latents;  // [N, *state], instead of the seed's
    // A picture to start from, or for the port that reads one; in the bundle's size.
    std::optional<Pictures> image;
    std::optional<double> strength;  // the share of the steps that change the image; none: that of facts.json
    std::optional<Pictures> mask;    // white is drawn anew, black stays as in the image
    OnStep on_step;
    std::shared_ptr<Cancellation> cancellation = {};  // stops the run too; none: that of the call which begins it
};

// A request that a bundle can answer.
struct Checked {
    Rows condition, negative;    // with token ids as they came; negative has no rows without guidance
    std::vector<float> weights;  // of guidance, (N,)
    std::string solver;
    std::int64_t steps;
    Array timesteps;                            // of each evaluation
    std::vector<std::optional<Groups>> groups;  // of each evaluation; none where the prediction is 0
    std::vector<Level> levels;                  // of each evaluation
    std::size_t first = 0;                      // the steps that are left out, where the run starts from a picture
    std::vector<float> image;                   // (N or 1, 3, H, W); empty: none
    std::vector<bool> mask;                     // (N or 1, h, w) of the state: true where it is drawn anew; empty: all
};

// Refuses what this bundle does not take, before any work is done.
Checked check(const Manifest& manifest, const Request& request);

// The request with the values of a preset; a field that it states itself stays.
Request with_preset(const Manifest& manifest, Request request, const std::string& name);

// The class of a name ("golden retriever", one of its synonyms, or "207").
std::int64_t class_number(const Manifest& manifest, const std::string& label);

}  // namespace dit_runtime
