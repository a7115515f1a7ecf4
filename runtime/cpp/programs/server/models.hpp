// The bundles that are served by name, and how one is swapped for another. Mirrors dit_serve/models.py.
#pragma once

#include <map>
#include <memory>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "batcher.hpp"
#include "body.hpp"

namespace server {

namespace dit = dit_runtime;

// How bundles are opened.
struct Opening {
    dit::Options options;
    std::size_t places = 0;  // 0: as many samples share a call as the measured times say
    bool variance = false;   // whether more than one may share a call where pictures depend on that
    bool verify = true;
    std::vector<std::string> pins;  // sha256 of the manifests that may be served; none: of any
};

// A bundle that is open.
struct Served {
    std::unique_ptr<dit::Pipeline> pipe;
    std::unique_ptr<dit::Batcher> batcher;
    std::string sha256;  // of its manifest, which has the sums of all other files
    std::int64_t opened = 0;

    const dit::Manifest& manifest() const { return pipe->manifest; }
    // The bundle's sizes by what clients call them, WIDTHxHEIGHT; the first is drawn where none is asked for.
    std::vector<std::pair<std::string, const dit::Manifest*>> sizes() const;
};

// Opens, verifies and measures a bundle; throws UsageError or EngineError where it cannot be served.
std::shared_ptr<Served> open_bundle(const dit::Path& folder, const Opening& opening, bool verified = false);

// A name that clients ask for, and the bundle that draws for it now. The server's thread uses it; `look` is for
// another.
class Model {
  public:
    Model(std::string name, dit::Path folder, const Opening& opening)
        : name(std::move(name)), folder(std::move(folder)), opening_(opening) {
        served = open_bundle(this->folder, opening);
    }

    // The bundle that its folder holds now, opened and verified, if that is another one than `served` or that draws no
    // more; else NULL. Throws as open_bundle does.
    std::shared_ptr<Served> look(const Served& current) const;

    // Height and width of the pictures that an edit brings; throws Fault(501) where the bundle takes none.
    std::pair<std::size_t, std::size_t> picture_size(const Body& body) const;
    // A request for each image; throws Fault(400) where the bundle does not take what the body has, or it is too much.
    std::vector<dit::Request> requests(const Body& body, const Limits& limits) const;
    nlohmann::json describe() const;  // as /v1/models lists it

    const std::string name;
    const dit::Path folder;
    std::shared_ptr<Served> served;
    std::size_t swapped = 0, refused = 0;  // swaps
    std::string refusal;                   // why the last swap failed

  private:
    const dit::Manifest& sized(const Body& body) const;  // at the body's size

    const Opening opening_;
};

}  // namespace server
