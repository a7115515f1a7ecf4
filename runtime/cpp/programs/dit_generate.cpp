// dit-generate: pictures from a bundle, as `dit-run sample` draws them.
#include <unistd.h>

#include <algorithm>
#include <cctype>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <iostream>
#include <stdexcept>

#include "arguments.hpp"
#include "console.hpp"
#include "errors.hpp"
#include "files.hpp"
#include "picture_files.hpp"
#include "public_key.hpp"

namespace {

// A bar on a terminal, nothing in a pipe.
class Progress {
  public:
    explicit Progress(bool quiet) : terminal_(!quiet && isatty(STDERR_FILENO) != 0 && !is_dumb()) {}
    bool step(int done, int total) {
        if (!terminal_) return false;
        const auto elapsed = std::chrono::steady_clock::now() - start_;
        const int seconds = static_cast<int>(std::chrono::duration_cast<std::chrono::seconds>(elapsed).count());
        const std::string filled(static_cast<std::size_t>(24 * done / total), '#');
        const std::string open(24 - filled.size(), '.');
        std::fprintf(stderr, "\r\x1b[Ksample [%s%s] %d/%d %d:%02d", filled.c_str(), open.c_str(), done, total,
                     seconds / 60, seconds % 60);
        return false;
    }
    ~Progress() {
        if (terminal_) std::fputs("\r\x1b[K", stderr);
    }

