#include "condition.hpp"

#include <algorithm>
#include <string_view>

#include "errors.hpp"

namespace dit_runtime {
namespace {

// The mask that marks this port's tokens; NULL where there is none.
const Port* mask_of(const std::vector<Port>& ports, const Port& port) {
    for (const Port& mask : ports)
        if (mask.masks == port.name) return &mask;
    return nullptr;
}

// In the port's type: integers fit a port of floats, not the other way round.
Tensor typed(const Port& port, const Tensor& tensor, const std::string& where) {
    const auto in_range = [&](std::int64_t value) { return value >= 0 && value < port.size; };
    if (port.dtype == "int64") {
        if (!tensor.is_integer() || !std::all_of(tensor.integers.begin(), tensor.integers.end(), in_range))
            throw UsageError(text(where, " holds other values than the integers from 0 to ", port.size - 1));
        return tensor;
    }
    if (!all_finite(tensor.floats)) throw UsageError(where + " holds values that are not finite");
    if (!tensor.is_integer()) return tensor;
    return {tensor.shape, std::vector<float>(tensor.integers.begin(), tensor.integers.end())};
}

// (N, *shape) in the port's type; where it may be `shorter`, of up to so many tokens.
Tensor values_of(const Port& port, const Tensor& tensor, const std::string& where, bool shorter) {
    const Shape& shape = tensor.shape;
    Shape row = shape.empty() ? Shape() : Shape(shape.begin() + 1, shape.end());
    const bool fewer = shorter && row.size() == port.shape.size() && row[0] >= 1 && row[0] < port.shape[0];
    if (fewer) row[0] = port.shape[0];
    if (shape.empty() || shape[0] < 1 || row != port.shape) {
        std::vector<std::string> sizes = {"rows"};
        for (const std::int64_t size : port.shape) sizes.push_back(std::to_string(size));
        if (shorter) sizes[1] = "up to " + sizes[1];
        throw UsageError(text(where, " has shape ", shown(shape), "; expected [", join(sizes), "]"));
    }
    return typed(port, tensor, where);
}

// Rows of so many tokens, with zeros behind those that are there.
Tensor padded(const Tensor& tensor, std::int64_t tokens) {
    if (tensor.shape[1] == tokens) return tensor;
    Tensor filled{tensor.shape};
    filled.shape[1] = tokens;
    const std::size_t old = tensor.row_size(), size = count(filled.shape);
    if (tensor.is_integer())
        filled.integers.resize(size);
    else
        filled.floats.resize(size);
    for (std::size_t row = 0; row < tensor.rows(); ++row) {
        const auto from = static_cast<std::ptrdiff_t>(row * old);
        const auto to = static_cast<std::ptrdiff_t>(row * filled.row_size());
        if (tensor.is_integer())
            std::copy_n(tensor.integers.begin() + from, old, filled.integers.begin() + to);
        else
            std::copy_n(tensor.floats.begin() + from, old, filled.floats.begin() + to);
    }
    return filled;
}

// 1 for each of the tokens of `values`, (N, tokens).
Tensor ones(const Port& mask, const Tensor& values) {
    Tensor made{{values.shape[0], values.shape[1]}};
    if (mask.dtype == "int64")
        made.integers.assign(count(made.shape), 1);
    else
        made.floats.assign(count(made.shape), 1.0f);
    return made;
}

void check_mask(const Tensor& mask, const Tensor& values, const std::string& where) {
    const Shape expected = {values.shape[0], values.shape[1]};
    bool fits = mask.shape == expected;
    const std::size_t length = fits ? mask.row_size() : 0, rows = fits ? mask.rows() : 0;
    for (std::size_t row = 0; row < rows; ++row) {
        bool any = false;
        for (std::size_t index = row * length; index < (row + 1) * length; ++index) {
            const double value =
                mask.is_integer() ? static_cast<double>(mask.integers[index]) : static_cast<double>(mask.floats[index]);
            fits = fits && (value == 0 || value == 1);
            any = any || value == 1;
        }
        fits = fits && any;
    }
    if (!fits)
        throw UsageError(text(where, " has shape ", shown(mask.shape), "; expected ", shown(expected),
                              " of 0 and 1, a 1 in every row"));
}

// A checked mask, 0 and 1, in its port's type.
Tensor in_type_of(const Port& port, const Tensor& mask) {
    Tensor cast{mask.shape};
    if (port.dtype == "int64" && !mask.is_integer())
        cast.integers.assign(mask.floats.begin(), mask.floats.end());
    else if (port.dtype != "int64" && mask.is_integer())
        cast.floats.assign(mask.integers.begin(), mask.integers.end());
    else
        return mask;
    return cast;
}

}  // namespace

const unsigned char* Tensor::data() const {
    return is_integer() ? reinterpret_cast<const unsigned char*>(integers.data())
                        : reinterpret_cast<const unsigned char*>(floats.data());
}

Rows fit(const std::vector<Port>& ports, const Arrays& arrays, const std::string& what) {
    Rows fitted;
    std::vector<std::string> known, missing, rows;
    for (const Port& port : ports) {
        known.push_back(port.name);
        if (port.masks.empty() && !arrays.count(port.name)) missing.push_back(port.name);
    }
    for (const auto& entry : arrays)
        if (!contains(known, entry.first))
            throw UsageError(text(what, " has the unknown port '", entry.first, "'", nearest(entry.first, known),
                                  "; known: ", known.empty() ? "none" : join(known)));
    if (!missing.empty())
        throw UsageError(text(what, " lacks ", join(missing), "; expected an array for each of ", join(known)));
    for (const Port& port : ports) {
        if (!port.masks.empty()) continue;
        const Port* const mask = mask_of(ports, port);
        Tensor values = values_of(port, arrays.at(port.name), text(what, ": ", port.name), mask);
        if (mask) {
            const auto marked = arrays.find(mask->name);
            const std::string where = text(what, ": ", mask->name);
            const Tensor marks = marked == arrays.end() ? ones(*mask, values) : marked->second;
            check_mask(marks, values, where);
            fitted.arrays[mask->name] = padded(in_type_of(*mask, marks), mask->shape[0]);
            values = padded(values, port.shape[0]);
        }
        rows.push_back(text(port.name, " ", values.rows()));
        if (!fitted.rows) fitted.rows = values.rows();
        fitted.arrays[port.name] = std::move(values);
    }
    for (const auto& entry : fitted.arrays)
        if (entry.second.rows() != fitted.rows)
            throw UsageError(text(what, ": numbers of rows differ: ", join(rows), "; expected one for all"));
    return fitted;
}

Rows null_condition(const std::vector<Port>& ports, const std::map<std::string, double>& null, const Arrays& negative) {
    std::vector<std::string> missing;
    for (const Port& port : ports)
        if (port.masks.empty() && !null.count(port.name) && !negative.count(port.name)) missing.push_back(port.name);
    if (!missing.empty())
        throw UsageError(
            text("guidance needs a negative with ", join(missing), ", to lead away from; or pass guidance 1"));
    Arrays arrays = negative;
    std::size_t rows = 1;
    for (const auto& entry : negative)
        if (!entry.second.shape.empty()) rows = std::max(rows, entry.second.rows());
    for (const Port& port : ports) {
        const auto constant = null.find(port.name);
        if (constant == null.end() || negative.count(port.name) || negative.count(port.masks)) continue;
        Tensor& tensor = arrays[port.name];
        tensor.shape = with_rows(rows, port.shape);
        if (port.dtype == "int64")
            tensor.integers.assign(count(tensor.shape), static_cast<std::int64_t>(constant->second));
        else
            tensor.floats.assign(count(tensor.shape), static_cast<float>(constant->second));
    }
    return fit(ports, arrays, "negative");
}

Rows stack(const Rows& first, const Rows& second) {
    Rows both = first;
    both.rows += second.rows;
    for (const auto& [name, tensor] : second.arrays) {
        Tensor& rows = both.arrays.at(name);
        rows.floats.insert(rows.floats.end(), tensor.floats.begin(), tensor.floats.end());
        rows.integers.insert(rows.integers.end(), tensor.integers.begin(), tensor.integers.end());
        rows.shape[0] += tensor.shape[0];
    }
    return both;
}

Rows slice(const Rows& condition, std::size_t first, std::size_t last) {
    Rows part{last - first};
    const auto cut = [&](const auto& values, std::size_t size) {
        if (values.empty()) return values;
        return std::decay_t<decltype(values)>(values.begin() + static_cast<std::ptrdiff_t>(first * size),
                                              values.begin() + static_cast<std::ptrdiff_t>(last * size));
    };
    for (const auto& [name, tensor] : condition.arrays) {
        const std::size_t size = tensor.row_size();
        Tensor& rows = part.arrays[name];
        rows = {tensor.shape, cut(tensor.floats, size), cut(tensor.integers, size)};
        rows.shape[0] = static_cast<std::int64_t>(last - first);
    }
    return part;
}

std::vector<std::size_t> unique_rows(const Rows& condition, const std::vector<std::string>& ports) {
    std::vector<std::size_t> numbers(condition.rows, 0);
    for (const std::string& port : ports) {
        const Tensor& tensor = condition.arrays.at(port);
        const std::size_t size = tensor.row_size() * tensor.item_size();
        std::map<std::pair<std::size_t, std::string_view>, std::size_t> distinct;
        for (std::size_t row = 0; row < condition.rows; ++row) {
            const auto* const bytes = reinterpret_cast<const char*>(tensor.data()) + row * size;
            numbers[row] = distinct.insert({{numbers[row], {bytes, size}}, distinct.size()}).first->second;
        }
    }
    return numbers;
}

}  // namespace dit_runtime
