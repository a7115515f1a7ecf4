/* Draws one picture of a class into a PPM file: example-c BUNDLE LABEL FILE.ppm */
#include <dit/dit.h>
#include <stdio.h>
#include <stdlib.h>

static int show(int step, int steps, const double* latents, size_t size, void* user) {
    (void)latents, (void)size, (void)user;
    fprintf(stderr, "\rstep %d of %d", step, steps);
    return 0; /* anything else stops the run */
}

int main(int count, char** words) {
    if (count != 4) return fprintf(stderr, "usage: %s BUNDLE LABEL FILE.ppm\n", words[0]), 2;
    dit_model* model = NULL;
    dit_info info = DIT_INFO_INIT;
    dit_request request = DIT_REQUEST_INIT;
    uint8_t* pixels = NULL;
    int64_t label = 0;
    size_t size = 0;
    int failed = dit_model_open(words[1], NULL, &model) || dit_model_info(model, &info) ||
                 dit_model_find_label(model, words[2], &label);
    if (!failed) {
        size = (size_t)(info.image_shape[0] * info.image_shape[1] * 3);
        pixels = malloc(size ? size : 1);
        request.labels = &label;
        request.count = 1;
        request.on_step = show;
        failed = dit_model_generate(model, &request, pixels, size);
    }
    if (failed) {
        fprintf(stderr, "%s\n", dit_last_message());
    } else {
        FILE* file = fopen(words[3], "wb");
        failed = !file || fprintf(file, "P6 %d %d 255\n", (int)info.image_shape[1], (int)info.image_shape[0]) < 0 ||
                 fwrite(pixels, 1, size, file) != size;
        if (file && fclose(file)) failed = 1;
        fprintf(stderr, failed ? "\n%s cannot be written\n" : "\n%s\n", words[3]);
    }
    free(pixels);
    dit_model_release(model);
    return failed ? 1 : 0;
}
