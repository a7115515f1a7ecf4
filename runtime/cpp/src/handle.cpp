#include "handle.hpp"

#include <new>

#include "errors.hpp"

namespace dit_runtime {
namespace {

// Without memory for the sentence, the status alone says what happened.
dit_status failed(dit_pipeline& pipe, dit_status status, const char* message) noexcept {
    try {
        pipe.message = one_line(message);
    } catch (...) {
        pipe.message.clear();
    }
    return status;
}

}  // namespace

dit_status status_of_failure(dit_pipeline& pipe) noexcept {
    try {
        throw;
    } catch (const BundleError& error) {
        return failed(pipe, DIT_BAD_BUNDLE, error.what());
    } catch (const UsageError& error) {
        return failed(pipe, DIT_BAD_ARGUMENT, error.what());
    } catch (const TooSmall& error) {
        return failed(pipe, DIT_BUFFER_TOO_SMALL, error.what());
    } catch (const NotVerified& error) {
        return failed(pipe, DIT_NOT_VERIFIED, error.what());
    } catch (const EngineError& error) {
        return failed(pipe, DIT_ENGINE_FAILED, error.what());
    } catch (const Stopped& error) {
        return failed(pipe, DIT_STOPPED, error.what());
    } catch (const std::bad_alloc&) {
        return failed(pipe, DIT_OUT_OF_MEMORY, "out of memory; try fewer pictures at a time, or low_memory");
    } catch (const std::length_error&) {
        return failed(pipe, DIT_OUT_OF_MEMORY, "out of memory; try fewer pictures at a time, or low_memory");
    } catch (const std::exception& error) {
        return failed(pipe, DIT_INTERNAL, error.what());
    } catch (...) {
        return failed(pipe, DIT_INTERNAL, "an exception that is no std::exception");
    }
}

Pipeline& opened(dit_pipeline* pipe) {
    if (!pipe->open) throw UsageError("no bundle is open in this pipeline; call dit_open first");
    return *pipe->open;
}

}  // namespace dit_runtime
