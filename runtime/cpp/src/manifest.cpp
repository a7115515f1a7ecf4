#include "manifest.hpp"

#include <algorithm>

#include "bundle_file.hpp"
#include "facts.hpp"
#include "parsing.hpp"
#include "sha256.hpp"
#include "signature.hpp"

namespace dit_runtime {

Shape TensorSpec::row() const {
    Shape sizes;
    for (const auto& size : shape)
        if (std::holds_alternative<std::int64_t>(size)) sizes.push_back(std::get<std::int64_t>(size));
    return sizes;
}

bool TensorSpec::starts(const std::string& free) const {
    return !shape.empty() && std::holds_alternative<std::string>(shape[0]) && std::get<std::string>(shape[0]) == free;
}

bool Stage::before_loop() const { return contains(BEFORE_LOOP, runs); }

const TensorSpec* find(const std::vector<TensorSpec>& specs, const std::string& name) {
    for (const TensorSpec& spec : specs)
        if (spec.name == name) return &spec;
    return nullptr;
}

namespace {

const Port& of_role(const std::vector<Port>& ports, const std::string& role) {
    return *std::find_if(ports.begin(), ports.end(), [&](const Port& port) { return port.role == role; });
}

const Stage* that_runs(const std::vector<Stage>& stages, const std::string& runs) {
    for (const Stage& stage : stages)
        if (stage.runs == runs) return &stage;
    return nullptr;
}

}  // namespace

std::string size_name(const std::string& size) {
    const std::size_t cross = size.find('x');
    const bool square = cross != std::string::npos && size.substr(0, cross) == size.substr(cross + 1);
    return square ? size.substr(0, cross) : size;
}

Manifest Manifest::at(const std::string& name) const {
    const std::string wanted = size_name(name);
    if (wanted.empty() || wanted == size) return *this;
    std::vector<std::string> names;
    if (!size.empty()) names.push_back(size);
    for (const Manifest& other : sizes) {
        names.push_back(other.size);
        if (other.size != wanted) continue;
        Manifest sized = other, own = *this;
        own.sizes.clear();
        for (const Manifest& entry : sizes) sized.sizes.push_back(&entry == &other ? own : entry);
        return sized;
    }
    throw UsageError(
        text("size ", wanted, " is not in this bundle; it has ", names.empty() ? "one size" : join(names)));
}

std::string Manifest::own(const std::string& file) const {
    const std::size_t dot = std::min(file.find('.'), file.size());
    return file.substr(0, dot) + suffix + file.substr(dot);
}

const Port& Manifest::state() const { return of_role(ports, "state"); }

const Port& Manifest::time() const { return of_role(ports, "time"); }

std::vector<Port> Manifest::conditions() const {
    std::vector<Port> chosen;
    std::copy_if(ports.begin(), ports.end(), std::back_inserter(chosen),
                 [](const Port& port) { return port.role == "condition"; });
    return chosen;
}

const Port* Manifest::port(const std::string& name) const {
    for (const Port& port : ports)
        if (port.name == name) return &port;
    return nullptr;
}

std::int64_t Manifest::classes() const {
    const Port* const port = this->port(LABELS);
    if (!port || port->role != "condition" || port->dtype != "int64" || !port->shape.empty()) return 0;
    return port->size - static_cast<std::int64_t>(null.count(LABELS));
}

std::vector<std::string> Manifest::without_null() const {
    std::vector<std::string> names;
    for (const Port& port : conditions())
        if (guidance.port.empty() && port.masks.empty() && !null.count(port.name)) names.push_back(port.name);
    return names;
}

const Preset& Manifest::preset(const std::string& name) const {
    const auto entry = presets.find(name);
    if (entry != presets.end()) return entry->second;
    std::vector<std::string> known;
    for (const auto& other : presets) known.push_back(other.first);
    throw UsageError(text("preset '", name, "' is not known", nearest(name, known), "; ",
                          known.empty() ? "this bundle has none (dit-export tune)" : "known: " + join(known)));
}

bool Manifest::mixes_guidance() const { return find(step().reads, GUIDANCE) != nullptr; }

const Stage* Manifest::prompt() const { return that_runs(stages, PROMPT); }

const Stage& Manifest::step() const { return *that_runs(stages, "step"); }

const Stage* Manifest::end() const { return that_runs(stages, "end"); }

const Stage* Manifest::start() const { return that_runs(stages, START); }

const Port* Manifest::picture() const {
    const auto port = std::find_if(ports.begin(), ports.end(), [](const Port& own) { return own.picture; });
    return port == ports.end() ? nullptr : &*port;
}

Shape Manifest::picture_shape() const {
    if (!start()) throw UsageError("this bundle takes no pictures, for it has no encoder; build it with --encoder");
    return start()->reads.at(0).row();
}

Shape Manifest::image_shape() const { return end() ? end()->gives.at(0).row() : Shape(); }

std::int64_t Manifest::frames() const {
    const Shape shape = image_shape();
    return shape.size() == 4 ? shape[1] : 0;
}

Manifest parse(const std::string& content, const std::string& where) {
    json::Json table;
    try {
        table = json::Json::parse(content);
    } catch (const json::Json::exception& error) {
        throw BundleError(where + ": not JSON: " + error.what());
    }
    if (!table.is_object() || !table.contains("format") || !table["format"].is_number_integer())
        throw BundleError(text(where, ": no format number; expected ", FORMAT));
    if (table["format"] != FORMAT) {
        const bool newer = table["format"].is_number_unsigned() && table["format"].get<std::uint64_t>() > FORMAT;
        throw BundleError(text(where, ": format ", table["format"].dump(), ", expected ", FORMAT, ": ",
                               newer ? "upgrade dit-export" : "rebuild it with `dit-export build`"));
    }
    try {
        return parse_table(table);
    } catch (const std::invalid_argument& error) {
        throw BundleError(where + ": " + error.what());
    }
}

namespace {

// Refuses a manifest's content that has another sum than the caller wants.
void require_sum(const std::string& content, const std::string& sha256, const Path& path) {
    if (sha256.empty()) return;
    if (sha256.size() != 64 || sha256.find_first_not_of("0123456789abcdefABCDEF") != std::string::npos)
        throw UsageError(text("manifest_sha256 has ", sha256.size(), " characters; expected 64 hexadecimal digits"));
    Sha256 sum;
    sum.update(reinterpret_cast<const unsigned char*>(content.data()), content.size());
    if (const std::string here = sum.hex(); here != lower(sha256))
        throw BundleError(text(path.string(), ": its sha256 is ", here, ", expected ", lower(sha256),
                               "; this is another bundle than the one that was asked for"));
}

}  // namespace

Manifest read(const Path& folder, const std::string& sha256,
              const std::optional<std::vector<unsigned char>>& public_key) {
    const Path path = folder / MANIFEST;
    std::error_code failure;
    if (!std::filesystem::is_regular_file(path, failure) || std::filesystem::is_symlink(path, failure))
        throw BundleError(
            text(folder.string(), ": no ", MANIFEST, " here; expected a bundle, as `dit-export build` writes it"));
    const auto bytes = BundleFile(folder, MANIFEST).read(static_cast<std::uintmax_t>(limit("manifest_bytes")));
    const std::string content(bytes.begin(), bytes.end());
    require_sum(content, sha256, path);
    if (public_key) require_signed(folder, content, *public_key);
    Manifest manifest = parse(content, path.string());
    for (const auto& [name, file] : manifest.files) {
        const Path location = inside(folder, name);
        if (!std::filesystem::is_regular_file(location, failure))
            throw BundleError(text(folder.string(), ": ", name, " is missing; rebuild the bundle"));
        const std::uintmax_t size = std::filesystem::file_size(location, failure);
        if (failure || size != file.size)
            throw BundleError(
                text(folder.string(), ": ", name, " has ", size, " bytes, expected ", file.size, "; rebuild it"));
    }
    return manifest;
}

std::vector<std::string> parts_inside(const Path& folder, const std::string& name) {
    std::vector<std::string> parts;
    bool leaves = name.empty() || name[0] == '/' || name.find_first_of(std::string("\\:\0", 3)) != std::string::npos;
    for (const Path& part : Path(name))
        if (!part.empty() && part != ".") parts.push_back(part.string());
    if (leaves || parts.empty() || contains(parts, ".."))
        throw BundleError(text(folder.string(), ": file name '", name, "' leaves the bundle; refused"));
    return parts;
}

Path inside(const Path& folder, const std::string& name) {
    Path path = folder;
    for (const auto& part : parts_inside(folder, name)) {
        path /= part;
        std::error_code failure;
        if (std::filesystem::is_symlink(path, failure))
            throw BundleError(text(folder.string(), ": '", name, "' is a link; refused"));
    }
    return path;
}

std::size_t count(const Shape& shape) {
    std::size_t product = 1;
    for (const auto size : shape) product *= static_cast<std::size_t>(size);
    return product;
}

Shape with_rows(std::size_t rows, const Shape& row) {
    Shape shape = {static_cast<std::int64_t>(rows)};
    shape.insert(shape.end(), row.begin(), row.end());
    return shape;
}

std::string shown(const Shape& shape) {
    std::vector<std::string> sizes;
    for (const auto size : shape) sizes.push_back(std::to_string(size));
    return "[" + join(sizes) + "]";
}

}  // namespace dit_runtime
