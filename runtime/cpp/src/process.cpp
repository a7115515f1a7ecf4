#include "process.hpp"

#include <cmath>
#include <map>

#include "errors.hpp"
#include "facts.hpp"
#include "json.hpp"

namespace dit_runtime {

const std::vector<std::string> SOLVERS = fact_names("solvers");
const std::vector<std::string> NOISE_SOLVERS = solvers_of("noise");
const std::vector<std::string> FLOW_SOLVERS = solvers_of("flow");
const std::vector<std::string> SPACINGS = spacings_of("noise");
const std::vector<std::string> FLOW_SPACINGS = spacings_of("flow");
const std::vector<std::string> CURVES = curve_names();

namespace {

using json::Json;

const double PI = 3.141592653589793;
const double GREATEST_GROWTH = 100.0;  // of the shift's logarithm, over as many steps as a run may take
const std::int64_t MOST_STEPS = limit("steps");

std::vector<std::string> flow_bases() {
    std::vector<std::string> names;
    for (const std::string& name : FLOW_SPACINGS)
        if (!contains(CURVES, name)) names.push_back(name);
    return names;
}

std::vector<std::string> curves_or_none() {
    std::vector<std::string> names = CURVES;
    names.insert(names.begin(), "none");
    return names;
}

const std::map<std::string, std::vector<std::string>> CHOICES = {
    {"beta_schedule", {"linear", "scaled_linear", "squaredcos_cap_v2"}},
    {"prediction", fact_names("predictions")},
    {"solver", SOLVERS},
    {"ddpm_spacing", SPACINGS},
    {"ddim_spacing", SPACINGS},
    {"dpm_spacing", SPACINGS},
    {"flow_spacing", flow_bases()},
    {"flow_curve", curves_or_none()},
    {"variance", {"fixed_small", "fixed_large", "learned", "learned_range"}},
    {"solver_type", {"midpoint", "heun", "bh1", "bh2"}},
    {"final_sigmas_type", {"zero", "sigma_min"}},
};

std::string choice(const std::string& name, const Json& value) {
    const auto& known = CHOICES.at(name);
    if (!value.is_string() || !contains(known, value.get<std::string>()))
        json::refuse(name, value, "one of " + join(known));
    return value.get<std::string>();
}

double fraction(const std::string& name, const Json& value) {
    const double number = json::number(value, name);
    if (!(0 < number && number < 1)) json::refuse(name, value, "a number between 0 and 1");
    return number;
}

double positive(const std::string& name, const Json& value) {
    const double number = json::number(value, name);
    if (!(number > 0)) json::refuse(name, value, "a number above 0");
    return number;
}

// Calls `take(name, value)` for each entry of the table that is there.
template <typename Take>
void each(const Json& table, const std::string& where, const std::vector<std::string>& known, const Take& take) {
    json::known_keys(table, where, known);
    for (const auto& entry : table.items()) take(entry.key(), entry.value());
}

Sampler sampler_from_json(const Json& table, bool flow) {
    Sampler sampler;
    if (flow) sampler.solver = "euler";
    const std::map<std::string, std::string*> words = {{"solver", &sampler.solver},
                                                       {"ddpm_spacing", &sampler.ddpm_spacing},
                                                       {"ddim_spacing", &sampler.ddim_spacing},
                                                       {"dpm_spacing", &sampler.dpm_spacing},
                                                       {"flow_spacing", &sampler.flow_spacing},
                                                       {"flow_curve", &sampler.flow_curve},
                                                       {"variance", &sampler.variance},
                                                       {"solver_type", &sampler.solver_type},
                                                       {"final_sigmas_type", &sampler.final_sigmas_type}};
    const std::map<std::string, bool*> flags = {{"clip_sample", &sampler.clip_sample},
                                                {"set_alpha_to_one", &sampler.set_alpha_to_one},
                                                {"lower_order_final", &sampler.lower_order_final},
                                                {"euler_at_final", &sampler.euler_at_final}};
    std::vector<std::string> known = {"solver",         "steps",        "solver_type", "lower_order_final",
                                      "euler_at_final", "flow_spacing", "flow_curve"};
    if (!flow) {
        known = {"steps", "steps_offset", "clip_sample_range", "lambda_min_clipped"};
        for (const auto& word : words)
            if (word.first.rfind("flow_", 0) != 0) known.push_back(word.first);
        for (const auto& flag : flags) known.push_back(flag.first);
    }
    each(table, "process.sampler", known, [&](const std::string& name, const Json& value) {
        if (words.count(name)) {
            *words.at(name) = choice(name, value);
        } else if (flags.count(name)) {
            *flags.at(name) = json::boolean(value, name);
        } else if (name == "steps") {
            sampler.steps = json::integer(value, name, 1, MOST_STEPS);
        } else if (name == "steps_offset") {
            sampler.steps_offset = json::integer(value, name, 0, MOST_STEPS);
        } else if (name == "clip_sample_range") {
            sampler.clip_sample_range = positive(name, value);
        } else if (!value.is_null()) {
            sampler.lambda_min_clipped = json::number(value, name);
        }
    });
    return sampler;
}

void take_field(Process& process, const std::string& name, const Json& value, bool flow) {
    if (name == "train_steps") {
        process.train_steps = json::integer(value, name, 2, MOST_STEPS);
    } else if (name == "beta_schedule") {
        process.beta_schedule = choice(name, value);
    } else if (name == "prediction") {
        process.prediction = choice(name, value);
    } else if (name == "beta_start") {
        process.beta_start = fraction(name, value);
    } else if (name == "beta_end") {
        process.beta_end = fraction(name, value);
    } else if (name == "shift") {
        process.shift = positive(name, value);
    } else if (name == "shift_growth") {
        process.shift_growth = json::number(value, name);
    } else if (name == "sigma_min") {
        process.sigma_min = fraction(name, value);
    } else if (name == "sampler") {
        process.sampler = sampler_from_json(value, flow);
    } else if (name == "shift_terminal" && !value.is_null()) {
        process.shift_terminal = fraction(name, value);
    } else if (name == "trained_betas" && !value.is_null()) {
        Array betas;
        for (const Json& beta : json::list(value, name)) betas.push_back(fraction(name, beta));
        process.trained_betas = std::move(betas);
    }
}

}  // namespace

Process process_from_json(const Json& table) {
    const auto kind = json::table(table, "process").find("kind");
    if (kind != table.end() && *kind != "noise" && *kind != "flow")
        json::refuse("process: kind", *kind, "one of noise, flow");
    const bool flow = kind != table.end() && *kind == "flow";
    Process process;
    if (flow) process.prediction = "velocity", process.sampler.solver = "euler";
    std::vector<std::string> known = {"kind",          "train_steps", "prediction", "sampler",
                                      "beta_schedule", "beta_start",  "beta_end",   "trained_betas"};
    if (flow) known = {"kind", "train_steps", "shift", "shift_growth", "shift_terminal", "sigma_min", "sampler"};
    each(table, "process", known,
         [&](const std::string& name, const Json& value) { take_field(process, name, value, flow); });
    if (process.trained_betas && process.trained_betas->size() != static_cast<std::size_t>(process.train_steps))
        throw std::invalid_argument(
            text("trained_betas is ", process.trained_betas->size(), " values; expected ", process.train_steps));
    const double growth = GREATEST_GROWTH / static_cast<double>(process.train_steps);
    if (std::abs(process.shift_growth) > growth)
        json::refuse("shift_growth", process.shift_growth, text("at most ", growth, " either way"));
    try {
        require_fit(process, process.sampler.solver);
    } catch (const UsageError& error) {
        throw std::invalid_argument(error.what());
    }
    if ((process.kind() == "flow") != flow)
        throw std::invalid_argument(text("process: prediction is '", process.prediction, "', which fits kind ",
                                         process.kind(), ", not ", flow ? "flow" : "noise"));
    if (!flow) {
        const Array levels = process.alpha_bar();
        if (levels.front() == 1) throw std::invalid_argument("process: the betas add no noise at the first step");
        if (levels.back() == 0) throw std::invalid_argument("process: the betas leave no signal at the last step");
    }
    return process;
}

std::string Process::kind() const { return facts().at("predictions").at(prediction).get<std::string>(); }

// Only + - × ÷ √ in double, cosine apart: so every machine gets the same bits. A flow has none.
Array Process::betas() const {
    if (kind() == "flow") return {};
    if (trained_betas) return *trained_betas;
    if (beta_schedule == "linear") return linspace(beta_start, beta_end, train_steps);
    if (beta_schedule == "scaled_linear") {
        Array values = linspace(std::sqrt(beta_start), std::sqrt(beta_end), train_steps);
        for (double& value : values) value = value * value;
        return values;
    }
    const auto level = [this](std::int64_t index) {
        const double time = static_cast<double>(index) / static_cast<double>(train_steps);
        const double cosine = std::cos((time + 0.008) / 1.008 * PI / 2);
        return cosine * cosine;
    };
    Array values;
    for (std::int64_t index = 0; index < train_steps; ++index)
        values.push_back(std::min(1 - level(index + 1) / level(index), 0.999));
    return values;
}

Array Process::alpha_bar() const {
    Array levels = betas();
    double product = 1;
    for (double& level : levels) level = product *= 1 - level;
    return levels;
}

double Process::shift_over(std::int64_t steps) const {
    return shift * std::exp(shift_growth * static_cast<double>(steps));
}

void require_fit(const Process& process, const std::string& solver) {
    if (!contains(SOLVERS, solver))
        throw UsageError(
            text("solver '", solver, "' is not known", nearest(solver, SOLVERS), "; known: ", join(SOLVERS)));
    const auto& fit = process.kind() == "flow" ? FLOW_SOLVERS : NOISE_SOLVERS;
    if (!contains(fit, solver))
        throw UsageError(text("solver '", solver, "' does not fit a model that predicts ", process.prediction,
                              "; take one of ", join(fit)));
}

void require_variance(const Sampler& sampler, bool predicted) {
    if (sampler.variance.rfind("learned", 0) == 0 && !predicted)
        throw UsageError(text("ddpm with '", sampler.variance,
                              "' variance needs a model that predicts its variance, and this one does not; take ddim"));
}

void require_steps(const Process& process, std::int64_t steps) {
    if (!(0 < steps && steps <= process.train_steps))
        throw UsageError(
            text("steps is ", steps, "; expected an integer from 1 to ", process.train_steps, ", the training steps"));
}

Array linspace(double start, double stop, std::int64_t count) {
    Array points(static_cast<std::size_t>(count));
    const double step = (stop - start) / static_cast<double>(count - 1);
    for (std::int64_t index = 0; index < count; ++index)
        points[static_cast<std::size_t>(index)] = count > 1 ? static_cast<double>(index) * step + start : start;
    if (count > 1) points.back() = stop;
    return points;
}

}  // namespace dit_runtime
