#include "checking.hpp"

#include <algorithm>
#include <system_error>
#include <thread>

#include "call.hpp"
#include "errors.hpp"
#include "external.hpp"
#include "sha256.hpp"

namespace dit_runtime {
namespace {

constexpr std::size_t BLOCK = 1 << 20;  // bytes between two looks at whether the call is cancelled

// A sum to be made.
struct Job {
    std::shared_ptr<const BundleFile> file;
    std::promise<std::string> sum;
};

// Makes sums until none is left; other threads do so too.
void work(std::vector<Job>& jobs, std::atomic<std::size_t>& next, const std::atomic<bool>& stop) {
    for (std::size_t number = next++; number < jobs.size(); number = next++) {
        try {
            jobs[number].sum.set_value(jobs[number].file->sha256(stop));
        } catch (...) {
            jobs[number].sum.set_exception(std::current_exception());
        }
    }
}

void require_sum(const Path& folder, const Manifest& manifest, const std::string& name, const std::string& actual) {
    if (actual != manifest.files.at(name).sha256)
        throw BundleError(
            text(folder.string(), ": ", name, " does not have the sha256 of its manifest; it is damaged: rebuild it"));
}

void require_known(const Path& folder, const Manifest& manifest, const std::string& name) {
    if (!manifest.files.count(name)) throw BundleError(text(folder.string(), ": ", name, " is not in the manifest"));
}

}  // namespace

Checking::Checking(const Path& folder, const Manifest& manifest, const std::vector<std::string>& names,
                   CheckedFiles& checked)
    : folder_(folder), manifest_(manifest), names_(names), checked_(checked) {
    const auto jobs = std::make_shared<std::vector<Job>>();
    for (const auto& name : names) {
        require_known(folder, manifest, name);
        if (opened_.count(name)) continue;
        const auto file = std::make_shared<const BundleFile>(folder, name);
        const FileState state = file->state();
        if (const auto size = manifest.files.at(name).size; file->size() != size)
            throw BundleError(
                text(folder.string(), ": ", name, " has ", file->size(), " bytes, expected ", size, "; rebuild it"));
        opened_[name] = {file, state};
        const auto before = checked.find(name);
        if (before != checked.end() && before->second.state == state) continue;
        jobs->push_back({file, {}});
        sums_[name] = jobs->back().sum.get_future();
    }
    const auto next = std::make_shared<std::atomic<std::size_t>>(0);
    const std::size_t most = std::min<std::size_t>(jobs->size(), std::max(1u, std::thread::hardware_concurrency()));
    try {
        while (workers_.size() < most)
            workers_.push_back(std::async(std::launch::async, [this, jobs, next, call = current_call()] {
                const CallScope scope(call);
                work(*jobs, *next, stop_);
            }));
    } catch (const std::system_error&) {  // no more threads here
        if (workers_.empty()) work(*jobs, *next, stop_);
    }
    try {
        for (const auto& name : names) {
            const std::string ending = Path(name).extension().string();
            if (ending == ENGINE) compare(name);
            if (ending == GRAPH) require_listed(name);
        }
    } catch (const BundleError&) {
        for (const auto& name : names) compare(name);  // a wrong sum is the error
        stop_ = true;
        throw;
    } catch (...) {
        stop_ = true;
        throw;
    }
}

Checking::~Checking() { stop_ = true; }

void Checking::finish() {
    for (const auto& name : names_) compare(name);
    for (const auto& [name, opened] : opened_)
        if (BundleFile(folder_, name).state() != opened.state)
            throw BundleError(text(folder_.string(), ": ", name, " was changed while it was opened; try again"));
    for (const auto& [name, opened] : opened_) checked_[name] = opened;
}

void Checking::compare(const std::string& name) {
    const auto sum = sums_.find(name);
    if (sum == sums_.end()) return;
    const std::string actual = sum->second.get();
    sums_.erase(sum);
    require_sum(folder_, manifest_, name, actual);
}

// Refuses a graph that reads files whose sums are not compared with its own. To an engine, a star can begin an address
// in memory.
void Checking::require_listed(const std::string& graph) const {
    const auto refuse = [&](const std::string& location) {
        throw BundleError(
            text(folder_.string(), ": ", graph, " reads '", location, "', which is no file of its stage; refused"));
    };
    const Mapping content = opened_.at(graph).file->map();
    std::set<std::string> read;
    try {
        read = locations(content.bytes());
    } catch (const std::invalid_argument& error) {
        throw BundleError(text(folder_.string(), ": ", graph, ": not an ONNX graph: ", error.what()));
    }
    for (const std::string& location : read) {
        Path name = Path(graph).parent_path();
        try {
            for (const std::string& part : parts_inside(folder_, location)) name /= part;
        } catch (const BundleError&) {
            refuse(location);
        }
        if (!contains(names_, name.string()) || location.find('*') != std::string::npos) refuse(location);
    }
}

std::vector<unsigned char> read_checked(const Path& folder, const Manifest& manifest, const std::string& name,
                                        std::uintmax_t most) {
    require_known(folder, manifest, name);
    const std::vector<unsigned char> content = BundleFile(folder, name).read(most);
    Sha256 sum;
    for (std::size_t at = 0; at < content.size(); at += BLOCK) {
        check_cancelled();
        sum.update(content.data() + at, std::min(BLOCK, content.size() - at));
    }
    require_sum(folder, manifest, name, sum.hex());
    return content;
}

void require_unwritten(const Path& folder, const Manifest& manifest, CheckedFiles& checked,
                       const std::vector<std::string>& names) {
    static const std::atomic<bool> never{false};
    for (const auto& name : names) {
        const auto entry = checked.find(name);
        if (entry == checked.end()) continue;
        CheckedFile& known = entry->second;
        const FileState state = known.file->state();
        if (state == known.state) continue;
        if (known.file->sha256(never) != manifest.files.at(name).sha256)
            throw BundleError(
                text(folder.string(), ": ", name, " was written while it was open; open the bundle again"));
        known.state = state;
    }
}

}  // namespace dit_runtime
