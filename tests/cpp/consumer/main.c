#include <dit/dit.h>
#include <stdio.h>

int main(int count, char** words) {
    static uint8_t pixels[32 * 32 * 3];
    const int64_t label = 1;
    dit_request request = DIT_REQUEST_INIT;
    dit_pipeline* pipe = dit_new();
    int failed = count != 2 || dit_open(pipe, words[1], NULL);
    request.labels = &label;
    request.count = 1;
    request.steps = 2;
    failed = failed || dit_generate(pipe, &request, pixels, sizeof pixels);
    puts(failed ? dit_message(pipe) : "drawn");
    dit_free(pipe);
    return failed;
}
