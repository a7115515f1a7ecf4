#include "solvers.hpp"

#include <algorithm>
#include <cmath>
#include <map>
#include <numeric>

#include "errors.hpp"
#include "facts.hpp"
#include "solvers/method.hpp"

namespace dit_runtime {
namespace {

const std::size_t SHORT = 15;  // steps: runs of fewer lower their order at the end
const double LARGE = 1e6;      // any clipping solver clips values of this size
const std::size_t PROBES = 8;  // numbers that a solver steps to show whether it is linear

using Make = std::function<std::unique_ptr<Method>(Setting)>;

const std::map<std::string, std::function<std::unique_ptr<Method>(Setting, int)>> MULTISTEP_METHODS = {
    {"dpm++", [](Setting setting, int order) { return dpm(std::move(setting), order); }},
    {"sde-dpm++", [](Setting setting, int order) { return dpm(std::move(setting), order, true); }},
    {"unipc", unipc},
    {"deis", deis}};

std::map<std::string, Make> make_methods() {
    std::map<std::string, Make> table = {{"ddpm", ddpm}, {"ddim", ddim}, {"euler", euler},
                                         {"heun", heun}, {"sde", sde},   {"scm", scm}};
    for (const std::string& solver : multistep_solvers())
        table[solver] = [make = MULTISTEP_METHODS.at(multistep_method(solver)),
                         order = solver_numbers("order").at(solver)](Setting setting) {
            return make(std::move(setting), order);
        };
    return table;
}

const std::map<std::string, Make>& methods() {
    static const std::map<std::string, Make> table = make_methods();
    return table;
}

struct Draws {};  // a solver asked for noise

double dot(const Array& a, const Array& b) { return std::inner_product(a.begin(), a.end(), b.begin(), 0.0); }

void subtract(Array& from, double factor, const Array& values) {
    for (std::size_t i = 0; i < from.size(); ++i) from[i] -= factor * values[i];
}

// What the columns are multiplied by to come nearest to the target, and what then is left of it. A column that the ones
// before it explain has 0. Gram and Schmidt's method, each column twice.
std::array<double, 3> nearest(const std::array<Array, 3>& columns, Array& target) {
    std::array<Array, 3> directions;
    std::array<std::array<double, 3>, 3> upper{};
    std::array<double, 3> along{}, factors{};
    for (std::size_t j = 0; j < 3; ++j) {
        Array direction = columns[j];
        for (int pass = 0; pass < 2; ++pass)
            for (std::size_t i = 0; i < j; ++i) {
                const double part = dot(directions[i], direction);
                upper[i][j] += part;
                subtract(direction, part, directions[i]);
            }
        const double length = std::sqrt(dot(direction, direction));
        const bool is_new = length > 1e-12 * std::sqrt(dot(columns[j], columns[j]));
        upper[j][j] = is_new ? length : 0.0;
        for (double& value : direction) value = is_new ? value / length : 0.0;
        directions[j] = std::move(direction);
        along[j] = dot(directions[j], target);
        subtract(target, along[j], directions[j]);
    }
    for (std::size_t j = 3; j-- > 0;) {
        if (upper[j][j] == 0.0) continue;
        for (std::size_t k = j + 1; k < 3; ++k) along[j] -= upper[j][k] * factors[k];
        factors[j] = along[j] / upper[j][j];
    }
    return factors;
}

}  // namespace

std::int64_t evaluations(const std::string& solver) {
    static const auto numbers = solver_numbers("evaluations");
    return numbers.at(solver);
}

Array plan(const Process& process, const std::string& solver, std::int64_t steps, const std::string& spacing) {
    Array times;
    for (const Level& level : levels(process, solver, steps, spacing)) times.push_back(level.time);
    return times;
}

std::vector<Level> levels(const Process& process, const std::string& solver, std::int64_t steps,
                          const std::string& spacing, std::size_t first) {
    const std::vector<Step> schedule = make_schedule(process, solver, steps, spacing);
    std::vector<Level> levels;
    for (std::size_t index = first; index < schedule.size(); ++index) {
        levels.push_back(schedule[index].now);
        if (evaluations(solver) == 2) levels.push_back(schedule[index].after);
    }
    return levels;
}

Solver::Solver(const Process& process, const std::string& solver, std::int64_t steps, Array x, Draw draw, double eta,
               const std::string& spacing, std::size_t first)
    : prediction_(process.prediction) {
    std::vector<Step> schedule = make_schedule(process, solver, steps, spacing);
    Sampler sampler = process.sampler;
    if (schedule.size() >= SHORT && multistep_method(solver) != "unipc")  // whose short runs are of any length
        sampler.lower_order_final = false;
    schedule.erase(schedule.begin(), schedule.begin() + static_cast<std::ptrdiff_t>(std::min(first, schedule.size())));
    if (!(0 <= eta && eta <= 1))
        throw UsageError(text("eta is ", eta, "; expected a number from 0 (deterministic) to 1"));
    if (eta != 0 && solver != "ddim")
        throw UsageError(text("eta is ", eta, " with solver ", solver, "; only ddim takes it"));
    method_ = methods().at(solver)({std::move(schedule), std::move(x), std::move(draw), std::move(sampler), eta});
}

Solver::~Solver() = default;
Solver::Solver(Solver&&) noexcept = default;
Solver& Solver::operator=(Solver&&) noexcept = default;

bool Solver::asks() const { return !method_->ended(); }
const Array& Solver::x() const { return method_->x(); }
double Solver::t() const { return method_->level().time; }
void Solver::send(const Prediction& prediction) {
    Estimate made = estimate(prediction_, method_->x(), prediction, method_->level());
    x0_ = made.x0;
    method_->take(std::move(made));
}
Array Solver::end(const Array& state, const Prediction& prediction) const {
    return estimate(prediction_, state, prediction, method_->level()).x0;
}

std::optional<std::vector<Matrix>> linear(const Process& process, const std::string& solver, std::int64_t steps,
                                          double eta, const std::string& spacing, std::size_t first) {
    const std::vector<Level> levels = dit_runtime::levels(process, solver, steps, spacing, first);
    std::vector<float> numbers = Noise(0).normal(PROBES * (levels.size() + 1));
    for (float& number : numbers) number *= static_cast<float>(LARGE);
    const auto probes = [&](std::size_t index) {
        const auto begin = numbers.begin() + static_cast<std::ptrdiff_t>(PROBES * index);
        return Array(begin, begin + PROBES);
    };
    const Draw draw = [](std::size_t) -> std::vector<float> { throw Draws(); };
    Solver run(process, solver, steps, probes(0), draw, eta, spacing, first);
    Array memory(PROBES);
    std::vector<Matrix> matrices;
    for (std::size_t index = 0; index < levels.size(); ++index) {
        const std::array<Array, 3> known = {run.x(), probes(index + 1), memory};
        try {
            run.send({{known[1].begin(), known[1].end()}, std::vector<float>(PROBES)});
        } catch (const Draws&) {
            return std::nullopt;
        }
        Array left = run.x();
        const std::array<double, 3> coefficients = nearest(known, left);
        if (!(std::sqrt(dot(left, left)) <= 1e-9 * std::sqrt(dot(run.x(), run.x())))) return std::nullopt;
        std::array<double, 3> keeping = {0.0, 1.0, 0.0};
        if (evaluations(solver) == 1) {
            const Array x0 = estimate(process.prediction, {1.0, 0.0}, {{0.0f, 1.0f}, {}}, levels[index]).x0;
            keeping = {x0[0], x0[1], 0.0};
        }
        matrices.push_back({keeping, coefficients});
        for (std::size_t i = 0; i < PROBES; ++i) memory[i] = keeping[0] * known[0][i] + keeping[1] * known[1][i];
    }
    return matrices;
}

}  // namespace dit_runtime
