// The body of a request for images, checked before anything is drawn, and the errors that a client gets to read.
// Mirrors dit_serve/body.py and faults.py.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "http.hpp"
#include "request.hpp"

namespace server {

// An error that the client gets to read; it repeats nothing of the request but names that are known here.
struct Fault {
    int status;
    std::string message;
    std::string param = {};
    std::vector<std::pair<std::string, std::string>> headers = {};

    std::string body() const;  // in the form that OpenAI's clients read
    http::Response response() const { return {status, body(), "application/json", headers}; }
};

std::pair<std::string, std::string> retry_after(double seconds);

struct Limits {
    std::int64_t images = 8, steps = 250;
    std::int64_t pixels = 1 << 24;  // of all images of a request
    std::size_t body = 64 << 10;    // bytes
    std::size_t form = 12 << 20;    // bytes of a body with pictures
};

// Names and meanings are those of OpenAI's API, and of the extensions that image servers have in common.
struct Body {
    std::string prompt;
    std::optional<std::string> model, size, solver, preset;
    std::int64_t n = 1;
    std::optional<std::uint64_t> seed;
    std::optional<std::int64_t> num_inference_steps;
    std::optional<double> guidance_scale;
    std::string response_format = "b64_json";
    std::optional<double> strength;                    // of an edit
    std::map<std::string, std::string> files;          // of an edit: image, mask
    std::optional<dit_runtime::Pictures> image, mask;  // what they hold

    std::vector<std::uint64_t> seeds() const;  // each image's: they follow one another
};

// A body's fields; throws Fault(400) where one is unknown, missing, or not of its type and range.
Body parse(const std::string& content, const Limits& limits);
// The same of a form whose Content-Type is `type`, where numbers are text.
Body parse_edit(const std::string& type, const std::string& content, const Limits& limits);

}  // namespace server
