// The sums of a bundle's files, compared while engines open them. Mirrors `checking` of dit_runtime/bundle/manifest.py.
#pragma once

#include <atomic>
#include <future>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "bundle_file.hpp"
#include "manifest.hpp"

namespace dit_runtime {

// A file that is open, and its state when its sum was right.
struct CheckedFile {
    std::shared_ptr<const BundleFile> file;
    FileState state;
};
using CheckedFiles = std::map<std::string, CheckedFile>;

// Compares sha256 sums, of files at the same time, while the caller opens them. Engines are executable, so theirs are
// compared at once. Graphs name other files, so those must be among `names`. A file that is written or replaced
// meanwhile is refused. `checked` has the states of files whose sums were right before, and gets these.
class Checking {
  public:
    Checking(const Path& folder, const Manifest& manifest, const std::vector<std::string>& names,
             CheckedFiles& checked);
    ~Checking();
    void finish();  // refuses what has another sum

  private:
    void compare(const std::string& name);
    void require_listed(const std::string& graph) const;

    const Path folder_;
    const Manifest& manifest_;
    const std::vector<std::string> names_;
    CheckedFiles& checked_;
    CheckedFiles opened_;
    std::map<std::string, std::future<std::string>> sums_;
    std::atomic<bool> stop_{false};
    std::vector<std::future<void>> workers_;  // waited for when it ends
};

// The content of a file of at most so many bytes, whose sum is the manifest's.
std::vector<unsigned char> read_checked(const Path& folder, const Manifest& manifest, const std::string& name,
                                        std::uintmax_t most);

// Refuses files that were written since: what an engine reads late would be other numbers. A file that was put in
// another's place changes nothing, for the engine has the one that it opened.
void require_unwritten(const Path& folder, const Manifest& manifest, CheckedFiles& checked,
                       const std::vector<std::string>& names);

}  // namespace dit_runtime
