// What a service needs of the C ABI: calls that stop, figures, settings, and failures that can be told apart.
#include <atomic>
#include <future>
#include <thread>

#include "api.hpp"
#include "dit/dit.hpp"

namespace {

class Service : public Api {
  protected:
    void open() {
        pipe.reset(dit_new());
        ASSERT_EQ(dit_open(pipe.get(), BUNDLE, &options), DIT_OK) << dit_last_message();
    }
    dit_status status_of_open() {
        pipe.reset(dit_new());
        return dit_open(pipe.get(), BUNDLE, &options);
    }

    struct FreeSwitch {
        void operator()(dit_cancellation* cancellation) const { dit_cancellation_free(cancellation); }
    };
    const std::unique_ptr<dit_cancellation, FreeSwitch> cancellation{dit_cancellation_new()};
};

INSTANTIATE_TEST_SUITE_P(Engines, Service, ::testing::Values("onnxruntime", "openvino"));

TEST_P(Service, AThrownSwitchStopsEveryCall) {
    options.cancellation = request.cancellation = cancellation.get();
    open();
    EXPECT_EQ(generate(), DIT_OK) << dit_last_message();
    dit_run* run = nullptr;
    int more = 0;
    ASSERT_EQ(dit_run_begin(dit_get_model(pipe.get()), &request, &run), DIT_OK);
    EXPECT_EQ(dit_run_step(run, &more), DIT_OK);
    std::thread([this] { dit_cancel(cancellation.get()); }).join();
    EXPECT_EQ(dit_run_step(run, &more), DIT_STOPPED);
    EXPECT_STREQ(dit_last_message(), "stopped after step 1 of 4");
    EXPECT_EQ(dit_run_preview(run, pixels, sizeof pixels), DIT_STOPPED);
    dit_run_free(run);
    EXPECT_EQ(generate(), DIT_STOPPED);
    const int64_t batches[] = {1};
    EXPECT_EQ(dit_model_warm(dit_get_model(pipe.get()), batches, 1, nullptr, cancellation.get()), DIT_STOPPED);
    dit_verify_options verify = DIT_VERIFY_OPTIONS_INIT;
    verify.cancellation = cancellation.get();
    EXPECT_EQ(dit_model_verify(dit_get_model(pipe.get()), &verify), DIT_STOPPED);
    request.cancellation = nullptr;
    EXPECT_EQ(generate(), DIT_OK) << dit_last_message();
    EXPECT_EQ(dit_model_verify(dit_get_model(pipe.get()), nullptr), DIT_OK) << dit_last_message();
    EXPECT_EQ(status_of_open(), DIT_STOPPED);
    options.cancellation = nullptr;
    open();
    EXPECT_EQ(generate(), DIT_OK) << dit_last_message();
}

// Who waits for another run's step leaves the queue, and who is behind goes on.
TEST_P(Service, CancellingThoseWhoWait) {
    std::atomic<bool> thrown{false};  // the switch; who is to be stopped takes no step beyond the 100th before it is
    const auto draw = [&](dit_cancellation* with) {
        dit_request own = request;
        own.steps = 200;
        own.cancellation = with;
        own.user = &thrown;
        if (with)
            own.on_step = [](int step, int, const double*, size_t, void* user) {
                while (step >= 100 && !*static_cast<const std::atomic<bool>*>(user)) std::this_thread::yield();
                return 0;
            };
        std::vector<float> state(2 * NUMBERS);
        return dit_generate_latents(pipe.get(), &own, state.data(), state.size());
    };
    std::vector<std::future<dit_status>> calls;
    for (int index = 0; index < 4; ++index)
        calls.push_back(std::async(std::launch::async, draw, index % 2 ? cancellation.get() : nullptr));
    dit_cancel(cancellation.get());
    thrown = true;
    for (std::size_t index = 0; index < 4; ++index) EXPECT_EQ(calls[index].get(), index % 2 ? DIT_STOPPED : DIT_OK);
}

TEST_P(Service, Progress) {
    struct Reports {
        double last = 0;
        int calls = 0, stop_at = 0;
    } reports;
    const dit_on_progress on_progress = [](double done, void* user) {
        Reports& reports = *static_cast<Reports*>(user);
        EXPECT_GE(done, reports.last);
        EXPECT_LE(done, 1);
        reports.last = done;
        return ++reports.calls == reports.stop_at ? 1 : 0;
    };
    options.on_progress = on_progress;
    options.user = &reports;
    open();
    EXPECT_EQ(reports.last, 1);
    EXPECT_GE(reports.calls, 5);  // files
    reports = {0, 0, 1};
    EXPECT_EQ(status_of_open(), DIT_STOPPED) << dit_last_message();
    reports = {};
    open();
    dit_verify_options verify = DIT_VERIFY_OPTIONS_INIT;
    verify.on_progress = on_progress;
    verify.user = &reports;
    reports = {};
    EXPECT_EQ(dit_model_verify(dit_get_model(pipe.get()), &verify), DIT_OK) << dit_last_message();
    EXPECT_EQ(reports.last, 1);
    EXPECT_GE(reports.calls, 8);
    reports = {0, 0, 3};
    EXPECT_EQ(dit_model_verify(dit_get_model(pipe.get()), &verify), DIT_STOPPED);
    EXPECT_EQ(reports.calls, 3);
}

TEST_P(Service, StatsAndPreviews) {
    request.steps = 3;
    ASSERT_EQ(dit_generate(pipe.get(), &request, pixels, sizeof pixels), DIT_OK);
    const std::vector<uint8_t> whole(pixels, pixels + 2 * PIXELS);
    dit_run* run = nullptr;
    ASSERT_EQ(dit_run_begin(dit_get_model(pipe.get()), &request, &run), DIT_OK);
    dit_stats stats = DIT_STATS_INIT;
    EXPECT_EQ(dit_run_stats(run, &stats), DIT_OK);
    EXPECT_EQ(stats.done, 0);
    EXPECT_EQ(stats.steps, 3);
    EXPECT_EQ(stats.planned_rows, 6);
    EXPECT_EQ(stats.in_steps + stats.decoding + stats.before_loop, 0);
    EXPECT_EQ(dit_run_preview(run, pixels, sizeof pixels), DIT_BAD_ARGUMENT);
    EXPECT_STREQ(dit_last_message(), "there is no preview before the first step; call dit_run_step first");
    std::vector<std::vector<uint8_t>> previews;
    for (int more = 1; more;) {
        ASSERT_EQ(dit_run_step(run, &more), DIT_OK) << dit_last_message();
        ASSERT_EQ(dit_run_preview(run, pixels, sizeof pixels), DIT_OK) << dit_last_message();
        previews.emplace_back(pixels, pixels + 2 * PIXELS);
    }
    EXPECT_NE(previews[0], previews[1]);
    EXPECT_EQ(previews[2], whole);  // the last step of ddim ends at its predicted x0
    EXPECT_EQ(dit_run_preview(run, pixels, sizeof pixels - 1), DIT_BUFFER_TOO_SMALL);
    EXPECT_EQ(dit_run_result(run, pixels, sizeof pixels), DIT_OK);
    EXPECT_EQ(std::vector<uint8_t>(pixels, pixels + 2 * PIXELS), whole);
    EXPECT_EQ(dit_run_stats(run, &stats), DIT_OK);
    EXPECT_EQ(stats.done, 3);
    EXPECT_EQ(stats.rows, 6);
    EXPECT_GT(stats.in_steps, 0);
    EXPECT_GT(stats.before_loop, 0);
    EXPECT_GT(stats.decoding, 0);
    EXPECT_EQ(stats.opening, 0);
    dit_run_free(run);
}

TEST_P(Service, LogLines) {
    static std::atomic<int> lines;
    lines = 0;
    dit_set_log([](dit_severity, const char* line,
                   void*) { lines += std::string(line).find("opened with") != std::string::npos; },
                DIT_LOG_INFO, nullptr);
    open();
    EXPECT_EQ(lines, 3);  // engines
    dit_set_log([](dit_severity, const char*, void*) { ++lines; }, DIT_LOG_ERROR, nullptr);
    open();
    dit_set_log(nullptr, DIT_LOG_DEBUG, nullptr);
    open();
    EXPECT_EQ(lines, 3);
}

// A bundle's names reach callbacks as printable characters alone.
TEST_P(Service, CallbacksGetEscapedStrings) {
    static std::string lines;
    lines.clear();
    const BundleCopy copy(BUNDLE);
    copy.edit([](nlohmann::json& table) {
        for (nlohmann::json& stage : table["stages"])
            stage["name"] = "\x1b[2J\n" + stage["name"].get<std::string>() + std::string(400, 'x');
    });
    dit_set_log([](dit_severity, const char* line, void*) { lines += std::string(line) + "|"; }, DIT_LOG_INFO, nullptr);
    dit_model* model = nullptr;
    ASSERT_EQ(dit_model_open(copy.folder.c_str(), &options, &model), DIT_OK) << dit_last_message();
    dit_set_log(nullptr, DIT_LOG_INFO, nullptr);
    dit_verify_options verify = DIT_VERIFY_OPTIONS_INIT;
    verify.on_check = [](const char* name, double, double, int, int, const char* where, void*) {
        EXPECT_LE(std::string(name).size(), 310u);
        lines += std::string(name) + where + "|";
    };
    EXPECT_EQ(dit_model_verify(model, &verify), DIT_OK) << dit_last_message();
    dit_model_release(model);
    EXPECT_NE(lines.find("\\x1b[2J"), std::string::npos) << lines;
    for (const char letter : lines) EXPECT_GE(static_cast<unsigned char>(letter), 0x20) << lines;
}

// Every stage may have its own device and threads; what is not known is refused before any file is opened.
TEST_P(Service, Settings) {
    const std::vector<float> expected = latents();
    const bool openvino = GetParam() == std::string("openvino");
    std::vector<dit_setting> settings = {{nullptr, "threads", "2"}, {"decoder", "device", openvino ? "CPU" : "cpu"}};
    const auto use = [&] {
        options.settings = settings.data();
        options.num_settings = settings.size();
    };
    use();
    open();
    EXPECT_EQ(latents().size(), expected.size());
    settings.push_back({nullptr, "onnxruntime.session.intra_op.allow_spinning", "0"});
    settings.push_back({"denoiser", "openvino.NUM_STREAMS", "1"});
    use();
    open();
    const auto bad = [&](dit_setting setting, dit_status status, const char* words) {
        settings.back() = setting;
        EXPECT_EQ(status_of_open(), status) << words;
        EXPECT_NE(std::string(dit_last_message()).find(words), std::string::npos) << dit_last_message();
    };
    bad({"denoser", "threads", "1"}, DIT_BAD_ARGUMENT, "no stage 'denoser' (did you mean \"denoiser\"?)");
    bad({nullptr, "thread", "1"}, DIT_BAD_ARGUMENT, "setting 'thread' is not known (did you mean \"threads\"?)");
    bad({nullptr, "nobody.threads", "1"}, DIT_BAD_ARGUMENT, "setting 'nobody.threads' is not known");
    for (const char* key : {"tensorrt.x", "tensorrt-rtx.x"})
        bad({nullptr, key, "1"}, DIT_BAD_ARGUMENT, "has no settings of its own");
    for (const char* value : {"0", "-1", "x", "", "999999"})
        bad({nullptr, "threads", value}, DIT_BAD_ARGUMENT, "1 or more");
    for (const char* value : {"", "1-", "3-1", "a", "1,,2"})
        bad({nullptr, "affinity", value}, DIT_BAD_ARGUMENT, "expected CPUs");
    bad({"decoder", "device", "nowhere"}, DIT_NO_DEVICE, "nowhere");
    bad({"decoder", "backend", "onyx"}, DIT_NO_BACKEND, "onyx");
    bad({nullptr, nullptr, "1"}, DIT_BAD_ARGUMENT, "dit_setting.key is NULL");
    bad({nullptr, "threads", nullptr}, DIT_BAD_ARGUMENT, "dit_setting.value is NULL");
    if (openvino) {
        bad({nullptr, "affinity", "0,1"}, DIT_BAD_ARGUMENT, "affinity is an option of onnxruntime");
        bad({nullptr, "openvino.NO_SUCH_PROPERTY", "1"}, DIT_BAD_BUNDLE, "NO_SUCH_PROPERTY");
    } else {
        bad({nullptr, "onnxruntime.provider.arena", "1"}, DIT_BAD_ARGUMENT, "the CPU's provider takes none");
        bad({nullptr, "affinity", "0"}, DIT_BAD_ARGUMENT, "affinity has 1 CPUs for 2 threads");
        settings.back() = {nullptr, "affinity", "0,1"};
        open();
        EXPECT_EQ(latents().size(), expected.size());
    }
}

TEST_P(Service, ABudgetOfBytes) {
    options.max_bytes = 1000;
    EXPECT_EQ(status_of_open(), DIT_BAD_BUNDLE);
    EXPECT_NE(std::string(dit_last_message()).find("max_bytes allows 1000"), std::string::npos) << dit_last_message();
    options.max_bytes = 1 << 20;
    open();
}

TEST_P(Service, Warm) {
    options.threads = 2;
    open();
    dit_model* const model = dit_get_model(pipe.get());
    const int64_t batches[] = {1, 3, 99};
    EXPECT_EQ(dit_model_warm(model, batches, 2, nullptr, nullptr), DIT_OK) << dit_last_message();
    EXPECT_EQ(dit_model_warm(model, batches, 3, nullptr, nullptr), DIT_BAD_ARGUMENT);
    EXPECT_EQ(dit_model_warm(model, batches, 1, "7", nullptr), DIT_BAD_ARGUMENT);
    EXPECT_EQ(dit_model_warm(model, nullptr, 1, nullptr, nullptr), DIT_BAD_ARGUMENT);
}

TEST(Face, ACancellationIsShared) {
    dit::OpenOptions options;
    double last = 0;
    options.on_progress = [&](double done) { return last = done, false; };
    const dit::Pipeline pipe(BUNDLE, options);
    EXPECT_EQ(last, 1);
    pipe.warm({1});
    dit::Request request;
    request.labels = {1};
    dit::Run run = pipe.run(request);
    run.step();
    EXPECT_EQ(run.preview().pixels.size(), PIXELS);
    EXPECT_EQ(run.stats().done, 1);
    dit::Cancellation copy = request.cancellation;
    copy.cancel();
    EXPECT_THROW(run.step(), dit::Error);
    EXPECT_THROW(pipe.verify({}, copy), dit::Error);
    options.on_progress = [](double) -> bool { throw std::out_of_range("mine"); };
    EXPECT_THROW(dit::Pipeline(BUNDLE, options), std::out_of_range);
}

}  // namespace
