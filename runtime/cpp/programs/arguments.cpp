#include "arguments.hpp"

#include <cerrno>
#include <cmath>
#include <cstdlib>
#include <functional>
#include <limits>
#include <map>
#include <optional>
#include <stdexcept>

#include "errors.hpp"

const char* const USAGE =
    R"(usage: dit-generate BUNDLE [OPTION …]

Draw pictures from a bundle, as `dit-run sample` does, or verify it.

arguments:
  BUNDLE                    folder with a manifest.json

what to draw:
  --labels CLASS …          a class for each picture, by name or number
  --condition NAME=FILE.npy …
                            an array for each port, with a row for each picture; or FILE.npz, which
                            has all of them. FILE.txt holds integers, a line for each row. Of a bundle
                            with text encoders, ports are token ids: `dit-run info` lists their names
  --negative-condition NAME=FILE.npy …
                            what to lead away from, in the form of --condition: a row for all
                            pictures, or one for each
  --seed N …                a seed for all pictures, or one for each; default: 0

sampling:
  Each of these wins over --preset.

  --size SIZE               one of the bundle's sizes, 512 or 512x768 for height x width; default:
                            its first
  --preset NAME             a plan of the bundle: `dit-run info` lists them
  --steps N                 steps of a run; default: the bundle's
  --solver NAME             of a noise schedule ddpm, ddim, dpm++1, dpm++, dpm++3, sde-dpm++1,
                            sde-dpm++, unipc1, unipc, unipc3, deis, deis3; of a velocity dpm++1,
                            dpm++, dpm++3, euler, heun, sde, scm, sde-dpm++1, sde-dpm++, unipc1,
                            unipc, unipc3, deis, deis3; default: the bundle's
  --eta X                   noise of ddim, 0 to 1; default: 0
  --spacing NAME            spacing of the timesteps: of a noise schedule stride, respaced,
                            leading, trailing, linspace, karras, exponential, beta; of a velocity
                            trailing, linspace, discrete, integer, karras, exponential, beta; or
                            the times themselves: 999,640,300; default: the bundle's
  --guidance, --cfg-scale X …
                            weight of guidance: one for all pictures, or one for each; default: the
                            bundle's
  --guidance-interval LOW HIGH
                            guide the steps between these fractions of the time; others evaluate
                            half the rows; default: 0 1
  --guidance-policy NAME [KEY=VALUE …]
                            constant, rescale, zero_star, apg; KEY=VALUE replaces a default;
                            default: the network's own rule

output cache:
  Predict from earlier steps instead of evaluating the network.

  --cache NAME              taylorseer, easycache (which decides for all pictures at once);
                            default: none
  --cache-interval N        taylorseer evaluates every Nth step
  --max-order N             order of taylorseer's series, 0 to 2
  --disable-cache-before-step N
                            evaluate all steps before this one
  --disable-cache-after-step N
                            evaluate this step and all after it; below 0: counted from the end
  --cache-threshold X       error up to which easycache reuses a prediction

start:
  Start from latents or pictures in the place of the seed's noise.

  --latents FILE.npy        the state to start from
  --image FILE.png …        files of the bundle's size and 8 bits a channel to start from, one for
                            all pictures or one for each; a bundle for super-resolution enlarges them
  --strength X              share of the steps that change --image; default: 0.6
  --mask FILE.png …         redraw --image where this picture is white, or where it is transparent
                            if it has transparent pixels

output:
  -o, --output FILE         .png (a grid), .npz, .npy (latents), or a folder for a .png of each image
                            or frame; default: sample.png
  --verify                  draw nothing; replay PyTorch's reference run with the engines here

engine:
  --backend NAME            auto, tensorrt, tensorrt-rtx, openvino, onnxruntime; default: the
                            bundle's
  --provider, --device NAME
                            device of ONNX Runtime: cpu, cuda, cuda:N; of OpenVINO: CPU, GPU; of
                            TensorRT: cuda:N
  --threads N               threads of an engine; default: the engine's choice
  --low-memory              keep one stage in memory at a time

safety:
  --public-key FILE         open a bundle only if the owner of this Ed25519 key has signed it