  private:
    static bool is_dumb() {
        const char* const term = std::getenv("TERM");
        return term && std::string(term) == "dumb";
    }
    const bool terminal_;
    const std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

// As `dit-run verify --json` says it: JSON knows no NaN.
std::string json_number(double number) {
    if (std::isnan(number)) return "\"nan\"";
    char digits[32];
    std::snprintf(digits, sizeof digits, std::isfinite(number) ? "%.17g" : "\"%g\"", number);
    return digits;
}

// The word as a shell takes it.
std::string quoted(const std::string& word) {
    const auto plain = [](unsigned char letter) { return std::isalnum(letter) || std::strchr("_@%+=:,./-", letter); };
    if (!word.empty() && std::all_of(word.begin(), word.end(), plain)) return word;
    std::string text = "'";
    for (const char letter : word) text += letter == '\'' ? "'\\''" : std::string(1, letter);
    return text + "'";
}

int verify(dit::Pipeline& pipe, const std::string& bundle, bool json, bool quiet) {
    std::vector<dit::Check> checks;
    const bool passed = pipe.verify([&](const dit::Check& check) {
        checks.push_back(check);
        for (std::string* const words : {&checks.back().name, &checks.back().where})
            *words = dit_runtime::one_line(*words);
    });
    if (json) std::printf("{\"passed\": %s, \"checks\": [", passed ? "true" : "false");
    bool first = true;
    std::size_t width = 0;
    for (const auto& check : checks) width = std::max(width, check.name.size());
    for (const auto& check : checks) {
        const std::size_t colon = check.name.rfind(": ");  // between the stage and the metric
        if (json)
            std::printf(
                "%s\n {\"name\": %s, \"stage\": %s, \"metric\": %s, \"value\": %s, \"limit\": %s, \"at_least\": %s, "
                "\"where\": %s, \"passed\": %s}",
                first ? "" : ",", json_text(check.name).c_str(), json_text(check.name.substr(0, colon)).c_str(),
                json_text(check.name.substr(colon + 2)).c_str(), json_number(check.value).c_str(),
                std::isinf(check.limit) ? "null" : json_number(check.limit).c_str(), check.at_least ? "true" : "false",
                json_text(check.where).c_str(), check.passed ? "true" : "false");
        else if (quiet && check.passed)
            continue;
        else if (std::isinf(check.limit))
            std::printf("%-*s %10.3g  %-11s %-6s  %s\n", static_cast<int>(width), check.name.c_str(), check.value, "",
                        check.passed ? "ok" : "FAILED", check.where.c_str());
        else
            std::printf("%-*s %10.3g  %s %-8.3g %-6s  %s\n", static_cast<int>(width), check.name.c_str(), check.value,
                        check.at_least ? ">=" : "<=", check.limit, check.passed ? "ok" : "FAILED", check.where.c_str());
        first = false;
    }
    const std::string following = "dit-export regress " + quoted(bundle) + " --report report.html";
    if (json)
        std::printf("]%s}\n", passed ? "" : (", \"next\": [" + json_text(following) + "]").c_str());
    else if (!passed)
        std::printf("FAILED: these engines do not draw PyTorch's pictures\nnext: %s\n",
                    dit_runtime::printable(following).c_str());
    else if (!quiet)
        std::puts("verified");
    return passed ? 0 : 1;
}

// What --condition may name: the ports, and the token ids and masks that the text encoders read.
std::vector<dit::Port> inputs(dit::Pipeline& pipe) {
    std::vector<dit::Port> all = pipe.ports();
    for (const dit::Prompt& prompt : pipe.prompts()) {
        all.push_back({prompt.ids, DIT_INT64, {prompt.tokens}, prompt.size, "", false});
        if (!prompt.mask.empty()) all.push_back({prompt.mask, DIT_INT64, {prompt.tokens}, 2, "", false});
    }
    return all;
}

std::string suffix(const std::string& path) {
    const std::string ending = std::filesystem::path(path).extension().string();
    if (!ending.empty() && ending != ".png" && ending != ".npz" && ending != ".npy")
        throw std::invalid_argument("output " + path +
                                    ": expected a name that ends in .png, .npz, .npy, or a folder for PNGs");
    const std::filesystem::path folder = std::filesystem::path(path).parent_path();
    if (!folder.empty() && !std::filesystem::is_directory(folder))
        throw std::invalid_argument("output " + path + ": the folder " + folder.string() + " does not exist");
    return ending;
}

int run(int count, char** words) {
    Arguments arguments = parse_arguments(count, words);
    if (arguments.help) return std::fputs(USAGE, stdout) < 0;
    if (arguments.version) return std::printf("dit-generate %s (%s)\n", dit_version(), dit_backends()) < 0;
    const std::string kind = suffix(arguments.output);
    if (arguments.public_key) arguments.open.public_key = read_public_key(*arguments.public_key);
    dit::Pipeline pipe(arguments.bundle, arguments.open);
    if (*pipe.info().note && !arguments.quiet)
        std::cerr << dit_runtime::one_line("note: " + std::string(pipe.info().note)) << '\n';
    if (arguments.verify) return verify(pipe, arguments.bundle, arguments.json, arguments.quiet);

    dit::Request& request = arguments.request;
    for (const auto& label : arguments.labels) request.labels.push_back(pipe.find_label(label));
    request.condition = read_condition(arguments.condition, "--condition", inputs(pipe));
    request.negative_condition = read_condition(arguments.negative, "--negative-condition", inputs(pipe));
    if (!arguments.image.empty()) {
        const dit::Size size = pipe.size_of(request);
        request.image = read_pictures(arguments.image, size.height, size.width, "the bundle's size");
    }
    const dit::Images& image = request.image;
    if (!arguments.mask.empty()) request.mask = read_masks(arguments.mask, image.height, image.width, "as the image");
    std::vector<std::int64_t> shape(pipe.info().state_shape, pipe.info().state_shape + pipe.info().state_rank);
    if (!arguments.latents.empty()) {
        const std::size_t rows = pipe.ports().empty() ? 0 : pipe.count(request);  // the file says how many, or must fit
        request.latents = read_latents(arguments.latents, rows, shape);
    }
    const std::int64_t samples = static_cast<std::int64_t>(pipe.count(request));
    shape.insert(shape.begin(), samples);
    std::int64_t rows = 0;
    {
        Progress progress(arguments.quiet);
        request.on_step = [&](int step, int steps, const double*, std::size_t) { return progress.step(step, steps); };
        dit::Run run = pipe.run(request);
        if (kind == ".npy") {
            while (run.step()) continue;
            write_npy(arguments.output, run.latents(), shape);
        } else {
            const dit::Images images = run.result();
            (kind == ".png" ? write_png : kind == ".npz" ? write_npz : write_folder)(arguments.output, images);
            shape = {samples, pipe.info().image_shape[0], pipe.info().image_shape[1], 3};
            if (images.frames) shape.insert(shape.begin() + 1, pipe.info().frames);
        }
        rows = run.rows().done;
    }
    if (!arguments.json) return std::puts(arguments.output.c_str()) < 0;
    std::string sizes;
    for (const auto size : shape) sizes += (sizes.empty() ? "" : ", ") + std::to_string(size);
    return std::printf("{\"output\": %s, \"shape\": [%s], \"rows\": %lld}\n", json_text(arguments.output).c_str(),
                       sizes.c_str(), static_cast<long long>(rows)) < 0;
}

int code_of(const std::exception& error) {
    const auto* const of_library = dynamic_cast<const dit::Error*>(&error);
    if (!of_library) return exit_code(error);
    if (of_library->status == DIT_STOPPED || of_library->status == DIT_NOT_VERIFIED) return FAILED;
    return of_library->status == DIT_INTERNAL ? BUG : REFUSED;
}

}  // namespace

int main(int count, char** words) try { return run(count, words); } catch (const std::exception& error) {
    return report("dit-generate", error, code_of(error), count, words);
}
