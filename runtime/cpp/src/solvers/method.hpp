// One file a solver. A solver sees (x₀, ε) and the levels of a run, never what the network predicts; double.
// Mirrors dit_runtime/sampling/solvers/.
#pragma once

#include <memory>
#include <utility>
#include <vector>

#include "denoiser.hpp"
#include "noise.hpp"

namespace dit_runtime {

// The arguments of a solver.
struct Setting {
    std::vector<Step> steps;
    Array x;
    Draw draw;
    Sampler sampler;
    double eta = 0;
};

// A solver in its run: it waits at (x, level) for the estimate there, and its last x is the result.
class Method {
  public:
    explicit Method(Setting setting)
        : steps_(std::move(setting.steps)),
          sampler_(std::move(setting.sampler)),
          eta_(setting.eta),
          x_(std::move(setting.x)),
          draw_(std::move(setting.draw)) {}
    virtual ~Method() = default;

    bool ended() const { return index_ == steps_.size(); }
    const Array& x() const { return x_; }
    virtual const Level& level() const { return steps_[index_].now; }
    void take(Estimate estimate) {
        if (advance(steps_[index_], estimate)) ++index_;
    }

  protected:
    // Brings x on; true where that ends the step.
    virtual bool advance(const Step& step, Estimate& estimate) = 0;

    void add_noise(double deviation) {
        const std::vector<float> z = draw_(x_.size());
        for (std::size_t i = 0; i < x_.size(); ++i) x_[i] = x_[i] + deviation * static_cast<double>(z[i]);
    }

    const std::vector<Step> steps_;
    const Sampler sampler_;
    const double eta_;
    std::size_t index_ = 0;
    Array x_;
    const Draw draw_;
};

// DDPM, Ho et al. 2020 (arXiv 2006.11239), algorithm 2, between the levels of a run.
//
// a = α/α',  β = 1 - a²,  x' = α' β / σ² x₀ + a σ'² / σ² x + s z, with z = 0 at t = 0.
std::unique_ptr<Method> ddpm(Setting setting);

// DDIM, Song et al. 2020 (arXiv 2010.02502), equations 12 and 16.
//
// s = η σ'/σ √(1 - α²/α'²),  x' = α' x₀ + √(σ'² - s²) ε + s z, with no draw where s = 0.
std::unique_ptr<Method> ddim(Setting setting);

// DPM-Solver++ multistep, Lu et al. 2022 (arXiv 2211.01095), algorithm 2, and its third-order sibling.
//
// x' = σ'/σ x + α' (φ₁ D₀ + φ₂ D₁ + φ₃ D₂),  h = λ' - λ,  φ₁ = 1 - e⁻ʰ,  φ₂ = 1 - φ₁/h,  φ₃ = 1/2 - φ₂/h,
// where λ = log(α/σ), D₀ is the predicted x₀ and D₁, D₂ its scaled differences over past steps; "midpoint" has
// φ₂ = φ₁/2 in second-order steps. φ₃ is the authors' (and diffusers'), half of Taylor's: observed order 2 to 3.
//
// Noisy, it is the same paper's SDE-DPM-Solver++: 2h stands for h in each φ, and
// x' = σ'/σ e⁻ʰ x + α' (φ₁ D₀ + φ₂ D₁) + σ' √(1 - e⁻²ʰ) z, with no draw where that is 0.
std::unique_ptr<Method> dpm(Setting setting, int order, bool noisy = false);

// Euler's method on a flow's dx/dσ = ε - x₀ (Lipman et al. 2022, arXiv 2210.02747): x' = x + (σ' - σ) (ε - x₀).
std::unique_ptr<Method> euler(Setting setting);

// Heun's method on a flow, of order 2 (Karras et al. 2022, arXiv 2206.00364, algorithm 1, there for σ/α).
//
// v = ε - x₀ at (x, σ),  w = ε - x₀ at (x + (σ' - σ) v, σ'),  x' = x + (σ' - σ) (v + w) / 2.
std::unique_ptr<Method> heun(Setting setting);

// Euler-Maruyama on SiT's reverse SDE, Ma et al. 2024 (arXiv 2401.08740), with their default coefficient w = σ.
//
// dx = (x₀ - ε + w s) dt + √(2 w) dW backwards in σ, with the score s = -ε / σ: so
// x' = x + (σ - σ') (x₀ - 2 ε) + √(2 σ (σ - σ')) z. The last step is the drift alone.
std::unique_ptr<Method> sde(Setting setting);

// Multistep consistency sampling, Song et al. 2023 (arXiv 2303.01469), algorithm 1: x' = α' x₀ + σ' z.
//
// A consistency network predicts the end of the path, so each step starts again with new noise; the last has none.
std::unique_ptr<Method> scm(Setting setting);

// UniPC, Zhao et al. 2023 (arXiv 2302.04867): UniP and UniC of order p, multistep, in predicted x₀.
//
// UniP takes a step with the last p predictions. Once the network has predicted at its end too, UniC takes the same
// step again with p + 1, and the next step starts from there.
std::unique_ptr<Method> unipc(Setting setting, int order);

// DEIS multistep in log ρ, Zhang & Chen 2022 (arXiv 2204.13902), ρ = σ/α: ε is a polynomial of u = log(ρ'/ρ).
//
// x' = α'/α x + α' ρ (J₀ ε + J₁ E₁ + (J₂ - u₁ J₁) E₂),  J_k = ∫ uᵏ eᵘ du from 0 to -h = λ - λ' (of order 1: DDIM),
// where E₁, E₂ are the divided differences of ε over past steps and u₁ = λ - λ₁.
std::unique_ptr<Method> deis(Setting setting, int order);

}  // namespace dit_runtime
