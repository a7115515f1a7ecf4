// Arrays that stay in the memory of a device, from run to run of the engines there. Mirrors Resident in
// dit_runtime/backends/__init__.py, and Rows in dit_runtime/backends/cuda.py.
#pragma once

#include <cstddef>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "manifest.hpp"

namespace dit_runtime {

struct Input;

// Rows that lie side by side: their place among those that were chosen, and in the memory, in bytes.
struct Stretch {
    std::size_t place, start, bytes;
};

// Memory of a device, given back when nobody has it any more.
class DeviceMemory {
  public:
    virtual ~DeviceMemory() = default;
    // Copies the stretches to the host, and waits for them.
    virtual void download(void* target, const std::vector<Stretch>& stretches) = 0;
    // What all work on it is queued in.
    virtual std::shared_ptr<void> stream() const = 0;
};

// Rows of an array in memory of a device; which, an index says, as NumPy's would.
struct DeviceRows {
    std::shared_ptr<DeviceMemory> memory;
    Shape row;
    bool integers = false;           // int64, else float32
    std::vector<std::size_t> index;  // of rows in the memory
    Shape lead;                      // the shape of the index

    static DeviceRows all(std::shared_ptr<DeviceMemory> memory, const Shape& shape, bool integers);

    Shape shape() const;  // (*lead, *row)
    // The rows of these numbers, as an array of this shape of rows.
    DeviceRows take(const std::vector<std::size_t>& numbers, const Shape& shape) const;
    // The rows from `first` to before `last`.
    DeviceRows slice(std::size_t first, std::size_t last) const;
    std::vector<Stretch> stretches() const;
    // Brings float32 home.
    std::vector<float> home() const;
};

using Into = std::map<std::string, DeviceRows>;  // by output

// An engine whose arrays may stay where it computes.
class Resident {
  public:
    virtual ~Resident() = default;
    // The array there; its values are the caller's again.
    virtual DeviceRows put(const Input& values) = 0;
    // Such an array there without values, for `into`.
    virtual DeviceRows empty(const Shape& shape, bool integers) = 0;
    // Writes outputs into the device arrays in `into`, and does not wait.
    virtual void run_into(const std::vector<Input>& inputs, const Into& into) = 0;
    // What its work is queued in; other engines may share it.
    virtual std::shared_ptr<void> stream() const = 0;
};

// The memory that the step stage reads its inputs from, and the engines that write there.
struct Device {
    std::function<DeviceRows(const Input&)> put;
    std::function<DeviceRows(const Shape&, bool integers)> empty;
    std::function<std::vector<float>(const DeviceRows&)> home;
    std::function<bool(const Stage&)> joins;  // whether a stage's engine can write there
    std::function<void(const Stage&, const std::vector<Input>&, const Into&)> run;
};

}  // namespace dit_runtime
