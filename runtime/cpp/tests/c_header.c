/* dit.h and batcher.h as C11 sees them. */
#include <dit/batcher.h>
#include <dit/dit.h>

int main(void) {
    dit_open_options options = DIT_OPEN_OPTIONS_INIT;
    dit_request request = DIT_REQUEST_INIT;
    dit_info info = DIT_INFO_INIT;
    dit_pipeline* pipe = dit_new();
    const int refused = dit_open(pipe, "/nowhere", &options) == DIT_BAD_BUNDLE &&
                        dit_get_info(pipe, &info) == DIT_BAD_ARGUMENT && request.count == 0;
    dit_batcher_options batching = DIT_BATCHER_OPTIONS_INIT;
    dit_batcher* batcher = NULL;
    dit_free(pipe);
    return refused && dit_batcher_new(NULL, &batching, &batcher) == DIT_BAD_ARGUMENT && !batcher ? 0 : 1;
}
