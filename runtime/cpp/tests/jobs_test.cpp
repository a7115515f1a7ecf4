// Which jobs of dit-server stay, by number, age and bytes; the twin of two tests in tests/serve/test_jobs.py.
#include <gtest/gtest.h>

#include "jobs.hpp"

namespace server {
namespace {

constexpr std::size_t LARGE = 1 << 30;

int status_of(const std::function<void()>& call) {
    try {
        call();
    } catch (const Fault& fault) {
        return fault.status;
    }
    return 200;
}

bool is_there(Jobs& jobs, const std::string& id) {
    return status_of([&] { jobs.get(id); }) == 200;
}

Json images(std::size_t bytes, std::size_t count) {
    return {{"data", std::vector<Json>(count, Json{{"b64_json", std::string(bytes, 'x')}})}};
}

TEST(Jobs, OnlySoManyAreHeld) {
    double now = 1;
    Jobs jobs([&] { return now; }, 1000, 2, LARGE);
    Job& first = jobs.add();
    const std::string gone = first.id;
    first.drawing = jobs.add().drawing = std::make_shared<Drawing>();
    EXPECT_EQ(status_of([&] { jobs.add(); }), 429);
    jobs.finish(first, "succeeded", images(1, 1));
    EXPECT_EQ(jobs.get(gone).describe()["status"], "succeeded");
    Job& third = jobs.add();
    EXPECT_FALSE(is_there(jobs, gone));
    jobs.finish(third, "failed", Json::object());
    EXPECT_TRUE(is_there(jobs, third.id));
    now += 1001;
    EXPECT_FALSE(is_there(jobs, third.id));
}

// Those that ended first go; the last one stays, whatever it has, and so do those without images.
TEST(Jobs, TheirImagesAreBounded) {
    double now = 1;
    Jobs jobs([&] { return ++now; }, 1000, 256, 100);
    std::vector<Job*> drawn;
    std::vector<std::string> ids;
    for (int job = 0; job < 4; ++job) drawn.push_back(&jobs.add()), ids.push_back(drawn.back()->id);
    Job& failed = jobs.add();
    jobs.finish(failed, "failed", Json{{"error", Json::object()}});
    for (const std::size_t job : {1, 0, 2}) jobs.finish(*drawn[job], "succeeded", images(25, 2));
    EXPECT_FALSE(is_there(jobs, ids[1]));
    for (const std::string& id : {failed.id, ids[0], ids[2]}) EXPECT_TRUE(is_there(jobs, id));
    jobs.finish(*drawn[3], "succeeded", images(101, 1));
    for (const std::string& id : {ids[0], ids[2]}) EXPECT_FALSE(is_there(jobs, id));
    for (const std::string& id : {failed.id, ids[3]}) EXPECT_TRUE(is_there(jobs, id));
}

}  // namespace
}  // namespace server
