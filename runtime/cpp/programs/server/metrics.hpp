// What Prometheus reads at /metrics; docs/serving.md lists the names. Mirrors dit_serve/metrics.py.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "models.hpp"

namespace server {

class Histogram {
  public:
    void observe(double seconds);
    void write(std::string& lines, const std::string& name, const std::string& labels) const;

  private:
    std::vector<std::size_t> counts_;  // by bucket, the last without a bound
    std::size_t count_ = 0;
    double sum_ = 0;
};

using Models = std::vector<std::unique_ptr<Model>>;

class Metrics {
  public:
    // Counts an answer; a model that is not served has no name here, because clients could invent any.
    void answer(const std::string& model, int code, double seconds);
    void image(const std::string& model, const dit::Stats& stats) { queue_[model].observe(stats.queue); }
    std::string scrape(const Models& models) const;

  private:
    std::map<std::pair<std::string, int>, std::size_t> requests_;
    std::map<std::string, Histogram> latency_, queue_;
};

}  // namespace server
