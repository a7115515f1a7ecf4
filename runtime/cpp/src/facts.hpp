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

// The spacings that bend σ between two ends.
std::vector<std::string> curve_names();

// The precisions that a backend runs.
std::vector<std::string> precisions_of(const std::string& backend);

// A request's values unless it has others.
std::int64_t default_steps();
double default_guidance();
double default_strength();

// The solvers that read predictions of earlier steps, in their order.
std::vector<std::string> multistep_solvers();

// The method of such a solver; empty for any other.
std::string multistep_method(const std::string& solver);

// A number of the table "limits", which a manifest must keep.
std::int64_t limit(const std::string& name);

// A number of the table "constants".
double constant(const std::string& name);

// A tensor's name in the table "constants".
std::string constant_name(const std::string& name);

// One number of each solver: its order, or its evaluations a step.
std::map<std::string, int> solver_numbers(const std::string& key);

}  // namespace dit_runtime
