#include "body.hpp"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <functional>
#include <nlohmann/json.hpp>
#include <random>

#include "errors.hpp"
#include "form.hpp"

namespace server {
namespace {

using Json = nlohmann::json;

constexpr std::size_t MOST_WORDS = 8000;  // characters of a prompt
constexpr std::uint64_t MOST_SEED = std::uint64_t{1} << 63;

std::size_t characters(const std::string& words) {
    const auto begins = [](char byte) { return (static_cast<unsigned char>(byte) & 0xC0) != 0x80; };
    return static_cast<std::size_t>(std::count_if(words.begin(), words.end(), begins));
}

struct Field {
    const char* name;
    std::string expected;
    std::function<bool(const Json&)> read;  // false where the value does not fit
};

template <typename Number>
std::function<bool(const Json&)> integer(Number& to, std::uint64_t least, std::uint64_t most) {
    return [&to, least, most](const Json& value) {
        if (!value.is_number_unsigned()) return false;  // what is below 0 is signed
        const auto number = value.get<std::uint64_t>();
        to = static_cast<std::int64_t>(number);
        return least <= number && number <= most;
    };
}

template <typename Words>
std::function<bool(const Json&)> words(Words& to) {
    return [&to](const Json& value) {
        if (value.is_string()) to = value.get<std::string>();
        return value.is_string();
    };
}

std::function<bool(const Json&)> one_of(std::string& to, const std::vector<std::string>& known) {
    return [&to, known](const Json& value) {
        if (value.is_string()) to = value.get<std::string>();
        return value.is_string() && dit_runtime::contains(known, to);
    };
}

}  // namespace

std::string Fault::body() const {
    const std::string type = status == 401   ? "authentication_error"
                             : status == 429 ? "rate_limit_error"
                             : status >= 500 ? "server_error"
                                             : "invalid_request_error";
    const Json error = {
        {"message", message}, {"type", type}, {"param", param.empty() ? Json() : Json(param)}, {"code", status}};
    return Json({{"error", error}}).dump(-1, ' ', false, Json::error_handler_t::replace);
}

std::pair<std::string, std::string> retry_after(double seconds) {
    return {"Retry-After", std::to_string(std::max(1L, std::lround(std::ceil(std::min(seconds, 1e6)))))};
}

std::vector<std::uint64_t> Body::seeds() const {
    const std::uint64_t first = seed ? *seed : std::random_device()();
    std::vector<std::uint64_t> seeds;
    for (std::int64_t number = 0; number < n; ++number) seeds.push_back(first + static_cast<std::uint64_t>(number));
    return seeds;
}

namespace {

const std::vector<std::string> FILES = {"image", "mask"};

// The fields of a table, which has `strength` where it is an edit's.
Body check(const Json& table, const Limits& limits, bool is_edit) {
    Body body;
    std::int64_t seed = 0, previews = 0;
    std::string output, user, negative;
    const auto most = [](std::int64_t limit) { return static_cast<std::uint64_t>(limit); };
    const auto prompt = [&](const Json& value) {
        return words(body.prompt)(value) && characters(body.prompt) <= MOST_WORDS;
    };
    const auto guidance = [&](const Json& value) {
        if (value.is_number()) body.guidance_scale = value.get<double>();
        return value.is_number() && *body.guidance_scale >= 0 && *body.guidance_scale <= 100;
    };
    const auto strength = [&](const Json& value) {
        if (value.is_number()) body.strength = value.get<double>();
        return value.is_number() && *body.strength > 0 && *body.strength <= 1;
    };
    std::vector<Field> fields = {
        {"prompt", "a string of at most 8000 characters", prompt},
        {"model", "a string", words(body.model)},
        {"n", dit_runtime::text("an integer from 1 to ", limits.images), integer(body.n, 1, most(limits.images))},
        {"size", "a string", words(body.size)},
        {"seed", dit_runtime::text("an integer from 0 to ", MOST_SEED), integer(seed, 0, MOST_SEED)},
        {"num_inference_steps", dit_runtime::text("an integer from 1 to ", limits.steps),
         integer(body.num_inference_steps, 1, most(limits.steps))},
        {"guidance_scale", "a number from 0 to 100", guidance},
        {"negative_prompt", "left out: libdit has no tokenizer", [](const Json&) { return false; }},
        {"solver", "a string", words(body.solver)},
        {"preset", "a string", words(body.preset)},
        {"response_format", "b64_json or bytes", one_of(body.response_format, {"b64_json", "bytes"})},
        {"output_format", "png: dit-server writes no other", one_of(output, {"png"})},
        {"previews", "0: dit-server draws none", integer(previews, 0, 0)},
        {"user", "a string", words(user)},
    };
    if (is_edit) fields.push_back({"strength", "a number above 0, up to 1", strength});
    std::vector<std::string> known;
    for (const Field& field : fields) known.push_back(field.name);
    for (const auto& [name, value] : table.items())
        if (!value.is_null() && !dit_runtime::contains(known, name))
            throw Fault{400, dit_runtime::text("the body has a field that is not known",
                                               name.size() < 40 ? dit_runtime::nearest(name, known) : "",
                                               "; known: ", dit_runtime::join(known))};
    if (table.value("prompt", Json()).is_null()) throw Fault{400, "prompt is missing", "prompt"};
    for (const Field& field : fields) {
        const auto value = table.find(field.name);
        if (value != table.end() && !value->is_null() && !field.read(*value))
            throw Fault{400, dit_runtime::text(field.name, " must be ", field.expected), field.name};
    }
    if (table.contains("seed") && !table["seed"].is_null()) body.seed = static_cast<std::uint64_t>(seed);
    if (body.response_format == "bytes" && body.n != 1)
        throw Fault{400, "response_format bytes has one image: n must be 1", "n"};
    return body;
}

// What a field of this name has as text; what is no number stays text, for its check.
Json number_of(const std::string& name, const std::string& text) {
    if (dit_runtime::contains({"n", "seed", "num_inference_steps"}, name)) {
        std::uint64_t value = 0;
        const char* const end = text.data() + text.size();
        if (const auto [last, error] = std::from_chars(text.data(), end, value); error == std::errc() && last == end)
            return value;
    } else if (dit_runtime::contains({"guidance_scale", "strength"}, name) &&
               text.find_first_not_of("0123456789.-") == std::string::npos) {
        if (const auto value = dit_runtime::number(text)) return *value;
    }
    return text;
}

}  // namespace

Body parse(const std::string& content, const Limits& limits) {
    const Json table = Json::parse(content, nullptr, false);
    if (table.is_discarded()) throw Fault{400, "the body is not JSON"};
    if (!table.is_object()) throw Fault{400, "the body is not a JSON object"};
    return check(table, limits, false);
}

Body parse_edit(const std::string& type, const std::string& content, const Limits& limits) {
    Json table = Json::object();
    std::map<std::string, std::string> files;
    for (const auto& [name, value] : parse_form(type, content)) {
        const bool is_file = dit_runtime::contains(FILES, name);
        if (table.contains(name) || files.count(name))
            throw Fault{400, name + " stands in the body twice; expected once", is_file ? name : ""};
        if (is_file)
            files[name] = value;
        else
            table[name] = number_of(name, std::string(value));
    }
    if (!files.count("image")) throw Fault{400, "image is missing", "image"};
    if (table.contains("previews")) throw Fault{400, "an edit has no previews", "previews"};
    Body body = check(table, limits, true);
    body.files = std::move(files);
    return body;
}

}  // namespace server
