#include "facts.hpp"

#include <nlohmann/json.hpp>

#include "errors.hpp"
#include "facts_json.hpp"

namespace dit_runtime {

const nlohmann::ordered_json& facts() {
    static const auto table = nlohmann::ordered_json::parse(FACTS_JSON);
    return table;
}

std::vector<std::string> fact_names(const std::string& table) {
    std::vector<std::string> names;
    for (const auto& entry : facts().at(table).items()) names.push_back(entry.key());
    return names;
}

std::vector<std::string> solvers_of(const std::string& kind) {
    std::vector<std::string> names;
    for (const auto& entry : facts().at("solvers").items())
        if (contains(entry.value().at("processes").get<std::vector<std::string>>(), kind)) names.push_back(entry.key());
    return names;
}

std::vector<std::string> spacings_of(const std::string& kind) {
    return facts().at("spacings").at(kind).get<std::vector<std::string>>();
}

std::vector<std::string> curve_names() { return facts().at("curves").get<std::vector<std::string>>(); }

std::vector<std::string> precisions_of(const std::string& backend) {
    return facts().at("precisions").at(backend).get<std::vector<std::string>>();
}

std::int64_t default_steps() { return facts().at("defaults").at("steps").get<std::int64_t>(); }
double default_guidance() { return facts().at("defaults").at("guidance").get<double>(); }
double default_strength() { return facts().at("defaults").at("strength").get<double>(); }

std::vector<std::string> multistep_solvers() {
    std::vector<std::string> names;
    for (const auto& entry : facts().at("solvers").items())
        if (entry.value().contains("multistep")) names.push_back(entry.key());
    return names;
}

std::string multistep_method(const std::string& solver) {
    return facts().at("solvers").at(solver).value("multistep", std::string());
}

std::int64_t limit(const std::string& name) { return facts().at("limits").at(name).get<std::int64_t>(); }
double constant(const std::string& name) { return facts().at("constants").at(name).get<double>(); }
std::string constant_name(const std::string& name) { return facts().at("constants").at(name).get<std::string>(); }

std::map<std::string, int> solver_numbers(const std::string& key) {
    std::map<std::string, int> numbers;
    for (const auto& entry : facts().at("solvers").items()) numbers[entry.key()] = entry.value().at(key).get<int>();
    return numbers;
}

}  // namespace dit_runtime
