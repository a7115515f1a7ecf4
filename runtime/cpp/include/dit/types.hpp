// What goes into and comes out of dit.hpp's Pipeline.
#ifndef DIT_TYPES_HPP
#define DIT_TYPES_HPP

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "dit/dit.h"

namespace dit {

class Error : public std::runtime_error {
  public:
    Error(dit_status status, const std::string& message) : std::runtime_error(message), status(status) {}
    const dit_status status;
};

// A switch that any thread may throw: calls that were made with it, or a copy, then end with DIT_STOPPED.
class Cancellation {
  public:
    Cancellation() : shared_(dit_cancellation_new(), dit_cancellation_free) {
        if (!shared_) throw Error(DIT_OUT_OF_MEMORY, "out of memory");
    }
    void cancel() { dit_cancel(shared_.get()); }
    dit_cancellation* get() const { return shared_.get(); }

  private:
    std::shared_ptr<dit_cancellation> shared_;
};

// As dit_setting; an empty stage means every stage.
struct Setting {
    std::string stage, key, value;
};

struct OpenOptions {
    std::string backend;  // empty: the bundle's own
    std::string device;   // empty: the CPU
    int threads = 0;      // 0: the engine's own choice
    bool low_memory = false;
    std::vector<std::int64_t> warm = {};  // batch sizes that every stage runs at before the first request
    std::string size = {};                // what requests without a size draw; empty: the bundle's first
    std::string manifest_sha256 = {};     // that manifest.json must have; empty: any
    std::optional<std::vector<std::uint8_t>> public_key = {};  // of 32 bytes, of who must have signed; none: nobody
    std::vector<Setting> settings = {};
    std::function<bool(double done)> on_progress = {};  // as dit_on_progress; true stops the call, and so does a throw
    Cancellation cancellation = {};
    std::uint64_t max_bytes = 0;  // of the files that are opened; 0: any number
};

// A size of the pictures that the bundle draws.
struct Size {
    std::string name;                 // "512", or "512x768" for height x width
    std::vector<std::int64_t> state;  // the shape of what a run changes, channels first
    std::size_t height, width;        // of pictures; 0 without a decoder
    std::size_t frames;               // of a video; 0 where the bundle draws pictures
};

// Rows for a port: floats, or integers.
struct Array {
    std::size_t rows = 0;  // one a picture
    std::vector<float> floats;
    std::vector<std::int64_t> integers;
};

using Condition = std::map<std::string, Array>;  // by port, or by the token ids and masks of Prompt

// An input that conditions the network.
struct Port {
    std::string name;
    dit_dtype dtype;
    std::vector<std::int64_t> shape;  // of a row
    std::int64_t size;                // of integers: values are 0 to size - 1
    std::string masks;                // the port whose tokens this one marks with 1 or 0; empty: none
    bool has_null;                    // whether a negative for it is not needed
};

// What a prompt becomes with one tokenizer: arrays of token ids and their mask, rows of `tokens` integers.
struct Prompt {
    std::string ids, mask;  // names of arrays; no mask is read where that is empty
    std::int64_t tokens;
    std::int64_t size;                               // ids are 0 to size - 1
    std::string tokenizer;                           // a tokenizer.json in the bundle's folder
    std::string prompt_template, negative_template;  // the words stand where these have {}
    bool lowercase;                                  // the words are stripped and lowered before
};

// Prompt embeddings: the ports "captions" and "mask".
struct Captions {
    std::size_t count = 0, tokens = 0;
    std::vector<float> embeddings;  // [count, tokens, numbers a token]
    std::vector<float> mask;        // [count, tokens]: 1 where a caption has a token, else 0; empty: all are tokens
};

struct Images {
    std::vector<std::uint8_t> pixels;  // [count, height, width, 3], of videos [count, frames, height, width, 3]
    std::size_t count = 0, height = 0, width = 0;
    std::size_t frames = 0;  // of a video; 0: pictures
};

struct Request {
    std::vector<std::int64_t> labels;
    std::vector<std::uint64_t> seeds = {0};  // one stream for all, or one a label
    std::vector<float> guidance;             // one, or one a label; empty: the bundle's
    int steps = 0;                           // 0: the bundle's
    std::string solver;                      // empty: the bundle's
    std::string spacing;                     // a name, or the times themselves, "999, 640, 300"; empty: the bundle's
    double eta = 0.0;
    std::vector<float> latents;            // to start from; empty: the seeds' noise
    double guidance_interval[2] = {0, 1};  // steps are guided between these fractions of the time
    std::string guidance_policy;           // "NAME", or "NAME KEY=VALUE …"; empty: the network's own guidance
    std::string cache;                     // of outputs: taylorseer, easycache; empty: none
    int cache_interval = DIT_DEFAULT, max_order = DIT_DEFAULT;
    int disable_cache_before_step = DIT_DEFAULT, disable_cache_after_step = DIT_DEFAULT;  // after: below 0 from the end
    double cache_threshold = -1;                                                          // below 0: its default
    std::string preset;  // of the bundle: values for the fields above that are at their defaults; empty: none
    // Called after each step; true stops the run, and what it throws reaches the caller of generate.
    std::function<bool(int step, int steps, const double* latents, std::size_t size)> on_step;
    Captions captions;               // instead of labels
    Captions negative;               // of an empty text, for guidance: one for all, or one a caption
    Condition condition;             // beside labels or captions or alone
    Condition negative_condition;    // what guidance leads away from: one row for all, or one a picture
    std::string size;                // one of the bundle's, by its name; empty: the pipeline's
    Cancellation cancellation;       // of the request and its copies
    Images image;                    // to start from, or for the port that reads one: one for all, or one a picture
    double strength = DIT_DEFAULT;   // the share of the steps that change the image; DIT_DEFAULT: 0.6
    std::vector<std::uint8_t> mask;  // a byte a place of the image, for all or for each: white is drawn anew

    std::size_t count() const {
        if (captions.count) return captions.count;
        if (!labels.empty()) return labels.size();
        return condition.empty() ? 0 : condition.begin()->second.rows;
    }
};

// What the network evaluates for each picture of a run.
struct Rows {
    std::int64_t done = 0;
    std::int64_t planned = 0;  // -1 where the run's cache decides step by step
};

struct Check {
    std::string name;
    double value;
    double limit;   // infinite for a value that is only reported
    bool at_least;  // the value must reach the limit, else not exceed it
    bool passed;
    std::string where;
};

}  // namespace dit

#endif  // DIT_TYPES_HPP
