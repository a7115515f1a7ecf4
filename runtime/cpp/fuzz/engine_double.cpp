// An engine that needs no graph: it gives small numbers in the shapes of the manifest.
#include "engine.hpp"

namespace dit_runtime {
namespace {

class Double : public Engine {
  public:
    explicit Double(const Stage& stage) : stage_(stage) {
        for (const TensorSpec& spec : stage.reads) inputs.push_back(spec.name);
        for (const TensorSpec& spec : stage.gives) outputs.push_back(spec.name);
    }

    std::map<std::string, Output> run(const std::vector<Input>& arrays) override {
        std::size_t rows = 1;
        float sum = 0;
        for (const Input& input : arrays) {
            const TensorSpec* const spec = find(stage_.reads, input.name);
            if (!spec->starts("groups")) rows = static_cast<std::size_t>(input.shape.at(0));
            const auto* const bytes = static_cast<const unsigned char*>(input.data);
            for (std::size_t at = 0; at < input.bytes(); ++at) sum += static_cast<float>(bytes[at]) * 1e-4f;
        }
        std::map<std::string, Output> named;
        for (const TensorSpec& spec : stage_.gives) {
            Output& output = named[spec.name];
            output.shape = with_rows(rows, spec.row());
            for (std::size_t at = 0; at < count(output.shape); ++at)
                output.values.push_back(sum / static_cast<float>(at + 1));
        }
        return named;
    }

  private:
    const Stage stage_;
};

}  // namespace

std::string ort_version() { return "double"; }

std::unique_ptr<Engine> open_ort(const std::vector<Path>&, const Stage& stage, const Options&) {
    return std::make_unique<Double>(stage);
}

}  // namespace dit_runtime