general:
  -h, --help                print this page
  --version                 print the version of the package
  --quiet                   print no progress, no notes and no tables of what passed
  --json                    print one JSON object on standard output, for errors too

examples:
  dit-generate BUNDLE --labels 207 360 --seed 42 -o sample.png
  dit-generate BUNDLE --condition captions=cat.npy mask=cat-mask.npy --negative-condition empty.npz --steps 20
  dit-generate BUNDLE --verify --json
)";

namespace {

[[noreturn]] void refuse(const std::string& flag, const std::string& word, const char* expected) {
    throw std::invalid_argument(flag + " is '" + word + "'; expected " + expected);
}

double number(const std::string& flag, const std::string& word) {
    const std::optional<double> value = dit_runtime::number(word);
    if (!value) refuse(flag, word, "a number");
    return *value;
}

float float_number(const std::string& flag, const std::string& word) {
    const double value = number(flag, word);
    if (std::abs(value) > std::numeric_limits<float>::max()) refuse(flag, word, "a number of float32");
    return static_cast<float>(value);
}

int integer(const std::string& flag, const std::string& word) {
    char* end = nullptr;
    const long value = std::strtol(word.c_str(), &end, 10);
    if (word.empty() || *end || std::abs(value) > 1000000000) refuse(flag, word, "an integer");
    return static_cast<int>(value);
}

int small_integer(const std::string& flag, const std::string& word) {
    const int value = integer(flag, word);
    if (value < 1) refuse(flag, word, "an integer of 1 or more");
    return value;
}

// From -2**63 to 2**64 - 1, as Python's seeds.
std::uint64_t seed(const std::string& flag, const std::string& word) {
    char* end = nullptr;
    errno = 0;
    const bool negative = word[0] == '-';
    const std::uint64_t value = negative ? static_cast<std::uint64_t>(std::strtoll(word.c_str(), &end, 10))
                                         : std::strtoull(word.c_str(), &end, 10);
    if (word.empty() || *end || errno) refuse(flag, word, "an integer from -2**63 to 2**64 - 1");
    return value;
}

[[noreturn]] void refuse_words(const std::string& flag, const std::vector<std::string>&) {
    throw std::invalid_argument(flag + ": this program has no tokenizer; pass token ids with " +
                                (flag == "--prompt" ? "--condition" : "--negative-condition"));
}

bool is_flag(const std::string& word) {
    return word.size() > 1 && word[0] == '-' && word.find_first_of("0123456789.") != 1;
}

}  // namespace

