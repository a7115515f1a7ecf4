// Refusals of the C ABI: a status and a sentence, and the pipeline works on afterwards.
#include <cmath>

#include "api.hpp"
#include "npz.hpp"
#include "sha256.hpp"

namespace {

TEST_P(Api, BadRequests) {
    const auto bad = [this](const char* words, const std::function<void()>& change) {
        const dit_request before = request;
        change();
        refused(generate(), DIT_BAD_ARGUMENT, words);
        request = before;
    };
    int64_t wrong[2] = {1, 5};
    const uint64_t seeds[3] = {1, 2, 3};
    float guidance[3] = {1, 2, INFINITY};
    request.seeds = seeds;
    request.guidance = guidance;
    request.num_seeds = request.num_guidance = 1;
    bad("label 5 is out of range; expected 0 to 4", [&] { request.labels = wrong; });
    bad("label -1", [&] { wrong[1] = -1, request.labels = wrong; });
    bad("no labels", [&] { request.count = 0; });
    bad("labels is NULL", [&] { request.labels = nullptr; });
    bad("3 seeds for 2 samples", [&] { request.num_seeds = 3; });
    bad("0 seeds", [&] { request.num_seeds = 0; });
    bad("seeds is NULL", [&] { request.seeds = nullptr; });
    bad("guidance has 3", [&] { request.num_guidance = 3; });
    bad("guidance is NULL", [&] { request.guidance = nullptr; });
    bad("finite", [&] { request.guidance = guidance + 2; });
    bad("steps is -1", [&] { request.steps = -1; });
    bad("steps is 1001", [&] { request.steps = 1001; });
    bad("solver 'eular' is not known", [&] { request.solver = "eular"; });
    bad("spacing 'leding' is not known (did you mean \"leading\"?)", [&] { request.spacing = "leding"; });
    bad("eta is 2", [&] { request.eta = 2; });
    bad("eta is 0.5 with solver dpm++", [&] { request.eta = 0.5, request.solver = "dpm++"; });
    bad("needs a newer libdit", [&] { request.struct_size = sizeof request + 8; });
    bad("struct_size is 0", [&] { request.struct_size = 0; });
    bad("struct_size is 9", [&] { request.struct_size = 9; });
    for (std::size_t size = offsetof(dit_request, captions) + 1; size < sizeof request; ++size)  // within a field
        if (size % alignof(dit_request)) bad("start from the _INIT value", [&] { request.struct_size = size; });
    bad("start from the _INIT value", [&] { request.struct_size = offsetof(dit_request, guidance_policy); });
    refused(dit_generate_latents(pipe.get(), nullptr, numbers, 1), DIT_BAD_ARGUMENT, "dit_request is NULL");
    refused(dit_generate_latents(pipe.get(), &request, nullptr, 1), DIT_BAD_ARGUMENT, "latents is NULL");
    refused(dit_generate(pipe.get(), &request, nullptr, 1), DIT_BAD_ARGUMENT, "pixels is NULL");
    refused(dit_generate(pipe.get(), &request, pixels, sizeof pixels - 1), DIT_BUFFER_TOO_SMALL, "expected 6144");
    refused(dit_generate_latents(pipe.get(), &request, numbers, 63), DIT_BUFFER_TOO_SMALL, "expected 64");
    request.count = SIZE_MAX;
    refused(generate(), DIT_BAD_ARGUMENT, "no memory holds that many");
    refused(dit_get_info(pipe.get(), nullptr), DIT_BAD_ARGUMENT, "dit_info is NULL");
    dit_info info = DIT_INFO_INIT;
    info.struct_size += 1;
    refused(dit_get_info(pipe.get(), &info), DIT_BAD_ARGUMENT, "newer libdit");
    refused(dit_find_label(pipe.get(), nullptr, wrong), DIT_BAD_ARGUMENT, "name is NULL");
    refused(dit_find_label(pipe.get(), "ant", nullptr), DIT_BAD_ARGUMENT, "label is NULL");
    refused(dit_open(pipe.get(), BUNDLE, nullptr), DIT_BAD_ARGUMENT, "has a bundle already");
}

TEST_P(Api, BadOptions) {
    const auto bad = [this](const char* words, const std::function<void(dit_open_options&)>& change,
                            dit_status status = DIT_BAD_ARGUMENT) {
        dit_open_options own = DIT_OPEN_OPTIONS_INIT;
        own.backend = GetParam();
        change(own);
        const Handle fresh(dit_new());
        EXPECT_EQ(dit_open(fresh.get(), BUNDLE, &own), status) << words;
        EXPECT_NE(std::string(dit_message(fresh.get())).find(words), std::string::npos) << dit_message(fresh.get());
        own = DIT_OPEN_OPTIONS_INIT;
        EXPECT_EQ(dit_open(fresh.get(), BUNDLE, &own), DIT_OK) << dit_message(fresh.get());  // a second try
    };
    const int64_t none = 0, many = 99, one = 1;
    const auto warm = [](const int64_t* batches) {
        return [batches](dit_open_options& own) { own.warm = batches, own.num_warm = 1; };
    };
    bad("backend 'onyx' is not in this library", [](auto& own) { own.backend = "onyx"; }, DIT_NO_BACKEND);
    bad("device 'nowhere'", [](auto& own) { own.device = "nowhere"; }, DIT_NO_DEVICE);
    bad("threads is -1", [](auto& own) { own.threads = -1; });
    bad("struct_size is 4", [](auto& own) { own.struct_size = 4; });
    bad("newer libdit", [](auto& own) { own.struct_size += 16; });
    bad("warm has 0; expected batch sizes from 1 to 3", warm(&none));
    bad("warm has 99", warm(&many));
    bad("warm is NULL", warm(nullptr));
    bad("both warm and low_memory", [&](auto& own) { warm (&one)(own), own.low_memory = 1; });
    bad("settings is NULL", [](auto& own) { own.num_settings = 1; });
}

// Each kind of damage on the whole way: a status and a sentence, nothing opened, and a sound bundle opens after it.
TEST_P(Api, BadBundles) {
    using Json = nlohmann::json;
    const auto seal = [](const BundleCopy& copy) {
        copy.edit([&](Json& table) {
            for (auto& entry : table["files"].items()) {
                const auto path = copy.folder / entry.key();
                entry.value() = {{"size", std::filesystem::file_size(path)}, {"sha256", dit_runtime::sha256(path)}};
            }
        });
    };
    const auto bad = [&](const char* words, const std::function<void(const BundleCopy&)>& damage) {
        const BundleCopy copy;
        damage(copy);
        const Handle fresh(dit_new());
        EXPECT_EQ(dit_open(fresh.get(), copy.folder.c_str(), &options), DIT_BAD_BUNDLE) << words;
        EXPECT_NE(std::string(dit_message(fresh.get())).find(words), std::string::npos) << dit_message(fresh.get());
        dit_info info = DIT_INFO_INIT;
        EXPECT_EQ(dit_get_info(fresh.get(), &info), DIT_BAD_ARGUMENT);
        EXPECT_EQ(dit_open(fresh.get(), BUNDLE, &options), DIT_OK) << dit_message(fresh.get());
    };
    bad("no manifest.json", [](const BundleCopy& copy) { std::filesystem::remove(copy.folder / "manifest.json"); });
    bad("not JSON", [](const BundleCopy& copy) { copy.write("manifest.json", "{"); });
    bad("model: got a list, expected a table", [](const BundleCopy& copy) {  // deeper than any stack
        const std::size_t depth = 1000000;
        copy.write("manifest.json",
                   "{\"format\": 2, \"model\": " + std::string(depth, '[') + std::string(depth, ']') + "}");
    });
    bad("sha256", [](const BundleCopy& copy) {
        std::string content = copy.bytes("decoder.onnx");
        content[content.size() - 1] ^= 1;
        copy.write("decoder.onnx", content);
    });
    bad("not an ONNX graph", [&](const BundleCopy& copy) {
        copy.write("denoiser.onnx", "not a graph\nat all");
        seal(copy);
    });
    bad("conditioner has inputs", [](const BundleCopy& copy) {
        copy.edit([](Json& table) { stage(table, "conditioner")["onnx"] = "denoiser.onnx"; });
    });
    bad("leaves the bundle", [](const BundleCopy& copy) {
        copy.edit([](Json& table) {
            stage(table, "denoiser")["onnx"] = "../d.onnx";
            for (const char* name : {"../d.onnx", "../d.onnx.data"})
                table["files"][name] = {{"size", 1}, {"sha256", ""}};
        });
    });
    const auto location = [](const BundleCopy& copy, const std::string& name) {
        // The graph names its weights by a path of the same length that leads out of the folder.
        std::filesystem::copy_file(copy.folder / "denoiser.onnx.data", copy.folder.parent_path() / name,
                                   std::filesystem::copy_options::overwrite_existing);
        std::string content = copy.bytes("denoiser.onnx");
        const std::string own = "denoiser.onnx.data", other = "../" + name;
        for (std::size_t at = 0; (at = content.find(own, at)) != std::string::npos;)
            content.replace(at, own.size(), other);
        copy.write("denoiser.onnx", content);
    };
    bad("which is no file of its stage", [&](const BundleCopy& copy) {
        location(copy, "dit-outside.dat");  // with "../", as long as denoiser.onnx.data
        seal(copy);
    });
    std::filesystem::remove(std::filesystem::temp_directory_path() / "dit-outside.dat");
}

// Engines and manifests that disagree in shapes are caught before a number is read: by OpenVINO, which compiles the
// denoiser for the manifest's shapes, when the bundle is opened.
TEST_P(Api, ShapesThatDisagree) {
    const BundleCopy copy;
    copy.edit([](nlohmann::json& table) {
        stage(table, "conditioner")["gives"][0]["shape"] = {"rows", 2, 9};
        stage(table, "denoiser")["reads"][1]["shape"] = {"groups", "batch", 2, 9};
    });
    const Handle fresh(dit_new());
    if (GetParam() == std::string("openvino")) {
        ASSERT_EQ(dit_open(fresh.get(), copy.folder.c_str(), &options), DIT_BAD_BUNDLE);
        const std::string message = dit_message(fresh.get());
        EXPECT_NE(message.find("denoiser.onnx: OpenVINO does not compile it: "), std::string::npos) << message;
        return;
    }
    ASSERT_EQ(dit_open(fresh.get(), copy.folder.c_str(), &options), DIT_OK) << dit_message(fresh.get());
    EXPECT_EQ(dit_generate_latents(fresh.get(), &request, numbers, std::size(numbers)), DIT_ENGINE_FAILED);
    EXPECT_NE(std::string(dit_message(fresh.get())).find("expected [3, 2, 9]"), std::string::npos)
        << dit_message(fresh.get());
}

// A reference that is damaged, or of another bundle: a status and a sentence, and the pipeline draws on.
TEST_P(Api, BadReferences) {
    using Json = nlohmann::json;
    const auto bad = [this](const char* words, const std::function<void(const BundleCopy&)>& damage, bool seal = true) {
        const BundleCopy copy;
        damage(copy);
        const auto path = copy.folder / "reference.npz";
        if (seal)
            copy.edit([&](Json& table) {
                table["files"]["reference.npz"] = {{"size", std::filesystem::file_size(path)},
                                                   {"sha256", dit_runtime::sha256(path)}};
            });
        pipe.reset(dit_new());
        ASSERT_EQ(dit_open(pipe.get(), copy.folder.c_str(), &options), DIT_OK) << dit_message(pipe.get());
        refused(dit_verify(pipe.get(), nullptr, nullptr), DIT_BAD_BUNDLE, words);
    };
    const auto replace = [](const BundleCopy& copy, const std::string& from, const std::string& to) {
        std::string content = copy.bytes("reference.npz");
        for (std::size_t at = 0; (at = content.find(from, at)) != std::string::npos;)
            content.replace(at, from.size(), to);
        seal_npz(content);
        copy.write("reference.npz", content);
    };
    bad("sha256", [&](const BundleCopy& copy) { replace(copy, "variance", "varianse"); }, false);
    bad("it lacks variance", [&](const BundleCopy& copy) { replace(copy, "variance", "varianse"); });
    bad("cannot be read", [&](const BundleCopy& copy) { replace(copy, "'<i8'", "'|O8'"); });
    for (const std::string content : {"", "PK\x03\x04", "hello"})
        bad("reference.npz cannot be read", [&](const BundleCopy& copy) { copy.write("reference.npz", content); });
    bad("it lacks condition.labels",
        [&](const BundleCopy& copy) { replace(copy, "condition.labels", "condition.babels"); });
    bad("it has bytes after its 80 of numbers", [&](const BundleCopy& copy) { replace(copy, "(6, 4)", "(5, 4)"); });
    bad("fingerprint has shape [4, 6], expected [6, 4]",
        [&](const BundleCopy& copy) { replace(copy, "(6, 4)", "(4, 6)"); });
    bad("the decoder is gone", [](const BundleCopy& copy) {
        copy.edit([](Json& table) { table["stages"].erase(table["stages"].size() - 1); });
    });
}

// One weight that is wrong: every sum is right, so only verification can notice.
TEST_P(Api, AWrongWeightIsNotVerified) {
    const BundleCopy copy;
    std::string content = copy.bytes("conditioner.onnx.data");
    content[4 * 16 * 2 + 3] ^= 0x40;  // of label 2, which the reference's run does not use
    copy.write("conditioner.onnx.data", content);
    copy.edit([&](nlohmann::json& table) {
        table["files"]["conditioner.onnx.data"]["sha256"] = dit_runtime::sha256(copy.folder / "conditioner.onnx.data");
    });
    const Handle fresh(dit_new());
    ASSERT_EQ(dit_open(fresh.get(), copy.folder.c_str(), &options), DIT_OK) << dit_message(fresh.get());
    EXPECT_EQ(dit_verify(fresh.get(), nullptr, nullptr), DIT_NOT_VERIFIED);
    EXPECT_NE(std::string(dit_message(fresh.get())).find("label 2"), std::string::npos) << dit_message(fresh.get());
}

TEST(Nothing, NullsAndEmptyHandles) {
    dit_free(nullptr);
    int64_t label = 0;
    float number = 0;
    const dit_request request = DIT_REQUEST_INIT;
    EXPECT_EQ(dit_open(nullptr, BUNDLE, nullptr), DIT_BAD_ARGUMENT);
    EXPECT_EQ(dit_find_label(nullptr, "ant", &label), DIT_BAD_ARGUMENT);
    EXPECT_EQ(dit_verify(nullptr, nullptr, nullptr), DIT_BAD_ARGUMENT);
    EXPECT_EQ(dit_label(nullptr, 0), nullptr);
    EXPECT_EQ(dit_preset(nullptr, 0), nullptr);
    EXPECT_STRNE(dit_message(nullptr), "");
    const Handle empty(dit_new());
    EXPECT_EQ(dit_generate_latents(empty.get(), &request, &number, 1), DIT_BAD_ARGUMENT);
    EXPECT_NE(std::string(dit_message(empty.get())).find("call dit_open first"), std::string::npos);
    EXPECT_EQ(dit_open(empty.get(), nullptr, nullptr), DIT_BAD_ARGUMENT);
    EXPECT_EQ(dit_open(empty.get(), "/nowhere", nullptr), DIT_BAD_BUNDLE);
    EXPECT_EQ(dit_label(empty.get(), 0), nullptr);
    EXPECT_STREQ(dit_status_name(static_cast<dit_status>(99)), "unknown status");
    EXPECT_EQ(std::string(dit_version()).find("0."), 0u);
}

}  // namespace
