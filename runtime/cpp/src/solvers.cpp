#include "solvers.hpp"

#include <algorithm>
#include <map>

#include "errors.hpp"
#include "facts.hpp"
#include "solvers/method.hpp"

namespace dit_runtime {
namespace {

const std::size_t SHORT = 15;  // steps: runs of fewer lower their order at the end

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

}  // namespace dit_runtime
