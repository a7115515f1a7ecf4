#include "resident.hpp"

#include <numeric>

namespace dit_runtime {

DeviceRows DeviceRows::all(std::shared_ptr<DeviceMemory> memory, const Shape& shape, bool integers) {
    std::vector<std::size_t> index(static_cast<std::size_t>(shape.at(0)));
    std::iota(index.begin(), index.end(), std::size_t{0});
    return {std::move(memory), {shape.begin() + 1, shape.end()}, integers, std::move(index), {shape[0]}};
}

Shape DeviceRows::shape() const {
    Shape shape = lead;
    shape.insert(shape.end(), row.begin(), row.end());
    return shape;
}

DeviceRows DeviceRows::take(const std::vector<std::size_t>& numbers, const Shape& shape) const {
    DeviceRows rows{memory, row, integers, {}, shape};
    for (const std::size_t number : numbers) rows.index.push_back(index.at(number));
    return rows;
}

DeviceRows DeviceRows::slice(std::size_t first, std::size_t last) const {
    std::vector<std::size_t> numbers(last - first);
    std::iota(numbers.begin(), numbers.end(), first);
    return take(numbers, {static_cast<std::int64_t>(last - first)});
}

std::vector<Stretch> DeviceRows::stretches() const {
    const std::size_t bytes = count(row) * (integers ? sizeof(std::int64_t) : sizeof(float));
    std::vector<Stretch> stretches;
    for (std::size_t place = 0; place < index.size(); ++place)
        if (place && index[place] == index[place - 1] + 1)
            stretches.back().bytes += bytes;
        else
            stretches.push_back({place * bytes, index[place] * bytes, bytes});
    return stretches;
}

std::vector<float> DeviceRows::home() const {
    std::vector<float> values(count(shape()));
    memory->download(values.data(), stretches());
    return values;
}

}  // namespace dit_runtime
