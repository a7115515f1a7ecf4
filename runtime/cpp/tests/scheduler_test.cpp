// The scheduler against goldens.json: the same decisions as Python's for the same events.
#include "scheduler.hpp"

#include <gtest/gtest.h>

#include "goldens.hpp"

namespace dit_runtime {
namespace {

using Json = nlohmann::json;

std::shared_ptr<Job> job(const Json& table) {
    const auto made = std::make_shared<Job>();
    made->samples = table["samples"];
    made->left = table["left"];
    made->kind = {table["size"].get<std::string>(), table["groups"].get<std::size_t>()};
    made->places = table["places"];
    made->most = table["most"];
    made->weight = table["weight"];
    made->arrived = table["arrived"];
    if (!table["deadline"].is_null()) made->deadline = table["deadline"].get<double>();
    return made;
}

// Replays a case; returns how many of its outcomes are others than Python's.
std::size_t differences(const Json& golden) {
    Costs costs;
    Scheduler<Job> scheduler(golden["places"], costs);
    std::map<std::shared_ptr<Job>, int> names;
    const auto named = [&](const Scheduler<Job>::Jobs& jobs) {
        std::vector<int> all;
        for (const auto& each : jobs) all.push_back(names.at(each));
        return all;
    };
    const auto differs = [](double value, const Json& expected) {
        return std::abs(value - expected.get<double>()) > 1e-12 * std::max(1.0, std::abs(value));
    };
    std::size_t different = 0;
    for (const Json& event : golden["events"]) {
        if (event.contains("submit")) {
            const auto fresh = job(event["submit"]);
            const double late = scheduler.lateness(*fresh);
            different += differs(scheduler.work(*fresh), event["work"]) + differs(late, event["lateness"]);
            different += (late > 0) != (event["lateness"].get<double>() > 0);
            if (late > 0) continue;
            names[fresh] = event["name"];
            scheduler.push(fresh);
        } else if (event.contains("call")) {
            const auto picked = scheduler.pick();
            different += named(picked) != event["call"].get<std::vector<int>>();
            const auto groups = event["groups"].get<std::size_t>();
            for (const auto& each : picked) {
                each->started = true;
                each->left = std::max(0.0, each->left - each->samples * static_cast<double>(groups));
                each->kind.second = groups;
            }
        } else if (event.contains("cost")) {
            const std::string what = event["cost"];
            costs.update(what, event["seconds"], event["units"]);
            different += differs(costs(what), event["mean"]);
        } else {
            const int gone = event["leave"];
            for (const auto& [each, name] : names)
                if (name == gone) {
                    scheduler.remove(each);
                    names.erase(each);
                    break;
                }
            scheduler.undecoded = event["undecoded"];
            different += named(scheduler.jobs) != event["order"].get<std::vector<int>>();
        }
    }
    return different;
}

TEST(Scheduler, DecidesAsPythonDoes) {
    std::size_t calls = 0, refused = 0;
    for (const Json& golden : goldens()["schedulings"]) {
        EXPECT_EQ(differences(golden), 0u);
        for (const Json& event : golden["events"]) {
            calls += event.contains("call") && event["call"].size() > 1;
            refused += event.contains("submit") && event["lateness"] > 0;
        }
    }
    EXPECT_GT(calls, 10u);
    EXPECT_GT(refused, 10u);
}

TEST(Scheduler, AnotherDecisionIsNoticed) {
    Json golden = goldens()["schedulings"];
    for (Json& event : golden[0]["events"]) {
        if (!event.contains("submit")) continue;
        event["submit"]["arrived"] = event["submit"]["arrived"].get<double>() + 1.0;
        break;
    }
    EXPECT_GT(differences(golden[0]), 0u);
}

}  // namespace
}  // namespace dit_runtime
