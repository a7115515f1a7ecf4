// dit-server: serves bundles over HTTP with OpenAI's images API. Mirrors dit_serve/cli.py and process.py.
#include <cmath>
#include <cstdlib>
#include <fstream>
#include <functional>
#include <iostream>
#include <map>
#include <sstream>

#include "../console.hpp"
#include "../public_key.hpp"
#include "dit/dit.h"
#include "errors.hpp"
#include "service.hpp"

namespace {

namespace dit = dit_runtime;

const char* const USAGE =
    R"(usage: dit-server [NAME=]BUNDLE … [OPTION …]

Serve bundles over HTTP with OpenAI's images API, as `dit-serve` does.

arguments:
  [NAME=]BUNDLE             folders of bundles, or links to them, read again at SIGHUP; the first
                            is the default of requests without a model

network:
  --host ADDRESS            where to listen; default: 127.0.0.1; any other needs --api-key-file
  --port N                  0: any that is free; default: 8000
  --api-key-file FILE       clients must send this key as a bearer token

requests:
  --deadline SECONDS        longest time for a request; one that cannot finish in time gets 429;
                            default: 60
  --job-deadline SECONDS    longest time for a job; default: 600
  --grace SECONDS           time to finish open requests after SIGTERM; default: 30
  --max-images N            images of a request; default: 8
  --max-steps N             steps of a request; default: 250
  --max-pixels N            pixels of a request's images in all; default: 16777216

what is served:
  --pin SHA256 …            serve only bundles whose manifest.json has one of these sha256
  --public-key FILE         open a bundle only if the owner of this Ed25519 key has signed it
  --skip-verify             start without a replay of the reference; a swap always replays it

engine:
  --backend NAME            auto, tensorrt, tensorrt-rtx, openvino, onnxruntime; default: the
                            bundle's
  --provider, --device NAME
                            device of ONNX Runtime: cpu, cuda, cuda:N; of OpenVINO: CPU, GPU; of
                            TensorRT: cuda:N
  --threads N               threads of an engine; default: the engine's choice
  --batch N                 largest number of images in a call; default: measured at the start
  --allow-batch-variance    let --batch exceed 1 where an image depends on the others in its call

general:
  -h, --help                print this page
  --version                 print the version of the package
  --quiet                   log warnings and errors alone
  --json                    print an error as a JSON object on standard output, too

examples:
  dit-server BUNDLE
  dit-server fast=BUNDLE exact=OTHER-BUNDLE --port 8080
  dit-server BUNDLE --host 0.0.0.0 --api-key-file KEY --deadline 20
)";

std::string version() { return dit::text(DIT_VERSION_MAJOR, ".", DIT_VERSION_MINOR, ".", DIT_VERSION_PATCH); }

struct Arguments {
    std::vector<std::pair<std::string, std::string>> bundles;  // by name
    std::string host = "127.0.0.1";
    int port = 8000;
    server::Opening opening;
    server::Settings settings;
};

double number(const std::string& flag, const std::string& word, double least, double most) {
    char* end = nullptr;
    const double value = std::strtod(word.c_str(), &end);
    if (word.empty() || *end || !(value >= least && value <= most))
        throw dit::UsageError(dit::text(flag, " is ", word, "; expected a number from ", least, " to ", most));
    return value;
}

bool is_name(const std::string& word) {
    const std::string letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789";
    return !word.empty() && letters.find(word[0]) != std::string::npos &&
           word.find_first_not_of(letters + "._-") == std::string::npos;
}

std::string read_key(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    std::stringstream content;
    if (!file || !(content << file.rdbuf())) throw dit::UsageError(path + ": cannot be read");
    const std::string key = dit::strip(content.str());
    for (const char letter : key)
        if (letter <= ' ' || letter > '~') throw dit::UsageError(path + ": expected one key without spaces");
    if (key.size() < 16) throw dit::UsageError(path + ": expected one key of at least 16 characters");
    return key;
}

