// Images that are drawn while nobody waits: their progress and results, for a while. Mirrors dit_serve/jobs.py.
#pragma once

#include <list>
#include <memory>
#include <string>

#include "drawing.hpp"

namespace server {

struct Job {
    std::string id, status = "queued";  // then running; succeeded, failed or cancelled at the end
    std::int64_t created = 0;
    std::shared_ptr<Drawing> drawing = {};  // while it is under way
    double ended = 0;                       // by the clock; 0: it is under way
    std::size_t bytes = 0;                  // of its finished images, as text
    Json result = Json::object();           // or the error
    int steps_done = 0, steps = 0;

    Json describe() const;
};

class Jobs {
  public:
    // Finished jobs stay for `kept` seconds; `most` counts them too, and so many bytes their images.
    explicit Jobs(dit::Clock clock = dit::now, double kept = 600, std::size_t most = 256, std::size_t most_bytes = 0);

    // Makes room, and takes a job; throws Fault(429) where all that are here are under way.
    Job& add();
    // Ends a job; forgets those that ended first while all finished images have too many bytes. The last one stays.
    void finish(Job& job, const std::string& status, Json result);
    // Throws Fault(404) where no job has this id.
    Job& get(const std::string& id);
    void forget(const std::string& id);

  private:
    const dit::Clock clock_;
    const double kept_;
    const std::size_t most_, most_bytes_;
    std::list<Job> jobs_;  // the oldest first
};

}  // namespace server
