// A graph in OpenVINO: read, and compiled on a device.
#pragma once

#include <memory>
#include <openvino/openvino.hpp>
#include <string>
#include <vector>

#include "engine.hpp"
#include "errors.hpp"

namespace dit_runtime {

// OpenVINO's messages begin with its own source lines; the last line says what happened.
std::string ov_reason(std::string message);

// What OpenVINO computes on.
class OvDevice {
  public:
    explicit OvDevice(const Options& options);

    // The type that floats are computed in: where a CPU has no bf16, to emulate it takes five times as long as fp32.
    std::string float_type(const std::string& precision) const;

    const std::shared_ptr<ov::Core> core;
    std::string name = "CPU";

  private:
    std::vector<std::string> capabilities_;
};

// A graph's file, and the settings that it is compiled with.
class OvGraph {
  public:
    OvGraph(const Path& path, const Stage& stage, const Options& options);

    std::shared_ptr<ov::Model> read() const;

    // A request for each stream.
    std::vector<ov::InferRequest> compile(const std::shared_ptr<ov::Model>& model, const std::string& type,
                                          std::size_t streams = 1) const;

    BundleError not_compiled(const std::exception& error) const;

    const OvDevice device;
    const std::string type;  // that floats are computed in

  private:
    const Path path_;
    ov::AnyMap settings_;
};

}  // namespace dit_runtime
