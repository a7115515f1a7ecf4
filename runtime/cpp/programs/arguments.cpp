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
    R"(usage: dit-generate BUNDLE --labels CLASS … [-o FILE] [options]
       dit-generate BUNDLE --condition NAME=FILE.npy … [--negative-condition NAME=FILE.npy …] [-o FILE] [options]
       dit-generate BUNDLE --verify

Draws pictures from a bundle of dit-export.

  --labels CLASS …      names or numbers, one a picture
  --condition NAME=FILE.npy … | FILE.npz
                        arrays by port, rows first, one a picture: prompt embeddings, masks, …; of a bundle with text
                        encoders also token ids, under the names of `dit-run info`; NAME=FILE.txt has integers, a row a line
  --negative-condition NAME=FILE.npy … | FILE.npz
                        for guidance, as above: one row, or one a picture
  --size NAME           one of the bundle's, 512 or 512x768 for height x width; default: its first
  --preset NAME         values for the options below, as `dit-run info` lists them; yours win
  --steps N             default: the bundle's
  --guidance W …        one, or one a picture; default: the bundle's (also: --cfg-scale)
  --guidance-interval LOW HIGH
                        guide the steps between these fractions of the time; others evaluate half the rows. Default: 0 1
  --guidance-policy NAME KEY=VALUE …
                        constant, rescale, zero_star, apg; KEY=VALUE replaces a default
  --seed N …            one for all, or one a picture; 0
  --solver NAME         ddpm, ddim, dpm++1, dpm++, dpm++3, sde-dpm++1, sde-dpm++, unipc1, unipc, unipc3, deis, deis3;
                        of a model that predicts a velocity dpm++1, dpm++, dpm++3, euler, heun, sde, scm, sde-dpm++1,
                        sde-dpm++, unipc1, unipc, unipc3, deis, deis3; default: the bundle's
  --eta X               noise of ddim, 0 to 1
  --spacing NAME        stride, respaced, leading, trailing, linspace, karras, exponential, beta; of a velocity trailing,
                        linspace, discrete, integer, karras, exponential, beta; or the times themselves: 999,640,300;
                        default: the bundle's
  --cache NAME          of outputs: taylorseer, easycache, which decides for all pictures at once; default: none
  --cache-interval N    taylorseer evaluates each step of N
  --max-order N         of taylorseer, 0 to 2
  --disable-cache-before-step STEP, --disable-cache-after-step STEP
                        the cache works between these steps; the second, below 0, counts from the end
  --cache-threshold X   the error that easycache lets grow
  --latents FILE.npy    start from these instead of the seed's
  --image FILE.png …    start from this picture, or give it to the port that reads one; one for all or one a picture, in
                        the bundle's size, of 8 bits a channel
  --strength X          the share of the steps that change the image, above 0 and up to 1; default: 0.6
  --mask FILE.png …     of the image's size: white, or transparent, is drawn anew; black stays as in the image
  -o, --output FILE     .png (a grid), .npz, .npy (latents), or a folder for a .png of each image or frame; sample.png
  --verify              replay PyTorch's reference with the engines here, and draw nothing
  --backend NAME        onnxruntime, openvino, tensorrt, tensorrt-rtx, auto; default: the bundle's
  --provider NAME       device: of ONNX Runtime cpu, cuda, …; of OpenVINO CPU, GPU, …; of both TensorRTs cuda, cuda:1, …
                        (also: --device)
  --threads N           of the engine; default: its own choice
  --low-memory          one engine in memory at a time
  --public-key FILE     open the bundle only if the owner of this Ed25519 key has signed it
  --json                for machines, on standard output
  --version, --help
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
            if (!arguments.bundle.empty()) throw std::invalid_argument("'" + word + "' is too much; see --help");
            arguments.bundle = word;
            continue;
        }
        const std::size_t equals = word.find('=');
        const std::string name = word.substr(0, equals);
        if (!flags.count(name)) throw std::invalid_argument("unknown flag " + name + "; see --help");
        const Flag& flag = flags.at(name);
        Values values;
        if (equals != std::string::npos) values.push_back(word.substr(equals + 1));
        while (at < count && static_cast<int>(values.size()) < flag.most && equals == std::string::npos &&
               !is_flag(words[at]))
            values.push_back(words[at++]);
        if (static_cast<int>(values.size()) < flag.least || static_cast<int>(values.size()) > flag.most)
            throw std::invalid_argument(name + (flag.most ? " needs a value" : " takes no value") + "; see --help");
        flag.take(name, values);
    }
    if (arguments.help || arguments.version) return arguments;
    if (arguments.bundle.empty()) throw std::invalid_argument("no bundle; see --help");
    return arguments;
}
