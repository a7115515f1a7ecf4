#include "handle.hpp"

#include <new>

#include "ticket.hpp"

dit_model::dit_model(std::unique_ptr<dit_runtime::Pipeline> open)
    : pipe(std::move(open)), backend(pipe->backend(pipe->manifest.step()).name), note(pipe->note()) {}

namespace dit_runtime {

std::string& last_message() noexcept {
    static thread_local std::string message;
    return message;
}

dit_status fail(dit_status status, const char* message) noexcept {
    try {
        last_message() = one_line(message);
    } catch (...) {
        last_message().clear();
    }
    return status;
}

dit_status status_of_failure() noexcept {
    try {
        throw;
    } catch (const NoBackend& error) {
        return fail(DIT_NO_BACKEND, error.what());
    } catch (const NoDevice& error) {
        return fail(DIT_NO_DEVICE, error.what());
    } catch (const BundleError& error) {
        return fail(DIT_BAD_BUNDLE, error.what());
    } catch (const UsageError& error) {
        return fail(DIT_BAD_ARGUMENT, error.what());
    } catch (const TooSmall& error) {
        return fail(DIT_BUFFER_TOO_SMALL, error.what());
    } catch (const NotVerified& error) {
        return fail(DIT_NOT_VERIFIED, error.what());
    } catch (const EngineMemory& error) {
        return fail(DIT_OUT_OF_MEMORY, error.what());
    } catch (const DeviceLost& error) {
        return fail(DIT_DEVICE_LOST, error.what());
    } catch (const EngineError& error) {
        return fail(DIT_ENGINE_FAILED, error.what());
    } catch (const Stopped& error) {
        return fail(DIT_STOPPED, error.what());
    } catch (const Overloaded& error) {
        return fail(DIT_OVERLOADED, error.what());
    } catch (const Late& error) {
        return fail(DIT_LATE, error.what());
    } catch (const Closed& error) {
        return fail(DIT_CLOSED, error.what());
    } catch (const std::bad_alloc&) {
        return fail(DIT_OUT_OF_MEMORY, "out of memory; try fewer pictures at a time, or low_memory");
    } catch (const std::length_error&) {
        return fail(DIT_OUT_OF_MEMORY, "out of memory; try fewer pictures at a time, or low_memory");
    } catch (const std::exception& error) {
        return fail(DIT_INTERNAL, error.what());
    } catch (...) {
        return fail(DIT_INTERNAL, "an exception that is no std::exception");
    }
}

}  // namespace dit_runtime
