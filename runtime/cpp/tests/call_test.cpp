// What cannot be stopped, and a caller that leaves it.
#include "call.hpp"

#include <gtest/gtest.h>

#include <thread>

#include "errors.hpp"

namespace dit_runtime {
namespace {

TEST(Call, WhatIsMadeForNobodyIsDroppedAtOnce) {
    std::promise<void> left;
    std::promise<std::thread::id> dropped;
    const auto make = [gate = left.get_future().share(), &dropped] {
        gate.wait();
        return std::shared_ptr<int>(new int, [&dropped](const int* made) {
            delete made;
            dropped.set_value(std::this_thread::get_id());
        });
    };
    const auto cancellation = std::make_shared<Cancellation>();
    const CallScope scope({cancellation});
    cancellation->cancel();
    EXPECT_THROW(unless_cancelled(make), Stopped);
    left.set_value();
    auto where = dropped.get_future();
    ASSERT_EQ(where.wait_for(std::chrono::seconds(30)), std::future_status::ready);
    EXPECT_NE(where.get(), std::this_thread::get_id());
}

TEST(Call, WhatIsMadeInTimeIsTheCallers) {
    const CallScope scope({std::make_shared<Cancellation>()});
    EXPECT_EQ(*unless_cancelled([] { return std::make_shared<int>(3); }), 3);
    EXPECT_THROW(unless_cancelled([]() -> int { throw EngineError("no"); }), EngineError);
}

}  // namespace
}  // namespace dit_runtime