Arguments parse_arguments(int count, char** words) {
    Arguments arguments;
    using Values = std::vector<std::string>;
    const auto word_of = [](std::string& place) {
        return [&place](const std::string&, const Values& v) { place = v[0]; };
    };
    const auto on = [](bool& place) { return [&place](const std::string&, const Values&) { place = true; }; };
    struct Flag {
        int least, most;  // words after it
        std::function<void(const std::string&, const Values&)> take;
    };
    const auto integer_of = [](int& place) {
        return [&place](const std::string& flag, const Values& v) { place = integer(flag, v[0]); };
    };
    const int any = 1 << 30;
    dit::Request& request = arguments.request;
    std::map<std::string, Flag> flags = {
        {"--labels", {1, any, [&](const std::string&, const Values& v) { arguments.labels = v; }}},
        {"--guidance",
         {1, any,
          [&](const std::string& flag, const Values& v) {
              arguments.request.guidance.clear();
              for (const auto& word : v) arguments.request.guidance.push_back(float_number(flag, word));
          }}},
        {"--seed",
         {1, any,
          [&](const std::string& flag, const Values& v) {
              arguments.request.seeds.clear();
              for (const auto& word : v) arguments.request.seeds.push_back(seed(flag, word));
          }}},
        {"--guidance-interval",
         {2, 2,
          [&](const std::string& flag, const Values& v) {
              for (const std::size_t bound : {0, 1}) request.guidance_interval[bound] = number(flag, v[bound]);
          }}},
        {"--guidance-policy",
         {1, any,
          [&](const std::string&, const Values& v) {
              request.guidance_policy = v[0];
              for (std::size_t word = 1; word < v.size(); ++word) request.guidance_policy += " " + v[word];
          }}},
        {"--cache", {1, 1, word_of(request.cache)}},
        {"--cache-interval", {1, 1, integer_of(request.cache_interval)}},
        {"--max-order", {1, 1, integer_of(request.max_order)}},
        {"--disable-cache-before-step", {1, 1, integer_of(request.disable_cache_before_step)}},
        {"--disable-cache-after-step", {1, 1, integer_of(request.disable_cache_after_step)}},
        {"--cache-threshold",
         {1, 1, [&](const std::string& flag, const Values& v) { request.cache_threshold = number(flag, v[0]); }}},
        {"--steps",
         {1, 1,
          [&](const std::string& flag, const Values& v) { arguments.request.steps = small_integer(flag, v[0]); }}},
        {"--threads",
         {1, 1, [&](const std::string& flag, const Values& v) { arguments.open.threads = small_integer(flag, v[0]); }}},
        {"--eta",
         {1, 1, [&](const std::string& flag, const Values& v) { arguments.request.eta = number(flag, v[0]); }}},
        {"--preset", {1, 1, word_of(arguments.request.preset)}},
        {"--solver", {1, 1, word_of(arguments.request.solver)}},
        {"--spacing", {1, 1, word_of(arguments.request.spacing)}},
        {"--latents", {1, 1, word_of(arguments.latents)}},
        {"--image", {1, any, [&](const std::string&, const Values& v) { arguments.image = v; }}},
        {"--mask", {1, any, [&](const std::string&, const Values& v) { arguments.mask = v; }}},
        {"--strength",
         {1, 1, [&](const std::string& flag, const Values& v) { request.strength = number(flag, v[0]); }}},
        {"--size", {1, 1, word_of(arguments.open.size)}},
        {"--condition", {1, any, [&](const std::string&, const Values& v) { arguments.condition = v; }}},
        {"--negative-condition", {1, any, [&](const std::string&, const Values& v) { arguments.negative = v; }}},
        {"--prompt", {1, any, refuse_words}},
        {"--negative", {1, any, refuse_words}},
        {"--output", {1, 1, word_of(arguments.output)}},
        {"--backend", {1, 1, word_of(arguments.open.backend)}},
        {"--device", {1, 1, word_of(arguments.open.device)}},
        {"--public-key", {1, 1, [&](const std::string&, const Values& v) { arguments.public_key = v[0]; }}},
        {"--low-memory", {0, 0, on(arguments.open.low_memory)}},
        {"--json", {0, 0, on(arguments.json)}},
        {"--quiet", {0, 0, on(arguments.quiet)}},
        {"--verify", {0, 0, on(arguments.verify)}},
        {"--help", {0, 0, on(arguments.help)}},
        {"--version", {0, 0, on(arguments.version)}},
    };
    flags["--cfg-scale"] = flags["--guidance"];
    flags["--provider"] = flags["--device"];
    flags["-o"] = flags["--output"];
    flags["-h"] = flags["--help"];

    for (int at = 1; at < count;) {
        const std::string word = words[at++];
        if (!is_flag(word)) {
            if (!arguments.bundle.empty())
                throw std::invalid_argument("'" + word + "' is too much; see dit-generate --help");
            arguments.bundle = word;
            continue;
        }
        const std::size_t equals = word.find('=');
        const std::string name = word.substr(0, equals);
        if (!flags.count(name))
            throw std::invalid_argument("unrecognized argument " + name + "; see dit-generate --help");
        const Flag& flag = flags.at(name);
        Values values;
        if (equals != std::string::npos) values.push_back(word.substr(equals + 1));
        while (at < count && static_cast<int>(values.size()) < flag.most && equals == std::string::npos &&
               !is_flag(words[at]))
            values.push_back(words[at++]);
        if (static_cast<int>(values.size()) < flag.least || static_cast<int>(values.size()) > flag.most)
            throw std::invalid_argument(name + (flag.most ? " needs a value" : " takes no value") +
                                        "; see dit-generate --help");
        flag.take(name, values);
    }
    if (arguments.help || arguments.version) return arguments;
    if (arguments.bundle.empty()) throw std::invalid_argument("no bundle; see dit-generate --help");
    return arguments;
}
