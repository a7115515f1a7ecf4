// The backends that are compiled into this library, program or plugin.
#include "engine.hpp"
#include "facts.hpp"

namespace dit_runtime {

const std::vector<Backend>& backends() {
    static const std::vector<Backend> known = {
#ifdef DIT_ONNXRUNTIME
        {"onnxruntime", true, precisions_of("onnxruntime"), ort_version, open_ort},
#endif
#ifdef DIT_OPENVINO
        {"openvino", true, precisions_of("openvino"), ov_version, open_ov, ov_note},
#endif
#ifdef DIT_TENSORRT
        {DIT_TENSORRT, false, precisions_of(DIT_TENSORRT), trt_version, open_trt},
#endif
    };
    return known;
}

std::string missing_backends() { return ""; }

}  // namespace dit_runtime
