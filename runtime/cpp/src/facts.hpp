// The facts that Python and C++ share: runtime/facts.json, built in.
#pragma once

#include <cstdint>
#include <map>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

namespace dit_runtime {

const nlohmann::ordered_json& facts();

// The names of a table, in its order.
std::vector<std::string> fact_names(const std::string& table);

// The solvers of one kind of process, in their order.
std::vector<std::string> solvers_of(const std::string& kind);

// The spacings of one kind of process.
std::vector<std::string> spacings_of(const std::string& kind);

// The precisions that a backend runs.
std::vector<std::string> precisions_of(const std::string& backend);

// What a request has where nothing is said.
std::int64_t default_steps();
double default_guidance();

// One number of each solver: its order, or its evaluations a step.
std::map<std::string, int> solver_numbers(const std::string& key);

}  // namespace dit_runtime
