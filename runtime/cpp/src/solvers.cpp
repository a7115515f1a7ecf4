#include "solvers.hpp"

#include <map>

#include "errors.hpp"
#include "facts.hpp"
#include "solvers/method.hpp"

namespace dit_runtime {
namespace {

using Make = std::function<std::unique_ptr<Method>(Setting)>;

Make multistep(const std::string& solver) {
    return [order = solver_numbers("order").at(solver)](Setting setting) { return dpm(std::move(setting), order); };
}

const std::map<std::string, Make>& methods() {
    static const std::map<std::string, Make> table = {{"ddpm", ddpm},
                                                      {"ddim", ddim},
                                                      {"dpm++1", multistep("dpm++1")},
                                                      {"dpm++", multistep("dpm++")},
                                                      {"dpm++3", multistep("dpm++3")},
                                                      {"euler", euler},
                                                      {"heun", heun},
                                                      {"sde", sde},
                                                      {"scm", scm}};
    return table;
}

}  // namespace

std::int64_t evaluations(const std::string& solver) {
    static const auto numbers = solver_numbers("evaluations");
    return numbers.at(solver);
}

Array plan(const Process& process, const std::string& solver, std::int64_t steps, const std::string& spacing) {
    Array times;
    for (const Step& step : make_schedule(process, solver, steps, spacing)) {
        times.push_back(step.now.time);
        if (evaluations(solver) == 2) times.push_back(step.after.time);
    }
    return times;
}

Solver::Solver(const Process& process, const std::string& solver, std::int64_t steps, Array x, Draw draw, double eta,
               const std::string& spacing)
    : prediction_(process.prediction) {
    std::vector<Step> schedule = make_schedule(process, solver, steps, spacing);
    if (!(0 <= eta && eta <= 1))
        throw UsageError(text("eta is ", eta, "; expected a number from 0 (deterministic) to 1"));
    if (eta != 0 && solver != "ddim")
        throw UsageError(text("eta is ", eta, " with solver ", solver, "; only ddim takes it"));
    method_ = methods().at(solver)({std::move(schedule), std::move(x), std::move(draw), process.sampler, eta});
}

Solver::~Solver() = default;
Solver::Solver(Solver&&) noexcept = default;
Solver& Solver::operator=(Solver&&) noexcept = default;

bool Solver::asks() const { return !method_->ended(); }
const Array& Solver::x() const { return method_->x(); }
double Solver::t() const { return method_->level().time; }
void Solver::send(const Prediction& prediction) {
    method_->take(estimate(prediction_, method_->x(), prediction, method_->level()));
}

}  // namespace dit_runtime
