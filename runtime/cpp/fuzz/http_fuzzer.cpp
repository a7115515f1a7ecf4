// Reads what a client of dit-server sends: a head in HTTP, and the body of a request for images, as JSON and as a form.
// However the bytes come in pieces, the head is the same; a body is read or refused with 400.
#include <cstdlib>

#include "../programs/server/body.hpp"
#include "../programs/server/http.hpp"

extern "C" int LLVMFuzzerTestOneInput(const unsigned char* data, std::size_t size) {
    const std::string_view bytes(reinterpret_cast<const char*>(data), size);
    const http::Head head = http::read_head(bytes);
    if (head.bytes > size || (head.refusal && head.refusal != 400 && head.refusal != 431)) std::abort();
    if (head.bytes) {
        const http::Head again = http::read_head(bytes.substr(0, head.bytes)),
                         before = http::read_head(bytes.substr(0, head.bytes - 1));
        if (again.bytes != head.bytes || again.refusal != head.refusal || again.length != head.length ||
            again.request.path != head.request.path || again.request.headers != head.request.headers)
            std::abort();
        if (before.bytes || before.refusal) std::abort();
    }
    const std::string answer = http::write({200, std::string(bytes), "text/plain"}, head.request.keep_alive);
    if (answer.size() < size) std::abort();
    try {
        const server::Body body = server::parse(std::string(bytes.substr(head.bytes)), server::Limits());
        if (body.n < 1 || body.n > 8 || body.prompt.size() > 4 * 8000 || body.seeds().size() != std::size_t(body.n))
            std::abort();
    } catch (const server::Fault& fault) {
        if (fault.status != 400 || fault.body().empty()) std::abort();
    }
    const std::string type = head.bytes ? head.request.header("content-type") : "multipart/form-data; boundary=x";
    try {
        const server::Body body = server::parse_edit(type, std::string(bytes.substr(head.bytes)), server::Limits());
        if (body.n < 1 || body.n > 8 || !body.files.count("image")) std::abort();
    } catch (const server::Fault& fault) {
        if (fault.status != 400 || fault.body().empty()) std::abort();
    }
    return 0;
}