Arguments parse(const std::vector<std::string>& words) {
    Arguments arguments;
    server::Limits& limits = arguments.settings.limits;
    const double second = 1e-3, ages = 1e6, many = 1e9;
    using Take = std::function<void(const std::string& flag, const std::string& value)>;
    const auto real = [](double& to, double least, double most) -> Take {
        return [&to, least, most](const std::string& flag, const std::string& value) {
            to = number(flag, value, least, most);
        };
    };
    const auto whole = [](auto& to, double least, double most) -> Take {
        return [&to, least, most](const std::string& flag, const std::string& value) {
            const double taken = number(flag, value, least, most);
            if (taken != std::floor(taken)) throw dit::UsageError(flag + " is " + value + "; expected an integer");
            to = static_cast<std::decay_t<decltype(to)>>(taken);
        };
    };
    const auto word = [](std::string& to) -> Take {
        return [&to](const std::string&, const std::string& value) { to = value; };
    };
    const std::map<std::string, Take> options = {
        {"--host", word(arguments.host)},
        {"--port", whole(arguments.port, 0, 65535)},
        {"--api-key-file",
         [&](const std::string&, const std::string& path) { arguments.settings.key = read_key(path); }},
        {"--public-key",
         [&](const std::string&, const std::string& path) {
             arguments.opening.options.public_key = read_public_key(path);
         }},
        {"--backend", word(arguments.opening.options.backend)},
        {"--device", word(arguments.opening.options.device)},
        {"--provider", word(arguments.opening.options.device)},
        {"--threads", whole(arguments.opening.options.threads, 1, 4096)},
        {"--batch", whole(arguments.opening.places, 1, 4096)},
        {"--deadline", real(arguments.settings.deadline, second, ages)},
        {"--job-deadline", real(arguments.settings.job_deadline, second, ages)},
        {"--grace", real(arguments.settings.grace, second, ages)},
        {"--max-images", whole(limits.images, 1, 1024)},
        {"--max-steps", whole(limits.steps, 1, many)},
        {"--max-pixels", whole(limits.pixels, 1, 1e12)},
    };
    const auto is_sum = [](const std::string& text) {
        return text.size() == 64 && text.find_first_not_of("0123456789abcdef") == std::string::npos;
    };
    for (std::size_t index = 0; index < words.size(); ++index) {
        const std::string& flag = words[index];
        const auto option = options.find(flag);
        if (option != options.end()) {
            if (++index == words.size()) throw dit::UsageError(flag + " lacks its value");
            option->second(flag, words[index]);
        } else if (flag == "--skip-verify") {
            arguments.opening.verify = false;
        } else if (flag == "--allow-batch-variance") {
            arguments.opening.variance = true;
        } else if (flag == "--quiet") {
            server::quiet_log();
        } else if (flag == "--json") {
            continue;  // `report` looks for it
        } else if (flag == "--pin") {
            const std::size_t before = arguments.opening.pins.size();
            while (index + 1 < words.size() && is_sum(words[index + 1]))
                arguments.opening.pins.push_back(words[++index]);
            if (arguments.opening.pins.size() == before)
                throw dit::UsageError("--pin lacks its value; expected 64 hexadecimal digits, in lower case");
        } else if (flag.rfind("-", 0) == 0) {
            throw dit::UsageError("unrecognized argument " + flag + "; see dit-server --help");
        } else {
            const std::size_t sign = flag.find('=');
            const bool named = sign != std::string::npos;
            const std::string folder = named ? flag.substr(sign + 1) : flag;
            const std::string name =
                named ? flag.substr(0, sign) : std::filesystem::weakly_canonical(folder).filename().string();
            for (const auto& other : arguments.bundles)
                if (other.first == name) throw dit::UsageError("bundle '" + name + "' is there twice");
            if (!is_name(name))
                throw dit::UsageError("bundle '" + flag + "': expected NAME=BUNDLE, of letters, digits, and . _ -");
            arguments.bundles.emplace_back(name, folder);
        }
    }
    if (arguments.bundles.empty()) throw dit::UsageError("no bundle; see dit-server --help");
    arguments.settings.hosts = {"localhost", "127.0.0.1", "[::1]", arguments.host};
    const bool local = dit::contains({"127.0.0.1", "::1", "localhost"}, arguments.host);
    if (!local && arguments.settings.key.empty())
        throw dit::UsageError("--host " + arguments.host + " is open to others: pass --api-key-file FILE too");
    return arguments;
}

void serve(const Arguments& arguments) {
    server::Models models;
    for (const auto& [name, folder] : arguments.bundles) {
        models.push_back(std::make_unique<server::Model>(name, folder, arguments.opening));
        server::log_line("info", dit::text(name, ": ", folder, ", ", models.back()->served->batcher->places(),
                                           " samples share a call"));
    }
    http::Limits limits;
    server::Service service(std::move(models), arguments.settings);
    http::Listener listener(service, arguments.host, arguments.port, limits);
    const std::string host =
        arguments.host.find(':') == std::string::npos ? arguments.host : "[" + arguments.host + "]";
    server::log_line("info", "listening", {{"url", dit::text("http://", host, ":", listener.port(), "/")}});
    service.run(listener);
}

}  // namespace

int main(int count, char** words) try {
    const std::vector<std::string> all(words + 1, words + count);
    if (dit::contains(all, "--help") || dit::contains(all, "-h")) return std::cout << USAGE, 0;
    if (dit::contains(all, "--version")) return std::cout << "dit-server " << version() << '\n', 0;
    serve(parse(all));
    return 0;
} catch (const std::exception& error) {
    return report("dit-server", error, exit_code(error), count, words);
}
