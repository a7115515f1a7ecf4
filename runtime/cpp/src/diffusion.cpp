// The manifest's `diffusion` section: every field against its kind and CHOICES, as schedule.py's from_dict does.
#include "diffusion.hpp"

namespace dit_runtime {
namespace {

using json::Json;

void require(bool fits, const std::string& name, const Json& value, const std::string& expected) {
    if (!fits) json::refuse(name, value, expected);
}

// Calls `take(name, value)` for each entry of the table that is there.
template <typename Take>
void each(const Json& table, const std::string& where, const std::vector<std::string>& known, const Take& take) {
    json::known_keys(table, where, known);
    for (const auto& entry : table.items()) take(entry.key(), entry.value());
}

std::string choice(const std::string& name, const Json& value) {
    const auto& known = CHOICES.at(name);
    require(value.is_string() && contains(known, value.get<std::string>()), name, value, "one of " + join(known));
    return value.get<std::string>();
}

Sampler sampler_from_json(const Json& table) {
    Sampler sampler;
    const std::map<std::string, std::string*> words = {{"solver", &sampler.solver},
                                                       {"ddpm_spacing", &sampler.ddpm_spacing},
                                                       {"ddim_spacing", &sampler.ddim_spacing},
                                                       {"dpm_spacing", &sampler.dpm_spacing},
                                                       {"variance", &sampler.variance},
                                                       {"solver_type", &sampler.solver_type},
                                                       {"final_sigmas_type", &sampler.final_sigmas_type}};
    const std::map<std::string, bool*> flags = {{"clip_sample", &sampler.clip_sample},
                                                {"set_alpha_to_one", &sampler.set_alpha_to_one},
                                                {"lower_order_final", &sampler.lower_order_final},
                                                {"euler_at_final", &sampler.euler_at_final}};
    std::vector<std::string> known = {"steps_offset", "clip_sample_range", "lambda_min_clipped"};
    for (const auto& word : words) known.push_back(word.first);
    for (const auto& flag : flags) known.push_back(flag.first);
    each(table, "diffusion.sampler", known, [&](const std::string& name, const Json& value) {
        if (words.count(name)) {
            *words.at(name) = choice(name, value);
        } else if (flags.count(name)) {
            *flags.at(name) = json::boolean(value, name);
        } else if (name == "steps_offset") {
            sampler.steps_offset = json::integer(value, name, 0, MOST);
        } else if (name == "clip_sample_range") {
            sampler.clip_sample_range = json::number(value, name);
            require(sampler.clip_sample_range > 0, name, value, "a number above 0");
        } else if (!value.is_null()) {
            sampler.lambda_min_clipped = json::number(value, name);
        }
    });
    return sampler;
}

}  // namespace

Diffusion diffusion_from_json(const Json& table) {
    Diffusion diffusion;
    const auto fraction = [](const std::string& name, const Json& value) {
        const double number = json::number(value, name);
        require(0 < number && number < 1, name, value, "a number between 0 and 1");
        return number;
    };
    const std::vector<std::string> known = {"train_steps",   "beta_schedule", "beta_start", "beta_end",
                                            "trained_betas", "prediction",    "sampler"};
    each(table, "diffusion", known, [&](const std::string& name, const Json& value) {
        if (name == "train_steps") {
            diffusion.train_steps = json::integer(value, name, 2, MOST);
        } else if (name == "beta_schedule") {
            diffusion.beta_schedule = choice(name, value);
        } else if (name == "prediction") {
            diffusion.prediction = choice(name, value);
        } else if (name == "beta_start") {
            diffusion.beta_start = fraction(name, value);
        } else if (name == "beta_end") {
            diffusion.beta_end = fraction(name, value);
        } else if (name == "sampler") {
            diffusion.sampler = sampler_from_json(value);
        } else if (!value.is_null()) {
            Array betas;
            for (const Json& beta : json::list(value, name)) betas.push_back(fraction(name, beta));
            diffusion.trained_betas = std::move(betas);
        }
    });
    if (diffusion.trained_betas && diffusion.trained_betas->size() != static_cast<std::size_t>(diffusion.train_steps))
        throw std::invalid_argument(
            text("trained_betas is ", diffusion.trained_betas->size(), " values; expected ", diffusion.train_steps));
    try {
        require_fit(diffusion, diffusion.sampler.solver);
    } catch (const UsageError& error) {
        throw std::invalid_argument(error.what());
    }
    return diffusion;
}

}  // namespace dit_runtime
