// From conditions to pictures: the bundle's stages around a solver. Mirrors dit_runtime/pipeline.py.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "checking.hpp"
#include "engine.hpp"
#include "memo.hpp"
#include "prompts.hpp"
#include "request.hpp"
#include "turns.hpp"

namespace dit_runtime {

// The step's inputs but the state and guidance, [G, B, ...], for the samples from `first` to before `last`.
using Conditioned = std::function<const Arrays&(std::size_t first, std::size_t last)>;

// Any thread may call it at any time: calls of engines take turns.
class Pipeline {
  public:
    // Opens a bundle, and checks its manifest and the sha256 of each file that is opened. Every stage runs at the batch
    // sizes of `warm`, so that a later request of such a size compiles nothing. Requests without a size draw `size`, or
    // the bundle's first where that is empty.
    Pipeline(const Path& folder, const Options& options, const std::vector<std::int64_t>& warm = {},
             const std::string& size = {});

    // This pipeline at a size of the bundle; empty: as it is. Both have the same engines, and those of a size open when
    // it is first drawn. It lives as long as this one.
    Pipeline& at(const std::string& size);
    void close();  // all engines; those that are needed open again
    // Every stage runs at these batch sizes, and so every engine is open.
    void warm(const std::vector<std::int64_t>& batches);

    std::vector<std::uint8_t> images(const Request& request);  // [N, H, W, 3]
    std::vector<float> latents(const Request& request);        // [N, *state]

    // The rows of every condition port, those of token ids through the prompt stage.
    Rows encode(const Rows& condition);
    // The memo of these conditions; without rows of `negative` there is no guidance. The pipeline outlives it. Stages
    // run through `compute` where there is one, and what the step reads is on the device where there is one.
    Memo memo(const Array& timesteps, const Rows& condition, const Rows& negative = {}, const RunRows& compute = {},
              std::size_t budget = MEMO_BYTES, const std::optional<Device>& device = {});
    // The memory of the step's engine, where arrays can stay there.
    std::optional<Device> device();
    // Whether the update's engine is there, too.
    bool updates_on_device();
    RunStage runner();  // of stages of any size
    // [B, *state], [B] -> prediction and, where it is learned, variance; split into what the engine takes at a time.
    Prediction denoise(const std::vector<float>& state, const Conditioned& inputs, const std::vector<float>& guidance);
    // [N, 3, H, W] in [0, 1] -> mean and, where the encoder gives it, logvar of their latents, [N, *state].
    std::map<std::string, std::vector<float>> encode_pictures(const std::vector<float>& pictures);
    // [N, *state] -> [N, 3, H, W] in [0, 1].
    std::vector<float> decode(const std::vector<float>& latents);
    // The same as uint8 [N, H, W, 3].
    std::vector<std::uint8_t> pictures(const std::vector<float>& latents);

    void require_decoder() const;
    const Backend& backend(const Stage& stage) const;
    // A line for people where a stage does not compute here in its precision; else empty.
    std::string note() const;
    bool on_cpu(const Stage& stage) const;
    // Whether the build saw on the engines that run here that a sample has the same bits in each batch.
    bool batch_invariant() const;

    const Path folder;
    const Manifest manifest;

  private:
    friend struct EngineDouble;  // tests put engines of their own in the place of a stage's
    struct Opened {
        Turns turns;                                             // for engines and checked, at all sizes
        std::map<std::string, std::unique_ptr<Engine>> engines;  // by stage
        std::map<std::string, std::vector<std::string>> files;   // that each was opened from
        CheckedFiles checked;                                    // files whose sums are the manifest's
        PromptMemo prompts;
    };

    Pipeline(const Pipeline& whole, Manifest sized);
    template <typename Call>
    void checking(const std::vector<std::string>& names, const Call& call);
    std::vector<std::string> files() const;
    Path cache() const;
    Engine& engine(const Stage& stage);
    std::unique_ptr<Engine> open(const Stage& stage);
    std::map<std::string, std::vector<float>> run(const Stage& stage, const std::vector<Input>& inputs,
                                                  std::size_t rows);
    std::map<std::string, Output> answer(const Stage& stage, std::vector<Input> inputs, const Into* into = nullptr);
    // Calls it with the engine, where arrays can stay with that, and NULL elsewhere.
    template <typename Call>
    auto with_resident(const Stage& stage, const Call& call);
    void require_room(const std::vector<std::string>& files) const;

    Options options_;
    std::shared_ptr<Opened> opened_ = std::make_shared<Opened>();
    std::map<std::string, std::unique_ptr<Pipeline>> sizes_;  // that were asked for; in turns
};

}  // namespace dit_runtime
