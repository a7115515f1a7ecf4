/* What is drawn. Included by dit.h. */
#ifndef DIT_REQUEST_H
#define DIT_REQUEST_H

/* Called after each step, on the thread that makes the call; solver heun has two for each of the request's. Return 0 to
 * go on; any other number stops the run after this step: DIT_STOPPED. `latents` holds the numbers of state_shape for
 * each picture, until the callback returns. It must not throw, and must not call the run or pipeline that calls it. */
typedef int (*dit_on_step)(int step, int steps, const double* latents, size_t size, void* user);

/* Rows for one port, or token ids or their mask for a dit_prompt. A port that another one masks takes shorter rows too;
 * a mask of a port that is not there is 1 for each of their tokens. */
typedef struct dit_array {
    size_t struct_size;
    const char* name;        /* of the port, or of dit_prompt */
    size_t rows;             /* one a picture; of a negative one for all, or one each */
    size_t size;             /* numbers in all, a multiple of rows */
    const float* floats;     /* size numbers; or NULL, and */
    const int64_t* integers; /* size numbers, which fit a port of floats too */
} dit_array;

#define DIT_ARRAY_INIT {sizeof(dit_array), NULL, 0, 0, NULL, NULL}

/* Prompt embeddings: the ports "captions" and "mask" of a bundle that has them. */
typedef struct dit_captions {
    size_t struct_size;
    size_t count;            /* of texts */
    size_t tokens;           /* of each, up to dit_info.caption_shape[0]; shorter ones have a mask */
    const float* embeddings; /* count · tokens · caption_shape[1] numbers */
    const float* mask;       /* count · tokens: 1 where a text has a token, else 0; NULL: all are tokens */
    size_t size;             /* numbers in embeddings */
    size_t mask_size;        /* numbers in mask; 0 without one */
} dit_captions;

#define DIT_CAPTIONS_INIT {sizeof(dit_captions), 0, 0, NULL, NULL, 0, 0}

/* A number of a dit_request that has its default. */
#define DIT_DEFAULT INT32_MIN

typedef struct dit_request {
    size_t struct_size;
    const int64_t* labels;
    size_t count;          /* of labels, and so of pictures; 0 where arrays or captions say how many; the number of
                              pictures where nothing conditions the network */
    const uint64_t* seeds; /* NULL: 0 */
    size_t num_seeds;      /* 1: one stream of noise for all, as PyTorch draws; count: one each, so that a picture does
                              not depend on its neighbours */
    const float* guidance; /* weights; where all are 1, no step is guided, at half the rows, unless guidance_port
                              takes them; NULL: the bundle's */
    size_t num_guidance;   /* 1, or count */
    int steps;             /* 0: the bundle's */
    const char* solver;    /* ddpm, ddim, dpm++1, dpm++, dpm++3, sde-dpm++1, sde-dpm++, unipc1, unipc, unipc3, deis,
                              deis3; of a model that predicts a velocity dpm++1, dpm++, dpm++3, euler, heun, sde, scm,
                              sde-dpm++1, sde-dpm++, unipc1, unipc, unipc3, deis, deis3; NULL: the bundle's */
    const char* spacing;   /* stride, respaced, leading, trailing, linspace, karras, exponential, beta; of a velocity
                              trailing, linspace, discrete, integer, karras, exponential, beta; or the times themselves,
                              "999, 640, 300": training steps, or σ of a velocity; NULL: the bundle's */
    double eta;            /* noise of ddim, 0 to 1 */
    const float* latents;  /* for each picture the numbers of state_shape to start from; NULL: the seeds' noise */
    dit_on_step on_step;   /* NULL: none */
    void* user;            /* for on_step */
    const dit_captions* captions; /* instead of labels; count is then 0 or theirs */
    const dit_captions* negative; /* of an empty text, which guidance leads away from: one, or one a caption */
    const dit_array* arrays;      /* conditions by port or by token ids, beside labels or captions or alone */
    size_t num_arrays;
    const dit_array* negative_arrays; /* what guidance leads away from, where a port has no constant for that */
    size_t num_negative_arrays;
    size_t latents_size;         /* numbers in latents; 0 without them */
    double guidance_interval[2]; /* steps are guided between these fractions of the time: of t over train_steps, of a
                                    model that predicts a velocity of σ; both ends count. {0, 1}: all steps, or the
                                    preset's */
    const char* guidance_policy; /* constant, rescale, zero_star, apg, as "NAME" or "NAME KEY=VALUE …"; NULL: constant,
                                    the network's own guidance */
    const char* cache;  /* of outputs: taylorseer, easycache, which decides for all pictures of a request at once;
                           NULL: none */
    int cache_interval; /* taylorseer evaluates each step of so many */
    int max_order;      /* of taylorseer, 0 to 2 */
    int disable_cache_before_step;  /* earlier steps are evaluated */
    int disable_cache_after_step;   /* this step and later ones are evaluated; below 0: from the end */
    double cache_threshold;         /* the error that easycache lets grow; below 0: its default */
    const char* preset;             /* of the bundle (dit_preset): values for the fields above that have their _INIT
                                       values; NULL: none */
    const char* size;               /* one of the bundle's, as dit_size names it; its shapes are then those of the
                                       buffers and of latents; NULL: the pipeline's */
    dit_cancellation* cancellation; /* stops the run; NULL: dit_run_cancel alone does */
    const uint8_t* image; /* to start from, or for the port that reads a picture: RGB, rows from the top, in the size of
                             the pictures that the bundle draws (the caller resizes); one for all pictures, or one
                             each; NULL: none. It needs a bundle with an encoder */
    size_t image_size;    /* bytes in image: num_images · image_height · image_width · 3 */
    size_t num_images;    /* 1, or count */
    size_t image_height;
    size_t image_width;
    double strength;     /* the share of the steps that change the image, above 0 and up to 1; DIT_DEFAULT: 0.6 */
    const uint8_t* mask; /* a byte a place of the image, for all pictures or for each: white, 128 or more, is drawn
                            anew, black stays as in the image; NULL: all is drawn anew */
    size_t mask_size;    /* bytes in mask: image_height · image_width, for all or count times; 0 without one */
} dit_request;

#define DIT_REQUEST_INIT  \
    {sizeof(dit_request), \
     NULL,                \
     0,                   \
     NULL,                \
     0,                   \
     NULL,                \
     0,                   \
     0,                   \
     NULL,                \
     NULL,                \
     0.0,                 \
     NULL,                \
     NULL,                \
     NULL,                \
     NULL,                \
     NULL,                \
     NULL,                \
     0,                   \
     NULL,                \
     0,                   \
     0,                   \
     {0.0, 1.0},          \
     NULL,                \
     NULL,                \
     DIT_DEFAULT,         \
     DIT_DEFAULT,         \
     DIT_DEFAULT,         \
     DIT_DEFAULT,         \
     -1.0,                \
     NULL,                \
     NULL,                \
     NULL,                \
     NULL,                \
     0,                   \
     0,                   \
     0,                   \
     0,                   \
     DIT_DEFAULT,         \
     NULL,                \
     0}

#endif /* DIT_REQUEST_H */
