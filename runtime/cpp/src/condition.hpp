// Conditions: arrays by the names of their ports, a row for each picture.
// Mirrors dit_runtime/conditions/condition.py.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "engine.hpp"
#include "manifest.hpp"

namespace dit_runtime {

// Rows of one port, or of one tensor that a stage gives.
struct Tensor {
    Shape shape;                                    // (N, ...)
    std::vector<float> floats = {};                 // of float32
    std::vector<std::int64_t> integers = {};        // of int64, else empty
    std::uint64_t version = 0;                      // as an Input's
    std::shared_ptr<const DeviceRows> device = {};  // where the values are, in the place of all above

    std::size_t rows() const { return static_cast<std::size_t>(shape.at(0)); }
    std::size_t row_size() const { return count(shape) / rows(); }
    bool is_integer() const { return !integers.empty(); }
    std::size_t item_size() const { return is_integer() ? sizeof(std::int64_t) : sizeof(float); }
    const unsigned char* data() const;
    Input input(const std::string& name) const {
        if (device) return {name, shape, nullptr, device->integers, version, device.get()};
        return {name, shape, data(), is_integer(), version};
    }
};

using Arrays = std::map<std::string, Tensor>;  // by port

// Arrays of one row each for so many pictures.
struct Rows {
    std::size_t rows = 0;
    Arrays arrays = {};
};

// Every port's rows as the network takes them: a port that is masked is padded with zeros, and a mask that is left out
// is 1 for each token that was passed. `what` begins each message.
Rows fit(const std::vector<Port>& ports, const Arrays& arrays, const std::string& what = "condition");

// The rows that guidance leads away from: the user's negative, else the constants in `null`; one row, or more.
Rows null_condition(const std::vector<Port>& ports, const std::map<std::string, double>& null, const Arrays& negative);

// The rows of the first condition, then of the second.
Rows stack(const Rows& first, const Rows& second);

// The rows from `first` to before `last`.
Rows slice(const Rows& condition, std::size_t first, std::size_t last);

// Each row's number among the distinct ones in these ports, in the order of their appearance.
std::vector<std::size_t> unique_rows(const Rows& condition, const std::vector<std::string>& ports);

}  // namespace dit_runtime
